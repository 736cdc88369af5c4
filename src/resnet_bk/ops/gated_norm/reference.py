"""The gated norm in plain PyTorch; gradients by autograd."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from resnet_bk.ops.dispatch import compute_dtype


def gated_norm_reference(y: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See `resnet_bk.ops.gated_norm.gated_norm`."""
    wide = y.to(compute_dtype(y))
    normed = wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (normed.flatten(-2) * weight.to(wide.dtype) * F.silu(gate.to(wide.dtype))).to(y.dtype)
