r"""Clark measures: the spectral measures of the rank-one family of a half line, and a bounded distance between them.

    m(z) = [(H - i Gamma - z)^{-1}]_{nn},      m_a = m / (1 + a m) = [(H + a e_n e_n* - i Gamma - z)^{-1}]_{nn}

Im m_a(E) / pi is the density of a probability measure on the energies. With b = (m - i) / (m + i), a function into the
unit disc, Clark's measure at the unit number `zeta` has the Herglotz function `i (1 + conj(zeta) b) / (1 - conj(zeta)
b)`, which is `(1 + a^2) m_a - a` for `conj(zeta) = (1 - i a) / (1 + i a)`: the same family up to a constant factor.

Unlike the rest of `theory`, every result carries gradients: the distance is a training loss.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError


class ClarkMeasure(NamedTuple):
    """A probability measure on the energies: a density on a grid and the mass beyond either end.

    Attributes:
        energies: grid, float64 [points], increasing, units of the hopping.
        density: float64 [..., points], states per unit of energy.
        below: mass below the first grid point, float64 [...].
        above: mass above the last grid point, float64 [...].
        absorption: eta of every site, float64 [..., sites]: the smoothing, which two measures must share.
    """

    energies: Tensor
    density: Tensor
    below: Tensor
    above: Tensor
    absorption: Tensor


def green_on_grid(potential: Tensor, energies: Tensor, absorption: Tensor) -> Tensor:
    r"""Returns the half-line Green function of the last site at every energy, `m_n(E)`.

    Args:
        potential: v, real [..., sites], units of the hopping; leading axes are independent lines.
        energies: E, real [points], same units.
        absorption: eta, real [..., sites], > 0, the shape of `potential`.

    Returns:
        complex128 [..., points], Im > 0, differentiable in potential and absorption. Hard wall.

    Raises:
        ShapeError: not real floating point, empty, or shapes that differ.
        DomainError: a value is not finite, or some absorption is not positive.

    Cost: O(sites * points) work a line in `sites` sequential steps; with gradients as much memory.
    Source: docs/mathematics, "The operator".
    """
    potential, energies, absorption = _checked(potential, energies, absorption)
    m = torch.zeros(*potential.shape[:-1], len(energies), dtype=torch.complex128, device=potential.device)
    for v, eta in zip(potential.unbind(-1), absorption.unbind(-1), strict=True):
        detuning = v[..., None] - energies
        m = 1 / (torch.complex(detuning, -eta[..., None].expand_as(detuning)) - m)
    return m


def rank_one_family(m: Tensor, coupling: Tensor | float) -> Tensor:
    r"""Returns the Aronszajn-Donoghue function `m_a = m / (1 + a m)`: m after the last site's potential rose by a.

    Args:
        m: Herglotz function, complex, any shape, Im m > 0.
        coupling: a, real, broadcast against `m`, units of the hopping.

    Returns:
        complex128, Im m_a > 0.

    Raises:
        ShapeError: `m` is not complex.
        DomainError: Im m <= 0 somewhere, or a value is not finite.

    Theorem (Aronszajn-Donoghue): `m_a` is the Green function of `H + a e_n e_n*`.
    Theorem (Aleksandrov): the average over all a is Lebesgue's measure, `Integral Im m_a da = pi` for every m.
    Cost: O(1) an element.
    Source: docs/theory/claims; 1 / m_a = 1 / m + a.
    """
    if not m.is_complex():
        raise ShapeError(f"m has dtype {m.dtype}; expected complex: pass a Green function")
    if not bool((torch.isfinite(m) & (m.imag > 0)).all()):
        raise DomainError("m has an entry that is not finite or has Im m <= 0; expected a Herglotz function")
    coupling = torch.as_tensor(coupling, dtype=torch.float64, device=m.device)
    if not bool(torch.isfinite(coupling).all()):
        raise DomainError("coupling is not finite; expected a real number. Infinity cuts the last site off.")
    return 1 / (1 / m.to(torch.complex128) + coupling)


def clark_measure(
    potential: Tensor,
    energies: Tensor,
    absorption: Tensor,
    coupling: Tensor | float = 0.0,
    *,
    tolerance: float = 1e-2,
) -> ClarkMeasure:
    r"""Returns the spectral measure of the last site of `H + a e_n e_n*`, smoothed by the absorption.

        density = Im m_a(E) / pi,      below = arg m_a(E_first) / pi,      above = 1 - arg m_a(E_last) / pi

    Args:
        potential: v, real [..., sites], units of the hopping; leading axes are independent lines.
        energies: grid, real [points], increasing, same units; wider than the spectrum, no coarser than the absorption.
        absorption: eta, real [..., sites], > 0, the shape of `potential`.
        coupling: a, real, a number or [...].
        tolerance: largest accepted distance of the total mass from 1.

    Returns:
        `ClarkMeasure` with leading shape [...], differentiable in potential, absorption and coupling.

    Raises:
        ShapeError: not real floating point, empty, or shapes that differ.
        DomainError: a value is not finite, some absorption is not positive, the grid does not increase or is coarser
            than the least absorption, or the mass misses 1 by more than `tolerance`.

    Theorem: the mass is 1. The tails beyond +-L are exact for one site, else right to O(eta / L^3); the trapezoid
        rule errs by O(e^{-2 pi eta / spacing}), eta the least absorption.
    Checked numerically: the mass is within 8e-6 of 1 for |v| and |a| up to 2, eta 0.1, L = 40, spacing 0.05.
    Cost: that of `green_on_grid`.
    Source: docs/theory/claims. In the tail m(E) = 1 / (c - E) with c constant to leading order, and the integral of
        Im 1 / (c - E) is that of -d arg(c - E).
    """
    potential, energies, absorption = _checked(potential, energies, absorption)
    spacing = energies.diff()
    if len(energies) < 2 or not bool((spacing > 0).all()):
        raise DomainError("energies must increase and hold at least 2 points; sort them and drop repetitions")
    widest, least = float(spacing.max()), float(absorption.detach().min())
    if widest > least:
        raise DomainError(
            f"energies are up to {widest:.3g} apart; expected at most the least absorption, {least:.3g}, the width of a"
            " level: refine the grid or raise the absorption"
        )
    m = green_on_grid(potential, energies, absorption)
    coupling = torch.as_tensor(coupling, dtype=torch.float64, device=m.device)
    m = rank_one_family(m, coupling[..., None])
    density = m.imag / math.pi
    below, above = m[..., 0].angle() / math.pi, 1 - m[..., -1].angle() / math.pi
    measure = ClarkMeasure(energies, density, below, above, absorption)
    defect = float((total_mass(measure).detach() - 1).abs().max())
    if not defect <= tolerance:
        raise DomainError(
            f"the mass of the measure misses 1 by {defect:.3g}; expected at most tolerance = {tolerance:.3g}: widen the"
            " grid beyond the spectrum (|v| + 2) or refine it"
        )
    return measure


def total_mass(measure: ClarkMeasure) -> Tensor:
    """Returns the mass of the grid (trapezoid rule) and of both tails, float64 [...]; 1 up to the grid's error.

    Args:
        measure: result of `clark_measure`.

    Returns:
        float64 [...].

    Cost: O(points).
    Source: docs/theory/claims.
    """
    return measure.below + torch.trapezoid(measure.density, measure.energies, dim=-1) + measure.above


def cumulative_mass(measure: ClarkMeasure) -> Tensor:
    """Returns the share of the mass below each grid point, float64 [..., points], increasing inside (0, 1).

    Args:
        measure: result of `clark_measure`.

    Returns:
        float64 [..., points]; divided by the total mass, so that it is a distribution function exactly.

    Cost: O(points).
    Source: the definition.
    """
    steps = torch.cumulative_trapezoid(measure.density, measure.energies, dim=-1)
    inside = torch.cat([torch.zeros_like(steps[..., :1]), steps], dim=-1)
    return (measure.below[..., None] + inside) / total_mass(measure)[..., None]


def measure_distance(first: ClarkMeasure, second: ClarkMeasure, *, scale: float = 2.0) -> Tensor:
    r"""Returns the Wasserstein-1 distance of two measures for the bounded cost `|phi(E) - phi(E')|`.

        phi(E) = atan(E / scale) / pi,      distance = Integral |F(E) - F'(E)| phi'(E) dE,      in [0, 1]

    The measure-preserving distillation term: with a teacher's measure as `second`, its gradient moves the student's
    potential so that the spectra agree. The cost has to be bounded, because smoothed measures have Cauchy tails.

    Args:
        first: result of `clark_measure`.
        second: the same grid and absorption.
        scale: energy at which the cost saturates, > 0, units of the hopping; 2 is half the free band.

    Returns:
        float64 [...], differentiable; the gradient is a subgradient where the distribution functions cross.

    Raises:
        ShapeError: grids or lines of different shape.
        DomainError: different energies, different absorption, or a scale that is not positive and finite.

    Theorem: a metric on the measures of one grid and absorption; at most 1; for single sites at v and v' it is
        `|atan(v / (scale + eta)) - atan(v' / (scale + eta))| / pi`.
    Not claimed: anything about measures at different absorption, where smoothing and not spectrum decides.
    Cost: O(points).
    Source: optimal transport on a line; docs/theory/claims.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise DomainError(f"scale is {scale}; expected finite and > 0: take 2, half the width of the free band")
    for name in ("energies", "absorption"):
        one, other = getattr(first, name), getattr(second, name)
        if one.shape != other.shape:
            raise ShapeError(f"second.{name} has shape {list(other.shape)}; expected {list(one.shape)}, that of first")
        if not torch.equal(one, other):
            raise DomainError(f"second.{name} differs from first.{name}; measures are compared at equal {name} only")
    gap = (cumulative_mass(first) - cumulative_mass(second)).abs()
    place = (first.energies / scale).atan() / math.pi
    # Beyond the grid both tails are linear in phi, so their difference vanishes linearly.
    tails = gap[..., 0] * (place[0] + 0.5) + gap[..., -1] * (0.5 - place[-1])
    return torch.trapezoid(gap, place, dim=-1) + tails / 2


def _checked(potential: Tensor, energies: Tensor, absorption: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments in float64, gradients kept."""
    for name, tensor in (("potential", potential), ("energies", energies), ("absorption", absorption)):
        if not tensor.is_floating_point():
            raise ShapeError(f"{name} has dtype {tensor.dtype}; expected real floating point: convert it to float64")
        if tensor.ndim == 0 or tensor.numel() == 0:
            raise ShapeError(f"{name} has shape {list(tensor.shape)}; expected at least one axis and one element")
        if not bool(torch.isfinite(tensor).all()):
            raise DomainError(f"{name} holds a value that is not finite; expected finite: look where it was computed")
    if energies.ndim != 1:
        raise ShapeError(f"energies has shape {list(energies.shape)}; expected [points], one grid for all lines")
    if potential.shape != absorption.shape:
        raise ShapeError(
            f"absorption has shape {list(absorption.shape)}; expected {list(potential.shape)}, that of potential"
        )
    if not bool((absorption > 0).all()):
        raise DomainError(f"absorption is {float(absorption.min())} at its least; expected > 0: add a floor")
    return potential.double(), energies.double(), absorption.double()
