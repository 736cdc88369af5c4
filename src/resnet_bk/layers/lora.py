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
    _check_groups(tuple(weight.shape), group)
    groups = weight.detach().float().unflatten(1, (-1, group))
    # A GPU divides by a constant by multiplying with its reciprocal, so that codes would differ from a CPU's.
    scales = (groups.abs().amax(2) * (1 / 7)).half()
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


def _check_groups(shape: tuple[int, ...], group: int) -> None:
    if group < 2 or group % 2:
        raise DomainError(f"group is {group}; expected an even number of at least 2.")
    if len(shape) != 2 or shape[1] % group:
        raise ShapeError(f"weight is {list(shape)}; expected a matrix whose rows are whole groups of {group}.")


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

    W is zero until `pack` is called, and B until it is trained, so that the layer starts as that of the rounded W.

    Args:
        in_features: columns of W, whole groups.
        out_features: rows of W.
        rank: rows of A, at least 1.
        alpha: weight of the adapter times `rank`.
        group: numbers of W that share a scale; even.
        device: of all tensors.

    Cost: (0.5 + 2 / group) bytes a number of W; one unpacked W while it is used, forward and backward.
    Source: Hu et al., LoRA (2021); Dettmers et al., QLoRA (2023), whose four-bit floats and twice packed scales are
        not taken over.
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 16,
        alpha: float = 16.0,
        group: int = 64,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise DomainError(f"rank is {rank}; expected at least 1.")
        _check_groups((out_features, in_features), group)
        self.in_features, self.out_features = in_features, out_features
        self.group, self.factor = group, alpha / rank
        codes = torch.zeros(out_features, in_features // 2, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        scales = torch.zeros(out_features, in_features // group, dtype=torch.float16, device=device)
        self.register_buffer("scales", scales)
        self.adapter_in = nn.Parameter(torch.empty(rank, in_features, device=device))
        self.adapter_out = nn.Parameter(torch.empty(out_features, rank, device=device))
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Draw A anew, normal with standard deviation in^(-1/2), and set B to zero."""
        nn.init.normal_(self.adapter_in, std=self.in_features**-0.5)
        nn.init.zeros_(self.adapter_out)

    def pack(self, weight: Float[Tensor, "out in"]) -> None:
        """Freeze `weight` as W, packed on its own device; raises as `pack_int4` does."""
        self.codes, self.scales = pack_int4(weight, self.group)

    @torch.no_grad()
    def merged(self) -> Float[Tensor, "out in"]:
        """W + (alpha / rank) B A in float32: the one matrix of the whole layer."""
        return unpack_int4(self.codes, self.scales, torch.float32).addmm_(
            self.adapter_out, self.adapter_in, alpha=self.factor
        )

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
    a time; of a model on the meta device none is, and the packed ones are on the meta device too. Adapters are float32.

    Raises:
        ShapeError: a matrix whose rows are not whole groups; some layers may have been replaced.
    """
    model.requires_grad_(False)
    for parent in list(model.get_submodule("blocks").modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            sizes, weight = (child.in_features, child.out_features), child.weight
            adapted = AdaptedLinear(*sizes, rank=rank, alpha=alpha, group=group, device=weight.device)
            if not weight.is_meta:
                adapted.pack(weight)
            setattr(parent, name, adapted)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
