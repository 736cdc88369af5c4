"""What a training step reads: batches, where they come from, and how many predictions they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from resnet_bk.data.loader import IGNORED_LABEL


class BatchLoader(Protocol):
    """An endless iterator of batches whose position is saved with a checkpoint.

    A batch is a mapping or named tuple with `input_ids` [batch, time] and, optionally, `labels` (unshifted, -100 where
    nothing is to be predicted), `cu_seqlens` (document boundaries; batch 1) and `continues` (which rows continue
    those of the batch before, bool [batch]; `training.carry` needs it).
    """

    def __next__(self) -> Any:
        """The next batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position of the next batch, in plain JSON types."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` returned."""
        ...


def batch_fields(batch: Any) -> dict[str, Any]:
    """The fields of a loader's batch by name."""
    return dict(batch) if isinstance(batch, Mapping) else batch._asdict()


def model_arguments(batch: Any) -> dict[str, Tensor]:
    """Keyword arguments of the model for a loader's batch; labels are the inputs themselves unless given."""
    fields = batch_fields(batch)
    arguments = {name: fields.get(name) for name in ("input_ids", "labels", "cu_seqlens")}
    if arguments["labels"] is None:
        arguments["labels"] = arguments["input_ids"]
    return {name: tensor for name, tensor in arguments.items() if tensor is not None}


def count_targets(arguments: dict[str, Tensor]) -> int:
    """Tokens that the model is trained to predict: labels after the first of each row and of each document."""
    counted = arguments["labels"][:, 1:] != IGNORED_LABEL
    if "cu_seqlens" in arguments:
        counted[:, arguments["cu_seqlens"][1:-1].long() - 1] = False
    return int(counted.sum())
