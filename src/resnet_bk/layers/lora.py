"""Frozen matrices in four bits with trainable low-rank adapters: fine-tuning in the memory of the packed weights."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.errors import DomainError, ShapeError


def pack_int4(
    weight: Float[Tensor, "out in"], group: int = 64
) -> tuple[UInt8[Tensor, "out half_in"], Float[Tensor, "out groups"]]:
    """Four-bit codes of `weight`, two a byte, and one scale for every `group` numbers of a row.

        scale = max |w| / 7 over the group,   code = round(w / scale) + 8 in [1, 15]

    Args:
        weight: any floating dtype.
        group: numbers that share a scale; even, and a divisor of the row length.

    Returns:
        Codes (first of a pair in the low half of the byte) and float16 scales.

    Raises:
        ShapeError: no matrix, or rows that are not whole groups. DomainError: an odd group or one below 2, numbers that
            are not finite or too large for scales in float16.

    Theorem: no number moves by more than half its scale, but for the rounding of the scale itself.
    """
    if group < 2 or group % 2:
        raise DomainError(f"group is {group}; expected an even number of at least 2.")
    if weight.dim() != 2 or weight.shape[1] % group:
        raise ShapeError(f"weight is {list(weight.shape)}; expected a matrix whose rows are whole groups of {group}.")
    groups = weight.detach().float().unflatten(1, (-1, group))
    scales = (groups.abs().amax(2) / 7).half()
    if not bool(torch.isfinite(scales).all()):
        raise DomainError("weight holds numbers that are not finite, or beyond 7 * 65504; scales are float16.")
    # A group of zeros, or of numbers so small that their scale is zero, is zero.
    steps = torch.where(scales > 0, scales.float(), 1.0)[..., None]
    # Only scales below float16's normal numbers are so far off that a code could leave its range.
    codes = (groups / steps).round().clamp(-7, 7).add(8).to(torch.uint8).flatten(1)
    return codes[:, ::2] | (codes[:, 1::2] << 4), scales


def unpack_int4(
    codes: UInt8[Tensor, "out half_in"], scales: Float[Tensor, "out groups"], dtype: torch.dtype
) -> Float[Tensor, "out in"]:
    """The matrix that `pack_int4` stored, in `dtype`."""
    pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    signed = pairs.to(dtype).sub_(8).unflatten(1, (scales.shape[1], -1))
    return signed.mul_(scales.to(dtype)[..., None]).flatten(1)


class _FrozenProduct(torch.autograd.Function):
    """x W^T for a packed W, which is unpacked for every use and has no gradient, so that nothing else is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.dtypes = x.dtype, dtype
        return x.to(dtype) @ unpack_int4(codes, scales, dtype).T

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        before, dtype = ctx.dtypes
        codes, scales = ctx.saved_tensors
        grad = grads[0].to(dtype) @ unpack_int4(codes, scales, dtype)
        return grad.to(before), None, None, None


class AdaptedLinear(nn.Module):
    """x W^T + (alpha / rank) x A^T B^T with W frozen in four bits, and A [rank, in] and B [out, rank] trained.

    B starts at zero, so that the layer starts as that of the rounded W.

    Args:
        weight: W.
        rank: rows of A, at least 1.
        alpha: weight of the adapter times `rank`.
        group: numbers of W that share a scale.

    Cost: (0.5 + 2 / group) bytes a number of W; one unpacked W while it is used, forward and backward.
    Source: Hu et al., LoRA (2021); Dettmers et al., QLoRA (2023), whose four-bit floats and twice packed scales are
        not taken over.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, *, rank: int = 16, alpha: float = 16.0, group: int = 64) -> None:
        super().__init__()
        if rank < 1:
            raise DomainError(f"rank is {rank}; expected at least 1.")
        self.out_features, self.in_features = weight.shape
        self.factor = alpha / rank
        codes, scales = pack_int4(weight, group)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        wide = {"dtype": torch.float32, "device": weight.device}
        self.adapter_in = nn.Parameter(torch.randn(rank, self.in_features, **wide) * self.in_features**-0.5)
        self.adapter_out = nn.Parameter(torch.zeros(self.out_features, rank, **wide))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Output in the dtype of autocast, else in that of `x`."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        frozen = _FrozenProduct.apply(x, self.codes, self.scales, dtype)
        adapted = F.linear(F.linear(x, self.adapter_in.to(x.dtype)), self.adapter_out.to(x.dtype))
        return frozen + self.factor * adapted


def adapt(model: nn.Module, *, rank: int = 16, alpha: float = 16.0, group: int = 64) -> int:
    """Number of trainable parameters left after the linear layers of all `model.blocks` became `AdaptedLinear`.

    Everything else, embeddings, head, norms and the media's parameters, is frozen as it is. One matrix is converted at
    a time. Adapters are float32 parameters of the model; `save_pretrained` does not know the packed matrices yet.

    Raises:
        ShapeError: a matrix whose rows are not whole groups.
    """
    model.requires_grad_(False)
    blocks = model.get_submodule("blocks")
    for parent in list(blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, AdaptedLinear(child.weight, rank=rank, alpha=alpha, group=group))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
