r"""Koopman estimates: linear models of hidden states by dynamic mode decomposition, with their measured residual.

    x_{t+1} ~ A x_t,      A V = V diag(lambda),      keep |lambda| >= threshold

For a matrix that is not normal, dropping small eigenvalues is no small change; every function says how large it is.
`balanced_truncation` is the alternative whose error is bounded.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError


class KoopmanModes(NamedTuple):
    """A reduced linear model `x_{t+1} ~ modes diag(eigenvalues) readout x_t`, and how well it fits.

    Attributes:
        eigenvalues: complex128 [rank], largest modulus first.
        modes: right eigenvectors as columns, complex128 [dimension, rank].
        readout: coordinates of a state in the modes, complex128 [rank, dimension].
        mode_residual: `||readout_k x' - lambda_k readout_k x|| / ||readout_k x||` over the snapshots, float64 [rank].
        residual: `||X' - A_r X|| / ||X'||` in Frobenius norm, float.
    """

    eigenvalues: Tensor
    modes: Tensor
    readout: Tensor
    mode_residual: Tensor
    residual: float


class SpectralTruncation(NamedTuple):
    """A matrix without its small eigenvalues.

    Attributes:
        matrix: float64 [dimension, dimension].
        kept: number of eigenvalues kept.
        error: measured `||W - W_r||`, operator norm.
        bound: `condition * largest dropped |lambda|`.
        condition: of the eigenvectors; 1 for a normal matrix.
    """

    matrix: Tensor
    kept: int
    error: float
    bound: float
    condition: float


def dynamic_modes(before: Tensor, after: Tensor, rank: int) -> KoopmanModes:
    r"""Returns the dynamic mode decomposition of snapshot pairs at a given rank, with measured residuals.

        A = P X' X^+ P,      P the projection on the first `rank` left singular vectors of the snapshots X

    Args:
        before: states x_t, real [samples, dimension].
        after: states x_{t+1}, the same shape.
        rank: singular directions of `before` kept, 1 <= rank <= its numerical rank.

    Returns:
        `KoopmanModes` of `rank` modes.

    Raises:
        ShapeError: not two real matrices of one shape.
        DomainError: a value is not finite, or more modes asked for than the snapshots hold.

    Theorem: pairs of one linear map whose states span `rank` invariant dimensions are reproduced, residual 0.
    Not claimed: that hidden states of a model obey a linear map; the residual says how far they are from it.
    Cost: O(samples * dimension * min(samples, dimension)).
    Source: Schmid 2010; residual of a mode after Colbrook and Townsend 2021, for linear observables.
    """
    before, after = _checked_pair(before, after)
    left, values, right = torch.linalg.svd(before.T, full_matrices=False)
    numerical = int((values > values[0] * max(before.shape) * torch.finfo(torch.float64).eps).sum())
    if not 1 <= rank <= numerical:
        raise DomainError(f"rank is {rank}; expected 1 to {numerical}, the numerical rank of the snapshots: lower it")
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    reduced = left.T @ after.T @ (right.T / values)
    eigenvalues, vectors = torch.linalg.eig(reduced)
    order = eigenvalues.abs().argsort(descending=True)
    eigenvalues, vectors = eigenvalues[order], vectors[:, order]
    modes = left.to(torch.complex128) @ vectors
    readout = torch.linalg.solve(vectors, left.T.to(torch.complex128))
    return _with_residuals(eigenvalues, modes, readout, before, after)


def keep_modes(modes: KoopmanModes, before: Tensor, after: Tensor, threshold: float) -> KoopmanModes:
    """Returns the modes with |eigenvalue| >= threshold, their residuals measured anew on the given snapshots.

    Args:
        modes: a decomposition.
        before: states, real [samples, dimension]; use some that the decomposition has not seen.
        after: the states one step later, the same shape.
        threshold: smallest modulus kept, >= 0.

    Returns:
        `KoopmanModes`, conjugate pairs kept or dropped together.

    Raises:
        ShapeError: snapshots of another dimension, or not two real matrices of one shape.
        DomainError: a value is not finite, the threshold is negative, or nothing is left.

    Not claimed: a residual of the size of the threshold. It may be larger by the condition of the modes.
    Cost: O(samples * dimension * rank).
    Source: docs/theory/claims.
    """
    before, after = _checked_pair(before, after)
    if before.shape[1] != modes.modes.shape[0]:
        raise ShapeError(f"before has {before.shape[1]} channels; expected {modes.modes.shape[0]}, those of the modes")
    # Conjugate eigenvalues may differ in the last bit.
    kept = modes.eigenvalues.abs() >= _checked_threshold(threshold) * (1 - 1e-12)
    if not bool(kept.any()):
        largest = float(modes.eigenvalues.abs().max())
        raise DomainError(f"threshold is {threshold}; expected at most {largest:.3g}, the largest |eigenvalue|")
    return _with_residuals(modes.eigenvalues[kept], modes.modes[:, kept], modes.readout[kept], before, after)


def predict(modes: KoopmanModes, states: Tensor) -> Tensor:
    """Returns the states one step later according to the modes, float64 [samples, dimension].

    Args:
        modes: a decomposition.
        states: real [samples, dimension].

    Returns:
        float64, the shape of `states`; the real part, exact where modes come in conjugate pairs.

    Raises:
        ShapeError: states of another dimension.

    Cost: O(samples * dimension * rank).
    Source: the definition.
    """
    if states.ndim != 2 or states.shape[1] != modes.modes.shape[0]:
        raise ShapeError(f"states has shape {list(states.shape)}; expected [samples, {modes.modes.shape[0]}]")
    coordinates = states.to(torch.complex128) @ modes.readout.T
    return ((coordinates * modes.eigenvalues) @ modes.modes.T).real


def truncate_spectrum(matrix: Tensor, threshold: float) -> SpectralTruncation:
    r"""Returns `V diag(lambda, |lambda| >= threshold) V^{-1}`, the error measured, and the error's bound.

    Args:
        matrix: W, real [dimension, dimension], diagonalisable.
        threshold: smallest modulus kept, >= 0.

    Returns:
        `SpectralTruncation`.

    Raises:
        ShapeError: not a real square matrix.
        DomainError: a value is not finite, the threshold is negative, or the eigenvectors are dependent to rounding.

    Theorem: `||W - W_r|| <= cond(V) max |dropped lambda|`, equal to the largest one dropped if W is normal.
    Not claimed: an error of the size of the threshold: [[1, 100], [0, 0.01]] without its eigenvalue 0.01 errs by 1.
    Cost: O(dimension^3).
    Source: submultiplicativity; docs/theory/claims.
    """
    matrix = checked_matrix("matrix", matrix)
    if matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"matrix has shape {list(matrix.shape)}; expected a square matrix")
    threshold = _checked_threshold(threshold)
    values, vectors = torch.linalg.eig(matrix)
    condition = float(torch.linalg.cond(vectors))
    if not condition < 1e12:
        raise DomainError(
            f"the eigenvectors of matrix have condition {condition:.1e}; expected below 1e12, since it is defective to"
            " rounding: use balanced_truncation"
        )
    kept = values.abs() >= threshold * (1 - 1e-12)
    small = torch.where(kept, 0, values)
    rest = torch.linalg.solve(vectors, vectors * small, left=False).real
    error = float(torch.linalg.matrix_norm(rest, ord=2))
    bound = condition * float(small.abs().max())
    return SpectralTruncation(matrix - rest, int(kept.sum()), error, bound, condition)


def _with_residuals(eigenvalues: Tensor, modes: Tensor, readout: Tensor, before: Tensor, after: Tensor) -> KoopmanModes:
    now, later = (states.to(torch.complex128) @ readout.T for states in (before, after))
    drift = torch.linalg.vector_norm(later - now * eigenvalues, dim=0)
    mode_residual = drift / torch.linalg.vector_norm(now, dim=0)
    predicted = ((now * eigenvalues) @ modes.T).real
    residual = float(torch.linalg.vector_norm(after - predicted) / torch.linalg.vector_norm(after))
    return KoopmanModes(eigenvalues, modes, readout, mode_residual, residual)


def _checked_pair(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    before, after = checked_matrix("before", before), checked_matrix("after", after)
    if before.shape != after.shape:
        raise ShapeError(f"after has shape {list(after.shape)}; expected {list(before.shape)}, that of before")
    if not bool(before.any()) or not bool(after.any()):
        raise DomainError("before or after is zero throughout; expected states that move: nothing can be fitted")
    return before, after


def checked_matrix(name: str, matrix: Tensor) -> Tensor:
    """Returns the matrix in float64 without gradient.

    Args:
        name: what the messages call it.
        matrix: real [rows, columns], finite.

    Returns:
        float64 [rows, columns].

    Raises:
        ShapeError: not a real matrix, or an empty one.
        DomainError: a value is not finite.
    """
    if matrix.ndim != 2 or 0 in matrix.shape or not matrix.is_floating_point():
        raise ShapeError(f"{name} is {matrix.dtype} {list(matrix.shape)}; expected a real matrix that is not empty")
    if not bool(torch.isfinite(matrix).all()):
        raise DomainError(f"{name} holds a value that is not finite; expected finite: look where it was computed")
    return matrix.detach().double()


def _checked_threshold(threshold: float) -> float:
    if not (math.isfinite(threshold) and threshold >= 0):
        raise DomainError(f"threshold is {threshold}; expected finite and >= 0: 0 keeps everything")
    return float(threshold)
