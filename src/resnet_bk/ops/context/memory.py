"""What a segment of tokens adds to the memory of the mixing, without its outputs."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from resnet_bk.ops.semiseparable.rotation import phase_table, rotate

# Tokens whose weighted values exist at one time.
_BLOCK_TOKENS = 16384
# A GPU sums so many parts of a block at once: one product over all its tokens would fill few multiprocessors.
_PARTS = 16


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
    Numerics: sums in the dtype of `weight`. A GPU multiplies shared keys and values of 16 bits as such, as
    `semiseparable_mix` does there; everything else is multiplied in the dtype of `weight`.
    """
    if key.dim() == 4:
        inputs = (key, value, weight, key_bias, frequencies, norm_epsilon)
        return _PerHeadMemory.apply(*inputs)  # type: ignore[no-any-return]
    dtype, state = weight.dtype, key.shape[-1]
    with torch.autocast(value.device.type, enabled=False):
        key = key.to(dtype)
        if norm_epsilon is not None:
            key = F.rms_norm(key, (state,), eps=norm_epsilon)
        table = key.new_ones(key.shape[1], 1)
        if frequencies is not None:
            phases = phase_table(torch.arange(key.shape[1], device=key.device), frequencies, dtype)
            key, table = rotate(key, *phases), torch.cat(phases, dim=-1)
        sums: Tensor = _SharedSums.apply(key, value, weight, None if key_bias is None else table)  # type: ignore[assignment]
        memory, *rest = sums.transpose(1, 2).split([state, sums.shape[1] - state], dim=2)
        if key_bias is None:
            return memory
        bias = key_bias.to(dtype)[..., None]
        if frequencies is None:
            return memory + bias * rest[0]
        cos, sin = rest[0].chunk(2, dim=2)
        low, high = bias.chunk(2, dim=1)
        return memory + torch.cat((low * cos - high * sin, low * sin + high * cos), dim=2)


class _SharedSums(torch.autograd.Function):
    """Sums over tokens of weight x^T times every channel of the keys, then of the table [time, columns]."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, weight: Tensor, table: Tensor | None) -> Tensor:
        ctx.save_for_backward(key, value, weight, table)
        sums = None
        for _, tokens in _blocks(value.shape[1]):
            x = _weighted(value[:, tokens], weight[:, tokens])
            left = _columns(key, table, tokens, x.dtype)
            parts = _PARTS if x.is_cuda and x.shape[1] % _PARTS == 0 else 1
            left, x = (part.unflatten(1, (parts, -1)).flatten(0, 1) for part in (left, x))
            part = _product(left.transpose(1, 2), x, weight.dtype).unflatten(0, (-1, parts)).sum(1)
            sums = part if sums is None else sums.add_(part)
        assert sums is not None  # there is at least one token
        return sums.unflatten(2, value.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        key, value, weight, table = ctx.saved_tensors
        d_key, d_value, d_weight = (torch.empty_like(x) for x in (key, value, weight))
        grad = grad.flatten(2)
        with torch.autocast(value.device.type, enabled=False):
            for _, tokens in _blocks(value.shape[1]):
                x = _weighted(value[:, tokens], weight[:, tokens])
                narrow = grad.to(x.dtype)
                d_key[:, tokens] = _product(x, narrow[:, : key.shape[-1]].transpose(1, 2), weight.dtype)
                d_x = _product(_columns(key, table, tokens, x.dtype), narrow, weight.dtype)
                d_x = d_x.unflatten(2, value.shape[2:])
                torch.mul(d_x, weight[:, tokens, :, None], out=d_value[:, tokens])
                torch.sum(d_x.mul_(value[:, tokens]), -1, out=d_weight[:, tokens])
        return d_key, d_value, d_weight, None


def _weighted(value: Tensor, weight: Tensor) -> Tensor:
    """Values times weights [batch, time, heads * value], rounded once to the dtype in which they are multiplied."""
    narrow = value.dtype if value.is_cuda and value.itemsize == 2 else weight.dtype
    out = torch.empty(value.shape, dtype=narrow, device=value.device)
    return torch.mul(value, weight[..., None], out=out).flatten(2)


def _columns(key: Tensor, table: Tensor | None, tokens: slice, dtype: torch.dtype) -> Tensor:
    """Keys and table of a block side by side [batch, time, columns]."""
    left = key[:, tokens].to(dtype)
    if table is None:
        return left
    return torch.cat((left, table[tokens].to(dtype).expand(left.shape[0], -1, -1)), dim=-1)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Batched matrix product, accumulated and returned in `dtype`."""
    return torch.bmm(left, right) if left.dtype == dtype else torch.bmm(left, right, out_dtype=dtype)


def _block(
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first: int,
    frequencies: Tensor | None,
    epsilon: float | None,
) -> Tensor:
    """`segment_memory` of per-head keys of one block, whose first token is token `first` of the segment."""
    if epsilon is not None:
        key = F.rms_norm(key, key.shape[-1:], eps=epsilon)
    dtype = weight.dtype
    key, x = key.to(dtype), weight[..., None] * value.to(dtype)
    key = key if bias is None else key + bias.to(dtype)
    if frequencies is not None:
        places = torch.arange(first, first + key.shape[1], device=key.device)
        key = rotate(key, *(part[:, None] for part in phase_table(places, frequencies, dtype)))
    return torch.einsum("bthk,bthp->bhkp", key, x)


class _PerHeadMemory(torch.autograd.Function):
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
