"""Both scans as gated semiseparable mixing, in matrix products or kernels of this library; see DERIVATION.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_bk.ops.dispatch import Backend
from resnet_bk.ops.semiseparable import MixState, semiseparable_mix, semiseparable_step
from resnet_bk.ops.state_space.reference import turn_pairs


def mamba2_chunked(
    value: Tensor,
    step: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    skip: Tensor,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Output and final memory [rows, heads, state, value]; arguments as for `mamba2_scan`."""
    return _mix(read, write, value, step * rate, step, skip, memory, cu_seqlens, backend)


def mamba3_chunked(
    value: Tensor,
    step: Tensor,
    log_decay: Tensor,
    trapezoid: Tensor,
    write: Tensor,
    read: Tensor,
    turn: Tensor,
    skip: Tensor,
    state: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    bounds: list[int] | None,
    cu_seqlens: Tensor | None,
    backend: Backend,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Output and final memory, angle, key and value; arguments as for `mamba3_scan`, biases added.

    `write` and `read` are [batch, time, heads, state], gates and biased operands in float32 or wider.
    """
    time = value.shape[1]
    memory, angle, key, last_value = (None, None, None, None) if state is None else state
    edges = None if bounds is None else torch.tensor(bounds, device=value.device)
    last = [time - 1] if edges is None else edges[1:] - 1

    def ends(x: Tensor) -> Tensor:
        """The last token of every row [rows, ...], in memory of its own."""
        return x[:, -1].clone() if edges is None else x[0, last]

    angles = _accumulate(torch.tanh(turn)[:, :, None] * step[..., None], angle, edges)
    turned_read, turned_write = turn_pairs(read, angles), turn_pairs(write, angles)
    share = torch.sigmoid(trapezoid)
    own, late = share * step, (1 - share) * step
    before = _delayed(own, None, edges)
    y, final = _mix(
        turned_read.to(value.dtype),
        _delayed(turned_write, key, edges).to(value.dtype),
        _delayed(value, last_value, edges),
        log_decay,
        log_decay.exp() * (before + late),
        None,
        memory,
        cu_seqlens,
        backend,
    )
    at_once = own * (read * write).sum(-1) + skip.to(own.dtype)
    y = (y + at_once[..., None] * value).to(value.dtype)
    key, last_value = ends(turned_write), ends(value).to(final.dtype)
    final = final + ends(own)[..., None, None] * key[..., None] * last_value[..., None, :]
    return y, (final, torch.remainder(ends(angles), 2 * math.pi), key, last_value)


def _mix(query, key, value, log_decay, source, skip, memory, cu_seqlens, backend) -> tuple[Tensor, Tensor]:
    """`semiseparable_mix` without positions; a single token that continues a memory takes one step."""
    initial = None
    if memory is not None:
        initial = MixState(memory, torch.zeros(memory.shape[0], dtype=torch.long, device=memory.device))
    if initial is not None and value.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
        now = [x[:, 0] for x in (query, key, value, log_decay)]
        y, after = semiseparable_step(now[0], now[1], now[2], now[3], initial, source=source[:, 0], skip=skip)
        return y.unsqueeze(1), after.memory
    y, after = semiseparable_mix(
        query, key, value, log_decay, source=source, skip=skip, initial=initial, cu_seqlens=cu_seqlens, backend=backend
    )
    return y, after.memory


def _delayed(x: Tensor, first: Tensor | None, edges: Tensor | None) -> Tensor:
    """`x` one token later; rows begin with `first` [rows, ...], None is zeros."""
    if edges is None:
        head = torch.zeros_like(x[:, :1]) if first is None else first[:, None].to(x.dtype)
        return torch.cat((head, x[:, :-1]), dim=1)
    later = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
    heads = x.new_zeros(1, len(edges) - 1, *x.shape[2:]) if first is None else first[None].to(x.dtype)
    return later.index_copy(1, edges[:-1], heads)


def _accumulate(turns: Tensor, start: Tensor | None, edges: Tensor | None) -> Tensor:
    """Running sum of `turns` [batch, time, heads, pairs], half turns, per row from `start` radians, modulo 2 pi.

    Summed in float64: after a million tokens a float32 sum would be wrong by more than a hundredth of a radian.
    """
    total = math.pi * turns.double().cumsum(1)
    if edges is None:
        total = total if start is None else total + start[:, None]
    else:
        before = torch.cat((torch.zeros_like(total[0, :1]), total[0]))[edges[:-1]]
        offset = -before if start is None else start - before
        total = total + torch.repeat_interleave(offset, edges.diff(), dim=0, output_size=total.shape[1])[None]
    return torch.remainder(total, 2 * math.pi).to(turns.dtype)
