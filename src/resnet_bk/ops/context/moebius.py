"""Moebius maps of segments of sites: composed, applied, differentiated; complex128 throughout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from resnet_bk.ops.dispatch import Backend, choose_backend, compute_dtype

# Sites whose matrices exist at one time, 64 bytes each before the first halving.
_BLOCK_SITES = 8192


class MoebiusMap(NamedTuple):
    r"""What a segment of sites does to the Green function before it, whatever that is: m -> (a m + b) / (c m + d)."""

    entries: Complex[Tensor, "2 2 *places"]
    """((a, b), (c, d)), rescaled so that none overflows."""
    log_scale: Float[Tensor, "*places"]
    """Log of the factor by which the entries were divided; the determinant is exp(-2 log_scale)."""

    def __call__(self, m: Complex[Tensor, "*places"]) -> Complex[Tensor, "*places"]:
        """The Green function after the segment."""
        (a, b), (c, d) = self.entries
        return (a * m + b) / (c * m + d)

    def derivative(self, m: Complex[Tensor, "*places"]) -> Complex[Tensor, "*places"]:
        """Derivative of the Green function after the segment with respect to `m`, the one before it.

        It is the product of the squared Green functions of all sites inside, and zero where nothing is remembered.
        """
        _, (c, d) = self.entries
        return torch.exp(-2 * self.log_scale) / (c * m + d).square()

    def after(self, earlier: MoebiusMap) -> MoebiusMap:
        """The map of the segment that consists of `earlier` and then this one."""
        first, second = earlier.entries, self.entries
        product = second[:, :1] * first[:1] + second[:, 1:] * first[1:]
        return _rescaled(product, earlier.log_scale + self.log_scale)

    def pack(self) -> Float[Tensor, "numbers batch heads"]:
        """The map as one float64 tensor, to be sent: nine numbers a sequence and head."""
        parts = torch.view_as_real(self.entries).movedim(-1, 0).flatten(0, 2)
        return torch.cat((parts, self.log_scale[None]))

    @classmethod
    def unpack(cls, packed: Float[Tensor, "numbers batch heads"]) -> MoebiusMap:
        """The map that `pack` made into `packed`."""
        real, imag = packed[:8].unflatten(0, (2, 2, 2))
        return cls(torch.complex(real, imag), packed[8])


def compose_sites(
    detuning: Float[Tensor, "batch time heads"],
    absorption: Float[Tensor, "batch time heads"],
    *,
    backend: Backend = "auto",
) -> MoebiusMap:
    """The Moebius map [batch, heads] of a segment of sites.

    One site is ((0, 1), (-1, detuning - i absorption)); products are taken pairwise in a tree and divided by their
    largest entry at every level, so that no site up to |detuning| 1e15 overflows.

    Args:
        detuning: as in `causal_resolvent`.
        absorption: the same.
        backend: "triton" composes by kernels, stretches of sites first; others pairs, in a tree.

    Cost: O(batch * time * heads) work in log2(time) steps; memory of a few thousand sites.
    Source: MATH theorem 6: composing and carrying in float64 whatever the precision of the sites.
    """
    sites = [part.to(compute_dtype(detuning, absorption)) for part in (detuning, absorption)]
    if choose_backend(backend, sites[0]) == "triton":
        return _compose_by_kernel(*sites)
    whole: MoebiusMap | None = None
    for delta, eta in zip(detuning.split(_BLOCK_SITES, 1), absorption.split(_BLOCK_SITES, 1), strict=True):
        block = _compose_block(torch.complex(delta.double(), -eta.double()))
        whole = block if whole is None else block.after(whole)
    assert whole is not None  # split yields at least one piece
    return whole


def _compose_by_kernel(detuning: Tensor, absorption: Tensor) -> MoebiusMap:
    """The map of float32 sites [batch, time, heads]."""
    from resnet_bk.ops.resolvent.kernels import moebius_maps_op

    rows = detuning.shape[0]
    maps, log_scale = moebius_maps_op(detuning.flatten(0, 1), absorption.flatten(0, 1), rows)
    # [batch, column, row, part, heads]; the columns come as (b, d), (a, c).
    columns = maps.unflatten(1, (2, 2, 2)).flip(1)
    return _rescaled(torch.view_as_complex(columns.permute(2, 1, 0, 4, 3).contiguous()), log_scale)


def _compose_block(alpha: Tensor) -> MoebiusMap:
    """The map of sites alpha [batch, time, heads]."""
    even = alpha.shape[1] // 2 * 2
    earlier, later = alpha[:, :even:2], alpha[:, 1:even:2]
    minus = torch.full_like(earlier, -1)
    entries = _matrix(minus, earlier, -later, later * earlier - 1)
    if even < alpha.shape[1]:
        last = alpha[:, even:]
        single = _matrix(torch.zeros_like(last), torch.ones_like(last), -torch.ones_like(last), last)
        entries = torch.cat((entries, single), dim=3)
    return _compose_maps(_rescaled(entries, alpha.real.new_zeros(entries.shape[2:])))


def _compose_maps(maps: MoebiusMap) -> MoebiusMap:
    """The map of all the segments [batch, segments, heads], one after the other."""
    while (count := maps.entries.shape[3]) > 1:
        even = count // 2 * 2
        products = _part(maps, slice(1, even, 2)).after(_part(maps, slice(0, even, 2)))
        if even < count:
            odd = _part(maps, slice(even, count))
            products = MoebiusMap(*(torch.cat(pair, dim=-2) for pair in zip(products, odd, strict=True)))
        maps = products
    return MoebiusMap(maps.entries[:, :, :, 0], maps.log_scale[:, 0])


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.stack((a, b, c, d)).unflatten(0, (2, 2))


def _part(maps: MoebiusMap, places: slice) -> MoebiusMap:
    """Those of many maps [..., places, heads] that stand at these places."""
    return MoebiusMap(maps.entries[..., places, :], maps.log_scale[..., places, :])


def _rescaled(entries: Tensor, log_scale: Tensor) -> MoebiusMap:
    """The map with its largest entry at modulus one."""
    largest = entries.abs().amax((0, 1))
    return MoebiusMap(entries / largest, log_scale + largest.log())
