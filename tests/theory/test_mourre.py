from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory.mourre import (
    conjugate_operator,
    free_hamiltonian,
    lattice_commutator,
    mourre_constant,
    mourre_estimate,
    weighted_resolvent_norm,
)


@pytest.mark.parametrize("sites", [2, 3, 10, 65])
def test_the_commutator_is_exact_but_for_two_corners(sites: int) -> None:
    hamiltonian = free_hamiltonian(sites)
    expected = 4 * torch.eye(sites, dtype=torch.float64) - hamiltonian @ hamiltonian
    expected[0, 0] -= sites + 1
    expected[-1, -1] -= sites + 1
    torch.testing.assert_close(lattice_commutator(sites), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sites", [2, 9])
def test_definitions_from_the_shift(sites: int) -> None:
    shift = torch.diag(torch.ones(sites - 1, dtype=torch.complex128), -1)
    position = torch.diag(torch.arange(sites) - (sites - 1) / 2).to(torch.complex128)
    hamiltonian = shift + shift.T
    velocity = 1j * (hamiltonian @ position - position @ hamiltonian)
    generator = (position @ velocity + velocity @ position) / 2
    torch.testing.assert_close(free_hamiltonian(sites).to(torch.complex128), hamiltonian)
    torch.testing.assert_close(velocity, 1j * (shift.T - shift))
    torch.testing.assert_close(conjugate_operator(sites), generator)
    torch.testing.assert_close(conjugate_operator(sites), conjugate_operator(sites).mH)
    commutator = 1j * (hamiltonian @ generator - generator @ hamiltonian)
    torch.testing.assert_close(lattice_commutator(sites).to(torch.complex128), commutator)


@given(st.integers(0, 2**31), st.integers(3, 40), st.floats(-1.99, 1.99), st.floats(-1.99, 1.99))
def test_mourre_estimate_holds_for_random_states(seed: int, sites: int, first: float, second: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        state = torch.randn(sites, dtype=torch.complex128, generator=generator)
        state[0] = state[-1] = 0
        value, bound = mourre_estimate(state, min(first, second), max(first, second))
        assert value >= bound - 1e-12 * sites
        assert bound >= 0


def test_a_wave_packet_inside_the_window_is_strictly_accelerated() -> None:
    position = torch.arange(400, dtype=torch.float64)
    state = torch.polar(torch.exp(-((position - 200) ** 2) / 400), 1.2 * position)
    state[0] = state[-1] = 0
    state = state / torch.linalg.vector_norm(state)
    value, bound = mourre_estimate(state, 0.3, 1.1)
    assert bound > 0.999 * mourre_constant(0.3, 1.1)
    assert value >= bound
    assert float(value) == pytest.approx(4 - (2 * math.cos(1.2)) ** 2, abs=0.02)


def test_not_true_on_a_block_every_eigenvector_has_expectation_zero() -> None:
    _, vectors = torch.linalg.eigh(free_hamiltonian(50))
    expectations = torch.einsum("ie,ij,je->e", vectors, lattice_commutator(50), vectors)
    assert expectations.abs().max() < 1e-11


def test_limiting_absorption_inside_the_band() -> None:
    values = [weighted_resolvent_norm(0.5, eta) for eta in (1e-1, 1e-2, 1e-3, 1e-6)]
    assert values[:3] == pytest.approx([1.02, 1.15, 1.18], abs=0.01)
    assert values[3] < 1.25


def test_the_bound_is_lost_at_the_band_edge() -> None:
    values = [weighted_resolvent_norm(2 - distance, 1e-8) for distance in (1e-1, 1e-2, 1e-3, 1e-4)]
    assert all(later > 1.5 * earlier for earlier, later in pairwise(values))


@pytest.mark.parametrize("energy", [-1.5, 0.0, 0.5])
def test_the_closed_form_is_the_middle_of_a_long_block(energy: float) -> None:
    # absorption 0.5 makes the ends of 301 sites invisible from the middle 41.
    position = torch.arange(301, dtype=torch.float64) - 150
    matrix = free_hamiltonian(301) - (energy + 0.5j) * torch.eye(301, dtype=torch.complex128)
    middle = torch.linalg.inv(matrix)[130:171, 130:171]
    weight = (1 + position[130:171].square()).rsqrt()
    expected = torch.linalg.matrix_norm(weight[:, None] * middle * weight, ord=2)
    assert weighted_resolvent_norm(energy, 0.5, sites=41) == pytest.approx(float(expected), rel=1e-10)


def test_the_cut_grows_towards_the_line() -> None:
    values = [weighted_resolvent_norm(0.5, 1e-3, sites=sites) for sites in (11, 51, 151, 301)]
    assert values == sorted(values)
    assert values[-1] - values[-2] < 0.01


@pytest.mark.parametrize("energy", [2.0, -2.0, 3.0, math.nan])
def test_energy_outside_the_band(energy: float) -> None:
    with pytest.raises(DomainError, match="energy"):
        weighted_resolvent_norm(energy, 0.1)
    with pytest.raises(DomainError, match="window"):
        mourre_constant(energy, energy)


def test_bad_input() -> None:
    for absorption in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(DomainError, match="absorption"):
            weighted_resolvent_norm(0.5, absorption)
    with pytest.raises(DomainError, match="exponent"):
        weighted_resolvent_norm(0.5, 0.1, exponent=0.5)
    with pytest.raises(DomainError, match="sites"):
        free_hamiltonian(1)
    with pytest.raises(DomainError, match="ends"):
        mourre_estimate(torch.ones(5, dtype=torch.float64), -1, 1)
    with pytest.raises(DomainError, match="non-finite"):
        mourre_estimate(torch.full((5,), math.nan, dtype=torch.float64), -1, 1)
    with pytest.raises(ShapeError, match="state"):
        mourre_estimate(torch.zeros(2, dtype=torch.float64), -1, 1)
