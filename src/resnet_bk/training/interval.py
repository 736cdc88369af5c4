"""`Interval`: sums over training steps, and the means of a row of metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Interval:
    """Sums over the steps since the last row of metrics."""

    nats: float = 0.0
    targets: int = 0
    gradient_norm: float = 0.0
    updates: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, nats: float, targets: int, gradient_norm: float, tokens: int, seconds: float) -> None:
        """Add one step; a gradient that overflowed under float16 updated nothing and has no norm."""
        self.nats += nats
        self.targets += targets
        if math.isfinite(gradient_norm):
            self.gradient_norm += gradient_norm
            self.updates += 1
        self.tokens += tokens
        self.seconds += seconds

    def means(self) -> dict[str, float | None]:
        """The columns of a row."""
        return {
            "loss": self.nats / self.targets,
            "gradient_norm": self.gradient_norm / self.updates if self.updates else None,
            "tokens_per_second": self.tokens / self.seconds,
        }
