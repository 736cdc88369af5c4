"""`StabilityConfig`: what is watched during a run, and what is done when it becomes unstable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from resnet_bk.errors import ConfigError


@dataclass(frozen=True)
class StabilityConfig:
    """Monitors, recovery and the schedules of the medium. Steps are optimizer steps."""

    monitor: bool = False
    """Write `stability.jsonl`: scores of loss and gradient norm, update over weight, the media of a probe."""
    every: int = 100
    """Steps between two rows of the monitor; loss and gradient norm are judged at every step."""
    window: int = 64
    """Steps over which median and MAD of loss and gradient norm are taken."""
    least_steps: int = 16
    """Steps seen before any is judged."""
    loss_score: float = 8.0
    """Robust z-score of a loss above which it is a spike; 0 judges no loss."""
    gradient_score: float = 12.0
    """Robust z-score of the logarithm of a gradient norm above which it is a spike; 0 judges no norm."""
    on_spike: Literal["log", "stop"] = "log"
    """What a spike does without `recovery`: a row, or the end of the run before it changes a parameter."""
    probe_tokens: int = 128
    """Tokens of the validation split whose media the monitors look at; at most 8192."""
    recovery: bool = False
    """Go back to a snapshot or checkpoint when a step is not finite or a spike, and skip what led there; brings the
    monitor."""
    snapshot_every: int = 50
    """Steps between snapshots in memory; 0 goes back to checkpoints on disk only."""
    snapshots: int = 2
    """Newest snapshots kept; each holds parameters and optimizer state once."""
    tries: int = 3
    """Rollbacks in a row before the run is given up."""
    learning_rate_factor: float = 0.5
    """What each rollback in a row multiplies the learning rate by."""
    calm_steps: int = 200
    """Steps after a failed one over which the rate returns, and after which rollbacks are counted anew."""
    spectral_every: int = 0
    """Steps between rows of `spectral.jsonl`, the Schatten bounds of every layer's media; 0 writes none."""
    absorption_start: float | None = None
    """Absorption floor at the first step, moved to `model.absorption_floor`; None keeps it where it is."""
    position_epsilon_start: float | None = None
    """Exponent of the prime bumps at the first step, moved to `model.position_epsilon`; None keeps it where it is."""
    epsilon_shape: Literal["linear", "cosine", "geometric"] = "geometric"
    """How floor and exponent move."""
    epsilon_share: float = 0.5
    """Share of the run over which they move."""

    def __post_init__(self) -> None:
        """Check every field; raises `ConfigError` naming the first that is wrong."""
        for name in ("every", "least_steps", "probe_tokens", "snapshots", "tries", "calm_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"stability.{name} is {getattr(self, name)!r}; expected a whole number >= 1.")
        for name in ("loss_score", "gradient_score", "snapshot_every", "spectral_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"stability.{name} is {getattr(self, name)!r}; expected a finite number >= 0.")
        if self.window < 3 or self.window < self.least_steps:
            raise ConfigError(
                f"stability.window is {self.window!r}; expected at least 3 and stability.least_steps, "
                f"{self.least_steps}."
            )
        for name in ("learning_rate_factor", "epsilon_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"stability.{name} is {getattr(self, name)!r}; expected a number in (0, 1].")
        for name in ("absorption_start", "position_epsilon_start"):
            start = getattr(self, name)
            if start is not None and not 0 < start < math.inf:
                raise ConfigError(f"stability.{name} is {start!r}; expected null or a finite number > 0.")
        for name, options in (
            ("on_spike", ("log", "stop")),
            ("epsilon_shape", ("linear", "cosine", "geometric")),
        ):
            if getattr(self, name) not in options:
                raise ConfigError(f"stability.{name} is {getattr(self, name)!r}; expected one of {', '.join(options)}.")
