"""What custom operators allocate inside, in bytes, for the planner; functions take the operator's own arguments.

Only what exceeds a per cent or so of a step is counted: prepared keys and queries, memories a block of chunks, tables
of gates, logits of a chunk. `tests/training/test_plan.py` and `benchmarks/memory_plan.py` compare with what is
allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnet_bk.ops.dispatch import planned_gpu
from resnet_bk.ops.linear_cross_entropy.chunked import default_chunk_tokens
from resnet_bk.ops.semiseparable.kernels import BLOCK_CHUNKS, CHUNK
from resnet_bk.ops.semiseparable.segments import segment_layout

OTHER, LOGITS = "workspace", "logits"
"""Parts of a plan: what nobody has claimed, and the logits of a chunk with their gradients."""
_WIDE = 4
"""Bytes of a float32."""


def _blocks(batch: int, time: int) -> int:
    """Memories that the kernels keep, a head."""
    return batch * -(-time // (CHUNK * BLOCK_CHUNKS))


def _kernels_forward(batch: int, time: int, heads: int, copies: int, state: int, channels: int, itemsize: int) -> int:
    """Prepared queries and keys, running decays and weights, turned biases."""
    tokens = batch * time
    tables = 2 * heads * CHUNK * state
    return 2 * tokens * copies * state * itemsize + 2 * tokens * heads * _WIDE + tables * itemsize


def _kernels_backward(batch: int, time: int, heads: int, copies: int, state: int, channels: int, itemsize: int) -> int:
    """The same again, memories behind every block, gradients of queries and keys in float32, four tables of gates."""
    tokens = batch * time
    memories = _blocks(batch, time) * heads * channels * state * _WIDE
    channel_gradients = 2 * tokens * copies * state * _WIDE
    prepared = _kernels_forward(batch, time, heads, copies, state, channels, itemsize)
    return prepared + memories + channel_gradients + 4 * tokens * heads * _WIDE


def _core_sizes(projection: Tensor, query_bias: Tensor, norm_weight: Tensor) -> tuple[int, ...]:
    heads, state = query_bias.shape
    return (*projection.shape[:2], heads, 1, state, norm_weight.shape[0] // heads, projection.itemsize)


def _shifted_keys(projection: Tensor, query_bias: Tensor, key_shift: Tensor | None) -> int:
    """Keys that know the token before, beside those of the projection."""
    if key_shift is None:
        return 0
    return projection.shape[0] * projection.shape[1] * query_bias.shape[1] * projection.itemsize


def _core_forward(projection: Tensor, query_bias: Tensor, *rest: Any) -> int:
    """Of `mixer_core`; the gates' tables are among its outputs."""
    shifted = _shifted_keys(projection, query_bias, rest[7])
    return _kernels_forward(*_core_sizes(projection, query_bias, rest[6])) + shifted


def _core_backward(projection: Tensor, query_bias: Tensor, *rest: Any) -> int:
    """Of its backward pass: that of the mixing, gradients behind the norm, of gates (three) and of shifted keys."""
    sizes = _core_sizes(projection, query_bias, rest[6])
    tokens, heads = sizes[0] * sizes[1], sizes[2]
    shifted = _shifted_keys(projection, query_bias, rest[7])
    behind_norm = tokens * rest[6].shape[0] * projection.itemsize
    return 2 * shifted + _kernels_backward(*sizes) + behind_norm + 5 * tokens * heads * _WIDE


def _mix_sizes(query: Tensor, value: Tensor) -> tuple[int, ...]:
    batch, time, heads, channels = value.shape
    return batch, time, heads, query.shape[2], query.shape[-1], channels, value.itemsize


def _mix_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> int:
    return _kernels_forward(*_mix_sizes(query, value))


def _mix_backward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> int:
    return _kernels_backward(*_mix_sizes(query, value))


def _chunked(value: Tensor, state: int, chunk: int, *, backward: bool) -> int:
    """Buffers of one segment of the chunked mixing."""
    layout = segment_layout(value, state, chunk)
    places = layout.chunks * layout.rows * layout.heads
    keys, channels, scores = chunk * layout.state, chunk * layout.value, chunk * chunk
    memory = layout.state * layout.value
    forward = 5 * keys + 4 * channels + 3 * scores + 2 * memory
    more = 3 * keys + 4 * channels + 2 * scores + 2 * memory
    tables = 2 * layout.chunks * layout.heads * keys
    return _WIDE * (places * (forward + backward * more) + tables * (1 + backward))


def _chunked_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> int:
    return _chunked(value, query.shape[-1], rest[-2], backward=False)


def _chunked_backward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> int:
    return _chunked(value, query.shape[-1], rest[-1], backward=True)


def _loss(hidden: Tensor, weight: Tensor, *rest: Any) -> int:
    """Of `linear_cross_entropy`: logits of a chunk in the precisions they pass through, the weight narrowed."""
    chunk_tokens, dtype = rest[4], rest[5]
    vocabulary, channels = weight.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    device = torch.device("cuda") if planned_gpu() else hidden.device
    length = min(chunk_tokens or default_chunk_tokens(vocabulary, device), hidden.shape[0])
    widens = device.type == "cuda" and dtype != wide
    logits = length * vocabulary * (dtype.itemsize + wide.itemsize * (1 + widens))
    matrix = weight.numel() * dtype.itemsize if weight.dtype != dtype else 0
    product = 0 if widens or dtype == wide else weight.numel() * dtype.itemsize
    return logits + matrix + product + 2 * length * channels * wide.itemsize


WORKSPACES: dict[str, tuple[str, Callable[..., int]]] = {
    "resnet_bk::mixer_core": (OTHER, _core_forward),
    "resnet_bk::mixer_core_backward": (OTHER, _core_backward),
    "resnet_bk::semiseparable_mix_triton": (OTHER, _mix_forward),
    "resnet_bk::semiseparable_mix_triton_backward": (OTHER, _mix_backward),
    "resnet_bk::semiseparable_mix": (OTHER, _chunked_forward),
    "resnet_bk::semiseparable_mix_backward": (OTHER, _chunked_backward),
    "resnet_bk::linear_cross_entropy": (LOGITS, _loss),
}
"""Operator -> part, and bytes that live inside a call and no longer."""


def _kept(out: Any, place: int, count: int) -> Any:
    """`out` with as many kept memories as the operator makes, where fake tensors do not know."""
    kept = out[place]
    if isinstance(kept.shape[0], int):
        return out
    replaced = list(out)
    replaced[place] = kept.new_empty(count, *kept.shape[1:])
    return type(out)(replaced)


def _kept_by_kernels(place: int, values: Callable[..., tuple[int, int]]) -> Callable[..., Any]:
    return lambda out, *args: _kept(out, place, _blocks(*values(*args)))


def _kept_in_chunks(out: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
    return _kept(out, 2, segment_layout(value, query.shape[-1], rest[-2]).segments)


KEPT_MEMORIES: dict[str, Callable[..., Any]] = {
    "resnet_bk::mixer_core": _kept_by_kernels(6, lambda projection, *_: tuple(projection.shape[:2])),
    "resnet_bk::semiseparable_mix_triton": _kept_by_kernels(2, lambda q, k, v, *_: tuple(v.shape[:2])),
    "resnet_bk::semiseparable_mix": _kept_in_chunks,
}
"""Operator -> its outputs with a number of kept memories that depends on how it cuts time."""
