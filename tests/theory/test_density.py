"""Densities of states: against the smoothed eigenvalues, and of mass 1."""

from __future__ import annotations

import math

import pytest
import torch

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory.density import density_of_states, surface_density_of_states


def test_densities_are_the_smoothed_spectrum() -> None:
    potential = torch.randn(40, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    eta, limit = 0.05, 200.0
    energies = torch.arange(-limit, limit, 0.02, dtype=torch.float64)
    absorption = torch.full_like(potential, eta)
    hopping = torch.diag(torch.ones(39, dtype=torch.float64), 1)
    levels, vectors = torch.linalg.eigh(hopping + hopping.T + torch.diag(potential))
    lorentz = eta / math.pi / ((energies[:, None] - levels) ** 2 + eta**2)
    cases = (
        (density_of_states(potential, energies, absorption), lorentz.mean(1)),
        (surface_density_of_states(potential, energies, absorption), lorentz @ vectors[-1].square()),
    )
    for density, expected in cases:
        torch.testing.assert_close(density, expected, rtol=1e-10, atol=0)
        mass = torch.trapezoid(density, energies).item() + 2 * eta / (math.pi * limit)
        assert mass == pytest.approx(1, abs=1e-5)


def test_bad_grids_are_named() -> None:
    good = torch.ones(3, dtype=torch.float64)
    for density in (density_of_states, surface_density_of_states):
        with pytest.raises(DomainError, match=r"energies at \(0,\) is nan"):
            density(good, good * math.nan, good)
        with pytest.raises(ShapeError, match="energies has shape"):
            density(good, good[:0], good)
        with pytest.raises(DomainError, match="absorption at"):
            density(good, good, -good)
