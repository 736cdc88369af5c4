"""Gated semiseparable mixing one token at a time, in the input's precision; gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_bk.ops.semiseparable.rotation import phase_table, rotate


def mix_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    source: Tensor | None,
    skip: Tensor | None,
    memory: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output [rows, heads, value] of one token and the memory after it; query and key [rows, heads, state]."""
    incoming = value if source is None else source[..., None] * value
    memory = log_decay.exp()[..., None, None] * memory + key[..., :, None] * incoming[..., None, :]
    with torch.autocast(memory.device.type, enabled=False):  # the memory is never read in less than float32
        y = torch.einsum("bhk,bhkp->bhp", query, memory)
    return (y if skip is None else y + skip[:, None] * value), memory


def per_head(x: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Query or key channels with a head dimension [..., heads, state] and the per-head bias added."""
    x = x if bias is None else x + bias
    return x.expand(*x.shape[:-2], heads, x.shape[-1])


def semiseparable_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    source: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    skip: Tensor | None,
    *,
    frequencies: Tensor | None,
    scale: float,
    memory: Tensor,
    position: Tensor,
    bounds: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """Output [batch, time, heads, value] and final memory [rows, heads, state, value].

    `query` and `key` are [batch, time, heads or 1, state]; rows are documents when `bounds` is given.
    """
    time, heads = value.shape[1:3]
    query, key = scale * per_head(query, query_bias, heads), per_head(key, key_bias, heads)
    starts = {} if bounds is None else {start: row for row, start in enumerate(bounds[:-1])}
    initial, offset, finals, outputs = memory, position, [], []
    for t in range(time):
        if t in starts:
            if t:
                finals.append(memory)
            memory = initial[starts[t] : starts[t] + 1]
            offset = position[starts[t] : starts[t] + 1] - t
        q, k = query[:, t], key[:, t]
        if frequencies is not None:
            cos, sin = (part[:, None] for part in phase_table(offset + t, frequencies, q.dtype))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        token_source = None if source is None else source[:, t]
        y, memory = mix_step(q, k, value[:, t], log_decay[:, t], token_source, skip, memory)
        outputs.append(y)
    final = memory if bounds is None else torch.cat([*finals, memory])
    return torch.stack(outputs, dim=1), final
