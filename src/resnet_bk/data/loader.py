"""Training batches from a token dataset: shuffled windows, whole or segment by segment, endless, resumable exactly.

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

_ROUNDS = 4


class Batch(NamedTuple):
    """What the model reads in one step."""

    input_ids: Tensor
    """int64 `[batch, time]`."""
    cu_seqlens: Tensor | None = None
    """Where each document starts in the one row, and at last `time`, int64 `[documents + 1]`; None: rows are whole."""
    labels: Tensor | None = None
    """int64 `[batch, time + 1]`: `input_ids` and what their last tokens are to predict; None: `input_ids` alone."""
    continues: bool | None = None
    """Whether the rows continue those of the batch before; None: rows are unrelated."""


class _WindowStream:
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
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise CheckpointError(
                    f"The data loader's {name} is {value!r}, but the checkpoint was written with {state.get(name)!r}; "
                    "resume with the same data and settings, or start a new run."
                )
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
        self._key = hashlib.blake2b(f"{self._seed}:{epoch}".encode(), digest_size=32).digest()
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


class TokenLoader(_WindowStream, Iterator[Batch]):
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


class StreamLoader(_WindowStream, Iterator[Batch]):
    """Endless iterator of batches whose rows continue those of the batch before, until all their streams end together.

    The streams are the windows of `TokenLoader` at `stream_length`, in its order, `batch_size` at a time and each in
    `stream_length / sequence_length` segments. Labels reach into the next segment, so that of a stream only the first
    token is nobody's target.
    """

    def __init__(
        self, dataset: TokenDataset, sequence_length: int, batch_size: int, *, stream_length: int = 0, seed: int = 0
    ) -> None:
        """Start at the first segment of the first streams of epoch 0.

        Args:
            dataset: training tokens.
            sequence_length: tokens of a segment.
            batch_size: streams read side by side.
            stream_length: tokens of a stream, a multiple of `sequence_length`; 0 is the most of which `dataset` has
                `batch_size`.
            seed: of the order of streams.

        Raises:
            ConfigError: a length or size below 1, or streams that segments do not tile.
            DataError: fewer tokens than one stream.
        """
        for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"training.{name} is {value}; expected a whole number >= 1.")
        if stream_length % sequence_length:
            raise ConfigError(
                f"training.stream_length is {stream_length}; expected 0 or a multiple of the {sequence_length} tokens "
                "that a batch reads of each stream."
            )
        share = len(dataset) // batch_size // sequence_length * sequence_length
        super().__init__(dataset, stream_length or max(sequence_length, share), seed, what="stream")
        self._segment_length, self._batch_size = sequence_length, batch_size
        self._segments = self._sequence_length // sequence_length
        self._segment = 0

    def __next__(self) -> Batch:
        if self._segment == 0:
            self._open()
        continues, first = self._segment > 0, self._segment * self._segment_length
        self._segment = (self._segment + 1) % self._segments
        last = first + self._segment_length + (self._segment > 0)  # with a target for the last token, if there is one
        rows = [self._dataset.tokens[start + first : start + last] for start in self._starts]
        labels = torch.from_numpy(np.stack(rows).astype(np.int64))
        return Batch(labels[:, : self._segment_length], labels=labels, continues=continues)

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, in plain JSON types: that of the streams in hand, and the next segment of them."""
        place = super().state_dict()
        if self._segment:
            place |= self._opened
        return place | {"segment": self._segment}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the place that `state_dict` told; raises `CheckpointError` as for windows."""
        super().load_state_dict(state)
        segment = state.get("segment")
        if not (isinstance(segment, int) and 0 <= segment < self._segments):
            raise CheckpointError(
                f"The data loader's segment in the checkpoint is {segment!r}; expected a whole number from 0 to "
                f"{self._segments - 1}."
            )
        if segment:
            self._open()
        self._segment = segment

    def _identity(self) -> dict[str, Any]:
        return {
            **super()._identity(),
            "sequence_length": self._segment_length,
            "stream_length": self._sequence_length,
            "batch_size": self._batch_size,
        }

    def _open(self) -> None:
        """Begin the next streams."""
        self._opened = {"epoch": self._epoch, "window": self._window}
        self._starts = [self._next_start() for _ in range(self._batch_size)]


class PackedTokenLoader(_WindowStream, Iterator[Batch]):
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
