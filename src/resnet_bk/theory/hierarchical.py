r"""Hierarchical semiseparable matrices: nested low-rank bases over a binary tree of sites.

    A_p = [[A_1, U_1 B_12 V_2^H], [U_2 B_21 V_1^H, A_2]],      U_p = [U_1 R_1; U_2 R_2],   V_p = [V_1 W_1; V_2 W_2]

at every inner node p with children 1 and 2; leaves hold dense blocks. Every level is one batch, and the last
leaves are padded with uncoupled sites. All in complex128; results are differentiable in every tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory.low_rank import _check_spectral_parameter, _expect


@dataclass(frozen=True)
class Hierarchical:
    """A hierarchical semiseparable matrix on `sites` sites; leaves are numbered from left to right.

    Attributes:
        sites: size of the matrix.
        blocks: diagonal blocks of the 2^levels leaves, complex128 [leaves, size, size]; identity where padded.
        left: U of the leaves, complex128 [leaves, size, rank]; 0 where padded.
        right: V of the leaves, same shape.
        left_transfers: R of the nodes of every level from the leaves up to the second, complex128 [nodes, rank, rank].
        right_transfers: W, likewise.
        couplings: (B_12, B_21) of every pair of siblings, from the leaves up, complex128 [pairs, 2, rank, rank].
        error: Frobenius norm of what a factorisation left out; 0 for a matrix given by its parts.
    """

    sites: int
    blocks: Tensor
    left: Tensor
    right: Tensor
    left_transfers: tuple[Tensor, ...]
    right_transfers: tuple[Tensor, ...]
    couplings: tuple[Tensor, ...]
    error: float = 0.0

    def __post_init__(self) -> None:
        if self.left.dim() != 3:
            raise ShapeError(f"left: found {list(self.left.shape)}, expected [leaves, size, rank]; stack the leaves")
        leaves, size, rank = self.left.shape
        levels = max(leaves, 1).bit_length() - 1
        if leaves != 1 << levels or not 0 < self.sites <= leaves * size:
            raise ShapeError(
                f"sites = {self.sites}: {leaves} leaves of {size} sites; expected a power of two that holds the sites"
            )
        _expect("blocks", self.blocks, torch.complex128, (leaves, size, size))
        _expect("left", self.left, torch.complex128, (leaves, size, rank))
        _expect("right", self.right, torch.complex128, (leaves, size, rank))
        for name, parts, count in (
            ("left_transfers", self.left_transfers, max(levels - 1, 0)),
            ("right_transfers", self.right_transfers, max(levels - 1, 0)),
            ("couplings", self.couplings, levels),
        ):
            if len(parts) != count:
                raise ShapeError(f"{name}: found {len(parts)} levels, expected {count} for {leaves} leaves; add them")
            for level, part in enumerate(parts):
                nodes = leaves >> level
                shape = (nodes // 2, 2, rank, rank) if name == "couplings" else (nodes, rank, rank)
                _expect(f"{name}[{level}]", part, torch.complex128, shape)

    @property
    def numbers(self) -> int:
        """Complex numbers stored: `sites (size + 2 rank)` and less than `6 leaves rank^2`, so O(sites * rank)."""
        parts = (self.blocks, self.left, self.right, *self.left_transfers, *self.right_transfers, *self.couplings)
        return sum(part.numel() for part in parts)

    @property
    def adjoint(self) -> Hierarchical:
        """The conjugate transpose, without cost but for the conjugation."""
        swapped = tuple(pair.flip(1).mH for pair in self.couplings)
        return Hierarchical(
            self.sites, self.blocks.mH, self.right, self.left, self.right_transfers, self.left_transfers, swapped,
            self.error,
        )  # fmt: skip

    @property
    def transpose(self) -> Hierarchical:
        """The transpose: the adjoint of the conjugate."""
        conjugate = Hierarchical(
            self.sites,
            self.blocks.conj(),
            self.left.conj(),
            self.right.conj(),
            tuple(part.conj() for part in self.left_transfers),
            tuple(part.conj() for part in self.right_transfers),
            tuple(part.conj() for part in self.couplings),
            self.error,
        )
        return conjugate.adjoint

    def dense(self) -> Tensor:
        """Returns the matrix, complex128 [sites, sites]. Cost: O(sites^2 rank)."""
        identity = torch.eye(self.sites, dtype=torch.complex128, device=self.blocks.device)
        return hierarchical_product(self, identity)


def hierarchical_product(matrix: Hierarchical, vectors: Tensor) -> Tensor:
    """Returns A x, without forming A; A^T x and A^H x are products with `matrix.transpose` and `matrix.adjoint`.

    Args:
        matrix: A.
        vectors: x, complex128 [sites, columns], finite.

    Returns:
        complex128 [sites, columns].

    Raises:
        ShapeError: `vectors` does not fit A.
        DomainError: `vectors` is not finite.

    Cost: O(sites * rank) per column.
    Source: Chandrasekaran, Gu and Pals 2006.
    """
    x = _by_leaf(matrix, vectors)
    seen = [matrix.right.mH @ x]  # what every node shows of x, from the leaves up
    for transfer in matrix.right_transfers:
        seen.append(_sum_children(transfer.mH @ seen[-1]))
    sent = None  # what every node receives, from the top down
    for level in reversed(range(len(matrix.couplings))):
        pairs = matrix.couplings[level] @ seen[level].unflatten(0, (-1, 2)).flip(1)
        received = pairs.flatten(0, 1)
        sent = received if sent is None else received + matrix.left_transfers[level] @ sent.repeat_interleave(2, 0)
    y = matrix.blocks @ x
    y = y if sent is None else y + matrix.left @ sent
    return y.flatten(0, 1)[: matrix.sites]


def hierarchical_resolvent(matrix: Hierarchical, absorption: Tensor, vectors: Tensor, *, energy: float = 0.0) -> Tensor:
    r"""Returns (A - E - i Gamma)^{-1} b, by Woodbury's identity at every node of the tree.

    Args:
        matrix: A.
        absorption: diagonal of Gamma, float64 [sites], finite and > 0, units of A.
        vectors: b, complex128 [sites, columns], finite.
        energy: E, finite, same units.

    Returns:
        complex128 [sites, columns].

    Raises:
        ShapeError: shapes or dtypes do not fit together.
        DomainError: an absorption <= 0, a value that is not finite, or (only if A is not Hermitian) a singular matrix.

    Theorem: for Hermitian A every node's matrix is a diagonal block of A - E - i Gamma, so all inverses exist, with
        norm <= 1 / min(absorption); another Hermitian A' moves the result by at most ||A - A'|| / min(absorption)^2.
    Not claimed: either statement for an A that is not Hermitian.
    Cost: O(sites * (size^2 + rank^2)) work, 2 log2(leaves) batched steps.
    Source: Woodbury 1950; second resolvent identity.
    """
    _check_spectral_parameter(absorption, energy, matrix.sites)
    b = _by_leaf(matrix, vectors)
    shift = torch.complex(torch.full_like(absorption, energy), absorption)
    block = matrix.blocks - torch.diag_embed(_by_leaf(matrix, shift[:, None])[..., 0])
    rank = matrix.left.shape[-1]
    both = _solve(block, torch.cat((matrix.left, b), dim=-1), energy)
    moved, plain = both[..., :rank], both[..., rank:]
    inner, seen = matrix.right.mH @ moved, matrix.right.mH @ plain  # V^H A^-1 U and V^H A^-1 b of every node
    steps = []
    for level, pairs in enumerate(matrix.couplings):
        inner, seen = _pair_diagonal(inner), seen.unflatten(0, (-1, 2)).flatten(1, 2)
        coupling = _pair_off_diagonal(pairs)
        identity = torch.eye(2 * rank, dtype=torch.complex128, device=coupling.device)
        weights = _solve(identity + coupling @ inner, coupling, energy)
        steps.append((inner, seen, weights))
        if level < len(matrix.left_transfers):
            left = matrix.left_transfers[level].unflatten(0, (-1, 2)).flatten(1, 2)
            right = matrix.right_transfers[level].unflatten(0, (-1, 2)).flatten(1, 2)
            seen = right.mH @ (seen - inner @ (weights @ seen))
            inner = right.mH @ ((inner - inner @ (weights @ inner)) @ left)
    correction = None
    for level in reversed(range(len(steps))):
        inner, seen, weights = steps[level]
        if correction is None:
            correction = weights @ seen
        else:
            sent = matrix.left_transfers[level].unflatten(0, (-1, 2)).flatten(1, 2) @ correction
            correction = sent + weights @ (seen - inner @ sent)
        correction = correction.unflatten(1, (2, rank)).flatten(0, 1)
    x = plain if correction is None else plain - moved @ correction
    return x.flatten(0, 1)[: matrix.sites]


def _by_leaf(matrix: Hierarchical, vectors: Tensor) -> Tensor:
    """[sites, columns] as [leaves, size, columns], padded with zeros."""
    _expect("vectors", vectors, torch.complex128, (matrix.sites, vectors.shape[-1] if vectors.dim() else 0))
    leaves, size = matrix.left.shape[:2]
    return F.pad(vectors, (0, 0, 0, leaves * size - matrix.sites)).unflatten(0, (leaves, size))


def _sum_children(parts: Tensor) -> Tensor:
    return parts.unflatten(0, (-1, 2)).sum(1)


def _pair_diagonal(parts: Tensor) -> Tensor:
    """diag(P_1, P_2) of every pair of siblings."""
    first, second = parts.unflatten(0, (-1, 2)).unbind(1)
    zero = torch.zeros_like(first)
    return torch.cat((torch.cat((first, zero), -1), torch.cat((zero, second), -1)), -2)


def _pair_off_diagonal(pairs: Tensor) -> Tensor:
    """[[0, B_12], [B_21, 0]] of every pair of siblings."""
    upper, lower = pairs.unbind(1)
    zero = torch.zeros_like(upper)
    return torch.cat((torch.cat((zero, upper), -1), torch.cat((lower, zero), -1)), -2)


def _solve(matrices: Tensor, vectors: Tensor, energy: float) -> Tensor:
    solved, failed = torch.linalg.solve_ex(matrices, vectors)
    if bool(failed.any()):
        raise DomainError(
            f"matrix: singular at E = {energy}; expected A Hermitian, for which it never is; factorise with "
            "factorise_hierarchical"
        )
    return solved
