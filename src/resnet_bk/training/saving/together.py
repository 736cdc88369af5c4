"""One action on every rank, with one outcome: what failed on a rank fails on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from resnet_bk.errors import CheckpointError

Outcome = TypeVar("Outcome")


def checkpoint_group() -> ProcessGroup | None:
    """A group of all ranks on the CPU, for checkpoints alone; None in a single process.

    Saving in the background talks on it while training talks on another. Every rank calls this, in the same order.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, ProcessGroup)  # every rank is in it
    return group


def rank_of(group: ProcessGroup | None) -> int:
    """This process's rank; 0 in a single process."""
    return 0 if group is None else dist.get_rank(group)


def world_size_of(group: ProcessGroup | None) -> int:
    """Number of ranks; 1 in a single process."""
    return 1 if group is None else dist.get_world_size(group)


def on_every_rank(group: ProcessGroup | None, action: Callable[[], Outcome]) -> list[Outcome]:
    """What `action` returned on each rank, by rank.

    Raises:
        CheckpointError: it failed on some rank: the disk refused, or a file is damaged. Raised on every rank, so that
            none waits for one that gave up.
    """
    result, error = None, None
    try:
        result = action()
    except (OSError, SafetensorError, CheckpointError, CheckpointException) as caught:
        error = caught
    if group is None:
        if error is not None:
            raise error if isinstance(error, CheckpointError) else CheckpointError(reason_of(error)) from error
        return [result]  # pyright: ignore[reportReturnType]
    outcomes: list[tuple[Outcome, str | None]] = [None] * world_size_of(group)  # pyright: ignore[reportAssignmentType]
    dist.all_gather_object(outcomes, (result, None if error is None else reason_of(error)), group=group)
    for _, reason in outcomes:
        if reason is not None:
            raise CheckpointError(reason) from error
    return [found for found, _ in outcomes]


def on_first_rank(group: ProcessGroup | None, action: Callable[[], Outcome]) -> Outcome:
    """What `action` returned on rank 0, on every rank; raises as `on_every_rank` does."""
    return on_every_rank(group, lambda: action() if rank_of(group) == 0 else None)[0]  # pyright: ignore[reportReturnType]


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line; of several ranks' failures, the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{error}".strip().split("\n")[0] or type(error).__name__
