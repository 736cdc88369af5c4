r"""Theorem 13 on the lattice: Hilbert-Schmidt and trace norm of the Birman-Schwinger operator.

K = sign(V) |V|^{1/2} R |V|^{1/2},      R = (H_0 - i Gamma - E)^{-1},   H_0 the free block tridiag(1, 0, 1)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_bk.errors import DomainError
from resnet_bk.theory.bounds import Bound
from resnet_bk.theory.jacobi import absorbing_jacobi, checked_sites


def hilbert_schmidt_bound(potential: Tensor, absorption: Tensor, energy: float = 0.0) -> Bound:
    """`||K||_2` (Hilbert-Schmidt) against `||V||_2 (max_i Im R_ii / eta)^{1/2}`, eta = min eta_i, scalars.

    Args:
        potential: V, real [n], units of the hopping.
        absorption: real [n], > 0, same units.
        energy: E, real, same units.

    Returns:
        Bound of float64 scalars.

    Raises:
        ShapeError, DomainError: as `absorbing_jacobi`, or the energy is not finite.

    Theorem 13: `sum_j eta_j |R_ij|^2 = Im R_ii` and `2 |V_i V_j| <= V_i^2 + V_j^2`. Any real V.
    Cost: O(n^3).
    Source: docs/theory/theorems, theorem 13.
    """
    potential, absorption, resolvent = _free_resolvent(potential, absorption, energy)
    value = torch.linalg.matrix_norm(_birman_schwinger(potential, resolvent))
    scale = (resolvent.diagonal().imag.max() / absorption.min()).sqrt()
    return Bound.of(value, torch.linalg.vector_norm(potential) * scale)


def trace_class_bound(potential: Tensor, absorption: Tensor, energy: float = 0.0) -> Bound:
    """`||K||_1` (trace norm) against `||V||_1 / eta`, eta = min eta_i, scalars.

    Args:
        potential: V, real [n], units of the hopping.
        absorption: real [n], > 0, same units.
        energy: E, real, same units.

    Returns:
        Bound of float64 scalars.

    Raises:
        ShapeError, DomainError: as `absorbing_jacobi`, or the energy is not finite.

    Theorem 13: Hoelder with `||R|| <= 1 / eta`. Any real V, on the lattice.
    Not claimed: the continuum form with 1/2 in front, which fails off the imaginary axis.
    Cost: O(n^3).
    Source: docs/theory/theorems, theorem 13.
    """
    potential, absorption, resolvent = _free_resolvent(potential, absorption, energy)
    value = torch.linalg.matrix_norm(_birman_schwinger(potential, resolvent), ord="nuc")
    return Bound.of(value, potential.abs().sum() / absorption.min())


def _free_resolvent(potential: Tensor, absorption: Tensor, energy: float) -> tuple[Tensor, Tensor, Tensor]:
    """The checked potential and absorption and `(H_0 - i Gamma - E)^{-1}`."""
    potential, absorption = checked_sites(potential, absorption, "potential")
    if not math.isfinite(energy):
        raise DomainError(f"energy is {energy}; expected a finite number. Look where it was computed.")
    free = absorbing_jacobi(torch.full_like(potential, -energy), absorption)
    return potential, absorption, torch.linalg.inv(free)


def _birman_schwinger(potential: Tensor, resolvent: Tensor) -> Tensor:
    root = potential.abs().sqrt()
    return (potential.sign() * root)[:, None] * resolvent * root
