from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from resnet_bk import Trainer
from resnet_bk.errors import ConfigError
from resnet_bk.training.callbacks import Callback
from resnet_bk.training.checkpoint import latest_checkpoint
from resnet_bk.training.time_budget import TimeBudget


class SendAt(Callback):
    """Sends a signal to this process at the start of a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def on_step_start(self, trainer):
        if trainer.step + 1 == self.step:
            os.kill(os.getpid(), self.number)
            os.kill(os.getpid(), self.number)


def trainer_with(tiny, *callbacks: Callback, **fields) -> Trainer:
    return Trainer(tiny.model(), tiny.loader(), tiny.config(**fields), callbacks=callbacks, progress=False)


def test_sigterm_finishes_the_step_saves_and_gives_the_signal_back(tiny):
    before = signal.getsignal(signal.SIGTERM)
    budget = TimeBudget()
    trainer = trainer_with(tiny, SendAt(3), budget)
    result = trainer.train()
    assert result.step == 3 and budget.reason == "SIGTERM was received"
    assert result.checkpoint == latest_checkpoint(trainer.output_dir) == trainer.output_dir / "step-000003"
    assert signal.getsignal(signal.SIGTERM) is before
    assert trainer_with(tiny, resume=True).train().step == 6


def test_other_signals_are_chosen_by_name(tiny):
    budget = TimeBudget(signals=[signal.SIGUSR1])
    assert trainer_with(tiny, SendAt(2, signal.SIGUSR1), budget).train().step == 2
    assert budget.reason == "SIGUSR1 was received"


class Clock:
    """A clock that a step moves on by so many seconds."""

    def __init__(self, monkeypatch, seconds: list[float]) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.seconds = seconds

    def callback(self) -> Callback:
        clock = self

        class Tick(Callback):
            def on_step_start(self, trainer):
                clock.now += clock.seconds[trainer.step]

        return Tick()


@pytest.mark.parametrize(
    "seconds, budget, reserve, ended_at",
    [
        ([10] * 6, 45.0, 0.0, 4),  # 5 left, a step takes 10
        ([10] * 6, 45.0, 6.0, 3),  # 15 left, and 16 would be needed
        ([10, 24, 1, 1, 1, 1], 60.0, 0.0, 4),  # 24 left, the slowest step took 24
        ([10] * 6, 1000.0, 5.0, 6),
    ],
)
def test_run_ends_before_the_slowest_step_seen_would_not_fit(tiny, monkeypatch, seconds, budget, reserve, ended_at):
    clock = Clock(monkeypatch, seconds)
    callback = TimeBudget(budget, reserve_seconds=reserve)
    trainer = trainer_with(tiny, clock.callback(), callback)
    result = trainer.train()
    assert result.step == ended_at and result.checkpoint is not None
    assert clock.now - 1000 + reserve <= budget
    assert (callback.reason is None) == (ended_at == 6)


def test_outside_the_main_thread_only_the_clock_counts(tiny):
    results = []
    trainer = trainer_with(tiny, TimeBudget(1000.0))
    thread = threading.Thread(target=lambda: results.append(trainer.train()))
    thread.start()
    thread.join()
    assert results[0].step == 6


def test_ended_run_is_not_evaluated_on_the_way_out(tiny):
    trainer = Trainer(
        tiny.model(), tiny.loader(), tiny.config(), validation=tiny.validation, callbacks=[SendAt(2), TimeBudget()],
        progress=False,
    )  # fmt: skip
    assert trainer.train().validation is None


@pytest.mark.parametrize(
    "options", [dict(seconds=30.0), dict(seconds=0.0, reserve_seconds=0.0), dict(reserve_seconds=-1.0)]
)
def test_budget_without_room_is_refused(options):
    with pytest.raises(ConfigError, match="TimeBudget: "):
        TimeBudget(**options)
