"""Arithmetic modulo a number: running sums, and expressions with three operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resnet_bk.errors import ConfigError
from resnet_bk.experiments.tasks.base import IGNORED, Batch, Element, Task, answered, integers, prefix_products


@dataclass(frozen=True)
class ModularSums(Task):
    """Uniform digits in [0, modulus); after each, the sum so far modulo `modulus`: a cyclic group."""

    name = "modular_sums"

    length: int = 64
    evaluation_lengths: tuple[int, ...] = (64, 128, 256, 512)
    modulus: int = 5
    """Number of digits and of answers."""

    def __post_init__(self) -> None:
        """Check every field; raises `ConfigError` naming the first that is wrong."""
        _check_modulus(self.name, self.modulus)
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        """Digits and the closing token."""
        return self.modulus + 1

    @property
    def shortest(self) -> int:
        """One digit and the closing token."""
        return 2

    @property
    def chance(self) -> float:
        """One of the remainders."""
        return 1 / self.modulus

    def scored(self, length: int) -> int:
        """One label a digit."""
        return length - 1

    def draw(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        """Rows of a valid length."""
        digits = integers(0, self.modulus, (batch, length - 1), generator)
        return answered(digits, torch.remainder(digits.cumsum(1), self.modulus), end=self.modulus)


@dataclass(frozen=True)
class ModularExpressions(Task):
    """Digits joined by +, - and *; after each digit, the value of the expression so far modulo `modulus`.

    Multiplication binds tighter, as usual, so two numbers must be kept: the sum of the finished terms and the term at
    hand. A row has an even number of tokens read, or one more whose last operator is not answered.
    Source: Deletang et al., "Neural Networks and the Chomsky Hierarchy", 2022 (modular arithmetic without brackets).
    """

    name = "modular_expressions"

    length: int = 64
    evaluation_lengths: tuple[int, ...] = (64, 128, 256, 512)
    modulus: int = 5
    """Number of digits and of answers."""

    def __post_init__(self) -> None:
        """Check every field; raises `ConfigError` naming the first that is wrong."""
        _check_modulus(self.name, self.modulus)
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        """Digits, the operators +, - and * in this order, and the closing token."""
        return self.modulus + 4

    @property
    def shortest(self) -> int:
        """One digit and the closing token."""
        return 2

    @property
    def chance(self) -> float:
        """One of the remainders."""
        return 1 / self.modulus

    def scored(self, length: int) -> int:
        """One label a digit."""
        return length // 2

    def draw(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        """Rows of a valid length."""
        k, count = self.modulus, length // 2
        digits = integers(0, k, (batch, count), generator)
        operators = integers(
            0, 3, (batch, count), generator
        )  # before each digit; the first is a plus that is not shown
        operators[:, 0] = 0
        tokens = torch.stack((operators + k, digits), dim=2).flatten(1)[:, 1:]
        answers = torch.full_like(tokens, IGNORED)
        answers[:, ::2] = self._values(digits, operators)
        if length - 1 > tokens.shape[1]:
            last = integers(k, k + 3, (batch, 1), generator)
            tokens, answers = torch.cat((tokens, last), 1), torch.cat((answers, torch.full_like(last, IGNORED)), 1)
        return answered(tokens, answers, end=k + 3)

    def _values(self, digits: torch.Tensor, operators: torch.Tensor) -> torch.Tensor:
        """Values of all prefixes.

        Operator and digit n map (finished, term) to (finished + a term + b, c term + d), where (a, b, c, d) is
        (1, 0, 0, n) for +, (1, 0, 0, -n) for - and (0, 0, n, 0) for *. Such maps are closed under composition.
        """
        k = self.modulus
        times = (operators == 2).long()
        signed = torch.where(operators == 1, -digits, digits) % k

        def compose(first: Element, second: Element) -> Element:
            (a1, b1, c1, d1), (a2, b2, c2, d2) = first, second
            return (a1 + a2 * c1) % k, (b1 + a2 * d1 + b2) % k, c2 * c1 % k, (c2 * d1 + d2) % k

        maps = 1 - times, torch.zeros_like(digits), times * digits, (1 - times) * signed
        _, finished, _, term = prefix_products(maps, compose)  # from (0, 0)
        return (finished + term) % k


def _check_modulus(name: str, modulus: int) -> None:
    if modulus < 2:
        raise ConfigError(f"{name}.modulus is {modulus}; expected at least 2.")
