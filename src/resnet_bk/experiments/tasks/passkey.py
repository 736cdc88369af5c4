"""Passkey retrieval."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from resnet_bk.errors import ConfigError
from resnet_bk.experiments.tasks.base import IGNORED, Batch, Task, answered, integers


@dataclass(frozen=True)
class Passkey(Task):
    """A key of digits somewhere in a long uniform filler; asked for at the end, digit by digit.

    Trained at a random depth in short rows, evaluated to eight times their length, also at fixed depths.
    Source: Mohtashami and Jaggi, "Landmark Attention", 2023, with symbols in place of sentences.
    """

    name = "passkey"

    length: int = 512
    evaluation_lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    digits: int = 5
    """Digits of the key."""
    filler: int = 16
    """Different filler tokens; no digit is one."""
    depth: float | None = None
    """Where the key stands: 0 = at the start, 1 = right before the question, None = anywhere."""
    evaluation_depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Depths to evaluate at besides random ones."""

    def __post_init__(self) -> None:
        """Check every field; raises `ConfigError` naming the first that is wrong."""
        for depth in (self.depth, *self.evaluation_depths):
            if depth is not None and not 0 <= depth <= 1:
                raise ConfigError(f"passkey.depth is {depth}; expected a number in [0, 1], or None.")
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        """Ten digits, the filler, and the marks before the key and the question."""
        return 10 + self.filler + 2

    @property
    def shortest(self) -> int:
        """Key and question, a mark before each, and one token more for the last answer."""
        return 2 * self.digits + 2

    @property
    def chance(self) -> float:
        """One of the digits."""
        return 0.1

    def scored(self, length: int) -> int:
        """One label a digit."""
        return self.digits

    def evaluations(self) -> dict[str, Task]:
        """Random depths, and every one of `evaluation_depths`."""
        whole = dataclasses.replace(self, evaluation_depths=())
        fixed = {f"depth_{depth:g}": dataclasses.replace(whole, depth=depth) for depth in self.evaluation_depths}
        return {"": whole, **fixed}

    def draw(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        """Rows of a valid length."""
        mark, question = 10 + self.filler, 11 + self.filler
        key = integers(0, 10, (batch, self.digits), generator)
        tokens = integers(10, mark, (batch, length - 1), generator)
        room = length - 1 - (self.digits + 1) - self.digits
        if self.depth is None:
            start = integers(0, room + 1, (batch, 1), generator)
        else:
            start = torch.full((batch, 1), round(self.depth * room), device=generator.device)
        needle = torch.cat((torch.full_like(start, mark), key), dim=1)
        tokens.scatter_(1, start + torch.arange(self.digits + 1, device=generator.device), needle)
        tokens[:, -self.digits] = question
        tokens[:, length - self.digits :] = key[:, :-1]
        answers = torch.full_like(tokens, IGNORED)
        answers[:, -self.digits :] = key
        # The closing token is read after the last answer was due.
        return answered(tokens, answers, end=question)
