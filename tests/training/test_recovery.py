"""Faults put into a run are found, rolled back and passed over; what cannot be passed over ends by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_cases import RandomLoader, tiny_model

from resnet_bk import Trainer, TrainingConfig
from resnet_bk.errors import ConfigError, InstabilityError, RecoveryError
from resnet_bk.evaluation.perplexity import evaluate_stream
from resnet_bk.training.callbacks import Callback
from resnet_bk.training.checkpoint import list_checkpoints
from resnet_bk.training.schedules import learning_rate_at
from resnet_bk.training.stability.config import StabilityConfig
from resnet_bk.training.stability.monitor import StabilityMonitor
from resnet_bk.training.stability.recovery import RECOVERY_FILE, AutoRecovery
from resnet_bk.training.stability.snapshot import Snapshot

STEPS, ROWS, RATE = 140, 8, 6e-2
VALIDATION = RandomLoader(batch=1, time=400, seed=99).__next__()["input_ids"][0]
WATCH = StabilityConfig(recovery=True, window=32, least_steps=8)


class FaultyLoader(RandomLoader):
    """The clean batches, with faults put between them: no clean batch is lost."""

    def __init__(self, faults: dict[int, str]) -> None:
        super().__init__(batch=ROWS)
        self.faults, self.drawn = faults, 0

    def __next__(self):
        self.drawn += 1
        fault = self.faults.get(self.drawn)
        if fault == "nan":
            return {"input_ids": torch.zeros(ROWS, 16, dtype=torch.int64)}
        if fault == "spike":
            return {"input_ids": (torch.arange(16 * ROWS).reshape(ROWS, 16) * 5) % 13}
        return super().__next__()

    def state_dict(self):
        return {**super().state_dict(), "drawn": self.drawn}

    def load_state_dict(self, state) -> None:
        super().load_state_dict(state)
        self.drawn = state["drawn"]


def poisoned(model):
    """The model with a module that returns NaN for a batch of zeros."""
    marked = []
    model.embedding.register_forward_hook(lambda _m, inputs, _out: marked.append(not inputs[0].any()))
    model.blocks[1].feed_forward.out_proj.register_forward_hook(
        lambda _m, _inputs, out: out * math.nan if marked[-1] else out
    )
    return model


def trainer_for(folder: Path, loader, *callbacks: Callback, **fields) -> Trainer:
    config = TrainingConfig(**{  # type: ignore[arg-type]
        **dict(output_dir=str(folder), steps=STEPS, sequence_length=16, batch_size=ROWS, warmup_steps=5, log_every=1,
               learning_rate=RATE, minimum_learning_rate_ratio=0, evaluate_every=0, checkpoint_every=0, device="cpu",
               tensorboard=False),
        **fields,
    })  # fmt: skip
    return Trainer(poisoned(tiny_model()), loader, config, callbacks=callbacks, progress=False)


def rows_of(folder: Path, name: str = RECOVERY_FILE) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def loss_of(trainer: Trainer) -> float:
    return evaluate_stream(trainer.model, VALIDATION, segment_length=400).loss


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> float:
    """Loss at the end of the run without a fault."""
    trainer = trainer_for(tmp_path_factory.mktemp("clean") / "run", FaultyLoader({}))
    trainer.train()
    return loss_of(trainer)


@pytest.mark.parametrize("fault", ["nan", "spike"])
@pytest.mark.parametrize("place", ["snapshot", "checkpoint"])
def test_a_fault_is_found_rolled_back_and_passed_over(tmp_path, clean: float, fault: str, place: str) -> None:
    memory = place == "snapshot"
    recovery = AutoRecovery(snapshot_every=20 if memory else 0, calm_steps=20)
    trainer = trainer_for(
        tmp_path, FaultyLoader({51: fault}), StabilityMonitor(WATCH), recovery, checkpoint_every=0 if memory else 20
    )
    assert trainer.train().step == STEPS
    # Without the recovery's lower rate both runs would be equal; measured: 0.1 % apart.
    assert loss_of(trainer) == pytest.approx(clean, rel=0.01)
    back, calm = rows_of(tmp_path)
    assert (back["action"], back["step"], back["failed_step"], back["left_out"]) == ("roll back", 40, 51, [50])
    assert back["to"] == ("snapshot" if memory else "step-000040") and back["learning_rate_factor"] == 0.5
    if fault == "nan":
        assert "first module whose output is not finite is blocks.1.feed_forward.out_proj" in back["error"]
    else:
        assert "the loss is" in back["error"] and "robust deviations above the median" in back["error"]
    assert (calm["action"], calm["step"]) == ("calm", 71)
    rows = rows_of(tmp_path, "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert max(row["loss"] for row in rows[40:]) < rows[0]["loss"]
    # The rate is halved before the fault, returns over the calm steps, and then is the schedule's.
    whole = TrainingConfig(steps=STEPS, learning_rate=RATE, minimum_learning_rate_ratio=0, warmup_steps=5)
    ratios = [row["learning_rate"] / learning_rate_at(row["step"] - 1, whole) for row in rows[:-1]]
    assert ratios[39] == 1 and ratios[41] == pytest.approx(0.5) and 0.5 < ratios[60] < 1 and ratios[-1] == 1


def test_without_a_lower_rate_the_run_is_the_clean_one(tmp_path, clean: float) -> None:
    recovery = AutoRecovery(snapshot_every=20, learning_rate_factor=1.0, calm_steps=10)
    trainer = trainer_for(tmp_path, FaultyLoader({51: "nan", 53: "spike"}), StabilityMonitor(WATCH), recovery)
    trainer.train()
    # The second fault comes within the calm steps, so one batch before it is left out too: the loss differs.
    assert [row["rollbacks"] for row in rows_of(tmp_path)] == [1, 2, 2]
    assert loss_of(trainer) == pytest.approx(clean, rel=0.01)
    alone = trainer_for(
        tmp_path / "one", FaultyLoader({51: "nan"}), AutoRecovery(snapshot_every=20, learning_rate_factor=1.0)
    )
    alone.train()
    assert loss_of(alone) == clean


def test_tries_are_bounded_and_reach_back_further_each_time(tmp_path) -> None:
    faults = dict.fromkeys(range(31, 200), "nan")
    recovery = AutoRecovery(snapshot_every=10, snapshots=3, tries=3)
    trainer = trainer_for(tmp_path, FaultyLoader(faults), recovery)
    with pytest.raises(RecoveryError, match=r"step 30 failed after 3 rollbacks in a row .*stability.tries"):
        trainer.train()
    rows = rows_of(tmp_path)
    assert [row["action"] for row in rows] == ["roll back"] * 3 + ["give up"]
    assert [row.get("left_out") for row in rows[:3]] == [[30], [30, 31], [29, 30, 31, 32]]
    assert [row["step"] for row in rows[:3]] == [30, 20, 10]
    assert [row["learning_rate_factor"] for row in rows[:3]] == [0.5, 0.25, 0.125]


def test_going_back_to_an_older_checkpoint_removes_the_newer(tmp_path) -> None:
    recovery = AutoRecovery(snapshot_every=0, tries=2)
    trainer = trainer_for(
        tmp_path, FaultyLoader({26: "nan", 27: "nan"}), recovery, checkpoint_every=10, steps=28, keep_checkpoints=3
    )
    seen = []

    class Look(Callback):
        def on_rollback(self, trainer) -> None:
            seen.append([folder.name for folder in list_checkpoints(tmp_path)])

    trainer.add_callback(Look())
    trainer.train()
    assert seen == [["step-000010", "step-000020"], ["step-000010"]]
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-000010", "step-000020", "step-000028"]


def test_nothing_to_go_back_to_is_said(tmp_path) -> None:
    trainer = trainer_for(tmp_path, FaultyLoader({3: "nan"}), AutoRecovery(snapshot_every=0))
    with pytest.raises(RecoveryError, match="neither a snapshot nor a checkpoint to go back to") as caught:
        trainer.train()
    assert isinstance(caught.value.__cause__, InstabilityError)
    assert [row["action"] for row in rows_of(tmp_path)] == ["give up"]


def test_a_resumed_run_remembers_what_to_leave_out(tmp_path) -> None:
    def run(folder: Path, *parts: int) -> Trainer:
        for steps in parts:
            recovery = AutoRecovery(snapshot_every=7, calm_steps=30)
            trainer = trainer_for(
                folder, FaultyLoader({12: "nan"}), recovery, steps=steps, resume=True, schedule="constant"
            )
            trainer.train()
        return trainer

    whole, parts = run(tmp_path / "whole", 40), run(tmp_path / "parts", 25, 40)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True))


def test_a_snapshot_puts_everything_back(tmp_path) -> None:
    trainer = trainer_for(tmp_path, FaultyLoader({}), steps=12)
    losses: list[float] = []
    kept = SimpleNamespace()

    class Twice(Callback):
        def on_log(self, trainer, row) -> None:
            losses.append(row["loss"])

        def on_step_end(self, trainer) -> None:
            if trainer.step == 4 and not hasattr(kept, "snapshot"):
                kept.snapshot = Snapshot.take(trainer)
            if trainer.step == 8 and len(losses) == 8:
                trainer.roll_back(kept.snapshot)

    trainer.add_callback(Twice())
    trainer.train()
    assert losses[8:12] == losses[4:8] and len(losses) == 16


@pytest.mark.parametrize(
    ("field", "value"), [("tries", 0), ("calm_steps", 0), ("snapshot_every", -1), ("snapshots", 0),
                         ("learning_rate_factor", 0.0), ("learning_rate_factor", 1.5)]
)  # fmt: skip
def test_bad_numbers_are_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value}; expected"):
        AutoRecovery(**{field: value})  # type: ignore[arg-type]
