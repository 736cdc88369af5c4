"""Factorisation of a dense Hermitian matrix into the nested bases of `hierarchical`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.errors import DomainError
from resnet_bk.theory.hierarchical import Hierarchical
from resnet_bk.theory.low_rank import OVERSAMPLING, POWER_STEPS, FactorMethod, checked_hermitian, default_rank


def factorise_hierarchical(
    matrix: Tensor,
    *,
    rank: int | None = None,
    leaf_size: int | None = None,
    method: FactorMethod = "exact",
    generator: torch.Generator | None = None,
) -> Hierarchical:
    r"""Returns a Hermitian hierarchical matrix close to a Hermitian one: every off-diagonal block projected on bases.

    Args:
        matrix: float64 or complex128 [sites, sites], finite and Hermitian to rounding.
        rank: of every basis, >= 1; ceil(log2 sites) (at least 1) unless given, at most the size of a leaf.
        leaf_size: a leaf's largest size, >= 1; 2 rank unless given.
        method: bases from singular vectors ("exact") or from a random sketch of the rows ("randomised").
        generator: seeded source of the sketch; required by "randomised", unused by "exact".

    Returns:
        `Hierarchical` with right = left and `error` = the Frobenius norm of the difference.

    Raises:
        ShapeError: not a square float64 or complex128 matrix.
        DomainError: empty, not finite, not Hermitian, a rank or size below 1, a missing generator, an unknown method.

    Theorem: exact, to rounding, if every block of rows off a node's diagonal block has rank <= `rank`: so for
        tridiagonal matrices at rank 2 and for their inverses. Storage is O(sites rank): O(sites log sites) by default.
    Not claimed: that log2(sites) is enough for a given matrix (read `error`), or the best approximation of that form.
    Cost: O(sites^2 * leaf_size) work for "exact", O(sites^2 * rank) for "randomised".
    Source: Xia, Chandrasekaran, Gu and Li 2010; Halko, Martinsson and Tropp 2011.
    """
    whole = checked_hermitian(matrix)
    sites = whole.shape[0]
    rank = max(1, default_rank(sites)) if rank is None else rank
    leaf_size = 2 * rank if leaf_size is None else leaf_size
    for name, value in (("rank", rank), ("leaf_size", leaf_size)):
        if value < 1:
            raise DomainError(f"{name} = {value}: expected >= 1; leave it out for the default")
    levels = max(0, (-(-sites // leaf_size) - 1).bit_length())
    leaves, size = 1 << levels, -(-sites // (1 << levels))
    rank = min(rank, size)
    padded = F.pad(whole, (0, leaves * size - sites, 0, leaves * size - sites))
    blocks = _diagonal_blocks(padded, leaves).clone()
    spare = torch.arange(leaves * size, device=whole.device).unflatten(0, (leaves, size)) >= sites
    blocks = blocks + torch.diag_embed(spare.to(torch.complex128))
    rows, both, bases, couplings = padded, padded, [], []
    for level in range(levels):
        nodes = leaves >> level
        basis = _row_basis(rows.unflatten(0, (nodes, -1)), rank, method, generator)
        bases.append(basis)
        rows = (basis.mH @ rows.unflatten(0, (nodes, -1))).flatten(0, 1)
        both = (basis.mH @ both.unflatten(0, (nodes, -1))).flatten(0, 1).mH
        both = (basis.mH @ both.unflatten(0, (nodes, -1))).flatten(0, 1).mH
        upper = _diagonal_blocks(both, nodes // 2)[:, :rank, rank:]
        couplings.append(torch.stack((upper, upper.mH), 1))
    leaf = bases[0] if bases else torch.zeros(1, size, rank, dtype=torch.complex128, device=whole.device)
    transfers = tuple(part for basis in bases[1:] for part in [basis.unflatten(1, (2, rank)).flatten(0, 1)])
    parts = (sites, blocks, leaf, leaf, transfers, transfers, tuple(couplings))
    error = float(torch.linalg.matrix_norm(whole - Hierarchical(*parts).dense()))
    return Hierarchical(*parts, error)


def _row_basis(rows: Tensor, rank: int, method: FactorMethod, generator: torch.Generator | None) -> Tensor:
    """Orthonormal basis [nodes, height, rank] of the rows [nodes, height, columns] off each node's own columns."""
    nodes, _, columns = rows.shape
    own = torch.eye(nodes, dtype=torch.bool, device=rows.device).repeat_interleave(columns // nodes, 1)
    rest = rows.masked_fill(own[:, None], 0)
    if method == "exact":
        return torch.linalg.svd(rest, full_matrices=False).U[..., :rank]
    if method != "randomised":
        raise DomainError(f"method = {method!r}: expected 'exact' or 'randomised'; choose one of them")
    if generator is None:
        raise DomainError("generator = None: the randomised method expects a seeded torch.Generator; pass one")
    sketch = min(rest.shape[1], rank + OVERSAMPLING)
    basis = rest @ torch.randn(columns, sketch, dtype=torch.complex128, generator=generator, device=generator.device)
    for _ in range(POWER_STEPS):
        basis = rest @ (rest.mH @ torch.linalg.qr(basis).Q)
    wide = torch.linalg.qr(basis).Q
    return wide @ torch.linalg.svd(wide.mH @ rest, full_matrices=False).U[..., :rank]


def _diagonal_blocks(matrix: Tensor, count: int) -> Tensor:
    """The `count` diagonal blocks of a square matrix, [count, size, size]."""
    grid = matrix.unflatten(0, (count, -1)).unflatten(2, (count, -1))
    return grid.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
