"""The gated norm on blocks of tokens, with a hand-written backward.

With r = (mean(y^2) + epsilon)^(-1/2), n = r y, s = sigmoid(gate) and p = grad * weight:
    d_gate = p n s (1 + gate (1 - s)),    d_weight = sum grad n gate s,
    d_n = p gate s,                       d_y = r (d_n - n mean(d_n n)).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.ops.dispatch import compute_dtype

# Bytes of one block of one tensor; about six are alive at once and should share a core's cache.
_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}


def _blocks(y: Tensor) -> Iterator[slice]:
    rows = y.shape[0]
    budget = _BLOCK_BYTES.get(y.device.type, _BLOCK_BYTES["cuda"])
    step = max(1, budget // (4 * y.shape[1] * y.shape[2]))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def _normed(y: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Y in `dtype` divided by its root mean square per head, and the reciprocal root mean square."""
    wide = y.to(dtype)
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(y.shape[-1]).add_(epsilon).rsqrt_()
    return wide * scale, scale


@torch.library.custom_op("resnet_bk::gated_norm", mutates_args=())
def gated_norm_op(y: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Gated norm of y [rows, heads, channels] with gate [rows, inner]."""
    dtype = compute_dtype(y)
    out = torch.empty(gate.shape, dtype=y.dtype, device=y.device)
    wide_weight = weight.to(dtype)
    for block in _blocks(y):
        normed = _normed(y[block], epsilon, dtype)[0].flatten(1).mul_(wide_weight)
        out[block] = normed.mul_(F.silu(gate[block].to(dtype)))
    return out


@torch.library.custom_op("resnet_bk::gated_norm_backward", mutates_args=())
def gated_norm_backward_op(
    grad: Tensor, y: Tensor, gate: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, gate and weight."""
    dtype = compute_dtype(y)
    d_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=y.device)
    d_weight = torch.zeros(weight.shape, dtype=dtype, device=y.device)
    wide_weight = weight.to(dtype)
    for block in _blocks(y):
        normed, scale = _normed(y[block], epsilon, dtype)
        cotangent, raw = grad[block].to(dtype), gate[block].to(dtype)
        silu = F.silu(raw)
        along = cotangent * normed.flatten(1)
        d_gate[block] = torch.ops.aten.silu_backward(along * wide_weight, raw)
        d_weight += along.mul_(silu).sum(0)
        d_normed = silu.mul_(cotangent).mul_(wide_weight).view_as(normed)
        projected = along.mul_(wide_weight).view_as(normed).mean(-1, keepdim=True)
        d_y[block] = d_normed.addcmul_(normed, projected, value=-1).mul_(scale)
    return d_y, d_gate, d_weight.to(weight.dtype)


@gated_norm_op.register_fake
def _(y, gate, weight, epsilon):
    return y.new_empty(gate.shape)


@gated_norm_backward_op.register_fake
def _(grad, y, gate, weight, epsilon):
    return y.new_empty(y.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:
    y, gate, weight, epsilon = inputs
    ctx.save_for_backward(y, gate, weight)
    ctx.epsilon = epsilon


def _backward(ctx, grad):
    return (*gated_norm_backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.epsilon), None)


gated_norm_op.register_autograd(_backward, setup_context=_save)
