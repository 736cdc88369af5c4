"""Causal convolution of every channel over a few tokens, with a silu: what Mamba-2 does before its scan."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resnet_bk.errors import ShapeError
from resnet_bk.ops.dispatch import Backend, choose_backend, document_boundaries
from resnet_bk.ops.short_convolution.reference import convolve

__all__ = ["short_convolution"]


def short_convolution(
    x: Float[Tensor, "batch time channels"],
    taps: Float[Tensor, "channels width"],
    bias: Float[Tensor, " channels"],
    *,
    history: Float[Tensor, "rows before channels"] | None = None,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "rows before channels"]]:
    r"""Silu of a causal convolution channel by channel, and the tokens that later ones still need.

        y_t = silu(bias + sum_p taps_p x_{t - width + 1 + p}),    p = 0 ... width - 1

    Args:
        x: tokens.
        taps: weights of each channel, the oldest token's first.
        bias: one a channel.
        history: the width - 1 tokens before the first of every row (document with `cu_seqlens`); None is zeros.
        cu_seqlens: boundaries of documents packed along time (batch 1); no document sees another.
        backend: "triton" is one kernel a direction; "reference" and "chunked" are both plain PyTorch.

    Returns:
        y in the dtype of `x`, computed in float32 or wider, and the last width - 1 tokens of every row.

    Raises:
        ShapeError: shapes that do not fit; the message names the tensor. BackendError: an unknown backend, or one
            that cannot run here.

    Cost: width multiplications a token and channel.
    """
    chosen = choose_backend(backend, x)
    batch, time, channels = x.shape
    before = taps.shape[-1] - 1
    if tuple(taps.shape) != (channels, before + 1) or tuple(bias.shape) != (channels,):
        raise ShapeError(
            f"x has {channels} channels and needs taps [{channels}, width] and bias [{channels}]; got "
            f"{list(taps.shape)} and {list(bias.shape)}."
        )
    bounds = None if cu_seqlens is None else document_boundaries(cu_seqlens, batch, time)
    rows = batch if bounds is None else len(bounds) - 1
    if history is None:
        history = x.new_zeros(rows, before, channels)
    elif tuple(history.shape) != (rows, before, channels):
        raise ShapeError(f"history must be [{rows}, {before}, {channels}]; got {list(history.shape)}.")
    history = history.to(x.dtype)
    if bounds is None:
        extended = torch.cat((history, x), dim=1)
        return _convolve(extended, taps, bias, chosen), extended[:, time:].clone()  # a view would keep all tokens alive
    # Every document behind its own history; what stands across two of them is not looked at.
    pieces = [torch.cat((history[row], x[0, start:end])) for row, (start, end) in enumerate(pairwise(bounds))]
    edges = torch.tensor(bounds, device=x.device)
    document = torch.repeat_interleave(torch.arange(rows, device=x.device), edges.diff(), output_size=time)
    y = _convolve(torch.cat(pieces)[None], taps, bias, chosen)
    after = torch.stack([piece[len(piece) - before :] for piece in pieces])
    return y[:, torch.arange(time, device=x.device) + before * document], after


def _convolve(x: Tensor, taps: Tensor, bias: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        from resnet_bk.ops.short_convolution.triton import short_convolution_triton

        return short_convolution_triton(x, taps, bias)
    return convolve(x, taps, bias)
