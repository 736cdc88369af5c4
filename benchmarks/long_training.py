"""Training at a million tokens a sequence on a GPU: steps of the whole trainer, watched, beside those at 2,048 tokens.

    python benchmarks/long_training.py --tokens FOLDER           # all arms, about ten minutes on one H100
    python benchmarks/long_training.py --only resnet-bk          # this library's model alone, about six
    python benchmarks/long_training.py --toy                     # the script itself, tiny, on a CPU

Every arm trains with `Trainer` from its initialisation at each length, in one process, under one policy of
recomputation: blocks, a segment of 65,536 tokens at a time (the Transformer's whole, as its scores see all tokens). A
step at 2,048 tokens has as many tokens as one at 1,048,576. `StabilityMonitor` watches; losses, gradient norms, spikes
and what ended a run early are in its row. The peers are those of `model_speed.py`. FOLDER is what `resnet-bk prepare`
wrote; without one, the bytes of the running Python's documentation and sources are the tokens.

Rows go to `results/long-training.jsonl` as soon as they are known; the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peer_models
import peers
import torch
from gpu_timing import (
    DeviceLostError,
    Rows,
    add_options,
    failures,
    out_of_time,
    release_memory,
    settle,
    start_again,
    summary,
)
from timed_trainer import WARM_UP, BareTrainer, Steps, peak_gigabytes

from resnet_bk import TrainingConfig
from resnet_bk.data.config import DataConfig
from resnet_bk.data.loader import TokenLoader
from resnet_bk.data.shards import TokenDataset, open_shard
from resnet_bk.data.sources import open_corpus
from resnet_bk.layers.mixer import Mixer
from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.training.config import MemoryConfig
from resnet_bk.training.stability.config import StabilityConfig
from resnet_bk.training.stability.monitor import STABILITY_FILE, StabilityMonitor

ARMS = {kind.split()[0]: kind for kind in peer_models.KINDS}
COLUMNS = {"arm": 28, "length_tokens": 13, "steps": 5, "spikes": 6, "not_finite": 10, "first_loss": 10, "last_loss": 9}
COLUMNS |= {"largest_gradient_norm": 21, "peak_gigabytes": 14, "tokens_per_second": 17, "over_shortest": 13}
COLUMNS |= {"over_resnet_bk": 14, "outcome": 7}


@dataclass(frozen=True)
class Stage:
    """A run at one length."""

    rows: int
    length: int
    passes: int
    """Forward and backward passes of a step."""
    steps: int
    """Of this library's model."""
    peer_steps: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.rows * self.length * self.passes


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    preset: str = "base"
    stages: tuple[Stage, ...] = (
        Stage(64, 2048, 8, 6, 5),
        Stage(1, 131072, 1, 8, 5),
        Stage(1, 1048576, 1, 56, 4),
    )
    segment_tokens: int = 65536
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    unjudged_steps: int = 6
    """First steps of a run, which the monitor only learns from."""
    step_limit: float = 30.0
    """Seconds; a peer's step that would take longer is left out."""


TOY = Plan(
    preset="tiny",
    stages=(Stage(2, 64, 4, 4, 3), Stage(1, 256, 1, 4, 3), Stage(1, 512, 1, 12, 3)),
    segment_tokens=128,
)


class Bench:
    """The arms at every length, with what they share."""

    def __init__(self, plan: Plan, rows: Rows, device: torch.device, tokens: TokenDataset, arguments) -> None:
        self.plan, self.rows, self.device, self.tokens, self.arguments = plan, rows, device, tokens, arguments
        self.absent = peers.absence()

    def arm(self, name: str) -> None:
        """The rows of one arm."""
        for stage in self.plan.stages:
            if self.done(name, stage):
                continue
            if out_of_time(self.arguments):
                raise TimeoutError
            reason = f"peer absent: {self.absent}" if self.absent and name == "mamba-2" else None
            reason = reason or self.too_slow(name, stage)
            if reason is not None:
                self.rows.add(**self.key(name, stage), preset=self.plan.preset, outcome=reason)
                continue
            with tempfile.TemporaryDirectory() as folder:
                self.train(name, stage, Path(folder))
            self.check_device(name)
            release_memory()

    def train(self, name: str, stage: Stage, folder: Path) -> None:
        """One run, and its row."""
        steps = stage.steps if name == "resnet-bk" else stage.peer_steps
        watch = Steps(self.arguments.deadline)
        model, outcome = None, None
        try:
            torch.manual_seed(0)
            with torch.device(self.device):
                model = peer_models.build(ARMS[name], self.plan.preset)
            self.run(model, stage, steps, watch, folder)
        except failures() as error:
            outcome = summary(error)
        found = folder / STABILITY_FILE
        events = [json.loads(line) for line in found.read_text().splitlines()] if found.is_file() else []
        seconds = watch.median_seconds
        speed = None if seconds is None else stage.tokens / seconds
        self.rows.add(
            **self.key(name, stage),
            preset=self.plan.preset,
            model=model,
            tokens=stage.tokens * len(watch.seconds),
            tokens_per_step=stage.tokens,
            steps=len(watch.seconds),
            planned_steps=steps,
            judged_steps=max(0, len(watch.losses) - self.plan.unjudged_steps),
            spikes=sum(row["kind"] == "spike" for row in events),
            not_finite=int(outcome is not None and "InstabilityError" in outcome),
            media_violations=sum(x["violations"] for row in events for x in row.get("layers", ())),
            first_loss=watch.losses[0] if watch.losses else None,
            last_loss=watch.losses[-1] if watch.losses else None,
            largest_gradient_norm=max(watch.norms, default=None),
            peak_gigabytes=peak_gigabytes(self.device),
            tokens_per_second=speed,
            over_shortest=self.ratio(speed, name, self.plan.stages[0]) if stage != self.plan.stages[0] else None,
            over_resnet_bk=self.ratio(speed, "resnet-bk", stage) if name != "resnet-bk" else None,
            slowest_seconds=max(watch.seconds[WARM_UP:], default=None),
            first_seconds=watch.seconds[0] if watch.seconds else None,
            seconds=seconds,
            recompute="block",
            segment_tokens=self.plan.segment_tokens,
            losses=" ".join(f"{x:.4f}" for x in watch.losses),
            gradient_norms=" ".join(f"{x:.4g}" for x in watch.norms),
            outcome=outcome,
        )

    def run(self, model: LanguageModel, stage: Stage, steps: int, watch: Steps, folder: Path) -> None:
        """Train, with all that watches."""
        plan = self.plan
        training = TrainingConfig(
            output_dir=str(folder), steps=steps, sequence_length=stage.length, batch_size=stage.rows,
            gradient_accumulation_steps=stage.passes, learning_rate=plan.learning_rate, warmup_steps=plan.warmup_steps,
            device=self.device.type, log_every=1, checkpoint_every=0, tensorboard=False,
        )  # fmt: skip
        stability = StabilityConfig(monitor=True, every=10, least_steps=plan.unjudged_steps)
        probe = None
        if any(isinstance(module, Mixer) for module in model.modules()):
            probe = torch.from_numpy(self.tokens.tokens[: stability.probe_tokens].astype(np.int64))[None]
        trainer = BareTrainer(
            model,
            TokenLoader(self.tokens, stage.length, stage.rows),
            training,
            memory=MemoryConfig(recompute="block", segment_tokens=plan.segment_tokens),
            callbacks=[StabilityMonitor(stability, probe), watch],
            progress=False,
        )
        trainer.train()

    def done(self, name: str, stage: Stage) -> bool:
        """Whether there is a row of all steps, or of what ended them."""
        row = self.row(name, stage)
        return "outcome" in row or (bool(row) and row["steps"] == row["planned_steps"])

    def too_slow(self, name: str, stage: Stage) -> str | None:
        """Why a peer's step is left out, by its speed at the longest length that was timed."""
        shorter = self.plan.stages[: self.plan.stages.index(stage)]
        timed = {s: row["seconds"] for s in shorter if (row := self.row(name, s)).get("seconds")}
        if name == "resnet-bk" or not timed:
            return None
        before, known = list(timed.items())[-1]
        with torch.device("meta"):
            model = peer_models.build(ARMS[name], self.plan.preset)
        flops = [peer_models.step_flops(model, s.rows * s.passes, s.length) for s in (before, stage)]
        expected = known * flops[1] / flops[0]
        if expected <= self.plan.step_limit:
            return None
        return f"not run: a step would take about {expected:.0f} s ({flops[1]:.2g} operations)"

    def ratio(self, speed: float | None, name: str, stage: Stage) -> float | None:
        """Speed over that of another row, if there is one."""
        other = self.row(name, stage).get("tokens_per_second")
        return None if other is None or speed is None else speed / other

    def check_device(self, name: str) -> None:
        """Raise `DeviceLostError` if a run broke the device's context; its row has been written."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise DeviceLostError(name, summary(error)) from None

    def row(self, name: str, stage: Stage) -> dict[str, Any]:
        """The metrics known of a run; empty if there are none."""
        return self.rows.find(**self.key(name, stage)) or {}

    def key(self, name: str, stage: Stage) -> dict[str, Any]:
        part = f"train {self.plan.preset}"
        return {"part": part, "arm": ARMS[name], "batch": stage.rows, "length_tokens": stage.length}


def planned(arguments: argparse.Namespace) -> Plan:
    """What the options ask for."""
    plan = TOY if arguments.toy else Plan()
    *shorter, longest = plan.stages
    longest = replace(longest, steps=arguments.steps or longest.steps)
    preset = arguments.preset or plan.preset
    return replace(plan, preset=preset, stages=(*shorter, longest), step_limit=arguments.step_limit)


def text_tokens(length: int) -> TokenDataset:
    """The first bytes of the running Python's documentation and sources."""
    found = bytearray()
    for document in open_corpus(DataConfig()).documents("train"):
        found += document.text.encode()
        if len(found) >= length:
            break
    return TokenDataset.from_ids("bytes", np.frombuffer(bytes(found), dtype=np.uint8))


def main() -> None:
    """Measure, and append rows."""
    parser = argparse.ArgumentParser(description="Training at a million tokens a sequence.")
    add_options(parser, tuple(ARMS))
    parser.add_argument("--tokens", type=Path, help="folder of a prepared corpus, whose `train` shard is trained on")
    parser.add_argument("--preset", default=None, help="base by default")
    parser.add_argument("--steps", type=int, default=None, help="of the longest sequence; 56 by default")
    parser.add_argument("--step-limit", type=float, default=Plan.step_limit, help="seconds of a peer's step at most")
    arguments = parser.parse_args()
    device = settle(arguments)
    plan = planned(arguments)
    tokens = open_shard(arguments.tokens, "train") if arguments.tokens else text_tokens(4 * plan.stages[-1].length)
    rows = Rows(
        "long-training",
        out=arguments.out,
        run=arguments.run,
        device=device,
        config=asdict(plan) | {"tokens": tokens.sha256},
        command="python benchmarks/long_training.py"
        + (" --toy" if arguments.toy else "")
        + (" --tokens FOLDER" if arguments.tokens else ""),
        commit=arguments.commit,
        shown=COLUMNS,
    )
    if peers.absence() is None and not arguments.toy:
        peers.compile_candidates_together(os.cpu_count() or 1)
    bench = Bench(plan, rows, device, tokens, arguments)
    try:
        for name in arguments.only or ARMS:
            bench.arm(name)
    except DeviceLostError:
        start_again(arguments)
    except TimeoutError:
        print("The budget is spent; the same command goes on from here.")


if __name__ == "__main__":
    main()
