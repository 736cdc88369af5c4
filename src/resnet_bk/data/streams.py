"""Training batches whose rows continue those of the batch before: long windows, or whole documents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from resnet_bk.data.loader import IGNORED_LABEL, Batch, WindowOrder, check_identity, epoch_key, permuted_index
from resnet_bk.data.shards import TokenDataset
from resnet_bk.errors import CheckpointError, ConfigError


class StreamLoader(WindowOrder, Iterator[Batch]):
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
        return Batch(labels[:, : self._segment_length], labels=labels, continues=torch.full((len(rows),), continues))

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


class DocumentLoader(Iterator[Batch]):
    """Endless iterator of batches in which every row reads one document after the other, whole, segment by segment.

    A document begins a segment, so what its last segment leaves empty is nobody's input or target; documents should be
    longer than `sequence_length`. Of a document only the first token is nobody's target. Documents come in a random
    order, another one in every epoch, each to the row that has ended its own first.
    """

    def __init__(self, dataset: TokenDataset, sequence_length: int, batch_size: int, *, seed: int = 0) -> None:
        """Start with the first documents of epoch 0.

        Raises:
            ConfigError: a length or size below 1.
        """
        for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"training.{name} is {value}; expected a whole number >= 1.")
        self._dataset, self._sequence_length, self._seed = dataset, sequence_length, seed
        self._drawn = 0
        self._rows = [(0, 0)] * batch_size
        """Where each row reads on, and where its document ends."""

    @property
    def epoch(self) -> int:
        """Passes over the documents completed so far, but for those that rows are still reading."""
        return self._drawn // self._dataset.num_documents

    def __next__(self) -> Batch:
        length = self._sequence_length
        continues = torch.tensor([start < end for start, end in self._rows])
        inputs = torch.zeros(len(self._rows), length, dtype=torch.int64)
        labels = torch.full((len(self._rows), length + 1), IGNORED_LABEL)
        for number, (start, end) in enumerate(self._rows):
            if start == end:
                start, end = self._next_document()
            last = min(start + length, end)
            tokens = torch.from_numpy(self._dataset.tokens[start : min(last + 1, end)].astype(np.int64))
            inputs[number, : last - start] = tokens[:length]
            labels[number, : len(tokens)] = tokens
            self._rows[number] = last, end
        return Batch(inputs, labels=labels, continues=continues)

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, in plain JSON types."""
        return {**self._identity(), "drawn": self._drawn, "rows": [list(row) for row in self._rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the place that `state_dict` told.

        Raises:
            CheckpointError: the place belongs to other data or settings, or is none.
        """
        check_identity(state, self._identity())
        drawn, rows = state.get("drawn"), state.get("rows")
        size = len(self._dataset)
        if not isinstance(drawn, int) or not isinstance(rows, list) or not all(0 <= a <= b <= size for a, b in rows):
            raise CheckpointError(
                f"The data loader's place in the checkpoint is {drawn!r} documents and rows {rows!r}; expected a "
                "number, and for each row where it reads on and where its document ends."
            )
        self._drawn, self._rows = drawn, [(start, end) for start, end in rows]

    def _identity(self) -> dict[str, Any]:
        return {
            "data_sha256": self._dataset.sha256,
            "documents": self._dataset.num_documents,
            "sequence_length": self._sequence_length,
            "batch_size": len(self._rows),
            "seed": self._seed,
        }

    def _next_document(self) -> tuple[int, int]:
        """First token and end of the next document."""
        epoch, place = divmod(self._drawn, self._dataset.num_documents)
        number = permuted_index(place, self._dataset.num_documents, epoch_key(self._seed, epoch))
        self._drawn += 1
        start, end = self._dataset.document_offsets[number : number + 2].tolist()
        return start, end
