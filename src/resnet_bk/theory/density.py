"""Densities of states of an absorbing Jacobi matrix on a grid of energies: of the whole block and of its last site."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_bk.theory.jacobi import checked_sites, full_green_diagonal, half_line_green


def density_of_states(potential: Tensor, energies: Tensor, absorption: Tensor) -> Tensor:
    r"""Density of states per site, `-Im tr (E - H + i Gamma)^{-1} / (pi n) = mean_i Im G_ii(E) / pi`; NOT causal.

    Args:
        potential: v, real [n], units of the hopping.
        energies: E, real [points], same units.
        absorption: eta, real [n], > 0, same units: the width over which the levels are smoothed.

    Returns:
        float64 [points], > 0, states per site and unit of energy.

    Raises:
        ShapeError: an argument is not a real vector, or potential and absorption differ in length.
        DomainError: a value is not finite, or some absorption is not positive.

    Theorem: total mass 1; the tails beyond +-L hold about `2 mean(eta) / (pi L)`.
    Cost: O(n points) work in 2 n points sequential steps.
    Source: docs/mathematics, "The operator".
    """
    potential, absorption, grid = _checked_grid(potential, energies, absorption)
    density = [full_green_diagonal(potential - energy, absorption).imag.mean().item() for energy in grid]
    return torch.tensor(density, dtype=torch.float64, device=potential.device) / math.pi


def surface_density_of_states(potential: Tensor, energies: Tensor, absorption: Tensor) -> Tensor:
    r"""Local density of states at the last site of the block, `Im m_n(E) / pi`; causal, it depends on sites <= n only.

    Args:
        potential: v, real [n], units of the hopping.
        energies: E, real [points], same units.
        absorption: eta, real [n], > 0, same units: the width over which the levels are smoothed.

    Returns:
        float64 [points], > 0, states per unit of energy.

    Raises:
        ShapeError: an argument is not a real vector, or potential and absorption differ in length.
        DomainError: a value is not finite, or some absorption is not positive.

    Theorem: total mass 1; the tails beyond +-L hold about `2 eta_n / (pi L)`.
    Cost: O(n points) work in n points sequential steps.
    Source: docs/mathematics, "The operator".
    """
    potential, absorption, grid = _checked_grid(potential, energies, absorption)
    density = [half_line_green(potential - energy, absorption)[-1].imag.item() for energy in grid]
    return torch.tensor(density, dtype=torch.float64, device=potential.device) / math.pi


def _checked_grid(potential: Tensor, energies: Tensor, absorption: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    potential, absorption = checked_sites(potential, absorption, "potential")
    grid, _ = checked_sites(energies, torch.ones_like(energies), "energies")
    return potential, absorption, grid.tolist()
