"""Custom operators over the Triton kernels: the flux gates in one pass over the projections, and the bare resolvent."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_bk.ops.resolvent.launch import Layout, Medium, adjoint, compose, forward
from resnet_bk.ops.resolvent.self_check import verify_flux_gates, verify_maps, verify_resolvent


@torch.library.custom_op("resnet_bk::flux_gates_triton", mutates_args=())
def flux_gates_op(
    potential: Tensor,
    absorption: Tensor,
    source: Tensor | None,
    potential_scale: Tensor,
    energy: Tensor,
    absorption_bias: Tensor,
    source_bias: Tensor | None,
    initial_real: Tensor | None,
    initial_imag: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: int,
    floor: float,
    kind: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log decay and weight [tokens, heads], parts of the last m [rows, heads], and of m if `save` (else empty)."""
    verify_flux_gates(kind, potential.dtype, potential.device, initial_real is None, cu_seqlens is not None)
    parameters = (potential_scale, energy, absorption_bias, source_bias)
    medium = gates_medium(kind, potential, absorption, source, *parameters, floor, initial_real, initial_imag)
    decay, weight, state_real, state_imag, *m = forward(medium, layout(potential, rows, cu_seqlens), save)
    return decay, weight, state_real, state_imag, m[0], m[1]


@torch.library.custom_op("resnet_bk::flux_gates_triton_backward", mutates_args=())
def flux_gates_backward_op(
    potential: Tensor,
    absorption: Tensor,
    source: Tensor | None,
    potential_scale: Tensor,
    energy: Tensor,
    absorption_bias: Tensor,
    source_bias: Tensor | None,
    initial_real: Tensor | None,
    initial_imag: Tensor | None,
    cu_seqlens: Tensor | None,
    m_real: Tensor,
    m_imag: Tensor,
    grad_decay: Tensor,
    grad_weight: Tensor,
    grad_real: Tensor | None,
    grad_imag: Tensor | None,
    rows: int,
    floor: float,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the three raw operands, of the four parameters [4, heads], and of both parts of the initial m."""
    parameters = (potential_scale, energy, absorption_bias, source_bias)
    medium = gates_medium(kind, potential, absorption, source, *parameters, floor, initial_real, initial_imag)
    place = layout(potential, rows, cu_seqlens)
    grads = (grad_decay.contiguous(), grad_weight.contiguous())
    state = (None, None) if grad_real is None or grad_imag is None else (grad_real.contiguous(), grad_imag.contiguous())
    d_potential, d_absorption, d_source, *rest = adjoint(medium, place, (m_real, m_imag), grads, state)
    return d_potential, d_absorption, m_real.new_empty(0) if d_source is None else d_source, *rest


@torch.library.custom_op("resnet_bk::causal_resolvent_triton", mutates_args=())
def causal_resolvent_op(
    detuning: Tensor, absorption: Tensor, initial_real: Tensor, initial_imag: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of m [tokens, heads], all float32; a row for every row of the initial m."""
    verify_resolvent(detuning.device, cu_seqlens is not None)
    initial = _one_stride(initial_real, initial_imag)
    medium = Medium("plain", _dense(detuning), _dense(absorption), initial_real=initial[0], initial_imag=initial[1])
    real, imag = forward(medium, layout(detuning, initial_real.shape[0], cu_seqlens), save=True)
    return real, imag


@torch.library.custom_op("resnet_bk::causal_resolvent_triton_adjoint", mutates_args=())
def causal_resolvent_adjoint_op(
    m_real: Tensor,
    m_imag: Tensor,
    initial_real: Tensor,
    initial_imag: Tensor,
    grad_real: Tensor,
    grad_imag: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of detuning, absorption and both parts of the initial m."""
    initial = _one_stride(initial_real, initial_imag)
    # The adjoint reads m alone; it stands for the inputs, whose shape and dtype it has.
    medium = Medium("plain", m_real, m_imag, initial_real=initial[0], initial_imag=initial[1])
    place = layout(m_real, initial_real.shape[0], cu_seqlens)
    grads = (grad_real.contiguous(), grad_imag.contiguous())
    d_detuning, d_absorption, _, _, d_real, d_imag = adjoint(medium, place, (m_real, m_imag), grads)
    return d_detuning, d_absorption, d_real, d_imag


@torch.library.custom_op("resnet_bk::moebius_maps_triton", mutates_args=())
def moebius_maps_op(detuning: Tensor, absorption: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Moebius maps of rows of sites [tokens, heads], one after the other and equally long; no gradients.

    Returns float64 entries (b, d, a, c) as real and imaginary parts [rows, 8, heads], m -> (a m + b) / (c m + d), and
    the logs of what they were divided by [rows, heads].
    """
    verify_maps(detuning.device)
    medium = Medium("plain", _dense(detuning), _dense(absorption))
    return compose(medium, layout(detuning, rows, None))


def layout(x: Tensor, rows: int, cu_seqlens: Tensor | None) -> Layout:
    """How operands [tokens, heads] of so many rows are cut into slots."""
    bounds = None if cu_seqlens is None else cu_seqlens.to(x.device).contiguous()
    return Layout(x.shape[0], x.shape[1], rows, bounds)


def _dense(x: Tensor) -> Tensor:
    """`x` [tokens, heads] with its heads side by side: a view of a projection as it is, others copied."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _one_stride(real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of m [rows, heads] whose rows lie equally far apart, 0 where one row serves all."""
    real, imag = _dense(real), _dense(imag)
    return (real, imag) if real.stride(0) == imag.stride(0) else (real.contiguous(), imag.contiguous())


def gates_medium(
    kind, potential, absorption, source, scale, energy, bias, source_bias, floor, initial_real, initial_imag
) -> Medium:  # fmt: skip
    """Raw projections [tokens, heads] and per-head parameters as the kernels read them."""
    a, e, s = _dense(potential), _dense(absorption), None if source is None else _dense(source)
    real, imag = (None, None) if initial_real is None else _one_stride(initial_real, initial_imag)
    return Medium(kind, a, e, s, scale, energy, bias, source_bias, floor, real, imag)


@flux_gates_op.register_fake
def _(
    potential, absorption, source, potential_scale, energy, absorption_bias, source_bias, initial_real, initial_imag,
    cu_seqlens, rows, floor, kind, save,
):  # fmt: skip
    tokens, heads = potential.shape
    shapes = [(tokens, heads)] * 2 + [(rows, heads)] * 2 + [(tokens, heads) if save else (0,)] * 2
    return tuple(potential.new_empty(shape, dtype=torch.float32) for shape in shapes)


@flux_gates_backward_op.register_fake
def _(
    potential, absorption, source, potential_scale, energy, absorption_bias, source_bias, initial_real, initial_imag,
    cu_seqlens, m_real, m_imag, grad_decay, grad_weight, grad_real, grad_imag, rows, floor, kind,
):  # fmt: skip
    heads = potential.shape[1]
    d_source = m_real.new_empty(0) if source is None else source.new_empty(source.shape)
    first = [m_real.new_empty(0 if initial_real is None else rows, heads) for _ in range(2)]
    raw = (potential.new_empty(potential.shape), absorption.new_empty(absorption.shape), d_source)
    return (*raw, m_real.new_empty(4, heads), *first)


@causal_resolvent_op.register_fake
def _(detuning, absorption, initial_real, initial_imag, cu_seqlens):
    return detuning.new_empty(detuning.shape), detuning.new_empty(detuning.shape)


@causal_resolvent_adjoint_op.register_fake
def _(m_real, m_imag, initial_real, initial_imag, grad_real, grad_imag, cu_seqlens):
    shapes = [m_real.shape] * 2 + [initial_real.shape] * 2
    return tuple(m_real.new_empty(shape) for shape in shapes)


@moebius_maps_op.register_fake
def _(detuning, absorption, rows):
    maps = detuning.new_empty((rows, 8, detuning.shape[1]), dtype=torch.float64)
    return maps, maps.new_empty(rows, detuning.shape[1])


def _save_gates(ctx, inputs, output) -> None:
    *tensors, rows, floor, kind, _ = inputs
    ctx.save_for_backward(*tensors, *output[4:])
    ctx.set_materialize_grads(False)
    ctx.options = (rows, floor, kind)


def _gates_gradients(ctx, grad_decay, grad_weight, grad_real, grad_imag, *_):
    tensors = ctx.saved_tensors
    m_real = tensors[-1]
    grads = (torch.zeros_like(m_real) if grad is None else grad for grad in (grad_decay, grad_weight))
    state = (grad_real, grad_imag)
    if any(grad is not None for grad in state):
        rows, heads = ctx.options[0], m_real.shape[1]
        state = tuple(m_real.new_zeros(rows, heads) if grad is None else grad for grad in state)
    *raw, parameters, first_real, first_imag = flux_gates_backward_op(*tensors, *grads, *state, *ctx.options)
    found = (*raw, *parameters, first_real, first_imag)
    return (
        *(None if x is None else grad.to(x.dtype) for grad, x in zip(found, tensors[:9], strict=True)),
        *(None,) * 5,
    )


def _save_resolvent(ctx, inputs, output) -> None:
    _, _, initial_real, initial_imag, cu_seqlens = inputs
    ctx.save_for_backward(*output, initial_real, initial_imag, cu_seqlens)


def _resolvent_gradients(ctx, grad_real, grad_imag):
    *kept, cu_seqlens = ctx.saved_tensors
    return (*causal_resolvent_adjoint_op(*kept, grad_real, grad_imag, cu_seqlens), None)


flux_gates_op.register_autograd(_gates_gradients, setup_context=_save_gates)
causal_resolvent_op.register_autograd(_resolvent_gradients, setup_context=_save_resolvent)
