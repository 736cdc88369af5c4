"""The trainer as benchmarks run it: no checkpoint at the end, and every step's loss, gradient norm and seconds."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path

import torch

from resnet_bk import Trainer
from resnet_bk.training.callbacks import Callback

WARM_UP = 2
"""First steps of a run, whose time does not count."""


class BareTrainer(Trainer):
    """Leaves out the checkpoint at the end, which is no part of what is measured, and large."""

    def save_checkpoint(self, *, wait: bool = True) -> Path:
        return self.output_dir


class Steps(Callback):
    """Losses, gradient norms and seconds of all steps; ends the run when the next step might pass the deadline."""

    def __init__(self, deadline: float = math.inf) -> None:
        self.deadline = deadline
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.seconds: list[float] = []
        """From the end of the step before, so what a step leaves to the device is counted in the next."""

    def on_train_start(self, trainer: Trainer) -> None:
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.device)
        self._last = time.perf_counter()

    def on_gradients(self, trainer: Trainer, loss: float, gradient_norm: float) -> None:
        self.losses.append(loss)
        self.norms.append(gradient_norm)

    def on_step_end(self, trainer: Trainer) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        if time.time() + 1.2 * self.seconds[-1] > self.deadline:
            trainer.stop()

    @property
    def median_seconds(self) -> float | None:
        """Of a step after the first ones; of the last if there are no others."""
        counted = self.seconds[WARM_UP:] or self.seconds[-1:]
        return statistics.median(counted) if counted else None


def peak_gigabytes(device: torch.device) -> float | None:
    """Most memory that tensors took on this GPU since a run with `Steps` began; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
