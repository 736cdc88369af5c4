"""Selective copying."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resnet_bk.experiments.tasks.base import IGNORED, Batch, Task, answered, integers, subsets


@dataclass(frozen=True)
class SelectiveCopy(Task):
    """Symbols scattered among noise, then markers: name the symbols in their order, one a marker.

    The spaces between symbols are random, so a fixed filter cannot do it.
    Source: Gu and Dao, "Mamba", 2023 (16 symbols to remember out of 16, in 4,096 tokens).
    """

    name = "selective_copy"

    length: int = 512
    evaluation_lengths: tuple[int, ...] = (512, 1024, 2048)
    symbols: int = 16
    """Different symbols."""
    count: int = 16
    """Symbols to remember in a row."""

    @property
    def vocab_size(self) -> int:
        """Symbols, noise and marker."""
        return self.symbols + 2

    @property
    def shortest(self) -> int:
        """Symbols, markers and the closing token."""
        return 2 * self.count + 1

    @property
    def chance(self) -> float:
        """One of the symbols."""
        return 1 / self.symbols

    def scored(self, length: int) -> int:
        """One label a marker."""
        return self.count

    def draw(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        """Rows of a valid length."""
        noise, marker = self.symbols, self.symbols + 1
        context = length - 1 - self.count
        places = subsets(batch, self.count, context, generator).sort(dim=1).values
        symbols = integers(0, self.symbols, (batch, self.count), generator)
        tokens = torch.full((batch, length - 1), noise, device=generator.device)
        tokens.scatter_(1, places, symbols)
        tokens[:, context:] = marker
        answers = torch.full_like(tokens, IGNORED)
        answers[:, context:] = symbols
        return answered(tokens, answers, end=marker)
