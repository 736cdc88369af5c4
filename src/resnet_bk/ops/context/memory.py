"""What a segment of tokens adds to the memory of the mixing, without its outputs."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from resnet_bk.ops.semiseparable.rotation import phase_table, rotate

# Tokens whose weighted values exist in float32 at one time.
_BLOCK_TOKENS = 4096


def segment_memory(
    key: Float[Tensor, "batch time *heads state"],
    value: Float[Tensor, "batch time heads value"],
    weight: Float[Tensor, "batch time heads"],
    *,
    key_bias: Float[Tensor, "heads state"] | None = None,
    frequencies: Float[Tensor, " half_state"] | None = None,
    norm_epsilon: float | None = None,
) -> Float[Tensor, "batch heads state value"]:
    r"""Sum over a segment's tokens of weight_t k_t x_t^T: its memory if nothing came before it.

        k_t = R(frequencies t) (key_t + key_bias),   t = 0 at the segment's first token

    Args:
        key: as in `semiseparable_mix`, shared by all heads or one a head.
        value: x.
        weight: source times the decay from the token to the segment's end; its dtype is that of the result.
        key_bias: added per head before the rotation.
        frequencies: angular frequencies in radians per token; None does not rotate.
        norm_epsilon: if given, every key is first divided by its root mean square, this added to its square.

    Cost: 2 state value operations per token and head, twice that with a bias, in matrix products over all heads. With
    shared keys the per-head keys of a bias never exist: a rotated bias is a combination of sum cos(frequency t) weight
    x^T and sum sin(frequency t) weight x^T. Keeps its inputs for the backward pass, which works in blocks of tokens.
    """
    return _SegmentMemory.apply(key, value, weight, key_bias, frequencies, norm_epsilon)  # type: ignore[no-any-return]


def _block(
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first: int,
    frequencies: Tensor | None,
    epsilon: float | None,
) -> Tensor:
    """`segment_memory` of the tokens of one block, whose first is token `first` of the segment."""
    if epsilon is not None:
        key = F.rms_norm(key, key.shape[-1:], eps=epsilon)
    dtype = weight.dtype
    key, x = key.to(dtype), weight[..., None] * value.to(dtype)
    phases = None
    if frequencies is not None:
        places = torch.arange(first, first + key.shape[1], device=key.device)
        phases = phase_table(places, frequencies, dtype)
    if key.dim() == 4:
        key = key if bias is None else key + bias.to(dtype)
        if phases is not None:
            key = rotate(key, *(part[:, None] for part in phases))
        return torch.einsum("bthk,bthp->bhkp", key, x)
    memory = torch.einsum("btk,bthp->bhkp", key if phases is None else rotate(key, *phases), x)
    if bias is None:
        return memory
    bias = bias.to(dtype)[..., None]
    if phases is None:
        return memory + bias * x.sum(1)[:, :, None]
    cos, sin = (torch.einsum("tk,bthp->bhkp", part, x) for part in phases)
    low, high = bias.chunk(2, dim=1)
    return memory + torch.cat((low * cos - high * sin, low * sin + high * cos), dim=2)


class _SegmentMemory(torch.autograd.Function):
    """`_block` summed over blocks; the backward pass forms each block again."""

    @staticmethod
    def forward(ctx: Any, key, value, weight, bias, frequencies, epsilon) -> Tensor:
        ctx.save_for_backward(key, value, weight, bias, frequencies)
        ctx.epsilon = epsilon
        memory = None
        with torch.autocast(value.device.type, enabled=False):
            for first, tokens in _blocks(value.shape[1]):
                part = _block(key[:, tokens], value[:, tokens], weight[:, tokens], bias, first, frequencies, epsilon)
                memory = part if memory is None else memory.add_(part)
        assert memory is not None  # there is at least one token
        return memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        key, value, weight, bias, frequencies = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (key, value, weight)]
        bias_gradient = None if bias is None else torch.zeros_like(bias)
        with torch.autocast(value.device.type, enabled=False), torch.enable_grad():
            for first, tokens in _blocks(value.shape[1]):
                k, x, w = parts = [x[:, tokens].detach().requires_grad_() for x in (key, value, weight)]
                shared = None if bias is None else bias.detach().requires_grad_()
                memory = _block(k, x, w, shared, first, frequencies, ctx.epsilon)
                found = torch.autograd.grad(memory, parts if shared is None else [*parts, shared], grad)
                for whole, part in zip(gradients, found[:3], strict=True):
                    whole[:, tokens] = part
                if bias_gradient is not None:
                    bias_gradient += found[3]
        return (*gradients, bias_gradient, None, None)


def _blocks(time: int) -> list[tuple[int, slice]]:
    return [(first, slice(first, first + _BLOCK_TOKENS)) for first in range(0, time, _BLOCK_TOKENS)]
