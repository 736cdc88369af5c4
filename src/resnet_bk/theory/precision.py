r"""How much precision a medium needs: the condition of I + K, and sweeps that a bound promotes from complex64.

    K = sign(V) |V|^{1/2} R_0 |V|^{1/2},   (I + K)^{-1} = I - sign(V) |V|^{1/2} R |V|^{1/2},   V = diag(v)
    R_0 = (H_0 - i Gamma - E)^{-1},   R = (H_0 + V - i Gamma - E)^{-1}

Everything is O(n), and no result carries a gradient. A `lead` is as in `scattering`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory.jacobi import checked_lead, checked_sites, full_green_diagonal, half_line_green
from resnet_bk.theory.scattering import _checked as checked_block
from resnet_bk.theory.tridiagonal import TridiagonalSolve

UNIT_ROUNDOFF = {torch.complex64: 2.0**-24, torch.complex128: 2.0**-53}
# Errors of one step in units of the rounding: conversion and difference one each, the reciprocal of a complex number up
# to eight; a backward stable solve is granted sixteen.
_STEP_ROUNDINGS = 10
_SOLVE_ROUNDINGS = 16


class Condition(NamedTuple):
    """Condition number of I + K in the operator norm: `estimate <= the true one <= bound`, without unit."""

    estimate: float
    bound: float


class ManagedGreen(NamedTuple):
    """A half-line Green function, the precision it was computed in, and a bound of its error.

    Attributes:
        m: complex64 or complex128 [n].
        error: bound of `|m - exact| / |m|` per site, float64 [n].
    """

    m: Tensor
    error: Tensor


def birman_schwinger_product(
    potential: Tensor,
    energy: float,
    absorption: Tensor,
    vectors: Tensor,
    lead: complex = 0j,
    *,
    inverse: bool = False,
    adjoint: bool = False,
) -> Tensor:
    """`(I + K) x`, or with its inverse or adjoint, without forming K.

    Args:
        potential: v, real [n], units of the hopping.
        energy: E, same units.
        absorption: eta, real [n], > 0, same units.
        vectors: x, complex128 [n, columns], finite.
        lead: m_0, with Im m_0 >= 0.
        inverse: apply `(I + K)^{-1}` instead.
        adjoint: apply the conjugate transpose of either instead.

    Returns:
        complex128 [n, columns].

    Raises:
        ShapeError: potential and absorption are not real vectors of one length >= 1, or `vectors` does not fit.
        DomainError: a value is not finite, some absorption is not positive, or Im lead < 0.

    Cost: O(n columns) work in 2 n sequential steps.
    Source: resolvent identity; R is symmetric, so its adjoint is its conjugate.
    """
    potential, free, absorption, lead = checked_block(potential, energy, absorption, lead)
    sites = len(potential)
    if vectors.dtype != torch.complex128 or vectors.ndim != 2 or len(vectors) != sites:
        raise ShapeError(f"vectors is {vectors.dtype} {list(vectors.shape)}; expected complex128 [{sites}, columns]")
    if not torch.isfinite(vectors).all():
        raise DomainError("vectors has an entry that is not finite; expected finite: look where it was computed")
    x = vectors.detach()
    alpha = torch.complex(potential + free if inverse else free, -absorption)
    alpha[0] -= lead
    root = potential.abs().sqrt()[:, None]
    sign = potential.sign()[:, None]
    hopping = torch.ones(sites - 1, dtype=torch.complex128, device=x.device)
    source = (sign * root * x).conj() if adjoint else root * x
    solved: Any = TridiagonalSolve.apply(alpha, hopping, hopping, source)
    moved = root * solved.conj() if adjoint else sign * root * solved
    return x - moved if inverse else x + moved


def hilbert_schmidt_norm(
    potential: Tensor, energy: float, absorption: Tensor, lead: complex = 0j, *, perturbed: bool = False
) -> float:
    r"""Hilbert-Schmidt norm of K, exactly; with `perturbed`, of the same operator made of R, `I - (I + K)^{-1}`.

        ||K||_2^2 = sum_i |v_i| |R_ii|^2 (|v_i| + 2 s_i),      s_i = |m_{i-1}|^2 (|v_{i-1}| + s_{i-1}),   s_1 = 0

    Args:
        potential: v, real [n], units of the hopping.
        energy: E, same units.
        absorption: eta, real [n], > 0, same units.
        lead: m_0, with Im m_0 >= 0.
        perturbed: use R instead of R_0.

    Returns:
        float >= 0, without unit.

    Raises:
        ShapeError, DomainError: as `birman_schwinger_product`.

    Theorem: `R_ij = (-1)^{i-j} R_ii m_{i-1} ... m_j` for j < i, and `R_ii = 1 / (1/m_i - mR_{i+1})`.
    Cost: O(n) work in 3 n sequential steps. The dense twin is the value of `hilbert_schmidt_bound`.
    Source: docs/mathematics, "The operator".
    """
    potential, free, absorption, lead = checked_block(potential, energy, absorption, lead)
    detuning = potential + free if perturbed else free
    # A lead is part of the first site.
    detuning, absorption = detuning.clone(), absorption.clone()
    detuning[0] -= lead.real
    absorption[0] += lead.imag
    diagonal = full_green_diagonal(detuning, absorption).abs().square()
    m = half_line_green(detuning, absorption).abs().square().tolist()
    weight, s, behind = potential.abs(), 0.0, []
    for factor, v in zip(m, weight.tolist(), strict=True):
        behind.append(s)
        s = factor * (v + s)
    later = torch.tensor(behind, dtype=torch.float64, device=potential.device)
    return math.sqrt(float((weight * diagonal * (weight + 2 * later)).sum()))


def condition_estimate(
    potential: Tensor,
    energy: float,
    absorption: Tensor,
    lead: complex = 0j,
    *,
    generator: torch.Generator,
    steps: int = 8,
) -> Condition:
    r"""Condition number of I + K from below, by power iteration, and from above, by its Schatten norms.

        ||K|| <= min(||K||_2, max_i |v_i| / eta_i),      and the same for the operator made of R

    Args:
        potential: v, real [n], units of the hopping.
        energy: E, same units.
        absorption: eta, real [n], > 0, same units.
        lead: m_0, with Im m_0 >= 0.
        generator: seeded source of the first vector.
        steps: power iterations for either norm, >= 1.

    Returns:
        Condition.

    Raises:
        ShapeError, DomainError: as `birman_schwinger_product`, or steps < 1.

    Theorem: `Gamma^{1/2} R Gamma^{1/2}` is a contraction, which gives the second term; I + K is always invertible.
    Not claimed: how near the estimate is; more steps bring it up.
    Cost: O(n steps).
    Source: docs/theory/theorems, theorem 2; power iteration.
    """
    potential, _, absorption, lead = checked_block(potential, energy, absorption, lead)
    if steps < 1:
        raise DomainError(f"steps is {steps}; expected >= 1: every norm needs one")
    start = torch.randn(len(potential), 1, dtype=torch.complex128, generator=generator)
    ratio = float((potential.abs() / absorption).max())
    lower, upper = 1.0, 1.0
    for inverse in (False, True):
        x, norm = start / start.norm(), 0.0
        for _ in range(steps):
            image = birman_schwinger_product(potential, energy, absorption, x, lead, inverse=inverse)
            norm = max(norm, float(image.norm()))
            x = birman_schwinger_product(potential, energy, absorption, image, lead, inverse=inverse, adjoint=True)
            x = x / x.norm()
        lower *= norm
        upper *= 1 + min(hilbert_schmidt_norm(potential, energy, absorption, lead, perturbed=inverse), ratio)
    # A condition number is at least 1, which two power iterations need not know.
    return Condition(max(1.0, lower), upper)


def required_dtype(condition: float, budget: float) -> torch.dtype:
    """complex64, or complex128 where `16 u condition` of complex64 exceeds the budget, u the unit roundoff.

    Args:
        condition: condition number or a bound of it, finite and >= 1.
        budget: allowed relative error of a solve, in (0, 1).

    Returns:
        torch.complex64 or torch.complex128.

    Raises:
        DomainError: a condition below 1 or not finite, a budget outside (0, 1), or one that complex128 cannot keep.

    Heuristic: sixteen roundings for a backward stable solve; their number may grow slowly with n.
    Cost: O(1).
    Source: first-order perturbation of linear systems.
    """
    if not (math.isfinite(condition) and condition >= 1):
        raise DomainError(f"condition is {condition}; expected finite and >= 1: see condition_estimate")
    _check_budget(budget)
    for dtype, unit in UNIT_ROUNDOFF.items():
        if _SOLVE_ROUNDINGS * unit * condition <= budget:
            return dtype
    raise DomainError(
        f"budget is {budget}; expected >= {_SOLVE_ROUNDINGS * UNIT_ROUNDOFF[torch.complex128] * condition:.1e} at a "
        f"condition of {condition:.1e}: allow more or raise the absorption"
    )


def half_line_green_within(detuning: Tensor, absorption: Tensor, *, budget: float, lead: complex = 0j) -> ManagedGreen:
    r"""Half-line Green function in complex64 if a bound shows its error to be within budget, else in complex128.

    The computed m is the exact one of another medium, `alpha_j + d_j` with `d_j = 1/m_j + m_{j-1} - alpha_j`. With
    `t_i = max_{j<=i} |d_j| / eta_j`:

        |m_i - exact| / |m_i| <= s_i (T^2 + T sqrt(T^2 + 4)) / 2,      T = t_i / sqrt(1 - t_i),   s_i = Im m_i / |m_i|

    In complex64 the d_j are computed, in complex128 they are bounded by ten roundings of `|alpha_j|` and `1/|m_j|`.

    Args:
        detuning: potential minus energy, real [n], units of the hopping.
        absorption: real [n], > 0, same units.
        budget: allowed relative error at every site, in (0, 1).
        lead: m_0, with Im m_0 >= 0.

    Returns:
        ManagedGreen; `m.dtype` says which precision was enough.

    Raises:
        ShapeError: the arguments are not real vectors of one length >= 1.
        DomainError: a value is not finite, some absorption is not positive, Im lead < 0, a budget outside (0, 1),
            or one that complex128 is not proved to keep.

    Theorem: resolvent identity and Ward's, `sum_j eta_j |G_ij|^2 <= Im m_i`, for both media.
    Cost: O(n) work in n sequential steps for either precision.
    Source: docs/theory/theorems, theorems 1, 2 and 4; backward error analysis.
    """
    detuning, absorption = checked_sites(detuning, absorption)
    lead = checked_lead(lead)
    _check_budget(budget)
    alpha = torch.complex(detuning, -absorption)
    m = _single_sweep(alpha, lead).to(detuning.device)
    wide = m.to(torch.complex128)
    before = torch.cat((torch.tensor([lead], dtype=torch.complex128, device=m.device), wide[:-1]))
    # The residual itself is rounded, in complex128.
    unit = UNIT_ROUNDOFF[torch.complex128]
    rounding = _STEP_ROUNDINGS * unit * (alpha.abs() + before.abs() + 1 / wide.abs())
    error = _relative_error(wide, (1 / wide + before - alpha).abs() + rounding, absorption)
    if bool((error <= budget).all()):
        return ManagedGreen(m, error)
    m = half_line_green(detuning, absorption, lead)
    error = _relative_error(m, _STEP_ROUNDINGS * unit * (alpha.abs() + 1 / m.abs()), absorption)
    if not bool((error <= budget).all()):
        worst = int((~(error <= budget)).nonzero()[0])
        raise DomainError(
            f"budget is {budget}; expected >= {error[worst].item():.1e}, the bound of complex128 at site {worst}: "
            "allow more or raise the absorption"
        )
    return ManagedGreen(m, error)


def _single_sweep(alpha: Tensor, lead: complex) -> Tensor:
    """The sweep with every operation rounded to complex64; what overflows is left for the bound to find."""
    m, one, found = np.complex64(lead), np.complex64(1), []
    with np.errstate(all="ignore"):
        for a in alpha.cpu().numpy().astype(np.complex64):
            m = one / (a - m)
            found.append(m)
    return torch.from_numpy(np.array(found, dtype=np.complex64))


def _relative_error(m: Tensor, moved: Tensor, absorption: Tensor) -> Tensor:
    """The bound of `half_line_green_within`; infinite where the other medium may not absorb, or m is not finite."""
    moved = torch.where(torch.isfinite(moved), moved, math.inf)
    t = (moved / absorption).cummax(0).values
    inside = (t < 1) & torch.isfinite(m)
    t = torch.where(inside, t, 0.5)
    scaled = t / (1 - t).sqrt()
    bound = m.imag / m.abs() * (scaled.square() + scaled * (scaled.square() + 4).sqrt()) / 2
    return torch.where(inside, bound, math.inf)


def _check_budget(budget: float) -> None:
    if not 0 < budget < 1:
        raise DomainError(f"budget is {budget}; expected a relative error in (0, 1): 1e-6, for instance")
