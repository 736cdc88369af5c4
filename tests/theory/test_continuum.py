"""Continuum Birman-Schwinger operators: O(N) against dense, a square well in closed form, prime bumps on both lines."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory import continuum
from resnet_bk.theory.potentials import prime_bump_potential
from resnet_bk.theory.scattering import birman_schwinger, dense_log_determinant, log_perturbation_determinant

CASES = 20  # per example of hypothesis, so that a bound meets 1,000 cases


def random_grid(seed: int, points: int, strength: float = 2.0) -> tuple[continuum.Grid, complex]:
    generator = torch.Generator().manual_seed(seed)
    positions = (0.01 + torch.rand(points, generator=generator, dtype=torch.float64)).cumsum(0)
    potential = strength * torch.randn(points, generator=generator, dtype=torch.float64)
    weights = 0.05 + torch.rand(points, generator=generator, dtype=torch.float64)
    place = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    return continuum.Grid(potential, positions, weights), complex(8 * place[0] - 4, 10 ** (3 * place[1] - 2.5))


@pytest.mark.parametrize("points", [1, 2, 65, 512])
def test_determinants_equal_their_dense_twins(points: int) -> None:
    grid, z = random_grid(points, points)
    logs = continuum.log_continuum_determinant(grid, z)
    regularised = continuum.log_continuum_regularised_determinant(grid, z)
    for i in sorted({1, (points + 1) // 2, points}):
        operator = continuum.continuum_birman_schwinger(continuum.Grid(*(part[:i] for part in grid)), z)
        dense, trace = dense_log_determinant(operator), operator.diagonal().sum()
        # The budget is 1e-10 relative to N = 512; the worst case is 3e-14. exp forgets the multiple of 2 pi i.
        assert (torch.exp(logs[i - 1] - dense) - 1).abs() < 1e-10
        assert (torch.exp(regularised[i - 1] - dense + trace) - 1).abs() < 1e-10
        assert (continuum.continuum_trace(grid)[i - 1] - trace).abs() < 1e-10 * (1 + trace.abs())


@given(seed=st.integers(0, 2**31), points=st.integers(1, 30), strength=st.sampled_from([0.1, 3.0, 100.0]))
def test_the_norm_keeps_its_bound_and_the_determinant_never_vanishes(seed: int, points: int, strength: float) -> None:
    for case in range(CASES):
        grid, z = random_grid(seed + case, points, strength)
        operator = continuum.continuum_birman_schwinger(grid, z)
        found = continuum.continuum_hilbert_schmidt_bound(grid, z)
        torch.testing.assert_close(found.value, torch.linalg.matrix_norm(operator), rtol=1e-11, atol=1e-13)
        assert found.slack >= -1e-12 * found.bound
        pivots = continuum.log_continuum_determinant(grid, z).diff().imag
        # The sign of Im S is that of the charge: the pivot cannot reach 0.
        assert (pivots * grid.potential[1:] > 0).all()
        assert torch.linalg.svdvals(torch.eye(points) + operator).min() > 0


def test_a_square_well_converges_to_its_transmission() -> None:
    z, height, length = 1.3 + 0.2j, 2.0, 1.5
    k = cmath.sqrt(z * z - z * height)
    exact = cmath.exp(1j * z * length) * (
        cmath.cos(k * length) - 0.5j * (z * z + k * k) / (z * k) * cmath.sin(k * length)
    )
    errors = []
    for points in (50, 100, 200):
        grid = continuum.midpoint_grid(torch.full((points,), height, dtype=torch.float64), 0.0, length)
        errors.append(abs(torch.exp(continuum.log_continuum_determinant(grid, z)[-1]).item() - exact))
    assert errors[2] < 1e-4
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05) and errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_the_bound_becomes_that_of_the_continuum_and_a_narrow_barrier_nearly_attains_it() -> None:
    z = 0.7 + 4j
    values = torch.linspace(-5, 5, 4000, dtype=torch.float64).square().neg().exp()
    grid = continuum.midpoint_grid(values, -5.0, 5.0)
    found = continuum.continuum_hilbert_schmidt_bound(grid, z)
    norm = math.sqrt(float((grid.weights * values.square()).sum()))
    assert found.bound.item() == pytest.approx(0.5 * norm / math.sqrt(z.imag), rel=1e-3)
    assert found.value > 0.95 * found.bound


@pytest.mark.parametrize("epsilon", [0.0, 0.25, 1.0])
def test_the_family_of_prime_bumps_on_lattice_and_line(epsilon: float) -> None:
    grid = continuum.prime_bump_grid(200, epsilon, width=2.0)
    assert torch.equal(grid.potential, prime_bump_potential(200, epsilon, smoothing=2 * epsilon))
    assert grid.weights.sum().item() == pytest.approx(math.log(200))
    dense = dense_log_determinant(continuum.continuum_birman_schwinger(grid, 3 + 0.1j))
    assert abs(torch.exp(continuum.log_continuum_determinant(grid, 3 + 0.1j)[-1] - dense) - 1) < 1e-10
    absorption = torch.full_like(grid.potential, 0.05)
    lattice = dense_log_determinant(birman_schwinger(grid.potential, 0.3, absorption))
    assert abs(torch.exp(log_perturbation_determinant(grid.potential, 0.3, absorption)[-1] - lattice) - 1) < 1e-10


def test_a_long_line_stays_finite() -> None:
    grid, z = random_grid(3, 50_000, 50.0)
    assert torch.isfinite(continuum.log_continuum_regularised_determinant(grid, z)).all()
    assert torch.isfinite(continuum.continuum_hilbert_schmidt_bound(grid, z).value)


@pytest.mark.parametrize(
    "function",
    [
        continuum.continuum_birman_schwinger,
        continuum.log_continuum_determinant,
        continuum.log_continuum_regularised_determinant,
        continuum.continuum_hilbert_schmidt_bound,
    ],
)
def test_bad_input_is_named(function) -> None:
    good, _ = random_grid(1, 3)
    for z in (1.0, 1 - 1j, complex(math.nan, 1)):
        with pytest.raises(DomainError, match="z is"):
            function(good, z)
    with pytest.raises(DomainError, match="potential at 0 is inf"):
        function(good._replace(potential=good.potential * math.inf), 1j)
    with pytest.raises(DomainError, match="positions do not increase"):
        function(good._replace(positions=good.positions.flip(0)), 1j)
    with pytest.raises(DomainError, match=r"weights at 0 is -?0\.0"):
        function(good._replace(weights=0 * good.weights), 1j)
    with pytest.raises(ShapeError, match="weights is"):
        function(good._replace(weights=good.weights[:2]), 1j)


def test_bad_grids_are_named() -> None:
    good = torch.ones(3, dtype=torch.float64)
    with pytest.raises(DomainError, match="low, high"):
        continuum.midpoint_grid(good, 1.0, 1.0)
    with pytest.raises(ShapeError, match="potential is"):
        continuum.midpoint_grid(good[:0], 0.0, 1.0)
    with pytest.raises(DomainError, match="sites is 1"):
        continuum.prime_bump_grid(1, 0.5)
    with pytest.raises(DomainError, match="epsilon"):
        continuum.prime_bump_grid(10, -0.5)
    with pytest.raises(ShapeError, match="potential is"):
        continuum.continuum_trace(continuum.Grid(good[:0], good[:0], good[:0]))
