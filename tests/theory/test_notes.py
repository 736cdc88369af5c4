"""Statements of the project's notes that no function of the theory computes: each is checked here by itself."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resnet_bk.theory.jacobi import absorbing_jacobi, free_root, half_line_green
from resnet_bk.theory.potentials import prime_bump_potential, von_mangoldt

seeds = st.integers(0, 2**31)


def line(seed: int, sites: int, eta: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    detuning = torch.randn(sites, dtype=torch.float64, generator=generator)
    return detuning, torch.full((sites,), eta, dtype=torch.float64)


def with_phases(detuning: Tensor, absorption: Tensor, below: complex, above: complex) -> Tensor:
    """The operator with hoppings `below` and `above` the diagonal."""
    sites = len(detuning)
    hopping = torch.ones(sites - 1, dtype=torch.complex128)
    diagonal = torch.complex(detuning, -absorption)
    return torch.diag(diagonal) + torch.diag(below * hopping, -1) + torch.diag(above * hopping, 1)


@given(seed=seeds, sites=st.integers(2, 12), omega=st.floats(-4, 4))
def test_a_hermitian_phase_is_a_gauge(seed: int, sites: int, omega: float) -> None:
    # Rotary position embedding is such a phase, one frequency a pair of key channels.
    detuning, absorption = line(seed, sites)
    plain = torch.linalg.inv(absorbing_jacobi(detuning, absorption))
    turned = torch.linalg.inv(with_phases(detuning, absorption, cmath.exp(1j * omega), cmath.exp(-1j * omega)))
    position = torch.arange(sites, dtype=torch.float64)
    phase = torch.exp(1j * omega * (position[:, None] - position))
    torch.testing.assert_close(turned, phase * plain, rtol=1e-9, atol=1e-10)


def test_one_phase_on_both_sides_is_not_hermitian_and_loses_theorem_1() -> None:
    detuning, absorption = line(0, 12, eta=0.05)
    phase = cmath.exp(0.7j)
    resolvent = torch.linalg.inv(with_phases(detuning, absorption, phase, phase))
    assert float(resolvent.diagonal().imag.min()) < 0
    assert float(torch.linalg.inv(absorbing_jacobi(detuning, absorption)).diagonal().imag.min()) > 0


def test_a_wall_reflects_and_a_lead_does_not() -> None:
    detuning, absorption = torch.full((400,), 0.1).double(), torch.full((400,), 1e-3).double()
    modulus = half_line_green(detuning, absorption).abs()
    assert float(modulus.max()) == pytest.approx(39, abs=1)
    assert 0.4 < float((modulus > 1).double().mean()) < 0.6
    lead = complex(free_root(detuning[:1], absorption[:1])[0])
    assert float(half_line_green(detuning, absorption, lead).abs().max()) < 1


def test_the_naive_root_of_the_quadratic_loses_the_gate() -> None:
    alpha = torch.tensor(1e4 - 1e-2j, dtype=torch.complex64)
    naive = (alpha - torch.sqrt(alpha * alpha - 4)) / 2
    exact = free_root(torch.tensor([1e4]).double(), torch.tensor([1e-2]).double())[0]
    assert float(naive.abs().log()) == -math.inf
    assert float(exact.abs().log()) == pytest.approx(-math.log(1e4), rel=1e-6)


@pytest.mark.parametrize("detuning", [2.5, 4.0, 10.0])
def test_raw_determinants_overflow_at_the_inverse_lyapunov_exponent(detuning: float) -> None:
    lyapunov = math.acosh(detuning / 2)
    before, now, sites = torch.tensor(0.0), torch.tensor(1.0), 0
    while torch.isfinite(now):
        before, now, sites = now, detuning * now - before, sites + 1
    assert sites == pytest.approx(88.7 / lyapunov, rel=0.02, abs=2)


def test_on_the_line_position_and_momentum_commute_to_the_identity() -> None:
    # H_0 = -i d/dx and A = x: i [H_0, A] f = f, here for polynomials times a Gaussian.
    x = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)

    def derivative(values: Tensor) -> Tensor:
        return torch.autograd.grad(values.sum(), x, create_graph=True)[0]

    for degree in range(4):
        f = x**degree * torch.exp(-(x**2) / 2)
        commutator = 1j * (-1j * derivative(x * f) - x * (-1j) * derivative(f))
        torch.testing.assert_close(commutator.detach(), f.detach().to(torch.complex128), rtol=1e-12, atol=1e-14)


def test_without_a_bounded_cost_measures_of_unequal_absorption_are_infinitely_far() -> None:
    def distance(reach: float) -> float:
        energy = torch.linspace(-reach, reach, 200_001, dtype=torch.float64)
        functions = [(energy / eta).atan() / math.pi for eta in (0.1, 0.3)]
        return float(torch.trapezoid((functions[0] - functions[1]).abs(), energy))

    # The tails differ by 0.2 / (pi E): every factor of ten in reach adds the same amount.
    steps = [distance(10 * reach) - distance(reach) for reach in (10.0, 100.0)]
    for step in steps:
        assert step == pytest.approx(2 * 0.2 / math.pi * math.log(10), rel=0.01)


def test_a_smoothing_fixed_in_log_n_grows_like_the_square_root() -> None:
    heights = []
    for n in (10**4, 10**6):
        first, last = round(n * math.exp(-0.1)), round(n * math.exp(0.1))
        position = torch.arange(first, last + 1, dtype=torch.float64)
        window = 0.5 * (1 + torch.cos(math.pi * (position / n).log() / 0.1))
        heights.append(float((von_mangoldt(first, last) / position.sqrt() * window).sum()))
    assert heights[1] / heights[0] == pytest.approx(10, rel=0.05)
    # A width of two sites, that is 2 / n in log n, leaves the bumps as they are.
    assert float(prime_bump_potential(1000, 0.0, smoothing=2.0, first=10**6).max()) < 0.1
