"""Training batches from a token dataset: shuffled windows, endless, resumable to the exact window.

Every epoch cuts the tokens into windows of `sequence_length`, from an offset drawn for that epoch, so that the cuts
differ between epochs, and visits them in a random order. The order is a keyed permutation computed entry by entry (a
Feistel network, walked until it lands inside the range), so it needs no memory and the place in it is two integers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from resnet_bk.data.shards import TokenDataset
from resnet_bk.errors import CheckpointError, ConfigError, DataError

IGNORED_LABEL = -100
"""Label of what is nobody's target."""
_ROUNDS = 4


class Batch(NamedTuple):
    """What the model reads in one step."""

    input_ids: Tensor
    """int64 `[batch, time]`."""
    cu_seqlens: Tensor | None = None
    """Where each document starts in the one row, and at last `time`, int64 `[documents + 1]`; None: rows are whole."""
    labels: Tensor | None = None
    """int64 `[batch, time + 1]`: `input_ids` and what their last tokens are to predict; None: `input_ids` alone."""
    continues: Tensor | None = None
    """Which rows continue those of the batch before, bool `[batch]`; None: rows are unrelated."""


class WindowOrder:
    """The order of the windows, and the place in it."""

    def __init__(self, dataset: TokenDataset, sequence_length: int, seed: int, *, what: str = "sequence") -> None:
        if sequence_length < 1:
            raise ConfigError(f"training.{what}_length is {sequence_length}; expected a whole number >= 1.")
        if len(dataset) < sequence_length:
            raise DataError(
                f"The {dataset.name} split has {len(dataset)} tokens, fewer than training.{what}_length = "
                f"{sequence_length}; shorten the {what}s or use more text."
            )
        self._dataset = dataset
        self._sequence_length = sequence_length
        self._seed = seed
        self._enter(0)

    @property
    def epoch(self) -> int:
        """Passes over the dataset completed so far."""
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, in plain JSON types."""
        return {**self._identity(), "epoch": self._epoch, "window": self._window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the place that `state_dict` told.

        Raises:
            CheckpointError: the place belongs to other data, another sequence length or another seed, or is none.
        """
        check_identity(state, self._identity())
        epoch, window = state.get("epoch"), state.get("window")
        if not (isinstance(epoch, int) and isinstance(window, int) and epoch >= 0 and window >= 0):
            raise CheckpointError(
                f"The data loader's place in the checkpoint is epoch {epoch!r}, window {window!r}; expected two whole "
                "numbers >= 0."
            )
        self._enter(epoch)
        self._window = window

    def _identity(self) -> dict[str, Any]:
        return {"data_sha256": self._dataset.sha256, "sequence_length": self._sequence_length, "seed": self._seed}

    def _enter(self, epoch: int) -> None:
        self._epoch = epoch
        self._window = 0
        self._key = epoch_key(self._seed, epoch)
        slack = len(self._dataset) - self._sequence_length
        self._offset = int.from_bytes(self._key[:8], "little") % min(self._sequence_length, slack + 1)
        self._windows = (len(self._dataset) - self._offset) // self._sequence_length

    def _next_start(self) -> int:
        """Position of the next window's first token."""
        if self._window >= self._windows:
            self._enter(self._epoch + 1)
        start = self._offset + permuted_index(self._window, self._windows, self._key) * self._sequence_length
        self._window += 1
        return start


class TokenLoader(WindowOrder, Iterator[Batch]):
    """Endless iterator of batches with `input_ids`, int64 `[batch_size, sequence_length]`.

    Documents follow each other in a window, separated by the end-of-text tokens of the shard. The same dataset,
    sequence length and seed give the same windows in the same order, whatever the batch size.
    """

    def __init__(self, dataset: TokenDataset, sequence_length: int, batch_size: int, *, seed: int = 0) -> None:
        """Start at the first window of epoch 0.

        Raises:
            ConfigError: a length or size below 1.
            DataError: fewer tokens than one window.
        """
        super().__init__(dataset, sequence_length, seed)
        if batch_size < 1:
            raise ConfigError(f"training.batch_size is {batch_size}; expected a whole number >= 1.")
        self._batch_size = batch_size

    def __next__(self) -> Batch:
        starts = [self._next_start() for _ in range(self._batch_size)]
        windows = [self._dataset.tokens[start : start + self._sequence_length] for start in starts]
        return Batch(torch.from_numpy(np.stack(windows).astype(np.int64)))


class PackedTokenLoader(WindowOrder, Iterator[Batch]):
    """Endless iterator of batches with `cu_seqlens`: one window of `TokenLoader` each, cut where documents start.

    Given to the model together with `cu_seqlens`, no document sees another. A document that a window's edge cuts
    continues in another batch as if it began there.
    """

    def __init__(self, dataset: TokenDataset, sequence_length: int, *, seed: int = 0) -> None:
        """Start at the first window, of `sequence_length` tokens, of epoch 0; raises as `TokenLoader` does."""
        super().__init__(dataset, sequence_length, seed)

    def __next__(self) -> Batch:
        start, length, offsets = self._next_start(), self._sequence_length, self._dataset.document_offsets
        first = np.searchsorted(offsets, start, side="right")
        last = np.searchsorted(offsets, start + length, side="left")
        cuts = np.concatenate([[0], offsets[first:last] - start, [length]])
        tokens = self._dataset.tokens[start : start + length].astype(np.int64)
        return Batch(torch.from_numpy(tokens)[None], torch.from_numpy(cuts))


def check_identity(state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise `CheckpointError` naming the first of the settings of a loader that `state` was not written with."""
    for name, value in identity.items():
        if state.get(name) != value:
            raise CheckpointError(
                f"The data loader's {name} is {value!r}, but the checkpoint was written with {state.get(name)!r}; "
                "resume with the same data and settings, or start a new run."
            )


def epoch_key(seed: int, epoch: int) -> bytes:
    """The key of the order of an epoch, 32 bytes."""
    return hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=32).digest()


def permuted_index(index: int, size: int, key: bytes) -> int:
    """Where a random permutation of `range(size)`, chosen by `key`, sends `index`.

    Four Feistel rounds permute the numbers of an even number of bits; numbers that land at or beyond `size` are sent
    on until they land below it, at most four times on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(_ROUNDS):
            digest = hashlib.blake2b(b"%d:%d" % (number, right), key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << half | right
        if index < size:
            return index
