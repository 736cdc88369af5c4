"""Independent uniform tokens: nothing to learn, and a floor that no causal model may fall through."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resnet_bk.experiments.tasks.base import Batch, Task, integers


@dataclass(frozen=True)
class UniformTokens(Task):
    """Independent uniform tokens, each to be predicted from those before it.

    Theorem: for a causal model the expected loss of every token is at least ln(vocabulary), whatever was learned; a
    loss below that by more than the sampling error means that the model sees what it predicts.
    """

    name = "uniform"

    length: int = 256
    evaluation_lengths: tuple[int, ...] = (256, 1024)
    vocabulary: int = 8
    """Number of tokens."""

    @property
    def vocab_size(self) -> int:
        """Every token."""
        return self.vocabulary

    @property
    def shortest(self) -> int:
        """One token to read and one to predict."""
        return 2

    @property
    def chance(self) -> float:
        """One of the tokens; also the best possible."""
        return 1 / self.vocabulary

    def scored(self, length: int) -> int:
        """All tokens but the first."""
        return length - 1

    def draw(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        """Rows of a valid length."""
        tokens = integers(0, self.vocabulary, (batch, length), generator)
        return Batch(tokens, tokens)
