"""The recurrences of Mamba-2 and Mamba-3 as they are written, one token at a time; gradients by autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mamba2_reference(
    value: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor, skip: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Output [batch, time, heads, value] and final memory; arguments as for `mamba2_scan`, in one dtype."""
    outputs = []
    for t in range(value.shape[1]):
        d = step[:, t, :, None, None]
        entering = torch.einsum("bn,bhp->bhnp", write[:, t], value[:, t])
        memory = torch.exp(d * rate[:, None, None]) * memory + d * entering
        outputs.append(torch.einsum("bn,bhnp->bhp", read[:, t], memory) + skip[:, None] * value[:, t])
    return torch.stack(outputs, dim=1), memory


def turn_pairs(x: Tensor, angle: Tensor) -> Tensor:
    """`x` [..., state] with channels (2p, 2p + 1) turned by angle [..., p], p < state / 4; the rest as it is."""
    turning, resting = x.split([2 * angle.shape[-1], x.shape[-1] - 2 * angle.shape[-1]], dim=-1)
    first, second = turning.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return torch.cat((turned.flatten(-2), resting), dim=-1)


def mamba3_reference(
    value: Tensor,
    step: Tensor,
    log_decay: Tensor,
    trapezoid: Tensor,
    write: Tensor,
    read: Tensor,
    turn: Tensor,
    skip: Tensor,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Output and final memory, angle, key and value; arguments as for `mamba3_scan`, biases added, in one dtype.

    `write` and `read` are [batch, time, heads, state].
    """
    memory, angle, last_key, last_value = state
    outputs = []
    for t in range(value.shape[1]):
        d = step[:, t]
        angle = torch.remainder(angle + math.pi * torch.tanh(turn[:, t, None]) * d[..., None], 2 * math.pi)
        key, query = turn_pairs(write[:, t], angle), turn_pairs(read[:, t], angle)
        share = torch.sigmoid(trapezoid[:, t])
        decay = log_decay[:, t].exp()
        late = ((1 - share) * d * decay)[..., None, None] * last_key[..., None] * last_value[..., None, :]
        own = (share * d)[..., None, None] * key[..., None] * value[:, t, :, None]
        memory = decay[..., None, None] * memory + late + own
        outputs.append(torch.einsum("bhn,bhnp->bhp", query, memory) + skip[:, None] * value[:, t])
        last_key, last_value = key, value[:, t]
    return torch.stack(outputs, dim=1), (memory, angle, last_key, last_value)
