"""Poles of the resolvent against dense eigenvalues, their number against the argument principle."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory.jacobi import absorbing_jacobi, full_green_diagonal
from resnet_bk.theory.resonances import count_resonances, newton_correction, resonance, resonances

CASES = 20  # per example of hypothesis, so that a bound meets 1,000 cases


def medium(seed: int, sites: int, smallest: float = 1e-2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    potential = 2 * torch.randn(sites, generator=generator, dtype=torch.float64)
    return potential, smallest ** torch.rand(sites, generator=generator, dtype=torch.float64)


def dense_poles(potential: torch.Tensor, absorption: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigvals(absorbing_jacobi(potential, absorption))


def distances(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return (found[:, None] - exact[None]).abs().amin(1)


@pytest.mark.parametrize("sites", [1, 2, 63, 64, 65, 512])
def test_all_poles_of_a_window_equal_the_dense_eigenvalues(sites: int) -> None:
    potential, absorption = medium(sites, sites, 0.1)
    exact = dense_poles(potential, absorption)
    low, high = -1.05, 1.55
    exact = exact[(exact.real >= low) & (exact.real < high)]
    found = resonances(potential, absorption, low, high)
    assert len(found.energies) == len(exact) == count_resonances(potential, absorption, low, high)
    if len(exact):
        # Budget 1e-10 relative; the worst case is 3e-14. Both directions: nothing missed, nothing invented.
        assert distances(found.energies, exact).max() < 1e-10
        assert distances(exact, found.energies).max() < 1e-10
        assert (found.radii < 1e-9).all()


def test_the_whole_spectrum_of_a_quiet_medium() -> None:
    potential, absorption = medium(4, 100)
    absorption = 1e-3 * absorption
    found = resonances(potential, absorption, -20.0, 20.0)
    assert len(found.energies) == 100
    assert distances(dense_poles(potential, absorption), found.energies).max() < 1e-10
    # A quiet medium moves its levels down by the mean absorption seen by their states: the trace is exact.
    torch.testing.assert_close(found.energies.sum(), torch.complex(potential.sum(), -absorption.sum()))


@given(seed=st.integers(0, 2**31), sites=st.integers(1, 30), smallest=st.sampled_from([0.5, 1e-2, 1e-6]))
def test_poles_lie_in_the_strip_and_the_radius_holds_one(seed: int, sites: int, smallest: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for case in range(CASES):
        potential, absorption = medium(seed + case, sites, smallest)
        exact = dense_poles(potential, absorption)
        slack = 1e-10
        assert (exact.imag <= -absorption.min() + slack).all() and (exact.imag >= -absorption.max() - slack).all()
        assert (exact.real > potential.min() - 2).all() and (exact.real < potential.max() + 2).all()
        energy = complex(*torch.randn(2, generator=generator, dtype=torch.float64).tolist())
        radius = sites * abs(newton_correction(potential, absorption, energy))
        assert (exact - energy).abs().min() <= radius * (1 + 1e-9) + slack


@pytest.mark.parametrize("energy", [0.3, 0.3 + 0.4j, -1.0 - 0.005j])
@pytest.mark.parametrize("sites", [1, 2, 65, 512])
def test_the_correction_is_the_trace_of_the_resolvent(sites: int, energy: complex) -> None:
    potential, absorption = medium(sites + 7, sites, 0.1)
    shifted = absorption + energy.imag if isinstance(energy, complex) else absorption
    trace = full_green_diagonal(potential - energy.real, shifted).sum().item()
    found = newton_correction(potential, absorption, energy)
    assert cmath.isclose(found * trace, -1, rel_tol=1e-10)  # the worst case is 2e-15


def test_a_peak_of_the_density_leads_to_its_pole() -> None:
    potential, absorption = medium(5, 40)
    absorption = 1e-3 * absorption
    energies = torch.linspace(-2, 2, 400, dtype=torch.float64)
    density = torch.stack([full_green_diagonal(potential - e, absorption).imag.sum() for e in energies])
    start = energies[density.argmax()].item()
    found = resonance(potential, absorption, start)
    exact = dense_poles(potential, absorption)
    assert (exact - found.energy).abs().min() < 1e-10
    assert found.energy.imag < 0 and found.radius < 1e-9 and found.steps < 20


def test_a_long_line_and_a_pole_that_is_exact() -> None:
    # Far apart in energy, two sites hardly mix; a line of equal sites has levels 2 cos(k pi / (n + 1)).
    sites = 20_000
    absorption = torch.full((sites,), 1e-3, dtype=torch.float64)
    exact = 2 * math.cos(7000 * math.pi / (sites + 1)) - 1e-3j
    found = resonance(torch.zeros(sites, dtype=torch.float64), absorption, exact + 2e-5)
    assert abs(found.energy - exact) < 1e-10
    alone = resonance(torch.tensor([0.5]), torch.tensor([0.25]), 3.0 + 1j)
    assert alone.energy == 0.5 - 0.25j and alone.radius == 0


def test_an_empty_window_holds_nothing() -> None:
    potential, absorption = medium(1, 20)
    assert len(resonances(potential, absorption, 100.0, 101.0).energies) == 0
    assert count_resonances(potential, absorption, 100.0, 101.0) == 0


def test_bad_input_is_named() -> None:
    good = torch.ones(3, dtype=torch.float64)
    for function in (newton_correction, resonance):
        with pytest.raises(DomainError, match=r"absorption at \(0,\) is 0.0"):
            function(good, 0 * good, 0j)
        with pytest.raises(ShapeError, match=r"absorption has shape \[2\]"):
            function(good, good[:2], 0j)
        with pytest.raises(DomainError, match="energy is"):
            function(good, good, complex(math.nan, 0))
        with pytest.raises(DomainError, match="potential reaches 1e\\+31"):
            function(1e31 * good, good, 0j)
    for window in ((1.0, 1.0), (0.0, math.inf)):
        for function in (resonances, count_resonances):
            with pytest.raises(DomainError, match="window"):
                function(good, good, *window)
    with pytest.raises(DomainError, match="f' vanishes"):
        newton_correction(torch.zeros(2, dtype=torch.float64), good[:2], -1j)
    with pytest.raises(DomainError, match=r"tolerance is 0\.0"):
        resonance(good, good, 0j, tolerance=0.0)
    with pytest.raises(DomainError, match="max_rounds is 0"):
        resonances(good, good, 0.0, 1.0, max_rounds=0)
    with pytest.raises(DomainError, match="Newton moved by"):
        resonance(good, good, 100j, max_steps=1)
    with pytest.raises(DomainError, match=r"found .* poles of .* in 1 rounds"):
        resonances(*medium(64, 64, 0.1), -1.05, 1.55, max_rounds=1)
    with pytest.raises(DomainError, match="too near to the contour"):
        count_resonances(good, good, -1.0, 1.0, max_points=300)
