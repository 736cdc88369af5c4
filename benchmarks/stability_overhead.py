"""What watching a run costs: the share of a training run's time that the stability callbacks take.

    python benchmarks/stability_overhead.py                      # the tiny preset, 2,048 tokens a step

Every hook of `StabilityMonitor` (rows every 100 steps, media of a probe of 128 tokens) and `AutoRecovery` (a snapshot
every 50 steps) is timed inside the run that it watches: processor time on a CPU, where other processes then count
little, and wall time after synchronisation on a GPU. Appends one row to `benchmarks/results/stability-overhead.jsonl`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from typing import Any

import torch

from resnet_bk import LanguageModel, ModelConfig, Trainer, TrainingConfig
from resnet_bk.data.loader import TokenLoader
from resnet_bk.data.shards import TokenDataset
from resnet_bk.evaluation.ledger import append_row
from resnet_bk.training.stability.config import StabilityConfig
from resnet_bk.training.stability.monitor import StabilityMonitor
from resnet_bk.training.stability.recovery import AutoRecovery


class TimedTrainer(Trainer):
    """Counts the seconds inside each kind of callback."""

    seconds: dict[str, float]

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            began = self.now()
            getattr(callback, hook)(self, *arguments)
            self.seconds[type(callback).__name__] += self.now() - began

    def now(self) -> float:
        """Seconds, of this process alone where nothing runs on a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()


def main() -> None:
    """Train, and append the row."""
    parser = argparse.ArgumentParser(description="Share of a training run that the stability callbacks take.")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-row", action="store_true", help="print only, append nothing to the ledger")
    options = parser.parse_args()
    started = time.perf_counter()
    config = ModelConfig.preset(options.preset)
    torch.manual_seed(0)
    tokens = TokenDataset.from_ids("train", torch.randint(config.vocab_size, (1 << 20,)).tolist())
    stability = StabilityConfig(recovery=True)
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingConfig(
            output_dir=folder, steps=options.steps, sequence_length=options.sequence_length,
            batch_size=options.batch_size, device=options.device, tensorboard=False, checkpoint_every=0,
        )  # fmt: skip
        loader = TokenLoader(tokens, options.sequence_length, options.batch_size)
        probe = torch.arange(stability.probe_tokens)[None]
        watch = [StabilityMonitor(stability, probe), AutoRecovery(snapshot_every=stability.snapshot_every)]
        model = LanguageModel(config)
        trainer = TimedTrainer(model, loader, training, callbacks=watch, progress=False)
        trainer.seconds = defaultdict(float)
        began = trainer.now()
        trainer.train()
        total = trainer.now() - began
    spent = {callback: trainer.seconds[type(callback).__name__] for callback in watch}
    metrics = {
        "preset": options.preset,
        "tokens_per_step": options.sequence_length * options.batch_size,
        "steps": options.steps,
        "clock": "wall" if trainer.device.type == "cuda" else "processor",
        "run_seconds": total,
        "monitor_percent": 100 * spent[watch[0]] / (total - sum(spent.values())),
        "recovery_percent": 100 * spent[watch[1]] / (total - sum(spent.values())),
    }
    print(metrics)
    if not options.no_row:
        append_row(
            "stability-overhead",
            command=f"python benchmarks/stability_overhead.py --preset {options.preset} --sequence-length "
            f"{options.sequence_length} --batch-size {options.batch_size} --steps {options.steps}",
            config=config,
            seeds=[0],
            metrics=metrics,
            wall_seconds=time.perf_counter() - started,
            model=model,
            tokens=options.steps * options.sequence_length * options.batch_size,
        )


if __name__ == "__main__":
    main()
