"""Induction heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resnet_bk.experiments.tasks.base import IGNORED, Batch, Task, answered, integers


@dataclass(frozen=True)
class InductionHeads(Task):
    """Uniform symbols with one special token among them, and the same token at the end: what followed it before?

    Source: Gu and Dao, "Mamba", 2023 (16 symbols, trained on 256 tokens, evaluated to 2^20).
    """

    name = "induction"

    length: int = 256
    evaluation_lengths: tuple[int, ...] = (64, 256, 1024, 4096)
    symbols: int = 16
    """Different symbols."""

    @property
    def vocab_size(self) -> int:
        """Symbols and the special token."""
        return self.symbols + 1

    @property
    def shortest(self) -> int:
        """The special token, what follows it, the special token again and one token more for the answer."""
        return 4

    @property
    def chance(self) -> float:
        """One of the symbols."""
        return 1 / self.symbols

    def scored(self, length: int) -> int:
        """The last token."""
        return 1

    def draw(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        """Rows of a valid length."""
        tokens = integers(0, self.symbols, (batch, length - 1), generator)
        place = integers(0, length - 3, (batch, 1), generator)
        answers = torch.full_like(tokens, IGNORED)
        answers[:, -1] = tokens.gather(1, place + 1)[:, 0]
        tokens.scatter_(1, place, self.symbols)
        tokens[:, -1] = self.symbols
        return answered(tokens, answers, end=self.symbols)
