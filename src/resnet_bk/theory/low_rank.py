"""Semiseparable matrices H = T + U V^H: product, exact Woodbury resolvent, factorisation that stays Hermitian."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory.tridiagonal import TridiagonalSolve

FactorMethod = Literal["exact", "randomised"]

OVERSAMPLING = 8  # extra directions of the random sketch
POWER_STEPS = 2  # multiplications by the matrix that sharpen the sketch


@dataclass(frozen=True)
class Semiseparable:
    """The matrix H = T + U V^H with T = tridiag(hopping, diagonal, conj(hopping)) Hermitian.

    Attributes:
        diagonal: of T, float64 [sites], units of energy.
        hopping: below the diagonal of T, complex128 [sites - 1], same units; its conjugate is above.
        left: U, complex128 [sites, rank].
        right: V, complex128 [sites, rank]. H is Hermitian if and only if U V^H is; `factorise_hermitian` ensures it.
        error: Frobenius norm of what a factorisation left out, same units; 0 for a matrix given by its factors.
    """

    diagonal: Tensor
    hopping: Tensor
    left: Tensor
    right: Tensor
    error: float = 0.0

    def __post_init__(self) -> None:
        sites = self.diagonal.shape[0] if self.diagonal.dim() == 1 else -1
        _expect("diagonal", self.diagonal, torch.float64, (sites,))
        if sites == 0:
            raise DomainError("diagonal: found 0 sites, expected at least 1; pass a non-empty line")
        _expect("hopping", self.hopping, torch.complex128, (sites - 1,))
        rank = self.left.shape[1] if self.left.dim() == 2 else -1
        _expect("left", self.left, torch.complex128, (sites, rank))
        _expect("right", self.right, torch.complex128, (sites, rank))

    def dense(self) -> Tensor:
        """Returns H as a dense matrix, complex128 [sites, sites]. Cost: O(sites^2 rank)."""
        band = torch.diag(self.diagonal.to(torch.complex128))
        band = band + torch.diag(self.hopping, -1) + torch.diag(self.hopping.conj(), 1)
        return band + self.left @ self.right.mH


def semiseparable_product(matrix: Semiseparable, vectors: Tensor) -> Tensor:
    """Returns H x, without forming H.

    Args:
        matrix: H.
        vectors: x, complex128 [sites, columns], finite.

    Returns:
        complex128 [sites, columns]; differentiable in `vectors` and in the parts of H.

    Raises:
        ShapeError: `vectors` does not fit H.
        DomainError: `vectors` is not finite.

    Cost: O(sites * rank) per column.
    Source: definition.
    """
    _expect("vectors", vectors, torch.complex128, (matrix.diagonal.shape[0], vectors.shape[-1] if vectors.dim() else 0))
    result = matrix.diagonal[:, None] * vectors + matrix.left @ (matrix.right.mH @ vectors)
    below = matrix.hopping[:, None] * vectors[:-1]
    above = matrix.hopping.conj()[:, None] * vectors[1:]
    zero = torch.zeros_like(vectors[:1])
    return result + torch.cat([zero, below]) + torch.cat([above, zero])


def tridiagonal_resolvent(
    diagonal: Tensor, hopping: Tensor, absorption: Tensor, vectors: Tensor, *, energy: float = 0.0
) -> Tensor:
    r"""Returns (T - E - i Gamma)^{-1} b for the Hermitian T = tridiag(hopping, diagonal, conj(hopping)).

    Elimination without pivoting: with alpha = diagonal - E - i absorption the pivots are

        p_1 = alpha_1,    p_i = alpha_i - |hopping_{i-1}|^2 / p_{i-1}

    Args:
        diagonal: float64 [sites], finite, units of energy.
        hopping: complex128 [sites - 1], finite, same units.
        absorption: diagonal of Gamma, float64 [sites], finite and > 0, same units.
        vectors: b, complex128 [sites, columns], finite.
        energy: E, finite, same units.

    Returns:
        complex128 [sites, columns]; differentiable in every tensor.

    Raises:
        ShapeError: shapes or dtypes do not fit together.
        DomainError: an absorption <= 0 or a value that is not finite.

    Theorem: Im p_i <= -absorption_i, so |p_i| >= absorption_i: no pivot vanishes and no exchange of rows is needed.
    Cost: O(sites * columns) work in 2 * sites sequential steps.
    Source: Thomas algorithm; 1 / p_i is the half-line Green function.
    """
    sites = diagonal.shape[0] if diagonal.dim() == 1 else -1
    _expect("diagonal", diagonal, torch.float64, (sites,))
    _expect("hopping", hopping, torch.complex128, (sites - 1,))
    _check_spectral_parameter(absorption, energy, sites)
    _expect("vectors", vectors, torch.complex128, (sites, vectors.shape[-1] if vectors.dim() else 0))
    return _tridiagonal_solve(diagonal, hopping, absorption, vectors, energy)


def _tridiagonal_solve(diagonal: Tensor, hopping: Tensor, absorption: Tensor, vectors: Tensor, energy: float) -> Tensor:
    alpha = torch.complex(diagonal - energy, -absorption)
    solved: Any = TridiagonalSolve.apply(alpha, hopping, hopping.conj(), vectors)
    return solved


def semiseparable_resolvent(
    matrix: Semiseparable, absorption: Tensor, vectors: Tensor, *, energy: float = 0.0
) -> Tensor:
    r"""Returns (H - E - i Gamma)^{-1} b for H = T + U V^H, by Woodbury's identity on the exact tridiagonal solve.

        A = T - E - i Gamma,   (A + U V^H)^{-1} = A^{-1} - A^{-1} U (1 + V^H A^{-1} U)^{-1} V^H A^{-1}

    Args:
        matrix: H, finite.
        absorption: diagonal of Gamma, float64 [sites], finite and > 0, units of energy.
        vectors: b, complex128 [sites, columns], finite.
        energy: E, finite, same units.

    Returns:
        complex128 [sites, columns]; differentiable in every tensor.

    Raises:
        ShapeError: shapes or dtypes do not fit together.
        DomainError: an absorption <= 0, a value that is not finite, or (only if H is not Hermitian) a singular matrix.

    Theorem: for Hermitian H the inverse exists and has operator norm <= 1 / min(absorption); replacing H by a
        Hermitian H' moves it by at most ||H - H'|| / min(absorption)^2.
    Not claimed: either bound for a U V^H that is not Hermitian, such as a truncated SVD; the norm can be any size.
    Cost: O(sites * rank * (rank + columns) + rank^3) work, 2 * sites sequential steps.
    Source: Woodbury 1950; second resolvent identity.
    """
    sites, rank = matrix.left.shape
    _check_spectral_parameter(absorption, energy, sites)
    _expect("vectors", vectors, torch.complex128, (sites, vectors.shape[-1] if vectors.dim() else 0))
    both = torch.cat([matrix.left, vectors], dim=1)
    solved = _tridiagonal_solve(matrix.diagonal, matrix.hopping, absorption, both, energy)
    moved, plain = solved[:, :rank], solved[:, rank:]
    capacitance = torch.eye(rank, dtype=torch.complex128, device=moved.device) + matrix.right.mH @ moved
    weights, failed = torch.linalg.solve_ex(capacitance, matrix.right.mH @ plain)
    if bool(failed != 0):
        raise DomainError(
            f"matrix: 1 + V^H (T - E - i Gamma)^-1 U is singular at E = {energy}; expected H Hermitian, for which it "
            "never is; factorise with factorise_hermitian"
        )
    return plain - moved @ weights


def default_rank(sites: int) -> int:
    """Returns ceil(log2 sites), the default rank of a factorisation; 0 for one site. Raises DomainError below 1."""
    if sites < 1:
        raise DomainError(f"sites = {sites}: expected at least 1; pass a non-empty line")
    return (sites - 1).bit_length()


def factorise_hermitian(
    matrix: Tensor,
    *,
    rank: int | None = None,
    method: FactorMethod = "exact",
    refinements: int = 0,
    generator: torch.Generator | None = None,
) -> Semiseparable:
    r"""Returns T + V Lambda V^H close to a Hermitian matrix: its tridiagonal part and a Hermitian low-rank correction.

    The off-tridiagonal part R is replaced by its `rank` eigenvalues of largest modulus ("exact"), or by those of its
    compression Q Q^H R Q Q^H to a random sketch Q of its range ("randomised"). U = V Lambda.

    Args:
        matrix: float64 or complex128 [sites, sites], finite and Hermitian to rounding, units of energy.
        rank: of the correction, 0 <= rank <= sites; ceil(log2 sites) unless given.
        method: "exact" or "randomised".
        refinements: how often to refit T to what the correction leaves, and the correction to the rest, >= 0.
        generator: seeded source of the sketch; required by "randomised", unused by "exact".

    Returns:
        `Semiseparable`, Hermitian for either method, with `error` = the Frobenius norm of the difference.

    Raises:
        ShapeError: not a square float64 or complex128 matrix.
        DomainError: empty, not finite, not Hermitian, a rank outside its range, a missing generator, an unknown method.

    Theorem: "exact" is the best approximation of R of that rank, in Frobenius and operator norm, and its error never
        grows with `refinements` (each half-step is a best approximation); with either method the
        resolvent keeps its bound 1 / min(absorption) and moves by at most error / min(absorption)^2.
    Not claimed: that log2(sites) is enough for a given matrix (read `error`), or that the refinements
        find the best pair T, R.
    Cost: O(sites^3) work for "exact", O(sites^2 * rank) for "randomised", per refinement.
    Source: Eckart and Young 1936; Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.3.
    """
    whole = checked_hermitian(matrix)
    sites = matrix.shape[0]
    rank = default_rank(sites) if rank is None else rank
    if not 0 <= rank <= sites:
        raise DomainError(f"rank = {rank}: expected 0 <= rank <= {sites}, the number of sites; choose one in between")
    if refinements < 0:
        raise DomainError(
            f"refinements = {refinements}: expected >= 0; 0 keeps the tridiagonal part of the matrix as T"
        )
    rest = whole.tril(-2) + whole.triu(2)
    values, vectors = _largest_eigenpairs(rest, rank, method, generator)
    for _ in range(refinements):
        left_over = whole - (vectors * values) @ vectors.mH
        rest = whole - left_over.tril(1).triu(-1)
        values, vectors = _largest_eigenpairs(rest, rank, method, generator)
    error = float(torch.linalg.matrix_norm(rest - (vectors * values) @ vectors.mH))
    band = whole - rest
    return Semiseparable(band.diagonal().real.clone(), band.diagonal(-1).clone(), vectors * values, vectors, error)


def checked_hermitian(matrix: Tensor) -> Tensor:
    """Returns (H + H^H) / 2 in complex128; raises ShapeError or DomainError unless H is Hermitian to rounding."""
    if matrix.dtype not in (torch.float64, torch.complex128) or matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        found = f"{matrix.dtype} {list(matrix.shape)}"
        raise ShapeError(f"matrix: found {found}, expected float64 or complex128 [sites, sites]; convert or reshape it")
    _check_finite("matrix", matrix)
    asymmetry = float((matrix - matrix.mH).abs().max())
    if asymmetry > 1e-12 * float(matrix.abs().max()):
        raise DomainError(
            f"matrix: differs from its adjoint by {asymmetry:.3e}, expected a Hermitian matrix; pass (H + H^H) / 2"
        )
    whole = matrix.to(torch.complex128)
    return 0.5 * (whole + whole.mH)


def _largest_eigenpairs(
    rest: Tensor, rank: int, method: FactorMethod, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Returns the `rank` eigenvalues of largest modulus of a Hermitian matrix (or of its sketch) and their vectors."""
    if method == "exact":
        values, vectors = torch.linalg.eigh(rest)
    elif method == "randomised":
        if generator is None:
            raise DomainError("generator = None: the randomised method expects a seeded torch.Generator; pass one")
        sketch = min(rest.shape[0], rank + OVERSAMPLING)
        basis = torch.randn(rest.shape[0], sketch, dtype=torch.complex128, generator=generator)
        for _ in range(1 + POWER_STEPS):
            basis = torch.linalg.qr(rest @ basis).Q
        inner = basis.mH @ rest @ basis
        values, vectors = torch.linalg.eigh(0.5 * (inner + inner.mH))
        vectors = basis @ vectors
    else:
        raise DomainError(f"method = {method!r}: expected 'exact' or 'randomised'; choose one of them")
    keep = values.abs().argsort(descending=True)[:rank]
    return values[keep], vectors[:, keep]


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raises unless the tensor has this dtype and shape (negative: the axes themselves are wrong) and is finite."""
    if tensor.dtype != dtype or min(shape, default=0) < 0 or tuple(tensor.shape) != shape:
        wanted = [axis if axis >= 0 else "any" for axis in shape]
        raise ShapeError(
            f"{name}: found {tensor.dtype} {list(tensor.shape)}, expected {dtype} {wanted}; convert or reshape it"
        )
    _check_finite(name, tensor)


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.shape[0] == 0 and name == "matrix":
        raise DomainError(f"{name}: found 0 sites, expected at least 1; pass a non-empty matrix")
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        index = (~finite).nonzero()[0].tolist()
        raise DomainError(f"{name}{index} = {tensor[tuple(index)].item()}: expected finite values; mend the input")


def _check_spectral_parameter(absorption: Tensor, energy: float, sites: int) -> None:
    _expect("absorption", absorption, torch.float64, (sites,))
    if not bool((absorption > 0).all()):
        index = int((absorption <= 0).nonzero()[0, 0])
        raise DomainError(
            f"absorption[{index}] = {float(absorption[index])}: expected > 0, which keeps the resolvent bounded; "
            "add a positive floor"
        )
    if not math.isfinite(energy):
        raise DomainError(f"energy = {energy}: expected a finite energy; choose a point of the real axis")
