"""Multi-query associative recall."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from resnet_bk.errors import ConfigError
from resnet_bk.experiments.tasks.base import IGNORED, Batch, Task, integers, subsets


@dataclass(frozen=True)
class AssociativeRecall(Task):
    """Key-value pairs, then every key once more at a random later place: what was its value?

    A row starts with `pairs` distinct keys, each followed by its value. Behind them, every second place may hold a
    query; each key is asked for once, at a place drawn without replacement with weight (place + 1)^(power - 1), so
    near places are likelier. All other places hold uniform tokens of the whole vocabulary. The token after a query
    is not its value, so answers are never shown twice.

    Source: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", 2023, where 4 pairs
    in 64 tokens to 64 pairs in 512 are usual; 256 pairs in 1,024 tokens are four times that.
    """

    name = "recall"

    length: int = 512
    evaluation_lengths: tuple[int, ...] = (512, 1024)
    pairs: int = 64
    """Key-value pairs a row."""
    fewest_pairs: int = 0
    """Training rows hold a log-uniform number of pairs from here to `pairs`; 0 = all hold `pairs`."""
    shortest_length: int = 0
    """Training batches take turns between rows of `length`, half of it and so on down to this, with pairs in
    proportion; 0 = all rows have `length`."""
    evaluation_pairs: tuple[int, ...] = ()
    """Other numbers of pairs to evaluate with, where a row has room."""
    vocabulary: int = 8192
    """Token ids; the lower half are keys, the upper half values."""
    power: float = 0.01
    """Exponent of the distances between pairs and queries; 1 is uniform."""
    random_filler: bool = True
    """Fill the other places with uniform tokens; else with 0, which is no key."""

    def __post_init__(self) -> None:
        """Check every field; raises `ConfigError` naming the first that is wrong."""
        most = self.vocabulary // 2 - 1
        if not 1 <= self.pairs <= most:
            raise ConfigError(f"recall.pairs is {self.pairs}; expected 1 to {most}, vocabulary / 2 - 1.")
        if not 0 <= self.fewest_pairs <= self.pairs:
            raise ConfigError(f"recall.fewest_pairs is {self.fewest_pairs}; expected 0 to {self.pairs}, the pairs.")
        if self.shortest_length and not self.length >= self.shortest_length >= self.length / self.pairs:
            raise ConfigError(
                f"recall.shortest_length is {self.shortest_length}; expected 0, or {self.length // self.pairs} (one "
                f"pair a row) to {self.length}, the length."
            )
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        """Keys, values and 0."""
        return self.vocabulary

    @property
    def shortest(self) -> int:
        """Two tokens a pair and two a query."""
        return 4 * self._most(self.shortest_length or self.length)

    def _most(self, length: int) -> int:
        """Most pairs in a row of `length` tokens."""
        if not self.shortest_length or length >= self.length:
            return self.pairs
        return max(1, self.pairs * length // self.length)

    def training_length(self, step: int) -> int:
        """`length`, half of it and so on, from step to step."""
        if not self.shortest_length:
            return self.length
        return self.length >> step % ((self.length // self.shortest_length).bit_length())

    @property
    def chance(self) -> float:
        """One of the values in the row."""
        return 1 / self.pairs

    def scored(self, length: int) -> int:
        """One label a query."""
        return self._most(length)

    def evaluations(self) -> dict[str, Task]:
        """Rows that all hold `pairs` pairs, and as many as `evaluation_pairs` says."""
        whole = dataclasses.replace(self, fewest_pairs=0, shortest_length=0, evaluation_pairs=())
        found: dict[str, Task] = {"": whole}
        for pairs in self.evaluation_pairs:
            lengths = tuple(length for length in self.evaluation_lengths if length >= 4 * pairs)
            if lengths:
                changes = {"pairs": pairs, "length": lengths[0], "evaluation_lengths": lengths}
                found[f"pairs_{pairs}"] = dataclasses.replace(whole, **changes)
        return found

    def draw(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        """Rows of a valid length."""
        device, half, pairs = generator.device, self.vocabulary // 2, self._most(length)
        keys = 1 + subsets(batch, pairs, half - 1, generator)
        values = half + subsets(batch, pairs, self.vocabulary - half, generator)
        held = torch.full((batch, 1), pairs, device=device)
        if self.fewest_pairs:
            place = torch.rand(batch, 1, generator=generator, device=device)
            fewest = min(self.fewest_pairs, pairs)
            span = math.log((pairs + 1) / fewest)
            held = (fewest * (span * place).exp()).long().clamp_(max=pairs)  # the largest place rounds up
        # Gumbel noise on log weights: the largest values are draws without replacement.
        slots = torch.arange((length - 2) // 2, device=device)
        uniform = torch.rand(batch, slots.numel(), generator=generator, device=device, dtype=torch.float64)
        score = (self.power - 1) * torch.log1p(slots) - torch.log(-torch.log(uniform))
        score = score.masked_fill(slots >= (length - 2 * held) // 2, -math.inf)
        gaps = score.topk(pairs, dim=1).indices
        # Pairs that a row does not hold are written to a column behind its end, which is then cut off.
        number = torch.arange(pairs, device=device)
        absent = number >= held
        query = (2 * held + 2 * gaps).masked_fill(absent, length)
        key = (2 * number).expand(batch, pairs).masked_fill(absent, length)
        shape = (batch, length + 2)
        tokens = integers(0, self.vocabulary, shape, generator) if self.random_filler else keys.new_zeros(shape)
        tokens.scatter_(1, key, keys).scatter_(1, key + 1, values).scatter_(1, query, keys)
        labels = torch.full_like(tokens, IGNORED).scatter_(1, query + 1, values)
        return Batch(tokens[:, :length].contiguous(), labels[:, :length].contiguous())
