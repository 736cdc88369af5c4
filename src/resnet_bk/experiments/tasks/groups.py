"""Words in groups: which element, or which point, is reached. State that does not commute."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from resnet_bk.errors import ConfigError
from resnet_bk.experiments.tasks.base import Batch, Element, Task, answered, integers, prefix_products


# Tables are kept: a copy to the device waits for everything before it.
@functools.cache
def _products(degree: int, device: torch.device) -> Tensor:
    """Number of the product [earlier, later] of any two permutations, numbered in lexicographic order."""
    elements = list(permutations(range(degree)))  # p maps letter i to p[i]
    number = {element: place for place, element in enumerate(elements)}
    table = [[number[tuple(q[letter] for letter in p)] for q in elements] for p in elements]
    return torch.tensor(table, device=device)


@functools.cache
def _field(prime: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Entries of the letters S, T and T^-1 modulo `prime` [3, 4], and inverses of all numbers [prime], 0 for 0."""
    letters = torch.tensor([[0, -1, 1, 0], [1, 1, 0, 1], [1, -1, 0, 1]], device=device) % prime
    return letters, torch.tensor([0, *(pow(n, -1, prime) for n in range(1, prime))], device=device)


@dataclass(frozen=True)
class PermutationWords(Task):
    """Uniform elements of a symmetric group; after each, the product so far.

    Tokens are the permutations of `degree` letters in lexicographic order, and so are the answers; a later
    permutation acts on what the earlier ones made. The group is solvable up to degree 4 and not from 5 on, where the
    word problem is complete for NC1.
    Source: Merrill, Petty and Sabharwal, "The Illusion of State in State-Space Models", 2024.
    """

    name = "permutation_words"

    length: int = 64
    evaluation_lengths: tuple[int, ...] = (64, 128, 256, 512)
    degree: int = 3
    """Letters that are permuted."""

    def __post_init__(self) -> None:
        """Check every field; raises `ConfigError` naming the first that is wrong."""
        if not 2 <= self.degree <= 5:
            raise ConfigError(f"permutation_words.degree is {self.degree}; expected 2 to 5.")
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        """Elements and the closing token."""
        return math.factorial(self.degree) + 1

    @property
    def shortest(self) -> int:
        """One element and the closing token."""
        return 2

    @property
    def chance(self) -> float:
        """One of the elements."""
        return 1 / math.factorial(self.degree)

    def scored(self, length: int) -> int:
        """One label an element."""
        return length - 1

    def draw(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        """Rows of a valid length."""
        table = _products(self.degree, generator.device)

        def compose(first: Element, second: Element) -> Element:
            return (table[first[0], second[0]],)

        word = integers(0, len(table), (batch, length - 1), generator)
        (reached,) = prefix_products((word,), compose)
        return answered(word, reached, end=len(table))


@dataclass(frozen=True)
class ModularGroupWords(Task):
    """Words in the generators of PSL(2, Z) acting on the projective line over F_p; after each letter, the point.

    Letters are S: x -> -1/x, T: x -> x + 1 and its inverse; the start is 0, and infinity is the answer `prime`. The
    letters generate PSL(2, F_p), which is solvable for p = 2, 3 and simple from 5 on.
    """

    name = "modular_group_words"

    length: int = 64
    evaluation_lengths: tuple[int, ...] = (64, 128, 256, 512)
    prime: int = 5
    """Size of the field; the line has prime + 1 points."""

    def __post_init__(self) -> None:
        """Check every field; raises `ConfigError` naming the first that is wrong."""
        if self.prime < 2 or any(self.prime % n == 0 for n in range(2, self.prime)) or self.prime > 997:
            raise ConfigError(f"modular_group_words.prime is {self.prime}; expected a prime below 1,000.")
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        """Points (of which three are letters too, as tokens) and the closing token."""
        return max(self.prime + 1, 3) + 1

    @property
    def shortest(self) -> int:
        """One letter and the closing token."""
        return 2

    @property
    def chance(self) -> float:
        """One of the points."""
        return 1 / (self.prime + 1)

    def scored(self, length: int) -> int:
        """One label a letter."""
        return length - 1

    def draw(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        """Rows of a valid length."""
        p = self.prime
        letters, inverses = _field(p, generator.device)

        def compose(first: Element, second: Element) -> Element:
            (a, b, c, d), (e, f, g, h) = first, second  # the later letter multiplies from the left
            return (e * a + f * c) % p, (e * b + f * d) % p, (g * a + h * c) % p, (g * b + h * d) % p

        word = integers(0, 3, (batch, length - 1), generator)
        _, numerator, _, denominator = prefix_products(letters[word].unbind(-1), compose)
        points = torch.where(denominator == 0, p, numerator * inverses[denominator] % p)
        return answered(word, points, end=self.vocab_size - 1)
