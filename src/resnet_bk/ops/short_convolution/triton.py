"""The short convolution in one Triton kernel a direction: memory-bound, what overlaps is read from cache.

With z_t = bias + sum_p taps_p x_{t + p} over the extended tokens, y = silu(z) and e_t = grad_t silu'(z_t):
    d_x_s = sum_p taps_p e_{s - p},    d_taps_p = sum_t e_t x_{t + p},    d_bias = sum_t e_t.
The backward kernel works on tiles of extended tokens and computes e anew for each of the width shifts. Its sums over
tiles are added in a fixed order, so results repeat bit by bit.
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_bk.ops.dispatch import verify_once
from resnet_bk.ops.short_convolution.reference import convolve

_TOKENS, _CHANNELS = 32, 64


@triton.jit
def _before_silu(x, taps, bias, token, time, channel, exists, channels, WIDTH: tl.constexpr):
    """Convolution at output tokens `token` [tokens, 1] of one sequence, bias included, and which of them exist."""
    inside = exists & (token >= 0) & (token < time)
    total = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    for place in tl.static_range(WIDTH):
        tap = tl.load(taps + channel * WIDTH + place, mask=exists, other=0.0).to(tl.float32)
        total += tap * tl.load(x + (token + place) * channels + channel, mask=inside, other=0.0).to(tl.float32)
    return total, inside


@triton.jit
def _tile(tiles, channels, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sequence, tokens [tokens, 1] and channels [1, channels] of this program, and which channels exist."""
    program = tl.program_id(0)
    token = (program % tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return (program // tiles).to(tl.int64), token[:, None], channel[None], (channel < channels)[None]


@triton.jit
def _forward_kernel(
    x, taps, bias, out, time, channels, WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    sequence, token, channel, exists = _tile(tl.cdiv(time, TOKENS), channels, TOKENS, CHANNELS)
    x += sequence * (time + WIDTH - 1) * channels
    z, inside = _before_silu(x, taps, bias, token, time, channel, exists, channels, WIDTH)
    place = (sequence * time + token) * channels + channel
    tl.store(out + place, (z * tl.sigmoid(z)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad, x, taps, bias, d_x, d_parameters, time, channels,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    extended = time + WIDTH - 1
    sequence, token, channel, exists = _tile(tl.cdiv(extended, TOKENS), channels, TOKENS, CHANNELS)
    x += sequence * extended * channels
    grad += sequence * time * channels
    sums = d_parameters + tl.program_id(0).to(tl.int64) * (WIDTH + 1) * channels + channel
    total = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
    for shift in tl.static_range(WIDTH):
        z, inside = _before_silu(x, taps, bias, token - shift, time, channel, exists, channels, WIDTH)
        sigmoid = tl.sigmoid(z)
        slope = sigmoid * (1 + z * (1 - sigmoid))
        e = slope * tl.load(grad + (token - shift) * channels + channel, mask=inside, other=0.0).to(tl.float32)
        total += e * tl.load(taps + channel * WIDTH + shift, mask=exists, other=0.0).to(tl.float32)
        if shift == 0:
            for place in tl.static_range(WIDTH):
                seen = tl.load(x + (token + place) * channels + channel, mask=inside, other=0.0).to(tl.float32)
                tl.store(sums + place * channels, tl.sum(e * seen, axis=0, keep_dims=True), mask=exists)
            tl.store(sums + WIDTH * channels, tl.sum(e, axis=0, keep_dims=True), mask=exists)
    place = (sequence * extended + token) * channels + channel
    tl.store(d_x + place, total.to(d_x.dtype.element_ty), mask=exists & (token < extended))


def forward(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """See `convolve`."""
    batch, extended, channels = x.shape
    width = taps.shape[1]
    time = extended - width + 1
    out = torch.empty(batch, time, channels, dtype=x.dtype, device=x.device)
    grid = (batch * triton.cdiv(time, _TOKENS), triton.cdiv(channels, _CHANNELS))
    with torch.cuda.device_of(x):
        _forward_kernel[grid](
            x.contiguous(), taps.contiguous(), bias, out, time, channels, width, _TOKENS, _CHANNELS, num_warps=4
        )
    return out


def backward(grad: Tensor, x: Tensor, taps: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, taps and bias."""
    batch, extended, channels = x.shape
    width = taps.shape[1]
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = batch * triton.cdiv(extended, _TOKENS)
    sums = torch.empty(parts, width + 1, channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[(parts, triton.cdiv(channels, _CHANNELS))](
            grad.contiguous(), x.contiguous(), taps.contiguous(), bias, d_x, sums, extended - width + 1, channels,
            width, _TOKENS, _CHANNELS, num_warps=8,
        )  # fmt: skip
    total = sums.sum(0)
    # Copies: operators may not return views of one another.
    return d_x, total[:width].t().to(taps.dtype, copy=True), total[width].to(bias.dtype, copy=True)


# Relative root-mean-square error allowed by dtype: a few roundings of the result.
_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def _verify(x: Tensor, taps: Tensor, bias: Tensor) -> None:
    """Compare the kernels with plain PyTorch in float64 once for every kind of operands."""
    dtypes = (x.dtype, taps.dtype, bias.dtype)
    channels, width = taps.shape

    def measure() -> dict[str, tuple[float, float]]:
        generator = torch.Generator(x.device).manual_seed(0)
        shapes = ((2, 40 + width - 1, channels), (channels, width), (channels,), (2, 40, channels))
        *case, grad = (
            torch.randn(shape, generator=generator, device=x.device).to(dtype)
            for shape, dtype in zip(shapes, (*dtypes, x.dtype), strict=True)
        )
        with torch.enable_grad():
            exact = [part.double().requires_grad_() for part in case]
            out = convolve(*exact)
            truth = (out.detach(), *torch.autograd.grad(out, exact, grad.double()))
        ours = (forward(*case), *backward(grad, *case))
        names = ("out", "d_x", "d_taps", "d_bias")
        return {
            name: (((one.double() - two).norm() / two.norm()).item(), _BOUNDS[one.dtype])
            for name, one, two in zip(names, ours, truth, strict=True)
        }

    verify_once("short_convolution", (x.device, channels, width, *dtypes), measure)


@torch.library.custom_op("resnet_bk::short_convolution_triton", mutates_args=())
def short_convolution_triton(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """Silu of the convolution at all tokens of x [batch, time, channels] but the first width - 1."""
    _verify(x, taps, bias)
    return forward(x, taps, bias)


@torch.library.custom_op("resnet_bk::short_convolution_triton_backward", mutates_args=())
def short_convolution_triton_backward(
    grad: Tensor, x: Tensor, taps: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, taps and bias."""
    return backward(grad, x, taps, bias)


@short_convolution_triton.register_fake
def _(x, taps, bias):
    return x.new_empty(x.shape[0], x.shape[1] - taps.shape[1] + 1, x.shape[2])


@short_convolution_triton_backward.register_fake
def _(grad, x, taps, bias):
    return x.new_empty(x.shape), taps.new_empty(taps.shape), bias.new_empty(bias.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    return short_convolution_triton_backward(grad, *ctx.saved_tensors)


short_convolution_triton.register_autograd(_gradients, setup_context=_save)
