"""Mourre's commutator and the limiting absorption principle for the free lattice Hamiltonian `S + S*`."""

from __future__ import annotations

import cmath
import math

import torch
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError


def free_hamiltonian(sites: int) -> Tensor:
    """The free block `tridiag(1, 0, 1)`, float64 [sites, sites].

    Args:
        sites: number of lattice sites, at least 2.

    Returns:
        The compression of `S + S*` (S the shift) to `sites` neighbouring sites; its spectrum lies inside (-2, 2).

    Raises:
        DomainError: fewer than 2 sites.

    Cost: O(sites^2) memory.
    Source: docs/mathematics, "The operator".
    """
    _check_sites(sites)
    hopping = torch.ones(sites - 1, dtype=torch.float64)
    return torch.diag(hopping, 1) + torch.diag(hopping, -1)


def conjugate_operator(sites: int) -> Tensor:
    """The generator of dilations `A = (X V + V X) / 2`, complex128 [sites, sites], Hermitian.

        X = diag(position),   V = i [H_0, X] = i (S* - S)   (the velocity)

    Args:
        sites: number of lattice sites, at least 2; positions are counted from the middle of the block.

    Returns:
        A on the block, purely imaginary and antisymmetric.

    Raises:
        DomainError: fewer than 2 sites.

    Cost: O(sites^2) memory.
    Source: docs/theory/theorems, theorem 11.
    """
    _check_sites(sites)
    position = _positions(sites)
    # Entry (i, i + 1) of V is i, entry (i + 1, i) is -i.
    midpoints = (0.5j * (position[1:] + position[:-1])).to(torch.complex128)
    return torch.diag(midpoints, 1) - torch.diag(midpoints, -1)


def lattice_commutator(sites: int) -> Tensor:
    """The commutator `i [H_0, A]` of the finite blocks, float64 [sites, sites].

    Args:
        sites: number of lattice sites, at least 2.

    Returns:
        The commutator of `free_hamiltonian` and `conjugate_operator`.

    Raises:
        DomainError: fewer than 2 sites.

    Theorem: on the whole line `i [H_0, A] = 4 - H_0^2`. On a block the entries equal those of `4 - H_0^2` for the
        block's H_0 except the first and last of the diagonal, each smaller by sites + 1: a commutator of matrices has
        trace zero.
    Not claimed: positivity on spectral subspaces of a block. Every eigenvector of the block has expectation zero
        (virial theorem); see `mourre_estimate` for what holds.
    Cost: O(sites^3).
    Source: docs/theory/theorems, theorem 11.
    """
    hamiltonian = free_hamiltonian(sites)
    generator = conjugate_operator(sites).imag  # A = i * generator, so i [H_0, A] = -[H_0, generator]
    return generator @ hamiltonian - hamiltonian @ generator


def mourre_constant(low: float, high: float) -> float:
    """The Mourre constant `theta = min over [low, high] of 4 - E^2`, units of the hopping squared.

    Args:
        low: lower end of the energy window, above -2.
        high: upper end of the energy window, below 2, not below `low`.

    Returns:
        theta > 0, the largest constant with `P i[H_0, A] P >= theta P` on the line, P the spectral projection.

    Raises:
        DomainError: the window is empty, not finite or touches a band edge, where no positive constant exists.

    Source: docs/theory/theorems, theorem 11.
    """
    if not -2 < low <= high < 2:
        raise DomainError(
            f"the energy window [low, high] is [{low}, {high}]; expected -2 < low <= high < 2, because 4 - E^2 "
            "vanishes at the band edges. Move the window inside the band."
        )
    return 4 - max(abs(low), abs(high)) ** 2


def mourre_estimate(state: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Both sides of Mourre's estimate for one state: the commutator's expectation and its lower bound.

        <psi, i[H_0, A] psi>  >=  theta ||P psi||^2

    Args:
        state: psi, complex128 or float64 [sites], exactly zero at the first and the last site.
        low: lower end of the energy window, above -2.
        high: upper end of the energy window, below 2.

    Returns:
        The expectation and theta ||P psi||^2, float64 scalars; P projects on the block's eigenvectors with energies in
        [low, high] and theta is `mourre_constant`.

    Raises:
        ShapeError: `state` is not a vector of at least 3 sites.
        DomainError: non-finite or non-zero end entries, or a window that touches a band edge.

    Theorem: the first is at least the second, since away from the corners the commutator is `4 - H_0^2 >= 0` and that
        commutes with P.
    Cost: O(sites^3).
    Source: docs/theory/theorems, theorem 11.
    """
    theta = mourre_constant(low, high)
    if state.ndim != 1 or state.shape[0] < 3:
        raise ShapeError(f"state has shape {tuple(state.shape)}; expected [sites] with sites >= 3.")
    if not bool(torch.isfinite(torch.view_as_real(state.to(torch.complex128))).all()):
        raise DomainError("state has a non-finite entry; expected finite amplitudes. Find where it was produced.")
    if state[0] != 0 or state[-1] != 0:
        raise DomainError(
            f"state is {state[0].item()} and {state[-1].item()} at its ends; expected exactly 0 there, because the "
            "commutator of a block is wrong at the corners. Pad the state with one zero on each side."
        )
    psi = state.to(torch.complex128)
    commutator = lattice_commutator(psi.shape[0]).to(torch.complex128)
    energies, vectors = torch.linalg.eigh(free_hamiltonian(psi.shape[0]))
    weights = (vectors.T.to(torch.complex128) @ psi).abs().square()
    inside = (energies >= low) & (energies <= high)
    return torch.vdot(psi, commutator @ psi).real, theta * weights[inside].sum()


def weighted_resolvent_norm(energy: float, absorption: float, *, exponent: float = 1.0, sites: int = 301) -> float:
    """The norm `||<X>^-s (H_0 - E - i eta)^-1 <X>^-s||` of limiting absorption, with `<X> = sqrt(1 + X^2)`.

    Args:
        energy: E, inside the band |E| < 2, units of the hopping.
        absorption: eta > 0, same units.
        exponent: s > 1/2.
        sites: the infinite line's weighted resolvent is cut to this many sites around the origin, at least 2.

    Returns:
        The operator norm of the cut, at most that of the line and non-decreasing in odd `sites`.

    Raises:
        DomainError: energy at or outside a band edge, absorption <= 0, exponent <= 1/2, not finite, too few sites.

    Theorem: for fixed |E| < 2 and s > 1/2 bounded as eta -> 0, while the unweighted norm on the line is 1/eta.
    Checked numerically: it grows without bound as |E| -> 2 (s = 1).
    Measured: E = 0.5, s = 1: 1.02, 1.15, 1.18 at eta = 1e-1, 1e-2, 1e-3.
    Cost: O(sites^3).
    Source: docs/theory/theorems, theorem 12; closed form `R_jk = (-m)^|j-k| / (alpha - 2 m)` with m the free root,
        theorem 5.
    """
    _check_sites(sites)
    if not abs(energy) < 2:
        raise DomainError(
            f"energy is {energy}; expected |energy| < 2, because limiting absorption fails at the band edges. "
            "Choose an energy inside the band."
        )
    if not (absorption > 0 and math.isfinite(absorption)):
        raise DomainError(f"absorption is {absorption}; expected a finite value > 0. Take a small positive one.")
    if not (exponent > 0.5 and math.isfinite(exponent)):
        raise DomainError(
            f"exponent is {exponent}; expected a finite value > 1/2, because the weighted norm is unbounded as the "
            "absorption vanishes otherwise. Use 1."
        )
    alpha = complex(-energy, -absorption)
    # The larger root first and then its inverse: the difference that gives the smaller one cancels.
    root = 1 / (alpha / 2 + cmath.sqrt(alpha / 2 - 1) * cmath.sqrt(alpha / 2 + 1))
    position = _positions(sites)
    distance = (position[:, None] - position[None, :]).abs()
    resolvent = torch.exp(distance * cmath.log(-root)) / (alpha - 2 * root)
    weight = (1 + position.square()).pow(-exponent / 2)
    return float(torch.linalg.matrix_norm(weight[:, None] * resolvent * weight[None, :], ord=2))


def _positions(sites: int) -> Tensor:
    """Site positions counted from the middle of the block, float64 [sites]."""
    return torch.arange(sites, dtype=torch.float64) - (sites - 1) / 2


def _check_sites(sites: int) -> None:
    if sites < 2:
        raise DomainError(f"sites is {sites}; expected at least 2. Use a longer block.")
