"""`TimeBudget`: saves and ends a run before a wall-clock limit, or when the system asks it to end."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from resnet_bk.errors import ConfigError
from resnet_bk.training.callbacks import Callback

if TYPE_CHECKING:
    from resnet_bk.training.trainer import Trainer

_log = logging.getLogger(__name__)


class TimeBudget(Callback):
    """Ends the run with a checkpoint at the first step after a signal, or before the time is up.

    For notebooks with session limits, queues with wall-clock limits, and machines that are taken back with a warning.
    The run is ended so early that the slowest step seen so far, evaluations and saves between steps included, and
    `reserve_seconds` still fit. Resume it with `training.resume`. Of several ranks, one that must end ends all.

    Args:
        seconds: since this object was made; None waits for signals alone.
        reserve_seconds: kept for the last checkpoint, beyond the slowest step.
        signals: handled while the run lasts, in the main thread only; one that comes again changes nothing.

    Raises:
        ConfigError: a time that is not positive, or a reserve that leaves nothing of it.
    """

    def __init__(
        self,
        seconds: float | None = None,
        *,
        reserve_seconds: float = 30.0,
        signals: Sequence[signal.Signals] = (signal.SIGTERM,),
    ) -> None:
        if reserve_seconds < 0:
            raise ConfigError(f"TimeBudget: reserve_seconds is {reserve_seconds!r}; expected a number >= 0.")
        if seconds is not None and not seconds > reserve_seconds:
            raise ConfigError(
                f"TimeBudget: seconds is {seconds!r}; expected more than reserve_seconds = {reserve_seconds!r}, which "
                "is kept for the last checkpoint."
            )
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._reserve = reserve_seconds
        self._signals = tuple(signals)
        self.reason: str | None = None
        """Why the run was ended; None while it was not."""

    def on_train_start(self, trainer: Trainer) -> None:
        """Listen to the signals, and start to time steps."""
        self.reason, self._received, self._slowest = None, None, 0.0
        self._last = time.monotonic()
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                self._previous[number] = signal.signal(number, self._receive)

    def on_step_end(self, trainer: Trainer) -> None:
        """Stop the run if it must end."""
        now = time.monotonic()
        self._slowest, self._last = max(self._slowest, now - self._last), now
        mine = self._why_now(now)
        if self.reason is None and mine is not None:
            self.reason = mine
            _log.info("Ending the run at step %d with a checkpoint: %s.", trainer.step, self.reason)
            trainer.stop()

    def on_train_end(self, trainer: Trainer) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: Any) -> None:
        self._received = signal.Signals(number).name

    def _why_now(self, now: float) -> str | None:
        """Why this rank must end the run now; None if it need not."""
        if self._received is not None:
            return f"{self._received} was received"
        if self._deadline is None:
            return None
        left = self._deadline - now
        if left > self._slowest + self._reserve:
            return None
        return (
            f"{left:.0f} seconds of the time budget are left, and a step took up to {self._slowest:.1f}, with "
            f"{self._reserve:.0f} in reserve"
        )
