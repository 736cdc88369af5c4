"""The gated norm in one Triton kernel a direction: memory-bound, every element read once and written once.

A program works on tiles [tokens, heads, channels] of `_TILE` elements; heads go together until 256 bytes or so of a
token are contiguous. Its equations are those of `chunked`. Each backward program sums the gradient of the weight over
`_STEPS` tiles of the same heads; the sums of all programs are added in a fixed order, so results repeat bit by bit.
Bytes of an element, for two-byte types: 6 forward, 10 backward, and 4 / (tokens of a tile * `_STEPS`) for the sums.
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_bk.ops.dispatch import verify_once
from resnet_bk.ops.gated_norm.chunked import gated_norm_backward_op, gated_norm_op

_TILE = 1024
_STEPS = 16


@triton.jit
def _columns(group, heads, CHANNELS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Column of every [1, head, channel] of a group of heads, and which of them exist."""
    head = group * GROUP + tl.arange(0, GROUP)
    channel = tl.arange(0, WIDTH)
    column = head[:, None] * CHANNELS + channel[None, :]
    return column[None], ((head < heads)[:, None] & (channel < CHANNELS)[None, :])[None]


@triton.jit
def _normed(y, epsilon, CHANNELS: tl.constexpr):
    """Tile of values divided by its root mean square per head, and the reciprocal root mean square."""
    scale = tl.rsqrt(tl.sum(y * y, axis=2, keep_dims=True) / CHANNELS + epsilon)
    return y * scale, scale


@triton.jit
def _forward_kernel(
    y, gate, weight, out, rows, heads, y_stride, gate_stride, epsilon,
    Y_UNIT: tl.constexpr, GATE_UNIT: tl.constexpr,
    CHANNELS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(heads, GROUP)
    program = tl.program_id(0)
    row = (program // groups).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column, exists = _columns(program % groups, heads, CHANNELS, GROUP, WIDTH)
    row = row[:, None, None]
    inside = exists & (row < rows)
    value = tl.load(y + row * (y_stride * Y_UNIT) + column, mask=inside, other=0.0).to(tl.float32)
    raw = tl.load(gate + row * (gate_stride * GATE_UNIT) + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
    normed, _ = _normed(value, epsilon, CHANNELS)
    result = normed * factor * (raw * tl.sigmoid(raw))
    tl.store(out + row * (heads * CHANNELS) + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad, y, gate, weight, d_y, d_gate, d_weight, rows, heads, y_stride, gate_stride, d_gate_stride, epsilon,
    Y_UNIT: tl.constexpr, GATE_UNIT: tl.constexpr, D_GATE_UNIT: tl.constexpr,
    CHANNELS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(heads, GROUP)
    program = tl.program_id(0)
    part = (program // groups).to(tl.int64)
    column, exists = _columns(program % groups, heads, CHANNELS, GROUP, WIDTH)
    factor = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
    total = tl.zeros((TOKENS, GROUP, WIDTH), dtype=tl.float32)
    inner = heads * CHANNELS
    for step in range(0, STEPS):
        row = ((part * STEPS + step) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
        inside = exists & (row < rows)
        cotangent = tl.load(grad + row * inner + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(y + row * (y_stride * Y_UNIT) + column, mask=inside, other=0.0).to(tl.float32)
        raw = tl.load(gate + row * (gate_stride * GATE_UNIT) + column, mask=inside, other=0.0).to(tl.float32)
        normed, scale = _normed(value, epsilon, CHANNELS)
        sigmoid = tl.sigmoid(raw)
        silu = raw * sigmoid
        along = cotangent * normed
        total += along * silu
        raw_gradient = along * factor * (sigmoid * (1 + raw - silu))
        tl.store(
            d_gate + row * (d_gate_stride * D_GATE_UNIT) + column, raw_gradient.to(d_gate.dtype.element_ty), mask=inside
        )
        weighted = factor * silu
        mean = tl.sum(along * weighted, axis=2, keep_dims=True) / CHANNELS
        gradient = scale * (cotangent * weighted - normed * mean)
        tl.store(d_y + row * inner + column, gradient.to(d_y.dtype.element_ty), mask=inside)
    partial = tl.sum(total, axis=0, keep_dims=True)
    tl.store(d_weight + part * inner + column, partial, mask=exists)


def _tile(y: Tensor) -> dict[str, int]:
    """Shape of a program's tile."""
    heads, channels = y.shape[1:]
    width, enough = (1 << (count - 1).bit_length() for count in (channels, heads))
    group = min(max(1, 128 // width), enough)
    return {"CHANNELS": channels, "TOKENS": max(1, _TILE // (group * width)), "GROUP": group, "WIDTH": width}


def _strides(**operands: Tensor) -> dict[str, int]:
    """Row strides as multiples of a power of two known when the kernel is compiled: 16-byte accesses need it."""
    found = {}
    for name, x in operands.items():
        unit = math.gcd(x.stride(0), 16)
        found |= {f"{name}_stride": x.stride(0) // unit, f"{name.upper()}_UNIT": unit}
    return found


def _dense_heads(y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The operands with each row contiguous: views as they are, others copied."""
    if y.stride(2) != 1 or y.stride(1) != y.shape[2]:
        y = y.contiguous()
    return y, gate if gate.stride(1) == 1 else gate.contiguous()


def forward(y: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Gated norm of y [rows, heads, channels] with gate [rows, inner]."""
    y, gate = _dense_heads(y, gate)
    rows, heads = y.shape[:2]
    out = torch.empty(gate.shape, dtype=y.dtype, device=y.device)
    tile = _tile(y)
    programs = triton.cdiv(rows, tile["TOKENS"]) * triton.cdiv(heads, tile["GROUP"])
    with torch.cuda.device_of(y):
        _forward_kernel[(programs,)](
            y, gate, weight, out, rows, heads, epsilon=epsilon, **_strides(y=y, gate=gate), **tile, num_warps=4
        )
    return out


def backward(
    grad: Tensor, y: Tensor, gate: Tensor, weight: Tensor, epsilon: float, d_gate: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, gate and weight; that of the gate in `d_gate`, whose rows may lie apart, if it is given."""
    y, gate = _dense_heads(y, gate)
    rows, heads = y.shape[:2]
    tile = _tile(y)
    parts = triton.cdiv(rows, tile["TOKENS"] * _STEPS)
    d_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if d_gate is None:
        d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=y.device)
    d_weight = torch.empty(parts, weight.numel(), dtype=torch.float32, device=y.device)
    with torch.cuda.device_of(y):
        _backward_kernel[(parts * triton.cdiv(heads, tile["GROUP"]),)](
            grad.contiguous(), y, gate, weight, d_y, d_gate, d_weight, rows, heads, epsilon=epsilon,
            **_strides(y=y, gate=gate, d_gate=d_gate), **tile, STEPS=_STEPS, num_warps=4,
        )  # fmt: skip
    return d_y, d_gate, d_weight.sum(0).to(weight.dtype)


# Relative root-mean-square error allowed by dtype: a few roundings of the result.
_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def verify(y: Tensor, gate: Tensor, weight: Tensor) -> None:
    """Compare the kernels with the chunked form in float64 once for every kind of operands."""
    heads, channels = y.shape[1:]
    dtypes = (y.dtype, gate.dtype, weight.dtype)

    def measure() -> dict[str, tuple[float, float]]:
        generator = torch.Generator(y.device).manual_seed(0)
        shapes = ((37, heads, channels), (37, heads * channels + 8), (heads * channels,), (37, heads * channels))
        values, wide_gate, factors, grad = (
            torch.randn(shape, generator=generator, device=y.device).to(dtype)
            for shape, dtype in zip(shapes, (*dtypes, y.dtype), strict=True)
        )
        case = (values, wide_gate[:, :-8], factors)
        exact = [x.double() for x in case]
        ours = (forward(*case, 1e-5), *backward(grad, *case, 1e-5))
        truth = (gated_norm_op(*exact, 1e-5), *gated_norm_backward_op(grad.double(), *exact, 1e-5))
        names = ("out", "d_y", "d_gate", "d_weight")
        return {
            name: (((one.double() - two).norm() / two.norm()).item(), _BOUNDS[one.dtype])
            for name, one, two in zip(names, ours, truth, strict=True)
        }

    verify_once("gated_norm", (y.device, heads, channels, *dtypes), measure)


@torch.library.custom_op("resnet_bk::gated_norm_triton", mutates_args=())
def gated_norm_triton(y: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Gated norm of y [rows, heads, channels] with gate [rows, inner]; rows of either may lie apart."""
    if y.numel() == 0:
        return y.new_empty(gate.shape)
    verify(y, gate, weight)
    return forward(y, gate, weight, epsilon)


@torch.library.custom_op("resnet_bk::gated_norm_triton_backward", mutates_args=())
def gated_norm_triton_backward(
    grad: Tensor, y: Tensor, gate: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, gate and weight."""
    if y.numel() == 0:
        return y.new_empty(y.shape), gate.new_empty(gate.shape), torch.zeros_like(weight)
    return backward(grad, y, gate, weight, epsilon)


@gated_norm_triton.register_fake
def _(y, gate, weight, epsilon):
    return y.new_empty(gate.shape)


@gated_norm_triton_backward.register_fake
def _(grad, y, gate, weight, epsilon):
    return y.new_empty(y.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:
    y, gate, weight, epsilon = inputs
    ctx.save_for_backward(y, gate, weight)
    ctx.epsilon = epsilon


def _gradients(ctx, grad):
    return (*gated_norm_triton_backward(grad, *ctx.saved_tensors, ctx.epsilon), None)


gated_norm_triton.register_autograd(_gradients, setup_context=_save)
