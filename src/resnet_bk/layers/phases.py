"""Phases that add up along a sequence: extra rotations of queries and keys beside those of their positions."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.ops.context import Segment, entering_sum


def peierls_angles(
    turn: Float[Tensor, "batch time pairs"],
    weight: Float[Tensor, "batch time heads"],
    pairs: int,
    start: Float[Tensor, "rows heads*pairs"] | None,
    cu_seqlens: Tensor | None,
    segment: Segment | None,
) -> tuple[Float[Tensor, "batch time heads all_pairs"], Float[Tensor, "rows heads*pairs"]]:
    """Angles in radians of all `pairs` pairs of channels at every token, and those after the last, float64.

    A token turns a head by its weight on entry to that head times up to half a turn: a token that is not written does
    not turn either, as in a step of an ordinary differential equation.

    Args:
        turn: raw projection; it turns the slowest pairs, which their positions turn least.
        weight: of a token on entry, float32 or wider.
        pairs: pairs of channels there are; those without a turn get angle 0.
        start: angles before the sequences or documents; None is 0.
        cu_seqlens: boundaries of packed documents.
        segment: this rank's part of sequences that ranks share.
    """
    step = weight[..., None] * (math.pi * torch.tanh(turn.to(weight.dtype)))[:, :, None]
    total, last = running_sum(step.flatten(2), start, cu_seqlens, segment)
    angle = torch.remainder(total, 2 * math.pi).to(weight.dtype).unflatten(-1, (weight.shape[-1], -1))
    return F.pad(angle, (pairs - turn.shape[-1], 0)), torch.remainder(last, 2 * math.pi)


def running_sum(
    turned: Float[Tensor, "batch time channels"],
    start: Float[Tensor, "rows channels"] | None,
    cu_seqlens: Tensor | None,
    segment: Segment | None,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "rows channels"]]:
    """Sum of `turned` per sequence or document up to every token, from `start`, and at its end; float64."""
    total = turned.double().cumsum(1)
    if segment is not None:
        start = entering_sum(total[:, -1], segment, first=start)
    if cu_seqlens is None:
        total = total if start is None else total + start[:, None]
        return total, total[:, -1].clone()  # a view would keep all sites alive
    bounds = cu_seqlens.long()
    before = torch.cat((total.new_zeros(1, total.shape[2]), total[0]))[bounds[:-1]]
    offset = -before if start is None else start - before
    total = total + torch.repeat_interleave(offset, bounds.diff(), dim=0)[None]
    return total, total[0, bounds[1:] - 1]
