"""Training batches that are the same for every model: a function of corpus, lengths, way of starting and seed alone."""

from __future__ import annotations

import hashlib
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from resnet_bk.data.loader import IGNORED_LABEL, PackedTokenLoader, TokenLoader
from resnet_bk.data.shards import TokenDataset
from resnet_bk.errors import CheckpointError, ConfigError, DataError

Context = Literal["fresh", "carried", "documents"]
CONTEXTS: dict[str, str] = {
    "fresh": "every sequence starts from an empty state",
    "carried": "rows are contiguous text, the state carried from batch to batch",
    "documents": "the state is empty at every start of a sequence or document",
}
"""How the first token of a training sequence is predicted."""


class TrainingBatch(NamedTuple):
    """What one optimizer step reads; every input has a target."""

    inputs: Tensor
    """int64 `[rows, time]`."""
    targets: Tensor
    """int64 `[rows, time]`, the token after each input; -100 where that begins another document."""
    cu_seqlens: Tensor | None
    """Boundaries for `documents`, whose batches are one packed row; else None."""
    restart: bool
    """The state of earlier batches does not belong to these rows."""


class TrainingBatches:
    """Endless batches of `batch_size` sequences of `sequence_length` predictions, with a digest of all read so far.

    Args:
        dataset: training tokens.
        sequence_length: predictions in a row.
        batch_size: rows.
        context: see `CONTEXTS`.
        seed: of the order of `fresh` and `documents`, and of where the rows of `carried` are cut in each epoch.

    Raises:
        ConfigError: a context that does not exist.
        DataError: the corpus is shorter than one batch needs.
    """

    def __init__(
        self, dataset: TokenDataset, *, sequence_length: int, batch_size: int, context: str, seed: int
    ) -> None:
        if context not in CONTEXTS:
            raise ConfigError(f"context is {context!r}; expected one of {', '.join(CONTEXTS)}.")
        self.digest = ""
        """SHA-256 over all batches so far; equal for two models that read the same."""
        self._dataset, self._length, self._rows, self._seed = dataset, sequence_length, batch_size, seed
        self._context = context
        self._step = 0
        # One token more than predictions: the last target.
        if context == "fresh":
            self._windows = TokenLoader(dataset, sequence_length + 1, batch_size, seed=seed)
        elif context == "documents":
            self._windows = PackedTokenLoader(dataset, sequence_length + 1, seed=seed)
        else:
            self._windows = None
            # Room for a cut anywhere in the first sequence, so that every epoch has as many steps.
            self._stride = (len(dataset) - sequence_length) // batch_size
            self._epoch_steps = (self._stride - 1) // sequence_length
            if self._epoch_steps < 1:
                raise DataError(
                    f"The {dataset.name} split has {len(dataset)} tokens, too few for {batch_size} contiguous rows of "
                    f"{sequence_length}; lower training.batch_size or training.sequence_length."
                )

    def __next__(self) -> TrainingBatch:
        batch = {"fresh": self._fresh, "carried": self._carried, "documents": self._documents}[self._context]()
        self._step += 1
        content = batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes()
        self.digest = hashlib.sha256(self.digest.encode() + content).hexdigest()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Position of the next batch, in plain JSON types."""
        return {
            "step": self._step,
            "digest": self.digest,
            "windows": None if self._windows is None else self._windows.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` returned; raises `CheckpointError` for another corpus."""
        if (state["windows"] is None) != (self._windows is None):
            raise CheckpointError("The checkpoint was written with another way of starting sequences; start anew.")
        if self._windows is not None:
            self._windows.load_state_dict(state["windows"])
        self._step, self.digest = state["step"], state["digest"]

    def _fresh(self) -> TrainingBatch:
        assert isinstance(self._windows, TokenLoader)
        ids = next(self._windows).input_ids
        return TrainingBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, restart=True)

    def _carried(self) -> TrainingBatch:
        epoch, place = divmod(self._step, self._epoch_steps)
        key = hashlib.blake2b(f"{self._seed}:{epoch}".encode(), digest_size=8).digest()
        start = int.from_bytes(key, "little") % self._length + place * self._length
        rows = [start + row * self._stride for row in range(self._rows)]
        ids = np.stack([self._dataset.tokens[first : first + self._length + 1] for first in rows])
        tokens = torch.from_numpy(ids.astype(np.int64))
        return TrainingBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, restart=place == 0)

    def _documents(self) -> TrainingBatch:
        assert isinstance(self._windows, PackedTokenLoader)
        inputs, targets, boundaries = [], [], [torch.zeros(1, dtype=torch.int64)]
        for row in range(self._rows):
            window = next(self._windows)
            assert window.cu_seqlens is not None
            starts = window.cu_seqlens[1:-1]
            following = window.input_ids[0, 1:].clone()
            following[starts - 1] = IGNORED_LABEL
            inputs.append(window.input_ids[0, :-1])
            targets.append(following)
            inside = starts[starts < self._length]
            boundaries += [inside + row * self._length, torch.tensor([(row + 1) * self._length])]
        return TrainingBatch(torch.cat(inputs)[None], torch.cat(targets)[None], torch.cat(boundaries), restart=True)
