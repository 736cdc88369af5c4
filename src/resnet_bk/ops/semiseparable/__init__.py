"""Causal mixing by a gated semiseparable matrix: chunked matrix products in training, one memory in decoding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resnet_bk.errors import BackendError, DomainError, ShapeError
from resnet_bk.ops.dispatch import Backend, choose_backend, compute_dtype, document_boundaries
from resnet_bk.ops.semiseparable.chunked import semiseparable_op
from resnet_bk.ops.semiseparable.kernels import has_tiles, semiseparable_triton_op
from resnet_bk.ops.semiseparable.reference import mix_step, per_head, semiseparable_reference
from resnet_bk.ops.semiseparable.rotation import phase_table, rotary_frequencies, rotate, rotate_memory

__all__ = ["MixState", "has_tiles", "rotary_frequencies", "rotate", "semiseparable_mix", "semiseparable_step"]


class MixState(NamedTuple):
    """All that later tokens need of earlier ones: the memory, and how many tokens it has seen."""

    memory: Float[Tensor, "rows heads state value"]
    position: Int[Tensor, " rows"]


def semiseparable_mix(
    query: Float[Tensor, "batch time *heads state"],
    key: Float[Tensor, "batch time *heads state"],
    value: Float[Tensor, "batch time heads value"],
    log_decay: Float[Tensor, "batch time heads"],
    *,
    source: Float[Tensor, "batch time heads"] | None = None,
    query_bias: Float[Tensor, "heads state"] | None = None,
    key_bias: Float[Tensor, "heads state"] | None = None,
    frequencies: Float[Tensor, " half_state"] | None = None,
    skip: Float[Tensor, " heads"] | None = None,
    scale: float = 1.0,
    norm_epsilon: float | None = None,
    initial: MixState | None = None,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    chunk_size: int = 64,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "batch time heads value"], MixState]:
    r"""Outputs of the causal semiseparable recurrence, head by head, and the state that continues it.

        S_t = exp(log_decay_t) S_{t-1} + source_t k_t x_t^T,     y_t = scale S_t^T q_t + skip x_t
        q_t = R(frequencies t) (query_t + query_bias),           k_t = R(frequencies t) (key_t + key_bias)

    that is y_i = scale sum_{j<=i} exp(log_decay_{j+1} + ... + log_decay_i) (q_i . k_j) source_j x_j + skip x_i, where R
    turns the channel pair (p, p + state/2) by its angle: rotary position embedding, or Peierls phases.

    Args:
        query: [batch, time, state] shared by all heads, or [batch, time, heads, state].
        key: the same; shared keys stay shared, per-head copies live in cache only.
        value: x.
        log_decay: log of the decay per token and head; at most 0 unless growth is meant.
        source: weight of a token on entry; None is 1.
        query_bias: added per head before the rotation.
        key_bias: added per head before the rotation.
        frequencies: angular frequencies in radians per token; None does not rotate.
        skip: per-head weight of the token itself.
        scale: factor on the scores.
        norm_epsilon: if given, every query and key is first divided by its root mean square, this added to its square.
        initial: state to continue from, one row per sequence (per document with `cu_seqlens`); None is empty.
        cu_seqlens: boundaries 0 = b_0 < ... < b_documents = time of documents packed along time (batch 1).
        chunk_size: tokens per score matrix of the chunked form, at least 1; the kernels take 64.
        backend: "reference" runs token by token, "chunked" in matrix products on any device, "triton" in kernels for
            a state of 32, 64 or 128 and values of 16 to 128 channels (powers of two).

    Returns:
        y in the dtype of `value`, and the state (memory in float32 or wider) after the last token of each row.

    Raises:
        ShapeError: shapes that do not fit; the message names the tensor.
        DomainError: chunk_size < 1. BackendError: an unknown backend, or one that cannot run here.

    Numerics: decays, cumulative sums (restarted in every chunk) and memory in float32 at least. Only differences of
    positions enter, and the initial angle is reduced in float64, so positions beyond 2^24 are as exact as small ones.
    Cost: per token and head 2 chunk (state + value) + 4 state value operations forward; memory independent of time
    except one state per segment kept for the backward pass.
    Source: the state-space duality form of gated linear attention; DERIVATION.md.
    """
    chosen = choose_backend(backend, value)
    batch, time, heads, state = _check_shapes(
        query, key, value, log_decay, source, query_bias, key_bias, frequencies, skip
    )
    if chunk_size < 1:
        raise DomainError(f"chunk_size is {chunk_size}; expected at least one token per score matrix.")
    dtype = compute_dtype(value, log_decay)
    bounds = None if cu_seqlens is None else document_boundaries(cu_seqlens, batch, time)
    rows = batch if bounds is None else len(bounds) - 1
    query, key = (x if x.dim() == 4 else x.unsqueeze(2) for x in (query, key))
    if chosen == "triton" and not has_tiles(state, value.shape[-1]):
        if backend == "triton":
            raise BackendError(
                f"the kernels mix states of 32, 64 or 128 and values of 16, 32, 64 or 128 channels; got {state} and "
                f"{value.shape[-1]}. Use backend='auto' or 'chunked'."
            )
        chosen = "chunked"
    if chosen == "triton":
        operands = (query, key, value, log_decay, source, query_bias, key_bias, frequencies, skip)
        return _mix_by_kernels(operands, initial, bounds, rows, scale, norm_epsilon)
    if norm_epsilon is not None:
        query, key = (torch.nn.functional.rms_norm(x, (state,), eps=norm_epsilon) for x in (query, key))
    memory, position = _initial(initial, rows, heads, state, value, dtype)
    if chosen == "reference":
        wide = [x if x is None else x.to(dtype) for x in (source, query_bias, key_bias, skip)]
        required = [x.to(dtype) for x in (query, key, value, log_decay)]
        y, final = semiseparable_reference(
            *required, *wide, frequencies=frequencies, scale=scale, memory=memory, position=position, bounds=bounds
        )
        y = y.to(value.dtype)
    else:
        chunk = min(chunk_size, max(16, 1 << (time - 1).bit_length()))
        memory = rotate_memory(memory, -position, frequencies)
        operands = [query, key, value, log_decay, source]
        if bounds is None:
            padding = -time % chunk
            if padding:
                operands = [x if x is None else _pad_time(x, padding) for x in operands]
            starts, ends = None, torch.full_like(position, time + padding)
        else:
            keep, starts, ends = _whole_chunks(bounds, chunk, value.device)
            operands = [x if x is None else _spread(x, keep, int(ends.sum())) for x in operands]
        needs_grad = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (*operands, query_bias, key_bias, skip, memory)
        )
        y, final, _ = semiseparable_op(
            *operands, query_bias, key_bias, frequencies, skip, memory, starts, scale, chunk, needs_grad
        )
        y = y[:, :time] if bounds is None else y[:, keep]
        final = rotate_memory(final, position + ends, frequencies)
    lengths = torch.tensor(bounds, device=position.device).diff() if bounds else time
    return y, MixState(final, position + lengths)


def _mix_by_kernels(operands, initial: MixState | None, bounds: list[int] | None, rows: int, scale: float, epsilon):
    """`semiseparable_mix` by the Triton kernels; an absent initial state costs nothing."""
    query, _, value, *_ = operands
    time, heads = value.shape[1:3]
    memory = position = None
    if initial is not None:
        memory, position = _initial(initial, rows, heads, query.shape[-1], value, torch.float32)
    edges = None if bounds is None else torch.tensor(bounds)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*operands, memory))
    y, final, _ = semiseparable_triton_op(*operands, memory, position, edges, scale, epsilon, needs_grad)
    lengths = time if edges is None else edges.diff().to(value.device)
    start = torch.zeros(rows, dtype=torch.long, device=value.device) if position is None else position
    return y, MixState(final, start + lengths)


def semiseparable_step(
    query: Float[Tensor, "batch *heads state"],
    key: Float[Tensor, "batch *heads state"],
    value: Float[Tensor, "batch heads value"],
    log_decay: Float[Tensor, "batch heads"],
    state: MixState,
    *,
    source: Float[Tensor, "batch heads"] | None = None,
    query_bias: Float[Tensor, "heads state"] | None = None,
    key_bias: Float[Tensor, "heads state"] | None = None,
    frequencies: Float[Tensor, " half_state"] | None = None,
    skip: Float[Tensor, " heads"] | None = None,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "batch heads value"], MixState]:
    """Output of one more token and the state after it: `semiseparable_mix` for time = 1, without its bookkeeping.

    Arguments are those of `semiseparable_mix` without the time dimension.
    Raises: ShapeError if the state's rows or sizes differ from the token's.
    Cost: reads and writes the memory once.
    """
    batch, heads, _ = value.shape
    memory, position = _initial(state, batch, heads, query.shape[-1], value, compute_dtype(value, log_decay))
    query, key = (x if x.dim() == 3 else x.unsqueeze(1) for x in (query, key))
    q = scale * per_head(query.to(memory.dtype), query_bias, heads)
    k = per_head(key.to(memory.dtype), key_bias, heads)
    if frequencies is not None:
        cos, sin = (part[:, None] for part in phase_table(position, frequencies, memory.dtype))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    y, memory = mix_step(q, k, value.to(memory.dtype), log_decay.to(memory.dtype), source, skip, memory)
    return y.to(value.dtype), MixState(memory, position + 1)


def _check_shapes(query, key, value, log_decay, source, query_bias, key_bias, frequencies, skip):
    """(batch, time, heads, state); raises `ShapeError` naming the first tensor that does not fit."""
    if value.dim() != 4 or 0 in value.shape:
        raise ShapeError(f"value must be a non-empty [batch, time, heads, value]; got {list(value.shape)}.")
    batch, time, heads, _ = value.shape
    state = query.shape[-1]
    expected = {
        "key": (key, query.shape),
        "log_decay": (log_decay, (batch, time, heads)),
        "source": (source, (batch, time, heads)),
        "query_bias": (query_bias, (heads, state)),
        "key_bias": (key_bias, (heads, state)),
        "frequencies": (frequencies, (state // 2,)),
        "skip": (skip, (heads,)),
    }
    if tuple(query.shape) not in ((batch, time, state), (batch, time, heads, state)):
        raise ShapeError(
            f"query must be [{batch}, {time}, state] or [{batch}, {time}, {heads}, state]; got {list(query.shape)}."
        )
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ShapeError(f"{name} must be {list(shape)}; got {list(tensor.shape)}.")
    if frequencies is not None and state % 2:
        raise ShapeError(f"rotary phases turn pairs of channels; the state size {state} must be even.")
    return batch, time, heads, state


def _initial(initial: MixState | None, rows: int, heads: int, state: int, value: Tensor, dtype: torch.dtype):
    shape = (rows, heads, state, value.shape[-1])
    if initial is None:
        return value.new_zeros(shape, dtype=dtype), value.new_zeros(rows, dtype=torch.long)
    if tuple(initial.memory.shape) != shape or tuple(initial.position.shape) != (rows,):
        raise ShapeError(
            f"initial must hold memory {list(shape)} and position [{rows}]; got {list(initial.memory.shape)} and "
            f"{list(initial.position.shape)}."
        )
    return initial.memory.to(dtype), initial.position


def _pad_time(x: Tensor, padding: int) -> Tensor:
    """`x` with `padding` zero tokens behind it: they decay nothing (log decay 0) and add nothing."""
    return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))


def _whole_chunks(bounds: list[int], chunk: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where each token goes when every document fills whole chunks, each one's first chunk, and padded lengths."""
    edges = torch.tensor(bounds)
    lengths = edges.diff()
    padded = -(-lengths // chunk) * chunk
    first = padded.cumsum(0) - padded
    keep = torch.arange(bounds[-1]) + torch.repeat_interleave(first - edges[:-1], lengths)
    return keep.to(device), (first // chunk).to(device), padded.to(device)


def _spread(x: Tensor, keep: Tensor, time: int) -> Tensor:
    """Tokens of `x` [1, tokens, ...] at places `keep` of [1, time, ...], zeros elsewhere."""
    return x.new_zeros(1, time, *x.shape[2:]).index_copy(1, keep, x)
