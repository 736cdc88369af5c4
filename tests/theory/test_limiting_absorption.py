"""Limiting absorption with a potential: the line's resolvent, bounded norms, and what a trapped level does to them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory.jacobi import absorbing_jacobi
from resnet_bk.theory.limiting_absorption import absorption_curve, line_resolvent, weighted_norm
from resnet_bk.theory.mourre import weighted_resolvent_norm

seeds = st.integers(0, 2**31)


def normal(seed: int, sites: int) -> torch.Tensor:
    return torch.randn(sites, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(seed=seeds, sites=st.integers(1, 12), energy=st.floats(-3, 3))
def test_the_block_is_the_middle_of_a_long_one(seed: int, sites: int, energy: float) -> None:
    eta, pad = 0.5, 80  # from there the walls are felt by e^{-2 * 80 * asinh(0.25)} < 1e-17
    potential = normal(seed, sites)
    zeros = torch.zeros(pad, dtype=torch.float64)
    long = torch.cat([zeros, potential, zeros]) - energy
    dense = torch.linalg.inv(absorbing_jacobi(long, torch.full_like(long, eta)))[pad:-pad, pad:-pad]
    torch.testing.assert_close(line_resolvent(potential, energy, eta), dense, rtol=1e-10, atol=1e-10)


@given(seed=seeds)
def test_the_resolvent_is_herglotz_and_bounded(seed: int) -> None:
    for case in range(20):
        potential, energy = normal(seed + case, 1 + case), float(normal(seed - case - 1, 1)) if seed > case else 0.0
        eta = 10.0 ** (-3 * case / 20)
        resolvent = line_resolvent(potential, energy, eta)
        imaginary = (resolvent - resolvent.mH) / 2j
        assert float(torch.linalg.eigvalsh(imaginary).min()) > -1e-12 / eta
        assert float(torch.linalg.matrix_norm(resolvent, ord=2)) <= (1 + 1e-10) / eta


def test_without_a_potential_it_is_the_free_norm() -> None:
    free = torch.zeros(101, dtype=torch.float64)
    for energy, eta in ((0.5, 1e-1), (0.5, 1e-3), (-1.9, 1e-2)):
        expected = weighted_resolvent_norm(energy, eta, sites=101)
        assert weighted_norm(free, energy, eta) == pytest.approx(expected, rel=1e-10)


@given(seed=seeds, energy=st.floats(-1.5, 1.5))
def test_inside_the_band_the_curve_is_flat_towards_zero(seed: int, energy: float) -> None:
    potential = torch.zeros(61, dtype=torch.float64)
    potential[28:33] = normal(seed, 5)
    curve = absorption_curve(potential, energy, torch.tensor([1e-6, 1e-8, 1e-10], dtype=torch.float64))
    assert float(curve.max() / curve.min()) < 1.01
    assert float(curve[-1]) < 1e-3 * 1e10


@pytest.mark.parametrize("barrier", [10.0, 50.0])
def test_a_trapped_level_makes_the_bound_large_but_finite(barrier: float) -> None:
    potential = torch.zeros(61, dtype=torch.float64)
    potential[29] = potential[31] = barrier
    curve = absorption_curve(potential, -2 / barrier, torch.tensor([1e-7, 1e-9], dtype=torch.float64))
    assert float(curve[1] / curve[0]) < 1.01
    assert float(curve[1]) == pytest.approx(barrier**2 / 2, rel=0.1)


def test_the_bound_is_lost_towards_the_edge() -> None:
    free = torch.zeros(201, dtype=torch.float64)
    assert weighted_norm(free, 1.9999, 1e-9) > 5 * weighted_norm(free, 0.5, 1e-9)


def test_bad_input_is_named() -> None:
    line = torch.zeros(5, dtype=torch.float64)
    for energy in (2.0, -2.0, 3.0, math.nan):
        with pytest.raises(DomainError, match="energy"):
            weighted_norm(line, energy, 0.1)
    with pytest.raises(DomainError, match="energy"):
        line_resolvent(line, math.inf, 0.1)
    with pytest.raises(DomainError, match="absorption"):
        weighted_norm(line, 0.0, 0.0)
    with pytest.raises(DomainError, match="exponent"):
        weighted_norm(line, 0.0, 0.1, exponent=0.5)
    with pytest.raises(DomainError, match="potential"):
        weighted_norm(line + math.nan, 0.0, 0.1)
    with pytest.raises(ShapeError, match="potential"):
        weighted_norm(line[None], 0.0, 0.1)
    with pytest.raises(ShapeError, match="absorptions"):
        absorption_curve(line, 0.0, torch.zeros(0, dtype=torch.float64))
