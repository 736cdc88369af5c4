"""Scaling efficiency over ranks of one host: tokens a second on N ranks over N times those of one plain process.

    python benchmarks/distributed.py                              # 1 and 2 ranks, GPUs through NCCL where there are any
    python benchmarks/distributed.py --toy --device cpu           # a model of milliseconds, through Gloo

Each rank has the same work in every run (weak scaling): data parallelism adds sequences, context parallelism lengthens
them. Runs alternate, and each figure is the median over all steps but the first two of every run. Appends a row for
each kind and number of ranks to `benchmarks/results/distributed.jsonl`. These are steps of the whole trainer;
`parallel_scaling.py` times the engine alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from resnet_bk import LanguageModel, ModelConfig, Trainer, TrainingConfig
from resnet_bk.data.loader import TokenLoader
from resnet_bk.data.shards import TokenDataset
from resnet_bk.evaluation.ledger import append_row
from resnet_bk.training.config import DistributedConfig
from resnet_bk.training.device import resolve_device

KINDS = ("ddp", "zero2", "zero3", "context")
TOY = ModelConfig(vocab_size=512, d_model=64, num_layers=2, feed_forward_dim=128, head_dim=16, state_size=16)


def main() -> None:
    arguments = parse()
    if arguments.worker:
        work(arguments, arguments.worker)
        return
    start = time.perf_counter()
    counts, kinds = map(int, arguments.ranks.split(",")), arguments.kinds.split(",")
    alone = ("ddp", 1)  # on one rank, DDP is the model itself
    speeds: dict[tuple[str, int], list[float]] = {alone: []}
    speeds |= {(kind, count): [] for count in counts for kind in kinds}
    failures: dict[tuple[str, int], str] = {}
    for _ in range(arguments.rounds):
        for kind, count in speeds:
            if (kind, count) not in failures:
                outcome = launch(kind, count)
                if isinstance(outcome, str):
                    failures[kind, count] = outcome
                else:
                    speeds[kind, count] += outcome
    device = resolve_device(arguments.device)
    model = model_config(arguments)
    with torch.device("meta"):
        counted = LanguageModel(model)
    for kind, count in speeds:
        metrics: dict[str, Any] = {
            "kind": kind,
            "ranks": count,
            "backend": "nccl" if device.type == "cuda" else "gloo",
            "sequence_length_tokens": arguments.sequence_length * (count if kind == "context" else 1),
            "batch_sequences": arguments.batch_size * (1 if kind == "context" else count),
        }
        if (kind, count) in failures or alone in failures:
            metrics["failure"] = failures.get((kind, count), "the run on one rank failed")
        else:
            one, many = (statistics.median(speeds[run]) for run in (alone, (kind, count)))
            metrics |= {"tokens_per_second": many, "scaling_efficiency": many / (count * one)}
            metrics |= {
                "slowest_tokens_per_second": min(speeds[kind, count]),
                "fastest_tokens_per_second": max(speeds[kind, count]),
            }
        print(metrics, flush=True)
        if not arguments.no_row:
            append_row(
                "distributed",
                command=shlex.join(["python", "benchmarks/distributed.py", *options_of_record()]),
                config={"model": model.to_dict(), **vars(arguments)},
                seeds=[0],
                metrics=metrics,
                wall_seconds=time.perf_counter() - start,
                model=counted,
                tokens=metrics["sequence_length_tokens"] * metrics["batch_sequences"] * arguments.steps,
                device=device,
                benchmarks=arguments.benchmarks,
                commit=arguments.commit,
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Scaling efficiency over the ranks of one host.")
    parser.add_argument("--ranks", default="2", help="numbers of ranks beside one, separated by commas")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"what is measured, of {', '.join(KINDS)}")
    parser.add_argument("--preset", default="base")
    parser.add_argument("--toy", action="store_true", help="a small model instead of a preset, for a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--sequence-length", type=int, default=4096, help="tokens a rank and sequence")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a rank")
    parser.add_argument("--steps", type=int, default=12, help="steps a run; the first two are not counted")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind and number of ranks")
    parser.add_argument("--benchmarks", default="benchmarks", help="folder that holds results/")
    parser.add_argument("--commit", help="of the code, where there is no checkout")
    parser.add_argument("--no-row", action="store_true", help="print only, append nothing to the ledger")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    return parser.parse_args()


def options_of_record() -> list[str]:
    """The options given, without those that only say where the row goes."""
    kept, skip = [], False
    for option in sys.argv[1:]:
        aside = option in ("--benchmarks", "--commit")
        if not (aside or skip):
            kept.append(option)
        skip = aside
    return kept


def model_config(arguments: argparse.Namespace) -> ModelConfig:
    return TOY if arguments.toy else ModelConfig.preset(arguments.preset)


def launch(kind: str, ranks: int) -> list[float] | str:
    """Tokens a second of every counted step of one run, or the last line of what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
            __file__, *sys.argv[1:], "--worker", kind, "--output", folder,
        ]  # fmt: skip
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            errors = [line for line in finished.stderr.splitlines() if "Error" in line and "ChildFailed" not in line]
            return (errors or [f"exit status {finished.returncode}"])[0][:200]
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [row["tokens_per_second"] for row in map(json.loads, lines) if row["kind"] == "train"][2:]


def work(arguments: argparse.Namespace, kind: str) -> None:
    """One rank of one run."""
    ranks = int(os.environ["WORLD_SIZE"])
    longer, wider = (ranks, 1) if kind == "context" else (1, ranks)
    training = TrainingConfig(
        output_dir=arguments.output, steps=arguments.steps, sequence_length=arguments.sequence_length * longer,
        batch_size=arguments.batch_size * wider, device=arguments.device, precision=arguments.precision, log_every=1,
        tensorboard=False,
    )  # fmt: skip
    distributed = DistributedConfig(
        strategy="fsdp" if kind.startswith("zero") else "ddp",
        reshard_after_forward=kind != "zero2",
        context_parallel=ranks if kind == "context" else 1,
    )
    config = model_config(arguments)
    with torch.device("meta"):
        model = LanguageModel(config)
    length = 4 * training.batch_size * training.sequence_length
    tokens = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).numpy()
    loader = TokenLoader(TokenDataset.from_ids("random", tokens), training.sequence_length, training.batch_size)
    trainer = Trainer(model, loader, training, distributed=distributed, progress=False)
    # The checkpoint at the end is no part of the measurement, and large.
    trainer.save_checkpoint = lambda *_arguments, **_options: Path(arguments.output)  # type: ignore[method-assign]
    trainer.train()


if __name__ == "__main__":
    main()
