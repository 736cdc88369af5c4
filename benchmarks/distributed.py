"""Scaling efficiency of the whole trainer over the GPUs of one host: tokens a second on N ranks over N times one's.

    torchrun --standalone --nproc-per-node 2 -- benchmarks/distributed.py         # about two minutes on two H200
    torchrun --standalone --nproc-per-node 2 -- benchmarks/distributed.py --toy   # the script itself, tiny, on a CPU

One launch measures everything: rank 0 trains alone, before the ranks know of each other and again after they have
parted, so that a drift of the machine is seen; between lie the arms of many ranks. `ddp`, `zero2` and `zero3` have as
many sequences of 2,048 tokens a rank as one rank alone; `context` has one sequence, N times as long as that of one rank
alone, and `context, split` the same sequence. The last trains on the very batches of one rank alone, and its row has
the relative errors of the first step's loss and gradient norm.

Rows go to `results/distributed.jsonl` as soon as they are known; the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from gpu_timing import Rows, add_options, failures, release_memory, settle, summary
from timed_trainer import WARM_UP, BareTrainer, Steps, peak_gigabytes

from resnet_bk import LanguageModel, ModelConfig, TrainingConfig
from resnet_bk.data.loader import TokenLoader
from resnet_bk.data.shards import TokenDataset
from resnet_bk.training.config import DistributedConfig, MemoryConfig
from resnet_bk.training.ranks import join_ranks

DATA, CONTEXT, SPLIT = ("ddp", "zero2", "zero3"), "context", "context, split"
ARMS = (*DATA, CONTEXT, SPLIT)
TOY_MODEL = dict(d_model=32, num_layers=2, feed_forward_dim=48, head_dim=16, state_size=16, vocab_size=64)
COLUMNS = {"part": 8, "arm": 21, "batch": 5, "length_tokens": 13, "tokens_per_second": 17, "scaling_efficiency": 18}
COLUMNS |= {"over_before": 11, "spread": 9, "peak_gigabytes": 14, "loss_relative_error": 19}
COLUMNS |= {"norm_relative_error": 19, "outcome": 7}


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    preset: str = "base"
    rows: int = 64
    """Sequences a rank of the data-parallel arms."""
    length: int = 2048
    long: int = 131072
    """Tokens a rank of one sequence in the context-parallel arms."""
    steps: int = 8
    segment_tokens: int = 65536


TOY = Plan(preset="toy", rows=2, length=64, long=256, steps=4, segment_tokens=128)


class Bench:
    """The arms, with what they share."""

    def __init__(self, plan: Plan, rows: Rows, device: torch.device, size: int, deadline: float) -> None:
        self.plan, self.rows, self.device, self.size, self.deadline = plan, rows, device, size, deadline
        toy = plan.preset == "toy"
        self.model = ModelConfig.preset("tiny", **TOY_MODEL) if toy else ModelConfig.preset(plan.preset)
        length = 4 * max(plan.rows * plan.length, plan.long) * size
        ids = torch.randint(self.model.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
        self.tokens = TokenDataset.from_ids("random", ids.numpy())

    def alone(self, *, after: bool) -> None:
        """One rank's rows for the data-parallel and the context-parallel arms."""
        for long in (False, True):
            before = self.key("alone", long)
            key = self.key("alone, after", long) if after else before
            earlier = self.rows.find(**before)
            if self.rows.find(**key) or (after and earlier is None):
                continue
            with alone():
                steps = self.train(before["batch"], before["length_tokens"], DistributedConfig(), self.deadline)
            found = self.metrics(key, steps)
            if earlier is not None:
                found["over_before"] = found["tokens_per_second"] / earlier["tokens_per_second"]
            self.rows.add(**found, tokens=found["batch"] * found["length_tokens"] * len(steps.seconds))

    def together(self, arm: str, *, is_main: bool) -> None:
        """All ranks' steps, and rank 0's row of them; what fails ends the process, as ranks may be out of step."""
        context = arm not in DATA
        distributed = DistributedConfig(
            strategy="fsdp" if arm.startswith("zero") else "ddp",
            reshard_after_forward=arm != "zero2",
            context_parallel=self.size if context else 1,
            timeout_seconds=600,
        )
        key = self.key(arm, context)
        try:
            steps = self.train(key["batch"], key["length_tokens"], distributed, self.deadline)
        except failures() as error:
            if is_main:
                self.rows.add(**key, outcome=summary(error))
            raise
        if not is_main:
            return
        found = self.metrics(key, steps)
        found["backend"] = "nccl" if self.device.type == "cuda" else "gloo"
        one = self.rows.find(**self.key("alone", context)) or {}
        if "tokens_per_second" in one:
            found["scaling_efficiency"] = found["tokens_per_second"] / (self.size * one["tokens_per_second"])
        if arm == SPLIT and one:
            found["loss_relative_error"] = abs(found["first_loss"] / one["first_loss"] - 1)
            found["norm_relative_error"] = abs(found["first_norm"] / one["first_norm"] - 1)
        self.rows.add(**found, tokens=found["batch"] * found["length_tokens"] * len(steps.seconds))

    def train(self, rows: int, length: int, distributed: DistributedConfig, deadline: float) -> Steps:
        """Steps of a new model on this rank, alone or with the others."""
        steps = Steps(deadline)
        with torch.device("meta"):
            model = LanguageModel(self.model)
        with tempfile.TemporaryDirectory() as folder:
            training = TrainingConfig(
                output_dir=folder, steps=self.plan.steps, sequence_length=length, batch_size=rows, log_every=1,
                device=self.device.type, checkpoint_every=0, tensorboard=False,
            )  # fmt: skip
            loader = TokenLoader(self.tokens, length, rows)
            memory = MemoryConfig(recompute="block", segment_tokens=self.plan.segment_tokens)
            BareTrainer(
                model, loader, training, distributed=distributed, memory=memory, callbacks=[steps], progress=False
            ).train()
        del model
        release_memory()
        return steps

    def metrics(self, key: dict[str, Any], steps: Steps) -> dict[str, Any]:
        seconds = steps.median_seconds
        assert seconds is not None
        counted = steps.seconds[WARM_UP:] or steps.seconds[-1:]
        return key | {
            "preset": self.plan.preset,
            "ranks": 1 if key["arm"].startswith("alone") else self.size,
            "steps": len(steps.seconds),
            "tokens_per_second": key["batch"] * key["length_tokens"] / seconds,
            "seconds": seconds,
            "spread": (max(counted) - min(counted)) / seconds,
            "peak_gigabytes": peak_gigabytes(self.device),
            "first_loss": steps.losses[0],
            "first_norm": steps.norms[0],
        }

    def key(self, arm: str, long: bool) -> dict[str, Any]:
        """Where a row is found; rows of other numbers of ranks have other baselines, taken in their own launch."""
        wider = self.size if arm in DATA else 1
        longer = self.size if arm == CONTEXT else 1
        rows, length = (1, self.plan.long) if long else (self.plan.rows, self.plan.length)
        return {"part": f"{self.size} ranks", "arm": arm, "batch": rows * wider, "length_tokens": length * longer}


@contextmanager
def alone() -> Iterator[None]:
    """This process as if torchrun had not started it; no process group exists."""
    run = os.environ.pop("TORCHELASTIC_RUN_ID")
    try:
        yield
    finally:
        os.environ["TORCHELASTIC_RUN_ID"] = run


def main() -> None:
    """Measure, and append rows."""
    parser = argparse.ArgumentParser(description="Scaling efficiency of the trainer over the ranks of one host.")
    add_options(parser, ARMS)
    parser.add_argument("--preset", default=None, help="base by default")
    parser.add_argument("--steps", type=int, default=None, help="of every arm; the first two are not counted")
    arguments = parser.parse_args()
    if not dist.is_torchelastic_launched():
        parser.error("start it so: torchrun --standalone --nproc-per-node 2 -- benchmarks/distributed.py")
    device = settle(arguments)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before anything takes memory of the first
    plan = TOY if arguments.toy else Plan()
    plan = replace(plan, preset=arguments.preset or plan.preset, steps=arguments.steps or plan.steps)
    rows = Rows(
        "distributed",
        out=arguments.out,
        run=arguments.run,
        device=device,
        config=asdict(plan) | {"ranks": size},
        command=f"torchrun --standalone --nproc-per-node {size} -- benchmarks/distributed.py"
        + (" --toy" if arguments.toy else ""),
        commit=arguments.commit,
        shown=COLUMNS,
    )
    bench = Bench(plan, rows, device, size, arguments.deadline)
    if rank == 0:
        bench.alone(after=False)
    ranks = join_ranks(device.type, timeout_seconds=600)  # the others wait here
    wanted = arguments.only or list(ARMS)
    # Rank 0 says what is left: the others read its file at another time.
    for arm in ranks.on_main(lambda: [a for a in wanted if not rows.find(**bench.key(a, a not in DATA))]):
        if ranks.any(time.time() > arguments.deadline):
            break
        bench.together(arm, is_main=ranks.is_main)
    dist.destroy_process_group()
    if rank == 0 and time.time() < arguments.deadline:
        bench.alone(after=True)


if __name__ == "__main__":
    main()
