"""Context parallelism: one sequence on several ranks, each with a segment of it; see the docs page of that name.

    group = context_group(4)
    part = split_batch(batch, group)
    loss = model(**part, group=group).loss * (targets of this rank / targets of all)

Losses and gradients of the ranks then add up to those of one process that has the whole sequences.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_bk.errors import ConfigError, ShapeError
from resnet_bk.models.resnet_bk import ModelState
from resnet_bk.ops.context import SequenceGroup

# Its name since PyTorch 2.13, and the one before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ContextGroup:
    """Ranks of a `torch.distributed` process group that share their sequences, in the order of their segments.

    Args:
        process_group: None is all ranks.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.process_group = process_group
        self.rank: int = dist.get_rank(process_group)
        """Place of this process's segment, from 0."""
        self.size: int = dist.get_world_size(process_group)
        """Number of segments."""

    def gather(self, part: Tensor) -> Tensor:
        """[size, *part.shape]: the `part` of every rank, of one shape everywhere."""
        gathered = part.new_empty(self.size, *part.shape)
        _all_gather(gathered.view(-1), part.detach().reshape(-1), group=self.process_group)
        return gathered


def context_group(size: int) -> ContextGroup:
    """The group of `size` neighbouring ranks that this one belongs to; every rank of the run must call.

    Neighbours usually lie on one host, where the summaries of every layer travel fastest.

    Raises:
        ConfigError: `size` does not divide the number of ranks.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if size < 1 or ranks % size:
        raise ConfigError(
            f"distributed.context_parallel is {size}; expected a divisor of the number of ranks, {ranks}. Start more "
            "with torchrun --nproc-per-node, or lower it."
        )
    own, _ = dist.new_subgroups(size)
    assert not isinstance(own, int)  # every rank is in one of the groups
    return ContextGroup(own)


def split_batch(
    arguments: dict[str, Tensor], group: SequenceGroup, *, lengths: list[int] | None = None
) -> dict[str, Tensor]:
    """This rank's segments of a batch that every rank of the group holds, as arguments of the model.

    Args:
        arguments: `input_ids` and, optionally, unshifted `labels` [batch, time].
        group: who shares the batch.
        lengths: tokens of every segment, each at least 1; as equal as possible by default.

    Returns:
        The segments. Labels reach one token into the next segment, which is what the last position predicts.

    Raises:
        ShapeError: fewer tokens than ranks, lengths that do not cover them. ConfigError: packed documents.
    """
    if "cu_seqlens" in arguments:
        raise ConfigError(
            "cu_seqlens packs documents along time, which ranks cannot share yet; give whole sequences, or set "
            "distributed.context_parallel 1."
        )
    time, size = arguments["input_ids"].shape[1], group.size
    if lengths is None:
        lengths = [(rank + 1) * time // size - rank * time // size for rank in range(size)]
    if len(lengths) != size or sum(lengths) != time or min(lengths) < 1:
        raise ShapeError(
            f"lengths are {lengths} for sequences of {time} tokens on {size} ranks; expected one of at least 1 a rank, "
            "adding up to the tokens. Use fewer ranks or longer sequences (training.sequence_length)."
        )
    end = list(accumulate(lengths))[group.rank]
    start = end - lengths[group.rank]
    reach = {"labels": 1}
    return {name: tensor[:, start : end + reach.get(name, 0)].contiguous() for name, tensor in arguments.items()}


@torch.no_grad()
def last_state(state: ModelState, group: ContextGroup) -> ModelState:
    """The state after the last rank's segment, on every rank and without history: it continues the sequences."""

    def sent(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(tensor, group_src=group.size - 1, group=group.process_group)
        return tensor

    return state.map(sent)


@torch.no_grad()
def sum_gradients(model: nn.Module, group: ContextGroup) -> None:
    """Add up the gradients of all parameters over the group, in place; for a loop without DDP or FSDP."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=group.process_group)
