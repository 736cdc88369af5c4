r"""Resonances: poles of the resolvent of an absorbing Jacobi matrix, by Newton's method on the sweep.

    f(E) = det(H - i Gamma - E),      poles of (H - i Gamma - E)^{-1} = zeros of f,      Im E_n < 0

f and f' come from the recursion of leading minors, rescaled as it goes: nothing is divided, so no pivot can vanish
below the real axis. All is complex128, and no result carries a gradient.
"""

from __future__ import annotations

import cmath
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from resnet_bk.errors import DomainError
from resnet_bk.theory.jacobi import checked_sites

_SITES_PER_RESCALE = 8
_ABERTH_STEPS = 40
_LARGEST_POTENTIAL = 1e30  # eight sites then stay inside the range of float64


class Resonance(NamedTuple):
    """One pole: `energy` in units of the hopping; one lies within `radius` of it, but for rounding of f / f'."""

    energy: complex
    radius: float
    steps: int


class Resonances(NamedTuple):
    """Poles sorted by real part: `energies` complex128 [poles] in units of the hopping, `radii` float64 [poles]."""

    energies: Tensor
    radii: Tensor


def newton_correction(potential: Tensor, absorption: Tensor, energy: complex) -> complex:
    r"""Newton's correction `f / f'` of the characteristic function, `-1 / tr (H - i Gamma - E)^{-1}`.

    Args:
        potential: v, real [n], units of the hopping, at most 1e30 in modulus.
        absorption: eta, real [n], > 0, same units, at most 1e30.
        energy: E, complex, on either side of the real axis, same units.

    Returns:
        complex, units of the hopping; 0 exactly at a pole.

    Raises:
        ShapeError: potential and absorption are not real vectors of one length >= 1.
        DomainError: a value is not finite or too large, some absorption is not positive, or f' vanishes.

    Theorem: some pole lies within `n |f / f'|` of E, because `f' / f` is a sum of n terms `1 / (E - E_k)`.
    Cost: O(n) work in n sequential steps.
    Source: Laplace expansion; Laguerre.
    """
    alpha, energy = _checked(potential, absorption, energy)
    return _correction(alpha, energy)


def resonance(
    potential: Tensor, absorption: Tensor, start: complex, *, tolerance: float = 1e-12, max_steps: int = 50
) -> Resonance:
    r"""Pole of the resolvent that Newton's method reaches from `start`.

    Args:
        potential: v, real [n], units of the hopping, at most 1e30 in modulus.
        absorption: eta, real [n], > 0, same units, at most 1e30.
        start: first guess, complex, same units; a peak of the density of states is a good one.
        tolerance: stop when the correction is below it, > 0, units of the hopping.
        max_steps: Newton steps allowed, >= 1.

    Returns:
        Resonance.

    Raises:
        ShapeError, DomainError: as `newton_correction`, a tolerance or step count outside its domain, no convergence.

    Theorem: `-max eta <= Im E_n <= -min eta` and `min v - 2 < Re E_n < max v + 2`; the radius is that of
        `newton_correction`.
    Not claimed: that the pole is the nearest one. Cost: O(n) work a step. Source: Bendixson; Newton.
    """
    alpha, energy = _checked(potential, absorption, start)
    _check_iteration(tolerance, max_steps)
    for step in range(1, max_steps + 1):
        correction = _correction(alpha, energy)
        energy -= correction
        if abs(correction) <= tolerance:
            return Resonance(energy, len(alpha) * abs(_correction(alpha, energy)), step)
    raise DomainError(
        f"start is {start}: Newton moved by {abs(correction):.1e} after {max_steps} steps, expected <= {tolerance}; "
        "start nearer to a pole, allow more steps or a larger tolerance"
    )


def resonances(
    potential: Tensor,
    absorption: Tensor,
    low: float,
    high: float,
    *,
    tolerance: float = 1e-12,
    max_rounds: int = 30,
) -> Resonances:
    r"""All poles with `low < Re E < high`, by Newton steps that repel each other (Ehrlich and Aberth).

    The first starts are the eigenvalues of H, from bisection, moved down by the mean absorption; until as many poles
    are found as `count_resonances` says, further rounds start from seeded random points of the strip.

    Args:
        potential: v, real [n], units of the hopping, at most 1e30 in modulus.
        absorption: eta, real [n], > 0, same units, at most 1e30.
        low: lower end of the window, same units.
        high: upper end, > low.
        tolerance: a pole is found when its correction is below it, > 0, same units.
        max_rounds: rounds allowed, >= 1.

    Returns:
        Resonances, possibly none; as many as `count_resonances` counts.

    Raises:
        ShapeError, DomainError: as `resonance` and `count_resonances`, or not as many poles found as counted (a
            multiple pole, for instance).

    Theorem: every pole lies within `(max eta - min eta) / 2` of an eigenvalue of H moved down by the middle of the
        absorptions, so the first starts are taken from a window wider by that much.
    Cost: O(n) work per pole in the wider window and step, and that of `count_resonances`.
    Source: Bauer and Fike; Ehrlich 1967, Aberth 1973.
    """
    alpha, _ = _checked(potential, absorption, 0j)
    _check_window(low, high)
    _check_iteration(tolerance, max_rounds, "max_rounds")
    expected = count_resonances(potential, absorption, low, high)
    v, eta = np.array([a.real for a in alpha]), np.array([-a.imag for a in alpha])
    margin = (eta.max() - eta.min()) / 2
    random = np.random.default_rng(0)
    known = np.zeros(0, dtype=np.complex128)
    # A little off the symmetry axis of a symmetric medium, where f' may vanish.
    starts = _levels(v, low - margin, high + margin) * (1 + 1e-9) - 1j * eta.mean()
    for _ in range(max_rounds):
        known = np.concatenate((known, _aberth(alpha, starts, known, tolerance)))
        inside = np.sort_complex(known[(known.real > low) & (known.real < high)])
        if len(inside) >= expected:
            break
        tries = 2 * (expected - len(inside)) + 2
        starts = random.uniform(low, high, tries) - 1j * random.uniform(eta.min(), eta.max(), tries)
    if len(inside) != expected:
        raise DomainError(
            f"window [{low}, {high}]: found {len(inside)} poles of {expected} in {max_rounds} rounds; allow more "
            "rounds or another tolerance"
        )
    radii = len(alpha) * np.abs(_correction(alpha, inside)) if expected else np.zeros(0)
    return Resonances(torch.from_numpy(inside), torch.from_numpy(radii))


def _aberth(alpha: list[complex], starts: np.ndarray, known: np.ndarray, tolerance: float) -> np.ndarray:
    """Zeros of f that the starts reach, repelled by each other and by the known ones; those that wander are dropped."""
    energies = starts.astype(np.complex128)
    moving = np.full(len(energies), True)
    for _ in range(_ABERTH_STEPS):
        if not moving.any():
            break
        newton = _correction(alpha, energies[moving])
        others = energies[moving][:, None] - np.concatenate((energies, known))[None, :]
        others[np.arange(len(others)), np.flatnonzero(moving)] = np.inf
        correction = newton / (1 - newton * (1 / others).sum(1))
        energies[moving] -= correction
        moving[moving] = np.abs(correction) > tolerance
    return energies[~moving]


def count_resonances(
    potential: Tensor, absorption: Tensor, low: float, high: float, *, max_points: int = 1 << 18
) -> int:
    r"""Number of poles with `low < Re E < high`, with multiplicity: the winding number of f around that strip.

    Args:
        potential: v, real [n], units of the hopping, at most 1e30 in modulus.
        absorption: eta, real [n], > 0, same units, at most 1e30.
        low: lower end of the window, same units.
        high: upper end, > low.
        max_points: evaluations of f allowed on the contour.

    Returns:
        int >= 0.

    Raises:
        ShapeError, DomainError: as `newton_correction`, an empty window, or a pole too near to the contour.

    Theorem: argument principle on the rectangle between Im E = 0 and Im E = -(max eta + min eta), which holds the strip
        of all poles with a margin of min eta.
    Not claimed: a proof against every contour; points are added until neighbours differ by less than `|f / f'| / 4`.
    Cost: O(n) work a point.
    Source: argument principle.
    """
    alpha, _ = _checked(potential, absorption, 0j)
    _check_window(low, high)
    eta = [-a.imag for a in alpha]
    floor = -(max(eta) + min(eta))
    corners = [complex(low, floor), complex(high, floor), complex(high, 0), complex(low, 0), complex(low, floor)]
    points = np.concatenate([np.linspace(a, b, 64, endpoint=False) for a, b in itertools.pairwise(corners)])
    points = np.append(points, corners[0])
    value, derivative = _minors(alpha, points)
    while True:
        gap = np.abs(np.diff(points))
        speed = np.abs(derivative) / np.maximum(np.abs(value), np.finfo(float).tiny)
        coarse = gap * np.maximum(speed[1:], speed[:-1]) > 0.25
        if not coarse.any():
            break
        if len(points) + coarse.sum() > max_points:
            raise DomainError(
                f"window [{low}, {high}]: a pole lies too near to the contour for {max_points} points; move an end or "
                "allow more points"
            )
        middle = (points[1:][coarse] + points[:-1][coarse]) / 2
        place = np.flatnonzero(coarse) + 1
        more, slope = _minors(alpha, middle)
        points, value, derivative = (
            np.insert(old, place, new) for old, new in ((points, middle), (value, more), (derivative, slope))
        )
    turned = np.angle(value[1:] / value[:-1]).sum() / (2 * math.pi)
    return round(turned)


def _minors(alpha: list[complex], energy: Any) -> tuple[Any, Any]:
    """F and f' times one positive number, at a complex energy or an array of them."""
    before, minor = 0 * energy, 1 + 0 * energy
    before_slope, slope = 0 * energy, 0 * energy
    for start in range(0, len(alpha), _SITES_PER_RESCALE):
        for a in alpha[start : start + _SITES_PER_RESCALE]:
            pivot = a - energy
            slope, before_slope = pivot * slope - before_slope - minor, slope
            minor, before = pivot * minor - before, minor
        scale = 1 / (abs(minor) + abs(before))
        minor, before, slope, before_slope = minor * scale, before * scale, slope * scale, before_slope * scale
    return minor, slope


def _correction(alpha: list[complex], energy: Any) -> Any:
    minor, slope = _minors(alpha, energy)
    if np.any(slope == 0):
        where = energy if isinstance(energy, complex) else energy[slope == 0][0]
        raise DomainError(
            f"energy is {where}, where f' vanishes; expected a point off the symmetry axis: move it a little"
        )
    return minor / slope


def _levels(potential: np.ndarray, low: float, high: float) -> np.ndarray:
    """Eigenvalues of tridiag(1, potential, 1) in [low, high), by bisection on the number of negative pivots."""
    bottom, top = potential.min() - 2, potential.max() + 2
    first, last = (int(_negative_pivots(potential, np.array([x]))[0]) for x in (low, high))
    index = np.arange(first, last)
    lower, upper = np.full(len(index), max(low, bottom)), np.full(len(index), min(high, top))
    for _ in range(40 if len(index) else 0):
        middle = (lower + upper) / 2
        below = _negative_pivots(potential, middle) > index
        lower, upper = np.where(below, lower, middle), np.where(below, middle, upper)
    return (lower + upper) / 2


def _negative_pivots(potential: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """How many eigenvalues of tridiag(1, potential, 1) lie below each energy (Sylvester's law of inertia)."""
    pivot = np.full(len(energy), np.inf)
    count = np.zeros(len(energy), dtype=np.int64)
    for v in potential.tolist():
        pivot = v - energy - 1 / pivot
        pivot[pivot == 0] = np.finfo(float).tiny ** 0.5
        count += pivot < 0
    return count


def _checked(potential: Tensor, absorption: Tensor, energy: complex) -> tuple[list[complex], complex]:
    """V - i eta of every site as Python numbers, and the energy."""
    potential, absorption = checked_sites(potential, absorption, "potential")
    for name, tensor in (("potential", potential), ("absorption", absorption)):
        if (tensor.abs() > _LARGEST_POTENTIAL).any():
            raise DomainError(f"{name} reaches {tensor.abs().max().item()}; expected <= 1e30: change the units")
    energy = complex(energy)
    if not cmath.isfinite(energy) or abs(energy) > _LARGEST_POTENTIAL:
        raise DomainError(f"energy is {energy}; expected finite and at most 1e30: take it near the band")
    return torch.complex(potential, -absorption).tolist(), energy


def _check_window(low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise DomainError(f"window [{low}, {high}]: expected finite ends with low < high; exchange or move them")


def _check_iteration(tolerance: float, most: int, name: str = "max_steps") -> None:
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise DomainError(f"tolerance is {tolerance}; expected > 0 and finite: 1e-12 is near the rounding of a level")
    if most < 1:
        raise DomainError(f"{name} is {most}; expected >= 1: allow some")
