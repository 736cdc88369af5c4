r"""Balanced truncation of a stable linear system, whose error is bounded before it is made.

s_{t+1} = A s_t + B u_t,      y_t = C s_t,      spectral radius of A below 1
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory.koopman import checked_matrix

# Squarings of A in the Gramians: 2^60 steps, beyond which a stable float64 matrix has nothing left.
_DOUBLINGS = 60


class BalancedModel(NamedTuple):
    """A reduced system `s' = A s + B u, y = C s` and the bound of its error.

    Attributes:
        state: A, float64 [order, order].
        source: B, float64 [order, inputs].
        readout: C, float64 [outputs, order].
        hankel_values: of the whole system, float64 [dimension], descending.
        bound: twice the sum of the Hankel values left out.
    """

    state: Tensor
    source: Tensor
    readout: Tensor
    hankel_values: Tensor
    bound: float


def gramians(state: Tensor, source: Tensor, readout: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns the Gramians of a stable system, `sum_k A^k B B^T A^{kT}` and `sum_k A^{kT} C^T C A^k`.

    Args:
        state: A, real [dimension, dimension], spectral radius below 1.
        source: B, real [dimension, inputs].
        readout: C, real [outputs, dimension].

    Returns:
        Two float64 [dimension, dimension], symmetric and positive semidefinite.

    Raises:
        ShapeError: shapes that do not fit together.
        DomainError: a value is not finite, or a spectral radius of 1 or more.

    Theorem: they solve `P = A P A^T + B B^T` and `Q = A^T Q A + C^T C`.
    Cost: O(dimension^3 log(1 / (1 - spectral radius))), by doubling.
    Source: Smith's squared iteration.
    """
    state, source, readout = _checked_system(state, source, readout)
    return _sum_of_powers(state, source @ source.T), _sum_of_powers(state.T, readout.T @ readout)


def balanced_truncation(state: Tensor, source: Tensor, readout: Tensor, order: int) -> BalancedModel:
    r"""Returns the system reduced to its `order` largest Hankel singular values, with the bound of its error.

    Args:
        state: A, real [dimension, dimension], spectral radius below 1.
        source: B, real [dimension, inputs]; the identity if every direction is driven.
        readout: C, real [outputs, dimension]; the identity if every direction is read.
        order: states kept, >= 1 and at most the number of Hankel values above rounding.

    Returns:
        `BalancedModel`, stable.

    Raises:
        ShapeError: shapes that do not fit together.
        DomainError: a value is not finite, a spectral radius of 1 or more, or an order out of range.

    Theorem: `max_w ||C (e^{iw} - A)^{-1} B - C_r (e^{iw} - A_r)^{-1} B_r|| <= 2 sum of the Hankel values left out`.
    Cost: O(dimension^3 log(1 / (1 - spectral radius))).
    Source: Glover 1984; Al-Saggaf and Franklin 1987 for discrete time; square-root algorithm.
    """
    controlled, observed = gramians(state, source, readout)
    state, source, readout = _checked_system(state, source, readout)
    left, right = _root(observed), _root(controlled)
    u, values, v = torch.linalg.svd(left.T @ right)
    usable = int((values > values[0] * len(values) * torch.finfo(torch.float64).eps).sum()) if values[0] > 0 else 0
    if not 1 <= order <= usable:
        raise DomainError(f"order is {order}; expected 1 to {usable}, the Hankel values above rounding")
    scale = values[:order].rsqrt()
    project, embed = scale[:, None] * (left @ u[:, :order]).T, (right @ v[:order].T) * scale
    bound = 2 * float(values[order:].sum())
    return BalancedModel(project @ state @ embed, project @ source, readout @ embed, values, bound)


def transfer_function(state: Tensor, source: Tensor, readout: Tensor, frequencies: Tensor) -> Tensor:
    r"""Returns `C (e^{iw} - A)^{-1} B` at each frequency, complex128 [frequencies, outputs, inputs].

    Args:
        state: A, real [dimension, dimension], spectral radius below 1.
        source: B, real [dimension, inputs].
        readout: C, real [outputs, dimension].
        frequencies: w, real [frequencies], radians a step.

    Returns:
        complex128 [frequencies, outputs, inputs].

    Raises:
        ShapeError: shapes that do not fit together.
        DomainError: a value is not finite, or a spectral radius of 1 or more.

    Cost: O(frequencies * dimension^3).
    Source: the definition.
    """
    state, source, readout = _checked_system(state, source, readout)
    turn = torch.polar(torch.ones_like(frequencies.double()), frequencies.double())
    identity = torch.eye(len(state), dtype=torch.complex128, device=state.device)
    shifted = turn[:, None, None] * identity - state
    return readout.to(torch.complex128) @ torch.linalg.solve(shifted, source.to(torch.complex128))


def _sum_of_powers(state: Tensor, start: Tensor) -> Tensor:
    """`sum_k A^k S A^{kT}`, symmetric."""
    total, power = start, state
    for _ in range(_DOUBLINGS):
        total = total + power @ total @ power.T
        power = power @ power
        if float(power.abs().max()) < torch.finfo(torch.float64).tiny:
            break
    return (total + total.T) / 2


def _root(gramian: Tensor) -> Tensor:
    """A square root L with L L^T the Gramian; rounding below zero is zero."""
    values, vectors = torch.linalg.eigh(gramian)
    return vectors * values.clamp(min=0).sqrt()


def _checked_system(state: Tensor, source: Tensor, readout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    state = checked_matrix("state", state)
    source, readout = checked_matrix("source", source), checked_matrix("readout", readout)
    if state.shape[0] != state.shape[1]:
        raise ShapeError(f"state has shape {list(state.shape)}; expected a square matrix")
    if source.shape[0] != len(state) or readout.shape[1] != len(state):
        raise ShapeError(
            f"source {list(source.shape)} and readout {list(readout.shape)} do not fit {len(state)} channels;"
            " expected [dimension, inputs] and [outputs, dimension]"
        )
    radius = float(torch.linalg.eigvals(state).abs().max())
    if not radius < 1:
        raise DomainError(f"state has spectral radius {radius:.6g}; expected below 1: the sums of powers diverge")
    return state, source, readout
