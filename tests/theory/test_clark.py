"""Clark measures: the rank-one family against dense matrices, mass 1, and the distance as a metric and as a loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory.clark import (
    ClarkMeasure,
    clark_measure,
    cumulative_mass,
    green_on_grid,
    measure_distance,
    rank_one_family,
    total_mass,
)
from resnet_bk.theory.jacobi import absorbing_jacobi, half_line_green

ETA = 0.1
GRID = torch.linspace(-40, 40, 1601, dtype=torch.float64)
seeds = st.integers(0, 2**31)


def lines(seed: int, *shape: int, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def measure(potential: Tensor, coupling: Tensor | float = 0.0) -> ClarkMeasure:
    return clark_measure(potential, GRID, torch.full_like(potential, ETA), coupling)


@given(seed=seeds, sites=st.integers(1, 12), coupling=st.floats(-20, 20))
def test_the_family_is_the_green_function_of_the_shifted_site(seed: int, sites: int, coupling: float) -> None:
    potential, absorption = lines(seed, 20, sites), 10 ** lines(seed + 1, 20, sites, spread=0.3)
    energies = torch.linspace(-3, 3, 5, dtype=torch.float64)
    m = green_on_grid(potential, energies, absorption)
    family = rank_one_family(m, coupling)
    for line in range(20):
        for k in range(5):
            shifted = potential[line] - energies[k]
            swept = half_line_green(shifted, absorption[line])[-1]
            torch.testing.assert_close(m[line, k], swept, rtol=1e-11, atol=0)
            shifted[-1] += coupling
            dense = torch.linalg.inv(absorbing_jacobi(shifted, absorption[line]))[-1, -1]
            torch.testing.assert_close(family[line, k], dense, rtol=1e-9, atol=0)


@given(seed=seeds, coupling=st.floats(-5, 5))
def test_the_family_is_the_one_of_clark(seed: int, coupling: float) -> None:
    m = torch.complex(lines(seed, 40), lines(seed + 1, 40).exp())
    disc = (m - 1j) / (m + 1j)
    assert bool((disc.abs() < 1).all())
    turned = (1 - 1j * coupling) / (1 + 1j * coupling) * disc
    clark = 1j * (1 + turned) / (1 - turned)
    torch.testing.assert_close(clark, (1 + coupling**2) * rank_one_family(m, coupling) - coupling, rtol=1e-9, atol=1e-9)


@given(seed=seeds)
def test_the_average_over_the_family_is_lebesgue(seed: int) -> None:
    m = torch.complex(lines(seed, 20), lines(seed + 1, 20).exp())
    # a = tan t maps the line to (-pi/2, pi/2), where the midpoint rule converges geometrically.
    angle = ((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000 - 0.5) * math.pi
    average = (rank_one_family(m[:, None], angle.tan()).imag * (1 + angle.tan().square())).mean(-1) * math.pi
    torch.testing.assert_close(average, torch.full_like(average, math.pi), rtol=1e-9, atol=0)


@given(seed=seeds, sites=st.integers(1, 40))
def test_the_mass_is_one(seed: int, sites: int) -> None:
    potential = lines(seed, 20, sites).clamp(-2, 2)
    found = measure(potential, coupling=lines(seed + 1, 20).clamp(-2, 2))
    assert bool((found.density > 0).all()) and bool((found.below > 0).all()) and bool((found.above > 0).all())
    # Worst of 15,000 measured: 8.0e-6, the next order eta / L^3 of the tails.
    assert (total_mass(found) - 1).abs().max() < 1.6e-5
    assert bool((cumulative_mass(found).diff(dim=-1) > 0).all())


def test_the_tails_are_right_to_the_third_order() -> None:
    potential = lines(3, 10)
    wide = torch.linspace(-3000, 3000, 120_001, dtype=torch.float64)
    whole = clark_measure(potential, wide, torch.full_like(potential, ETA))
    for reach in (10.0, 20.0):
        inside = wide.abs() <= reach
        beyond = whole.below + torch.trapezoid(whole.density[wide <= -reach], wide[wide <= -reach])
        tail = clark_measure(potential, wide[inside], torch.full_like(potential, ETA)).below
        assert abs(float(tail - beyond)) < 2 * ETA / reach**3
        assert float(beyond) > 0.8 * ETA / (math.pi * reach)


@given(seed=seeds)
def test_single_sites_have_a_known_distance(seed: int) -> None:
    v = lines(seed, 20, 2, spread=1.5).clamp(-4, 4)
    found = measure_distance(measure(v[:, :1]), measure(v[:, 1:]), scale=2.0)
    angles = (v / (2 + ETA)).atan()
    # Worst of 3,000 measured: 5.8e-5, from the spacing of the grid.
    torch.testing.assert_close(found, (angles[:, 0] - angles[:, 1]).abs() / math.pi, rtol=0, atol=1.2e-4)


@given(seed=seeds, sites=st.integers(1, 12))
def test_the_distance_is_a_bounded_metric(seed: int, sites: int) -> None:
    a, b, c = (measure(part.clamp(-6, 6)) for part in lines(seed, 3, 20, sites, spread=2.0))
    assert bool((measure_distance(a, a) == 0).all())
    torch.testing.assert_close(measure_distance(a, b), measure_distance(b, a), rtol=1e-13, atol=0)
    assert bool((measure_distance(a, b) > 0).all()) and bool((measure_distance(a, b) < 1).all())
    assert bool((measure_distance(a, c) <= measure_distance(a, b) + measure_distance(b, c) + 1e-15).all())


def test_gradients_of_measure_and_distance() -> None:
    grid = torch.linspace(-12, 12, 121, dtype=torch.float64)
    absorption = torch.full((3,), 0.4, dtype=torch.float64)
    teacher = clark_measure(lines(0, 3), grid, absorption, tolerance=0.1)

    def loss(potential: Tensor, coupling: Tensor) -> Tensor:
        return measure_distance(clark_measure(potential, grid, absorption, coupling, tolerance=0.1), teacher)

    student = (lines(5, 3).requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(loss, student)


def test_distillation_recovers_the_teachers_spectrum() -> None:
    grid = torch.linspace(-12, 12, 161, dtype=torch.float64)
    absorption = torch.full((6,), 0.3, dtype=torch.float64)
    teacher = clark_measure(lines(1, 6), grid, absorption)
    student = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.05)
    losses = []
    for _ in range(150):
        loss = measure_distance(clark_measure(student, grid, absorption), teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.015
    assert min(losses) < 0.1 * losses[0]


def test_bad_grids_and_comparisons_are_named() -> None:
    line = torch.zeros(3, dtype=torch.float64)
    eta = torch.full_like(line, ETA)
    with pytest.raises(DomainError, match="refine the grid"):
        clark_measure(line, torch.linspace(-40, 40, 100, dtype=torch.float64), eta)
    with pytest.raises(DomainError, match="increase"):
        clark_measure(line, GRID.flip(0), eta)
    with pytest.raises(DomainError, match="misses 1"):
        clark_measure(line, torch.linspace(-0.5, 0.5, 101, dtype=torch.float64), eta)
    with pytest.raises(DomainError, match="absorption is"):
        clark_measure(line, GRID, torch.zeros_like(line))
    with pytest.raises(DomainError, match="potential holds"):
        clark_measure(line + math.nan, GRID, eta)
    with pytest.raises(ShapeError, match="absorption has shape"):
        clark_measure(line, GRID, eta[:2])
    with pytest.raises(ShapeError, match="energies has dtype"):
        clark_measure(line, torch.arange(5), eta)
    with pytest.raises(ShapeError, match="potential has shape"):
        clark_measure(line[:0], GRID, eta[:0])
    with pytest.raises(ShapeError, match=r"expected \[points\]"):
        clark_measure(line, GRID[None], eta)
    with pytest.raises(DomainError, match="equal absorption"):
        measure_distance(measure(line), clark_measure(line, GRID, 2 * eta))
    with pytest.raises(DomainError, match="equal energies"):
        measure_distance(measure(line), clark_measure(line, GRID + 1e-3, eta))
    with pytest.raises(ShapeError, match=r"second\.absorption"):
        measure_distance(measure(line), clark_measure(line[:2], GRID, eta[:2]))
    with pytest.raises(DomainError, match="scale"):
        measure_distance(measure(line), measure(line), scale=0.0)
    with pytest.raises(ShapeError, match="m has dtype"):
        rank_one_family(line, 1.0)
    with pytest.raises(DomainError, match="Im m"):
        rank_one_family(torch.complex(line, -eta), 1.0)
    with pytest.raises(DomainError, match="coupling"):
        rank_one_family(torch.complex(line, eta), math.inf)
