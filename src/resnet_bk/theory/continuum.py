r"""Birman-Schwinger operator of the continuum on a grid, its determinants in O(N), and the family of prime bumps.

    R(x, y) = (i/2) e^{iz|x-y|},  Im z > 0      (the kernel of z (p^2 - z^2)^{-1}, p = -i d/dx)
    K_ab = sign(q_a) |q_a|^{1/2} R(x_a, x_b) |q_b|^{1/2},      q_a = V(x_a) w_a,   w: quadrature weights

Everything is float64 or complex128, and no result carries a gradient.
"""

from __future__ import annotations

import cmath
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory.bounds import Bound
from resnet_bk.theory.potentials import prime_bump_potential

_PIECE = 1 << 14


class Grid(NamedTuple):
    """A potential on a grid of the line.

    Attributes:
        potential: V, float64 [n], units of inverse length.
        positions: x, float64 [n], strictly increasing, units of length.
        weights: of the quadrature, float64 [n], > 0, same units.
    """

    potential: Tensor
    positions: Tensor
    weights: Tensor


def midpoint_grid(potential: Tensor, low: float, high: float) -> Grid:
    """Grid of n cells of equal width with the potential at their midpoints.

    Args:
        potential: V at the midpoints, real [n].
        low: left end of the line, units of length.
        high: right end, > low.

    Returns:
        Grid.

    Raises:
        ShapeError: the potential is not a real vector with n >= 1.
        DomainError: a value is not finite, or high <= low.

    Cost: O(n).
    Source: midpoint rule, second order in the width.
    """
    if not (potential.ndim == 1 and len(potential) and potential.is_floating_point()):
        raise ShapeError(f"potential is {potential.dtype} {list(potential.shape)}; expected real [n], n >= 1")
    if not (cmath.isfinite(low) and cmath.isfinite(high) and low < high):
        raise DomainError(f"[low, high] is [{low}, {high}]; expected finite ends with low < high: exchange them")
    width = (high - low) / len(potential)
    cell = torch.arange(len(potential), dtype=torch.float64, device=potential.device)
    return _checked_grid(Grid(potential, low + width * (cell + 0.5), torch.full_like(cell, width)))


def prime_bump_grid(sites: int, epsilon: float, *, width: float = 0.0) -> Grid:
    r"""The family V_eps of prime bumps on the grid x = log n, n = 1, ..., sites; epsilon sets height and width.

    Args:
        sites: number of integers, >= 2.
        epsilon: exponent above 1/2 of the heights, finite and >= 0.
        width: half-width of a bump over epsilon, in sites; `prime_bump_potential` gets `smoothing = epsilon width`.

    Returns:
        Grid with the widths of the cells around log n as weights.

    Raises:
        DomainError: a parameter outside its domain.

    Heuristic: an offer for a positional potential, always next to its controls; nothing about zeta follows.
    Cost: as `prime_bump_potential`.
    Source: docs/theory/claims.
    """
    if sites < 2:
        raise DomainError(f"sites is {sites}; expected >= 2, so that the cells around log n have a width")
    positions = torch.arange(1, sites + 1, dtype=torch.float64).log()
    edges = torch.cat((positions[:1], (positions[1:] + positions[:-1]) / 2, positions[-1:]))
    return Grid(prime_bump_potential(sites, epsilon, smoothing=epsilon * width), positions, edges.diff())


def continuum_birman_schwinger(grid: Grid, z: complex) -> Tensor:
    r"""Dense K on the grid.

    Args:
        grid: potential, positions and weights.
        z: spectral parameter, Im z > 0, units of inverse length.

    Returns:
        complex128 [n, n].

    Raises:
        ShapeError: the parts of the grid are not real vectors of one length >= 1.
        DomainError: a value is not finite, positions do not increase, a weight is not positive, or Im z <= 0.

    Cost: O(n^2).
    Source: docs/theory/theorems, theorem 13.
    """
    grid, z = _checked_grid(grid), _checked_parameter(z)
    distance = (grid.positions[:, None] - grid.positions[None, :]).abs()
    charge = grid.potential * grid.weights
    root = charge.abs().sqrt()
    return (charge.sign() * root)[:, None] * (0.5j * torch.exp(1j * z * distance)) * root


def log_continuum_determinant(grid: Grid, z: complex) -> Tensor:
    r"""Logarithm of `det(I + K)` of every leading part of the grid, on the branch that the points add up.

        P_1 = i/2,   S_a = 1 + q_a P_a,   P_{a+1} = f_a P_a / S_a + (i/2) (1 - f_a),   f_a = e^{2iz (x_{a+1} - x_a)}

    P_a is the kernel at x_a after all earlier points scattered (a Kalman filter with complex variances), and
    `log det = sum log S_a`.

    Args:
        grid: potential, positions and weights.
        z: spectral parameter, Im z > 0, units of inverse length.

    Returns:
        complex128 [n].

    Raises:
        ShapeError, DomainError: as `continuum_birman_schwinger`.

    Theorem: `Im P_a > 0` and `S_a != 0`, so `det(I + K) != 0` for every real V: R has positive imaginary part,
        `Im z (p^2 + |z|^2) / |p^2 - z^2|^2` in momentum space, hence on every grid.
    Cost: O(n) work in n sequential steps.
    Source: the kernel is semiseparable; docs/theory/theorems, theorems 9 and 13.
    """
    grid, z = _checked_grid(grid), _checked_parameter(z)
    step = 2j * z * grid.positions.diff().to(torch.complex128)
    factor, fresh = [*step.exp().tolist(), 0j], [*(-0.5j * step.expm1()).tolist(), 0j]
    kernel, pivots = 0.5j, []
    for q, f, new in zip((grid.potential * grid.weights).tolist(), factor, fresh, strict=True):
        pivot = 1 + q * kernel
        pivots.append(pivot)
        kernel = f * kernel / pivot + new
    return torch.tensor(pivots, dtype=torch.complex128, device=grid.potential.device).log().cumsum(0)


def continuum_trace(grid: Grid) -> Tensor:
    """Trace of K of every leading part of the grid, `(i/2) sum q_a`: it does not depend on z.

    Args:
        grid: potential, positions and weights.

    Returns:
        complex128 [n].

    Raises:
        ShapeError, DomainError: as `continuum_birman_schwinger`.

    Cost: O(n).
    Source: definition.
    """
    grid = _checked_grid(grid)
    charge = (grid.potential * grid.weights).cumsum(0)
    return torch.complex(torch.zeros_like(charge), charge / 2)


def log_continuum_regularised_determinant(grid: Grid, z: complex) -> Tensor:
    """Logarithm of `det_2(I + K) = det(I + K) e^{-tr K}` of every leading part of the grid.

    Args:
        grid: potential, positions and weights.
        z: spectral parameter, Im z > 0, units of inverse length.

    Returns:
        complex128 [n]; of second order in a small potential.

    Raises:
        ShapeError, DomainError: as `continuum_birman_schwinger`.

    Not claimed: relative accuracy for a tiny potential, where two rounded terms cancel.
    Cost: O(n) work in n sequential steps.
    Source: docs/theory/theorems, theorem 9.
    """
    return log_continuum_determinant(grid, z) - continuum_trace(grid)


def continuum_hilbert_schmidt_bound(grid: Grid, z: complex) -> Bound:
    r"""Hilbert-Schmidt norm of K against `(1/2) (sum_a w_a V_a^2 max_a s_a)^{1/2}`, scalars, both in O(n).

        s_a = sum_b w_b e^{-2 Im z |x_a - x_b|},      at most about 1 / Im z

    Args:
        grid: potential, positions and weights.
        z: spectral parameter, Im z > 0, units of inverse length.

    Returns:
        Bound of float64 scalars.

    Raises:
        ShapeError, DomainError: as `continuum_birman_schwinger`.

    Theorem 13: `2 |V_a V_b| <= V_a^2 + V_b^2`. On a fine grid it is `(1/2) (Im z)^{-1/2} ||V||_{L2}`.
    Cost: O(n) work in 4 n sequential steps.
    Source: docs/theory/theorems, theorem 13.
    """
    grid, z = _checked_grid(grid), _checked_parameter(z)
    factor = (-2 * z.imag * grid.positions.diff()).exp()
    charge = (grid.potential * grid.weights).abs()
    square = (charge * _decaying_sums(charge, factor)).sum() / 4
    reach = _decaying_sums(grid.weights, factor).max()
    return Bound.of(square.sqrt(), (grid.weights * grid.potential.square()).sum().mul(reach).sqrt() / 2)


def _decaying_sums(values: Tensor, factor: Tensor) -> Tensor:
    """`sum_b values_b prod of the factors between a and b` for every a, float64 [n]."""
    padded = torch.cat((torch.zeros_like(values[:1]), factor))
    forward = _sums_before(values, padded)
    backward = _sums_before(values.flip(0), torch.cat((padded[:1], factor.flip(0)))).flip(0)
    return forward + backward - values  # counted from both sides


def _sums_before(values: Tensor, factor: Tensor) -> Tensor:
    """`s_a = values_a + factor_a s_{a-1}`, float64 [n]."""
    running, parts = 0.0, []
    # Pieces, so that their numbers stay in the cache.
    for some, decays in zip(values.split(_PIECE), factor.split(_PIECE), strict=True):
        sums = []
        for value, decay in zip(some.tolist(), decays.tolist(), strict=True):
            running = value + decay * running
            sums.append(running)
        parts.append(torch.tensor(sums, dtype=torch.float64, device=values.device))
    return torch.cat(parts)


def _checked_grid(grid: Grid) -> Grid:
    shape = list(grid.potential.shape)
    for name, part in zip(Grid._fields, grid, strict=True):
        if part.ndim != 1 or len(part) == 0 or list(part.shape) != shape or not part.is_floating_point():
            raise ShapeError(
                f"{name} is {part.dtype} {list(part.shape)}; expected real [n], n >= 1, n that of potential"
            )
        if not torch.isfinite(part).all():
            place = int((~torch.isfinite(part)).nonzero()[0])
            raise DomainError(f"{name} at {place} is {part[place].item()}; expected finite: look where it was computed")
    grid = Grid(*(part.detach().double() for part in grid))
    if not (grid.positions.diff() > 0).all():
        raise DomainError("positions do not increase strictly; expected sorted distinct points: sort and merge them")
    if not (grid.weights > 0).all():
        place = int((grid.weights <= 0).nonzero()[0])
        raise DomainError(f"weights at {place} is {grid.weights[place].item()}; expected > 0: drop the point")
    return grid


def _checked_parameter(z: complex) -> complex:
    z = complex(z)
    if not cmath.isfinite(z) or z.imag <= 0:
        raise DomainError(
            f"z is {z}; expected finite with Im z > 0, where the kernel decays: add a small imaginary part"
        )
    return z
