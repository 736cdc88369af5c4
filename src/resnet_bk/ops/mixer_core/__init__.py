"""Everything between the projections of the default mixer in one operator, for GPUs.

It launches the kernels of `key_shift`, `resolvent` (gates), `semiseparable` and `gated_norm`. Their gradients are
written side by side into one gradient of the projection; from operators apart, autograd would copy them there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_bk.ops.dispatch import document_boundaries
from resnet_bk.ops.gated_norm import triton as norm
from resnet_bk.ops.key_shift import triton as shifted_keys
from resnet_bk.ops.mixer_step import Source, StepParameters
from resnet_bk.ops.resolvent import GreenState
from resnet_bk.ops.resolvent import kernels as gates
from resnet_bk.ops.resolvent import launch as resolvent
from resnet_bk.ops.resolvent.self_check import verify_flux_gates
from resnet_bk.ops.semiseparable import MixState, rotary_frequencies
from resnet_bk.ops.semiseparable import kernels as mixing

__all__ = ["mixer_core"]


def mixer_core(
    projection: Tensor,
    parameters: StepParameters,
    mix: MixState | None,
    green: GreenState | None,
    *,
    previous: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    source: Source = "gated",
    absorption_floor: float = 1e-3,
    rotary_base: float = 10000.0,
    rotary_fraction: float = 1.0,
    epsilon: float = 1e-5,
) -> tuple[Tensor, MixState, GreenState, Tensor | None]:
    """What a mixer with exact dynamics and flux kernel does between its projections; `mixer_step` for many tokens.

    Args:
        projection: z, x (inner each), k, q (state each), a, e, s (heads each; no s for "unit") [batch, time, width].
        parameters: of any floating dtype.
        mix: memory and position before the first token of every row (document); None is empty.
        green: m before it [rows, heads]; None is the lead.
        previous: k before it [rows, state]; None is zero, and all there is without `parameters.key_shift`.
        cu_seqlens: boundaries of documents packed along time (batch 1).
        source: weight of the token on entry.
        absorption_floor: smallest eta; > 0.
        rotary_base: ratio of the largest to the smallest rotary wavelength.
        rotary_fraction: share of the pairs of keys, the fastest, that positions turn.
        epsilon: added to mean squares.

    Returns:
        Output [batch, time, inner] in the dtype of `projection`, and the states after the last token of every row, the
        last k among them (None without `parameters.key_shift`).

    Raises:
        ShapeError: boundaries that do not cover the tokens.
        BackendError: the kernels disagree with their reference on first use.

    Cost: that of its three parts; the gradient of the projection is written once.
    Source: docs/mathematics, "The mixer"; the parts' DERIVATION.md.
    """
    batch, time, _ = projection.shape
    heads, state = parameters.query_bias.shape
    bounds = None if cu_seqlens is None else torch.tensor(document_boundaries(cu_seqlens, batch, time))
    rows = batch if bounds is None else bounds.numel() - 1
    memory = position = None
    if mix is not None:
        memory, position = mix.memory.float(), mix.position
    real = imag = None
    if green is not None:
        real, imag = (part.float().broadcast_to(rows, heads) for part in green)
    frequencies = rotary_frequencies(state, rotary_base, rotary_fraction, device=projection.device)
    previous = None if parameters.key_shift is None or previous is None else previous.float()
    tensors = (projection, *parameters, frequencies, memory, position, real, imag, previous, bounds, cu_seqlens)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    out, final, *last, key = mixer_core_op(*tensors, absorption_floor, source, epsilon, save)[:5]
    lengths = time if bounds is None else bounds.diff().to(projection.device)
    start = torch.zeros(rows, dtype=torch.long, device=projection.device) if position is None else position
    after = None if parameters.key_shift is None else key
    return out, MixState(final, start + lengths), GreenState(*last), after


class _Pieces:
    """The sections of a projection, or of its gradient, as views [tokens, ...]."""

    def __init__(self, projection: Tensor, heads: int, state: int, kind: str) -> None:
        flat = mixing.flat(projection)
        inner = (flat.shape[1] - 2 * state - (2 if kind == "unit" else 3) * heads) // 2
        sizes = [inner, inner, state, state, heads, heads, 0 if kind == "unit" else heads]
        self.gate, x, key, query, self.potential, self.absorption, source = flat.split(sizes, dim=-1)
        self.value = x.unflatten(-1, (heads, inner // heads))
        self.key, self.query = key.unsqueeze(1), query.unsqueeze(1)
        self.source = None if kind == "unit" else source


def _parts(projection, query_bias, key_bias, absorption_bias, potential_scale, energy, skip, source_bias, key_shift,
           frequencies, position, real, imag, previous, bounds, cu_seqlens, floor, kind):  # fmt: skip
    """Pieces, medium and layout of the gates, what the mixing takes beside queries, keys, values and gates, and last k.

    The keys are shifted already.
    """
    heads, state = query_bias.shape
    pieces = _Pieces(projection, heads, state, kind)
    last_key = projection.new_empty(0)
    if key_shift is not None:
        raw = pieces.key.squeeze(1)
        if projection.is_cuda:
            shifted_keys.verify(raw, key_shift)
        keys, last_key = shifted_keys.forward(raw, key_shift, previous, projection.shape[1], cu_seqlens)
        pieces.key = keys.unsqueeze(1)
    medium = gates.gates_medium(
        kind, pieces.potential, pieces.absorption, pieces.source, potential_scale, energy, absorption_bias, source_bias,
        floor, real, imag,
    )  # fmt: skip
    rows = projection.shape[0] if bounds is None else bounds.numel() - 1
    layout = gates.layout(pieces.potential, rows, cu_seqlens)

    def operands(log_decay: Tensor, weight: Tensor) -> Any:
        shape = projection.shape[:2]
        tokens = (pieces.query, pieces.key, pieces.value, log_decay, weight)
        return (*(x.unflatten(0, shape) for x in tokens), query_bias, key_bias, frequencies, skip)

    return pieces, medium, layout, operands, last_key


@torch.library.custom_op("resnet_bk::mixer_core", mutates_args=())
def mixer_core_op(
    projection: Tensor,
    query_bias: Tensor,
    key_bias: Tensor,
    absorption_bias: Tensor,
    potential_scale: Tensor,
    energy: Tensor,
    skip: Tensor,
    source_bias: Tensor | None,
    norm_weight: Tensor,
    key_shift: Tensor | None,
    frequencies: Tensor,
    memory: Tensor | None,
    position: Tensor | None,
    green_real: Tensor | None,
    green_imag: Tensor | None,
    previous: Tensor | None,
    bounds: Tensor | None,
    cu_seqlens: Tensor | None,
    floor: float,
    kind: str,
    epsilon: float,
    save: bool,
) -> list[Tensor]:
    """Output, last memory, parts of the last m, last k; kept if `save`: outputs of the mixing, memories, m, gates."""
    pieces, medium, layout, operands, last_key = _parts(
        projection, query_bias, key_bias, absorption_bias, potential_scale, energy, skip, source_bias, key_shift,
        frequencies, position, green_real, green_imag, previous, bounds, cu_seqlens, floor, kind,
    )  # fmt: skip
    scale = query_bias.shape[1] ** -0.5
    log_decay, weight, *m = resolvent.forward(medium, layout, save)
    mixed = operands(log_decay, weight)
    if projection.is_cuda:
        lead, packed = green_real is None, cu_seqlens is not None
        verify_flux_gates(kind, projection.dtype, projection.device, lead, packed)
        mixing.verify(mixed, scale, epsilon)
        norm.verify(pieces.value, pieces.gate, norm_weight)
    launch = mixing.Launch(mixed, position, bounds, scale, epsilon)
    y, final, kept = launch.forward(memory, save)
    out = norm.forward(y, pieces.gate, norm_weight, epsilon).unflatten(0, projection.shape[:2])
    saved = [y, kept, *m[2:], log_decay, weight]
    return [out, final, *m[:2], last_key, *(x if save else x.new_empty(0) for x in saved)]


@torch.library.custom_op("resnet_bk::mixer_core_backward", mutates_args=())
def mixer_core_backward_op(
    projection: Tensor,
    query_bias: Tensor,
    key_bias: Tensor,
    absorption_bias: Tensor,
    potential_scale: Tensor,
    energy: Tensor,
    skip: Tensor,
    source_bias: Tensor | None,
    norm_weight: Tensor,
    key_shift: Tensor | None,
    frequencies: Tensor,
    memory: Tensor | None,
    position: Tensor | None,
    green_real: Tensor | None,
    green_imag: Tensor | None,
    previous: Tensor | None,
    bounds: Tensor | None,
    cu_seqlens: Tensor | None,
    final: Tensor,
    y: Tensor,
    kept: Tensor,
    m_real: Tensor,
    m_imag: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    grad_out: Tensor,
    grad_final: Tensor | None,
    grad_real: Tensor | None,
    grad_imag: Tensor | None,
    grad_key: Tensor | None,
    floor: float,
    kind: str,
    epsilon: float,
) -> list[Tensor]:
    """Gradients of projection, the nine parameters, memory, both parts of m and k before; empty where absent."""
    pieces, medium, layout, operands, _ = _parts(
        projection, query_bias, key_bias, absorption_bias, potential_scale, energy, skip, source_bias, key_shift,
        frequencies, position, green_real, green_imag, previous, bounds, cu_seqlens, floor, kind,
    )  # fmt: skip
    d_projection = torch.empty(projection.shape, dtype=projection.dtype, device=projection.device)
    heads, size = query_bias.shape
    into = _Pieces(d_projection, heads, size, kind)
    d_y, _, d_norm = norm.backward(mixing.flat(grad_out), y, pieces.gate, norm_weight, epsilon, into.gate)
    launch = mixing.Launch(operands(log_decay, weight), position, bounds, size**-0.5, epsilon)
    gate_grads = {name: torch.empty_like(log_decay) for name in ("log_decay", "source")}
    d_key = into.key if key_shift is None else torch.empty_like(into.key, memory_format=torch.contiguous_format)
    tokens = {"query": into.query, "key": d_key, "value": into.value}
    d_y = d_y.unflatten(0, projection.shape[:2])
    found = launch.backward(final, kept, d_y, grad_final, memory is not None, gate_grads | tokens)
    state = (None, None)
    if grad_real is not None or grad_imag is not None:
        zero = m_real.new_zeros(layout.rows, layout.heads)
        state = tuple(zero if grad is None else grad.contiguous() for grad in (grad_real, grad_imag))
    gate_grads = (gate_grads["log_decay"], gate_grads["source"])
    d_a, d_e, d_s, shared, d_real, d_imag = resolvent.adjoint(medium, layout, (m_real, m_imag), gate_grads, state)
    into.potential.copy_(d_a)
    into.absorption.copy_(d_e)
    if into.source is not None:
        into.source.copy_(d_s)
    d_shift = d_previous = y.new_empty(0)
    if key_shift is not None:
        raw, into_key = (_Pieces(x, heads, size, kind).key.squeeze(1) for x in (projection, d_projection))
        d_shift, d_previous = shifted_keys.backward(
            d_key.squeeze(1), grad_key, raw, key_shift, previous, projection.shape[1], cu_seqlens, into_key
        )
    d_scale, d_energy, d_bias, d_source_bias = shared
    parameters = (
        (query_bias, found["query_bias"]), (key_bias, found["key_bias"]), (absorption_bias, d_bias),
        (potential_scale, d_scale), (energy, d_energy), (skip, found["skip"]), (source_bias, d_source_bias),
        (norm_weight, d_norm), (key_shift, d_shift), (memory, found["initial"]), (green_real, d_real),
        (green_imag, d_imag), (previous, d_previous),
    )  # fmt: skip
    return [
        d_projection,
        *(y.new_empty(0) if x is None else grad.to(x.dtype).reshape(x.shape).clone() for x, grad in parameters),
    ]


@mixer_core_op.register_fake
def _(
    projection, query_bias, key_bias, absorption_bias, potential_scale, energy, skip, source_bias, norm_weight,
    key_shift, frequencies, memory, position, green_real, green_imag, previous, bounds, cu_seqlens, floor, kind,
    epsilon, save,
):  # fmt: skip
    batch, time, _ = projection.shape
    heads, state = query_bias.shape
    inner = norm_weight.shape[0]
    rows, tokens = batch if bounds is None else bounds.shape[0] - 1, batch * time

    def wide(*shape):
        return projection.new_empty(shape, dtype=torch.float32)

    out = [projection.new_empty(batch, time, inner), wide(rows, heads, state, inner // heads)]
    out += [wide(rows, heads), wide(rows, heads), projection.new_empty(0) if key_shift is None else wide(rows, state)]
    if not save:
        return [*out, projection.new_empty(0), *(wide(0) for _ in range(5))]
    # How many memories are kept is the operator's own affair: an unbacked size keeps it opaque to compilers.
    kept = wide(torch.library.get_ctx().new_dynamic_size(), heads, inner // heads, state)
    return [*out, projection.new_empty(tokens, heads, inner // heads), kept, *(wide(tokens, heads) for _ in range(4))]


@mixer_core_backward_op.register_fake
def _(
    projection, query_bias, key_bias, absorption_bias, potential_scale, energy, skip, source_bias, norm_weight,
    key_shift, frequencies, memory, position, green_real, green_imag, previous, *rest,
):  # fmt: skip
    like = (query_bias, key_bias, absorption_bias, potential_scale, energy, skip, source_bias, norm_weight, key_shift)
    like = (projection, *like, memory, green_real, green_imag, previous)
    return [projection.new_empty(0) if x is None else x.new_empty(x.shape) for x in like]


def _save(ctx, inputs, output) -> None:
    *tensors, floor, kind, epsilon, _ = inputs
    ctx.save_for_backward(*tensors, output[1], *output[5:])
    ctx.set_materialize_grads(False)
    ctx.options = (floor, kind, epsilon)


def _gradients(ctx, grads):
    tensors = ctx.saved_tensors
    projection, norm_weight = tensors[0], tensors[8]
    grad_out = grads[0]
    if grad_out is None:
        grad_out = projection.new_zeros(*projection.shape[:2], norm_weight.shape[0])
    found = iter(mixer_core_backward_op(*tensors, grad_out, *grads[1:5], *ctx.options))
    differentiable = (*range(10), 11, 13, 14, 15)
    out: list[Tensor | None] = [None] * 22
    for index in differentiable:
        grad = next(found)
        out[index] = grad if tensors[index] is not None else None
    return tuple(out)


mixer_core_op.register_autograd(_gradients, setup_context=_save)
