"""Linear cross entropy with all logits at once: plain, differentiable by autograd any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_bk.errors import DomainError


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    """The loss of `linear_cross_entropy`, by its definition; at least float32."""
    rows = counted_rows(targets, weight.shape[0], ignore_index, reduction)
    logits = hidden[rows] @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = torch.logsumexp(logits, dim=1) - logits.gather(1, targets[rows, None].long())[:, 0]
    if reduction == "none":
        return counted.new_zeros(targets.shape).index_copy(0, rows, counted)
    return counted.sum() if reduction == "sum" else counted.mean()


def counted_rows(targets: Tensor, vocabulary: int, ignore_index: int, reduction: str) -> Tensor:
    """Indices of the targets that are not `ignore_index`.

    Raises:
        DomainError: a counted target lies outside [0, vocabulary), or none is left to take the mean of.
    """
    rows = (targets != ignore_index).nonzero()[:, 0]
    if rows.numel() == 0:
        if reduction == "mean":
            raise DomainError(
                f"the mean loss needs a target, and all {targets.numel()} are ignore_index = {ignore_index}; "
                "skip this batch or use reduction='sum'."
            )
        return rows
    smallest, largest = torch.stack(targets[rows].aminmax()).tolist()
    if smallest < 0 or largest >= vocabulary:
        outside = (targets[rows] < 0) | (targets[rows] >= vocabulary)
        first = int(rows[outside.nonzero()[0, 0]])
        raise DomainError(
            f"targets[{first}] is {int(targets[first])}; expected a token id in [0, {vocabulary}) or ignore_index = "
            f"{ignore_index}. Check that tokenizer and model have the same vocabulary."
        )
    return rows
