"""Parity of bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resnet_bk.experiments.tasks.base import Batch, Task, answered, integers


@dataclass(frozen=True)
class Parity(Task):
    """Uniform bits; after each, whether the number of ones so far is odd.

    The simplest state to track, and one that no positive diagonal decay can.
    Source: Grazzi et al., "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues", 2024.
    """

    name = "parity"

    length: int = 64
    evaluation_lengths: tuple[int, ...] = (64, 128, 256, 512)

    @property
    def vocab_size(self) -> int:
        """Two bits and the closing token."""
        return 3

    @property
    def shortest(self) -> int:
        """One bit and the closing token."""
        return 2

    @property
    def chance(self) -> float:
        """Even or odd."""
        return 0.5

    def scored(self, length: int) -> int:
        """One label a bit."""
        return length - 1

    def draw(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        """Rows of a valid length."""
        bits = integers(0, 2, (batch, length - 1), generator)
        return answered(bits, torch.remainder(bits.cumsum(1), 2), end=2)
