"""The short convolution in plain PyTorch; gradients by autograd."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from resnet_bk.ops.dispatch import compute_dtype


def convolve(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """Silu of the convolution at all tokens of x [batch, time, channels] but the first width - 1."""
    width = taps.shape[1]
    time = x.shape[1] - width + 1
    total = bias.to(compute_dtype(x))
    for place in range(width):
        total = total + taps[:, place].to(total.dtype) * x[:, place : place + time]
    return F.silu(total).to(x.dtype)
