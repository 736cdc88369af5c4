"""Shifted keys in one Triton kernel a direction: memory-bound, what overlaps is read from cache.

With keys k, results s and rows that do not see each other,
    s_t = k_t + w k_{t-1},    d_k_t = g_t + w g_{t+1} (+ that of the last key),    d_w = sum_t g_t k_{t-1}.
Sums over tiles are added in a fixed order, so results repeat bit by bit. Bytes of an element, for two-byte types: 4
forward, 6 backward, and 4 / `_TOKENS` for the sums.
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_bk.ops.dispatch import verify_once
from resnet_bk.ops.key_shift import shift_keys

_TOKENS = 32


@triton.jit
def _rows(token, document, tokens, time, PACKED: tl.constexpr):
    """Row of every token, -1 where there is none."""
    exists = (token >= 0) & (token < tokens)
    row = tl.load(document + token, mask=exists, other=-1) if PACKED else token // time
    return tl.where(exists, row, -1)


@triton.jit
def _tile(document, tokens, time, K: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr):
    """Tokens [TOKENS, 1] of this program, their rows and those of the ones before and after, channels [1, WIDTH]."""
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    channel = tl.arange(0, WIDTH)[None]
    row = _rows(token, document, tokens, time, PACKED)
    before = _rows(token - 1, document, tokens, time, PACKED)
    after = _rows(token + 1, document, tokens, time, PACKED)
    return token, row, before, after, channel, channel < K


@triton.jit
def _before(key, previous, token, row, row_before, channel, exists, stride, K: tl.constexpr, GIVEN: tl.constexpr):
    """The key before every token: that of its row, or else what came before the row."""
    inside = exists & (row >= 0)
    found = tl.load(key + (token - 1) * stride + channel, mask=inside & (row == row_before), other=0.0).to(tl.float32)
    if GIVEN:
        start = tl.load(previous + row * K + channel, mask=inside & (row != row_before), other=0.0)
        found += start.to(key.dtype.element_ty).to(tl.float32)
    return found


@triton.jit
def _forward_kernel(
    key, shift, previous, document, out, last, tokens, time, stride,
    UNIT: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
    GIVEN: tl.constexpr,
):  # fmt: skip
    token, row, row_before, row_after, channel, exists = _tile(document, tokens, time, K, TOKENS, WIDTH, PACKED)
    inside = exists & (row >= 0)
    own = tl.load(key + token * (stride * UNIT) + channel, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(shift + channel, mask=exists, other=0.0).to(tl.float32)
    before = _before(key, previous, token, row, row_before, channel, exists, stride * UNIT, K, GIVEN)
    tl.store(out + token * K + channel, (own + factor * before).to(out.dtype.element_ty), mask=inside)
    tl.store(last + row * K + channel, own, mask=inside & (row != row_after))


@triton.jit
def _backward_kernel(
    grad, grad_last, key, shift, previous, document, d_key, d_shift, d_previous, tokens, time, stride, d_stride,
    UNIT: tl.constexpr, D_UNIT: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    PACKED: tl.constexpr, GIVEN: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    token, row, row_before, row_after, channel, exists = _tile(document, tokens, time, K, TOKENS, WIDTH, PACKED)
    inside = exists & (row >= 0)
    own = tl.load(grad + token * K + channel, mask=inside, other=0.0).to(tl.float32)
    after = tl.load(grad + (token + 1) * K + channel, mask=inside & (row == row_after), other=0.0).to(tl.float32)
    factor = tl.load(shift + channel, mask=exists, other=0.0).to(tl.float32)
    found = own + factor * after
    if LAST:
        found += tl.load(grad_last + row * K + channel, mask=inside & (row != row_after), other=0.0).to(tl.float32)
    tl.store(d_key + token * (d_stride * D_UNIT) + channel, found.to(d_key.dtype.element_ty), mask=inside)
    before = _before(key, previous, token, row, row_before, channel, exists, stride * UNIT, K, GIVEN)
    sums = d_shift + tl.program_id(0).to(tl.int64) * K + channel
    tl.store(sums, tl.sum(own * before, axis=0, keep_dims=True), mask=exists)
    if GIVEN:
        tl.store(d_previous + row * K + channel, factor * own, mask=inside & (row != row_before))


def _documents(tokens: int, cu_seqlens: Tensor | None) -> Tensor | None:
    """Document of every token."""
    if cu_seqlens is None:
        return None
    place = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.bucketize(place, cu_seqlens[1:], right=True, out_int32=True)


def _shape(key: Tensor, time: int, document: Tensor | None, previous: Tensor | None) -> dict[str, int | bool]:
    """Sizes and options of both kernels. Strides are multiples of a known power of two: 16-byte accesses need it."""
    unit = math.gcd(key.stride(0), 16)
    tokens, state = key.shape
    return {
        "tokens": tokens, "time": time, "stride": key.stride(0) // unit, "UNIT": unit, "K": state, "TOKENS": _TOKENS,
        "WIDTH": 1 << (state - 1).bit_length(), "PACKED": document is not None, "GIVEN": previous is not None,
    }  # fmt: skip


def forward(
    key: Tensor, shift: Tensor, previous: Tensor | None, time: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shifted keys and last keys (float32) of key [tokens, state], whose rows of `time` tokens follow each other."""
    tokens, state = key.shape
    document, before = _documents(tokens, cu_seqlens), None if previous is None else previous.contiguous()
    rows = tokens // time if cu_seqlens is None else cu_seqlens.numel() - 1
    out = torch.empty(tokens, state, dtype=key.dtype, device=key.device)
    last = torch.empty(rows, state, dtype=torch.float32, device=key.device)
    with torch.cuda.device_of(key):
        _forward_kernel[(triton.cdiv(tokens, _TOKENS),)](
            key, shift, last if before is None else before, last if document is None else document, out, last,
            **_shape(key, time, document, previous), num_warps=4,
        )  # fmt: skip
    return out, last


def backward(
    grad: Tensor, grad_last: Tensor | None, key: Tensor, shift: Tensor, previous: Tensor | None, time: int,
    cu_seqlens: Tensor | None, d_key: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `shift` and `previous` (empty without it); that of `key` goes to `d_key`, a view of wider rows."""
    tokens, state = key.shape
    document, before = _documents(tokens, cu_seqlens), None if previous is None else previous.contiguous()
    wide = {"dtype": torch.float32, "device": key.device}
    parts = triton.cdiv(tokens, _TOKENS)
    d_shift = torch.empty(parts, state, **wide)
    d_previous = torch.empty((0,) if previous is None else previous.shape, **wide)
    d_unit = math.gcd(d_key.stride(0), 16)
    with torch.cuda.device_of(key):
        _backward_kernel[(parts,)](
            grad.contiguous(), d_shift if grad_last is None else grad_last.contiguous(), key, shift,
            d_shift if before is None else before, d_shift if document is None else document, d_key, d_shift,
            d_previous, d_stride=d_key.stride(0) // d_unit, D_UNIT=d_unit, LAST=grad_last is not None,
            **_shape(key, time, document, previous), num_warps=4,
        )  # fmt: skip
    return d_shift.sum(0), d_previous


# Relative root-mean-square error allowed by dtype: a few roundings of the result.
_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def verify(key: Tensor, shift: Tensor) -> None:
    """Compare the kernels with plain PyTorch in float64 once for every kind of operands."""
    state = key.shape[1]
    dtypes = (key.dtype, shift.dtype)

    def measure() -> dict[str, tuple[float, float]]:
        generator = torch.Generator(key.device).manual_seed(0)
        bounds = torch.tensor([0, 1, 40, 75], device=key.device)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=key.device)

        keys, factor, before = draw(75, state).to(key.dtype), draw(state).to(shift.dtype), draw(3, state)
        grad, grad_last = draw(75, state).to(key.dtype), draw(3, state)
        d_key = torch.empty_like(keys)
        ours = forward(keys, factor, before, 75, bounds)
        ours += (d_key, *backward(grad, grad_last, keys, factor, before, 75, bounds, d_key))
        with torch.enable_grad():
            # What came before enters as a key, so in the precision of keys.
            leaves = [keys.double(), factor.double(), before.to(key.dtype).double()]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            out, last = shift_keys(leaves[0][None], *leaves[1:], bounds)
            loss = (out[0] * grad).sum() + (last * grad_last).sum()
            truth = (out[0].detach(), last.detach(), *torch.autograd.grad(loss, leaves))
        names = ("out", "last", "d_key", "d_shift", "d_previous")
        return {
            name: (((one.double() - two).norm() / two.norm()).item(), _BOUNDS[key.dtype])
            for name, one, two in zip(names, ours, truth, strict=True)
        }

    verify_once("key_shift", (key.device, state, *dtypes), measure)
