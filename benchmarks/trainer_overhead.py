"""What watching and saving a run costs: monitor, snapshots and asynchronous saves against the same steps without.

    python benchmarks/trainer_overhead.py                              # about a minute on one H200
    python benchmarks/trainer_overhead.py --device cpu --preset tiny --length 256 --rows 4
    python benchmarks/trainer_overhead.py --toy                        # the script itself, times nothing

One run of the trainer, in whose steps the arms take turns, forwards and backwards: none, none again (what noise looks
like), `StabilityMonitor` (a row and the media of a probe every 100 steps), `AutoRecovery` (a snapshot every 50), and
an asynchronous checkpoint, which each block of steps waits for at its end. An arm's extra time is taken against the
bare steps of the same round and given as a share of the steps between two such events at the default settings; beside
it stands the time inside the arm's own calls, of a save one that is waited for, which does not drown where a machine is
busy. Wall time counts on a GPU; on a CPU the processor time of all threads, as other processes then count less.

Appends a row for every arm to `results/trainer-overhead.jsonl`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Rows, add_options, out_of_time, settle
from timed_trainer import BareTrainer

from resnet_bk import LanguageModel, ModelConfig, TrainingConfig
from resnet_bk.data.loader import TokenLoader
from resnet_bk.data.shards import TokenDataset
from resnet_bk.training.callbacks import Callback
from resnet_bk.training.stability.config import StabilityConfig
from resnet_bk.training.stability.monitor import StabilityMonitor
from resnet_bk.training.stability.recovery import AutoRecovery

BARE, AGAIN, MONITOR, RECOVERY, SAVE = "none", "none, again", "monitor", "recovery", "asynchronous save"
WARM_UP = "warm-up"
COLUMNS = {"part": 6, "arm": 18, "batch": 5, "length_tokens": 13, "bare_milliseconds": 17, "overhead_percent": 16}
COLUMNS |= {
    "least_percent": 13,
    "most_percent": 12,
    "wall_percent": 12,
    "inside_percent": 14,
    "event_milliseconds": 18,
    "save_seconds": 12,
}


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    preset: str = "base"
    rows: int = 8
    length: int = 1024
    rounds: int = 3
    monitor_every: int = StabilityConfig.every
    snapshot_every: int = StabilityConfig.snapshot_every
    save_every: int = TrainingConfig.checkpoint_every
    save_block: int = 100
    """Steps in which one save is measured, so many that it ends beside them."""

    @property
    def block(self) -> dict[str, int]:
        """Steps of every arm's blocks: one event lies in each."""
        every, snapshot = self.monitor_every, self.snapshot_every
        return {BARE: snapshot, AGAIN: snapshot, MONITOR: every, RECOVERY: snapshot, SAVE: self.save_block}

    @property
    def interval(self) -> dict[str, int]:
        """Steps between two events of an arm in a run with default settings."""
        return self.block | {SAVE: self.save_every}


TOY = Plan("tiny", 1, 32, 2, 4, 2, 10, 4)


def clocks(device: torch.device) -> tuple[float, float]:
    """Wall and processor seconds, all work on the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


class Turns(Callback):
    """Which arm the present step belongs to, and the wall and processor seconds of every block. To be called last."""

    def __init__(self, plan: Plan, stop: Any) -> None:
        arms = list(plan.block)
        self.blocks: list[tuple[str, int]] = [(WARM_UP, max(plan.monitor_every, plan.save_block))]
        for number in range(plan.rounds):
            self.blocks += [(arm, plan.block[arm]) for arm in (arms if number % 2 == 0 else arms[::-1])]
        self.seconds: list[dict[str, tuple[float, float]]] = []
        """Of each round: arm -> wall and processor seconds of its block."""
        self._per_round, self._stop = len(arms), stop
        self._block, self._done = 0, 0

    @property
    def steps(self) -> int:
        return sum(steps for _, steps in self.blocks)

    @property
    def arm(self) -> str:
        return self.blocks[self._block][0]

    @property
    def first(self) -> bool:
        """Whether this is the first step of its block."""
        return self._done == 0

    @property
    def last(self) -> bool:
        """Whether this is the last step of its block."""
        return self._done + 1 == self.blocks[self._block][1]

    def on_step_end(self, trainer: BareTrainer) -> None:  # type: ignore[override]
        last = self.last
        self._done += 1
        if not last:
            return
        now = clocks(trainer.device)
        if self.arm != WARM_UP:
            place = (self._block - 1) % self._per_round
            if place == 0:
                self.seconds.append({})
            self.seconds[-1][self.arm] = (now[0] - self._began[0], now[1] - self._began[1])
            if place == self._per_round - 1 and self._stop():
                trainer.stop()
        self._began = now
        self._block, self._done = min(self._block + 1, len(self.blocks) - 1), 0


class During(Callback):
    """Another callback, in the steps of one arm alone and while everything warms up."""

    def __init__(self, callback: Callback, arm: str, turns: Turns) -> None:
        self.callback, self.arm, self.turns = callback, arm, turns
        self.seconds = (0.0, 0.0)
        """Wall and processor seconds inside the callback in its arm's steps."""

    def _call(self, trainer: Any, hook: str, *arguments: Any) -> None:
        if self.turns.arm not in (self.arm, WARM_UP):
            return
        # Not synchronised, which would slow the steps down: what is read from the device is waited for all the same.
        wall, processor = time.perf_counter(), time.process_time()
        getattr(self.callback, hook)(trainer, *arguments)
        if self.turns.arm == self.arm:
            before = self.seconds
            self.seconds = before[0] + time.perf_counter() - wall, before[1] + time.process_time() - processor

    def on_train_start(self, trainer: Any) -> None:
        self.callback.on_train_start(trainer)

    def on_train_end(self, trainer: Any) -> None:
        self.callback.on_train_end(trainer)

    def on_step_start(self, trainer: Any) -> None:
        self._call(trainer, "on_step_start")

    def on_gradients(self, trainer: Any, loss: float, gradient_norm: float) -> None:
        self._call(trainer, "on_gradients", loss, gradient_norm)

    def on_step_end(self, trainer: Any) -> None:
        self._call(trainer, "on_step_end")

    def on_checkpoint(self, trainer: Any, folder: Path) -> None:
        self._call(trainer, "on_checkpoint", folder)


class SavingTrainer(BareTrainer):
    """Saves when it is asked to, not at the end."""

    def begin_save(self) -> None:
        super(BareTrainer, self).save_checkpoint(wait=False)

    def finish_save(self) -> None:
        self._note_checkpoint(wait=True)


class Saves(Callback):
    """One asynchronous checkpoint a block, which ends before the block does."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.seconds: list[float] = []
        """From the beginning of each save until the trainer learnt, after a step, that it is complete."""
        self.waited = (0.0, 0.0)
        """Wall and processor seconds of a save that the run waited for, while everything warmed up."""
        self.bytes = 0

    def on_step_end(self, trainer: SavingTrainer) -> None:  # type: ignore[override]
        if not (self.turns.first or self.turns.last):
            return
        trainer.finish_save()
        if self.turns.arm == WARM_UP and self.turns.last:
            before = clocks(trainer.device)
            self._begin(trainer)
            trainer.finish_save()
            after = clocks(trainer.device)
            self.waited = (after[0] - before[0], after[1] - before[1])
            self.seconds.clear()
        elif self.turns.first:
            self._begin(trainer)

    def _begin(self, trainer: SavingTrainer) -> None:
        self._began = time.perf_counter()
        trainer.begin_save()

    def on_checkpoint(self, trainer: Any, folder: Path) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        self.bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure(plan: Plan, device: torch.device, stop: Any) -> tuple[Turns, dict[str, During], LanguageModel]:
    """Train, the arms in turn; the callbacks by arm."""
    config = ModelConfig.preset(plan.preset)
    tokens = torch.randint(config.vocab_size, (1 << 20,), generator=torch.Generator().manual_seed(0))
    stability = StabilityConfig(every=plan.monitor_every, snapshot_every=plan.snapshot_every)
    turns = Turns(plan, stop)
    watching = {
        MONITOR: StabilityMonitor(stability, torch.arange(stability.probe_tokens)[None]),
        RECOVERY: AutoRecovery(snapshot_every=stability.snapshot_every, snapshots=stability.snapshots),
        SAVE: Saves(turns),
    }
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingConfig(
            output_dir=folder, steps=turns.steps, sequence_length=plan.length, batch_size=plan.rows,
            device=device.type, tensorboard=False, checkpoint_every=0, keep_checkpoints=1,
        )  # fmt: skip
        with torch.device("meta"):
            model = LanguageModel(config)
        loader = TokenLoader(TokenDataset.from_ids("random", tokens.numpy()), plan.length, plan.rows)
        callbacks = {arm: During(callback, arm, turns) for arm, callback in watching.items()}
        SavingTrainer(model, loader, training, callbacks=[*callbacks.values(), turns], progress=False).train()
    return turns, callbacks, model


def overheads(plan: Plan, arm: str, turns: Turns, clock: int) -> tuple[list[float], list[float], float]:
    """Per cent and seconds that an arm's event costs in every round, and the median seconds of a bare step.

    `clock` is 0 for wall and 1 for processor time.
    """
    percent, seconds, bare_steps = [], [], []
    for found in turns.seconds:
        if arm not in found:
            continue
        compared = (BARE,) if arm == AGAIN else (BARE, AGAIN)
        bare = sum(found[a][clock] for a in compared) / sum(plan.block[a] for a in compared)
        extra = found[arm][clock] - plan.block[arm] * bare
        percent.append(100 * extra / (plan.interval[arm] * bare))
        seconds.append(extra)
        bare_steps.append(bare)
    return percent, seconds, statistics.median(bare_steps)


def main() -> None:
    """Measure, and append rows."""
    parser = argparse.ArgumentParser(description="What watching and saving a run costs.")
    add_options(parser, ())
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    for name in ("preset", "rows", "length", "rounds", "save_block"):
        kind = str if name == "preset" else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None, help=f"{getattr(Plan, name)}")
    arguments = parser.parse_args()
    device = settle(arguments, on_cpu=arguments.device == "cpu")
    chosen = {n: getattr(arguments, n) for n in ("preset", "rows", "length", "rounds", "save_block")}
    plan = replace(TOY if arguments.toy else Plan(), **{n: v for n, v in chosen.items() if v is not None})
    options = "".join(f" --{n.replace('_', '-')} {v}" for n, v in chosen.items() if v is not None)
    rows = Rows(
        "trainer-overhead",
        out=arguments.out,
        run=arguments.run,
        device=device,
        config=asdict(plan),
        command="python benchmarks/trainer_overhead.py"
        + (" --toy" if arguments.toy else " --device cpu" if device.type == "cpu" else "")
        + options,
        commit=arguments.commit,
        shown=COLUMNS,
    )
    turns, callbacks, model = measure(plan, device, lambda: out_of_time(arguments))
    clock = 0 if device.type == "cuda" else 1
    for arm in (AGAIN, MONITOR, RECOVERY, SAVE):
        percent, seconds, bare = overheads(plan, arm, turns, clock)
        metrics: dict[str, Any] = {
            "part": plan.preset,
            "arm": arm,
            "batch": plan.rows,
            "length_tokens": plan.length,
            "clock": "wall" if clock == 0 else "processor",
            "rounds": len(percent),
            "block_steps": plan.block[arm],
            "interval_steps": plan.interval[arm],
            "bare_milliseconds": 1e3 * bare,
            "overhead_percent": statistics.median(percent),
            "least_percent": min(percent),
            "most_percent": max(percent),
            "wall_percent": statistics.median(overheads(plan, arm, turns, 0)[0]),
            "event_milliseconds": 1e3 * statistics.median(seconds),
        }
        if arm != AGAIN:
            inside = callbacks[arm].seconds[clock] / len(percent)
            if isinstance(saves := callbacks[arm].callback, Saves):
                inside = saves.waited[clock]
                metrics |= {"save_seconds": statistics.median(saves.seconds), "save_gigabytes": saves.bytes / 1e9}
            metrics["inside_percent"] = 100 * inside / (plan.interval[arm] * bare)
        rows.add(**metrics, model=model, tokens=sum(steps for _, steps in turns.blocks) * plan.rows * plan.length)


if __name__ == "__main__":
    main()
