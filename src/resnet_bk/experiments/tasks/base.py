"""What all synthetic tasks share: fields, the form of a batch, and products over all prefixes of a row."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from resnet_bk.errors import ConfigError

IGNORED = -100
"""Label of a position that is not scored."""


class Batch(NamedTuple):
    """Rows of a task, as `LanguageModel` takes them."""

    input_ids: Int[Tensor, "batch time"]
    labels: Int[Tensor, "batch time"]
    """Unshifted: labels[:, t] is what should follow input_ids[:, :t], and is -100 where nothing is scored.

    It differs from input_ids[:, t] where the task is to name a state and not to continue the row.
    """


@dataclass(frozen=True)
class Task(ABC):
    """A distribution over rows of tokens with known right answers.

    Rows are drawn by vectorised operations on the generator's device; the same seed on the same kind of device gives
    the same rows.
    """

    name: ClassVar[str]
    """Key in `TASKS`."""

    length: int = 256
    """Tokens of a training row."""
    evaluation_lengths: tuple[int, ...] = (256,)
    """Tokens of evaluation rows, beyond the training length too."""

    def __post_init__(self) -> None:
        """Check every length; raises `ConfigError` naming the first that is wrong."""
        for length in (self.length, *self.evaluation_lengths):
            if length < self.shortest:
                raise ConfigError(
                    f"A row of the task {self.name!r} has length {length}; expected at least {self.shortest} tokens."
                )

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids, answers included."""

    @property
    @abstractmethod
    def shortest(self) -> int:
        """Tokens of the shortest row that holds the task."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy of guessing uniformly among the possible answers."""

    @abstractmethod
    def scored(self, length: int) -> int:
        """Most labels that are scored in a row of `length` tokens."""

    def training_length(self, step: int) -> int:
        """Tokens of a row in the training batch of this step."""
        return self.length

    @abstractmethod
    def draw(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        """Rows of a valid length; `sample` checks and calls it."""

    def sample(self, batch: int, generator: torch.Generator, *, length: int | None = None) -> Batch:
        """Fresh rows on the generator's device, int64.

        Args:
            batch: number of rows.
            generator: source of all randomness.
            length: tokens of a row; default `self.length`.

        Raises:
            ConfigError: a row too short for the task.
        """
        length = self.length if length is None else length
        if length < self.shortest:
            raise ConfigError(
                f"length is {length}; the task {self.name!r} needs at least {self.shortest} tokens a row."
            )
        return self.draw(batch, length, generator)

    def evaluations(self) -> dict[str, Task]:
        """Tasks to evaluate on, by a short name; the empty name is the task itself as it counts."""
        return {"": self}

    @property
    def label(self) -> str:
        """Name of the task and the fields that differ from its usual size, as `make_task` reads them."""
        usual, found = type(self)().describe(), self.describe()
        changed = {key: value for key, value in found.items() if value != usual[key] and key != "evaluation_lengths"}
        shown = {key: "/".join(map(str, value)) if isinstance(value, list) else value for key, value in changed.items()}
        return ":".join([self.name, *(f"{key}={value}" for key, value in shown.items())])

    def describe(self) -> dict[str, Any]:
        """Name and every field, in plain JSON types, for the ledger."""
        fields = dataclasses.asdict(self).items()
        return {"task": self.name} | {key: list(value) if isinstance(value, tuple) else value for key, value in fields}


def integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform int64 in [low, high) on the generator's device."""
    return torch.randint(low, high, shape, generator=generator, device=generator.device)


def subsets(batch: int, size: int, among: int, generator: torch.Generator) -> Tensor:
    """Rows of `size` distinct numbers in [0, among) in random order, int64 [batch, size]."""
    return torch.rand(batch, among, generator=generator, device=generator.device).topk(size, dim=1).indices


def answered(tokens: Tensor, answers: Tensor, *, end: int) -> Batch:
    """The batch whose answer after reading tokens[:, :t + 1] is answers[:, t]; one token `end` closes every row.

    Args:
        tokens: int64 [batch, time - 1].
        answers: same shape, -100 where not scored.
        end: id of the closing token, beside which the last answer stands.
    """
    edge = torch.full_like(tokens[:, :1], end)
    return Batch(torch.cat((tokens, edge), dim=1), torch.cat((torch.full_like(edge, IGNORED), answers), dim=1))


Element = tuple[Tensor, ...]


def prefix_products(elements: Element, compose: Callable[[Element, Element], Element]) -> Element:
    """Products of all prefixes along dim 1, of elements held as several tensors [batch, time].

    Args:
        elements: parts of every element.
        compose: (earlier, later) -> their product, associative and elementwise.

    Cost: log2(time) calls of `compose` on whole rows; no loop over tokens.
    """
    shift, time = 1, elements[0].shape[1]
    while shift < time:
        earlier, later = tuple(part[:, :-shift] for part in elements), tuple(part[:, shift:] for part in elements)
        joined = compose(earlier, later)
        elements = tuple(torch.cat((part[:, :shift], new), dim=1) for part, new in zip(elements, joined, strict=True))
        shift *= 2
    return elements
