"""Determinants, phases and the scattering matrix: against dense twins, the operators of `ops` and theorems 2, 9, 10."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.ops.resolvent import causal_resolvent
from resnet_bk.theory import scattering

LEADS = (0j, 0.3 + 0.4j)


def random_block(seed: int, sites: int, smallest: float = 1e-2) -> tuple[torch.Tensor, float, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    potential = torch.randn(sites, generator=generator, dtype=torch.float64)
    absorption = smallest ** torch.rand(sites, generator=generator, dtype=torch.float64)
    return potential, 3 * torch.rand(1, generator=generator).item() - 1.5, absorption


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("sites", [1, 2, 65, 512])
def test_determinants_equal_their_dense_twins(sites: int, lead: complex) -> None:
    potential, energy, absorption = random_block(sites, sites)
    arguments = (potential, energy, absorption, lead)
    log_determinant = scattering.log_perturbation_determinant(*arguments)
    determinant = scattering.perturbation_determinant(*arguments)
    trace = scattering.birman_schwinger_trace(*arguments)
    regularised = scattering.log_regularised_determinant(*arguments)
    for i in sorted({1, (sites + 1) // 2, sites}):
        operator = scattering.birman_schwinger(potential[:i], energy, absorption[:i], lead)
        dense = scattering.dense_log_determinant(operator)
        dense_trace = operator.diagonal().sum()
        # The budget is 1e-10 relative to N = 512; the worst case is 5e-14. exp forgets the multiple of 2 pi i.
        assert (torch.exp(log_determinant[i - 1] - dense) - 1).abs() < 1e-10
        assert (determinant[i - 1] * torch.exp(-dense) - 1).abs() < 1e-10
        assert (trace[i - 1] - dense_trace).abs() < 1e-10 * (1 + dense_trace.abs())
        assert (torch.exp(regularised[i - 1] - dense + dense_trace) - 1).abs() < 1e-10


def test_the_regularised_determinant_is_of_second_order() -> None:
    potential, energy, absorption = random_block(3, 20)
    values = [scattering.log_regularised_determinant(s * potential, energy, absorption)[-1] for s in (1e-3, 5e-4)]
    assert (values[0] / values[1]).abs().item() == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("sites", [1, 65, 512])
def test_phases_equal_those_of_the_operator(sites: int) -> None:
    potential, energy, absorption = random_block(sites + 1, sites)
    free = torch.full_like(potential, -energy)
    angles = []
    for detuning in (free, potential - energy):
        (real, imag), _ = causal_resolvent(detuning[None, :, None], absorption[None, :, None], backend="reference")
        angles.append(torch.atan2(imag, real).flatten())
    phase = scattering.scattering_phase(potential, energy, absorption)
    torch.testing.assert_close(phase, angles[0] - angles[1], rtol=0, atol=1e-10)


@given(seed=st.integers(0, 2**31), sites=st.integers(1, 30), smallest=st.sampled_from([1e-1, 1e-4, 1e-8]))
def test_phases_need_no_unwrapping_and_add_up_to_the_determinant(seed: int, sites: int, smallest: float) -> None:
    for case in range(20):
        potential, energy, absorption = random_block(seed + case, sites, smallest)
        arguments = (10 ** (case % 4 - 1) * potential, energy, absorption, LEADS[case % 2])
        phase = scattering.scattering_phase(*arguments)
        assert (phase.abs() <= math.pi).all()
        shift = scattering.spectral_shift(*arguments)
        log_determinant = scattering.log_perturbation_determinant(*arguments)
        torch.testing.assert_close(math.pi * shift, log_determinant.imag, rtol=0, atol=1e-11)


@given(seed=st.integers(0, 2**31), sites=st.integers(1, 30), eta=st.floats(1e-3, 1.0))
def test_the_spectral_shift_counts_eigenvalues(seed: int, sites: int, eta: float) -> None:
    for case in range(20):
        potential, energy, _ = random_block(seed + case, sites)
        absorption = torch.full_like(potential, eta)
        hopping = torch.diag(torch.ones(sites - 1, dtype=torch.float64), 1)
        free = hopping + hopping.T
        counts = [
            torch.atan((torch.linalg.eigvalsh(h) - energy) / eta).sum() for h in (free, free + torch.diag(potential))
        ]
        shift = scattering.spectral_shift(potential, energy, absorption)[-1]
        torch.testing.assert_close(shift, (counts[1] - counts[0]) / math.pi, rtol=0, atol=1e-9)


@given(seed=st.integers(0, 2**31), sites=st.integers(1, 20), smallest=st.sampled_from([1e-1, 1e-3]))
def test_the_scattering_matrix_is_unitary_and_obeys_birman_krein(seed: int, sites: int, smallest: float) -> None:
    for case in range(20):
        potential, energy, absorption = random_block(seed + case, sites, smallest)
        matrix = scattering.scattering_matrix(potential, energy, absorption)
        identity = torch.eye(sites, dtype=torch.complex128)
        torch.testing.assert_close(matrix.mH @ matrix, identity, rtol=0, atol=1e-10)
        torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-10)
        free = scattering.scattering_matrix(0 * potential, energy, absorption)
        shift = scattering.spectral_shift(potential, energy, absorption)[-1]
        turned = torch.linalg.det(free) * torch.exp(-2j * math.pi * shift)
        torch.testing.assert_close(torch.linalg.det(matrix), turned, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "function",
    [
        scattering.log_perturbation_determinant,
        scattering.perturbation_determinant,
        scattering.birman_schwinger_trace,
        scattering.log_regularised_determinant,
        scattering.scattering_phase,
        scattering.spectral_shift,
    ],
)
def test_the_future_changes_nothing(function) -> None:
    potential, energy, absorption = random_block(17, 64)
    changed = potential.clone()
    changed[40:] += 1e3
    past, other = (function(v, energy, absorption) for v in (potential, changed))
    assert torch.equal(past[:40], other[:40])
    assert not torch.equal(past[40], other[40])


def test_a_long_line_stays_finite_and_an_overflow_is_named() -> None:
    potential, energy, absorption = random_block(13, 50_000)
    logs = scattering.log_regularised_determinant(potential, energy, absorption)
    assert torch.isfinite(logs).all()
    with pytest.raises(DomainError, match="use log_perturbation_determinant"):
        scattering.perturbation_determinant(potential, energy, absorption)


@pytest.mark.parametrize(
    "function",
    [
        scattering.birman_schwinger,
        scattering.log_perturbation_determinant,
        scattering.perturbation_determinant,
        scattering.birman_schwinger_trace,
        scattering.log_regularised_determinant,
        scattering.scattering_phase,
        scattering.spectral_shift,
        scattering.scattering_matrix,
    ],
)
def test_bad_blocks_are_named(function) -> None:
    good = torch.ones(3, dtype=torch.float64)
    with pytest.raises(DomainError, match=r"absorption at \(0,\) is 0.0"):
        function(good, 0.0, 0 * good)
    with pytest.raises(DomainError, match=r"potential at \(0,\) is inf"):
        function(good * math.inf, 0.0, good)
    with pytest.raises(DomainError, match="energy is nan"):
        function(good, math.nan, good)
    with pytest.raises(ShapeError, match=r"absorption has shape \[2\]; expected \[3\]"):
        function(good, 0.0, good[:2])
    with pytest.raises(ShapeError, match="potential has shape"):
        function(good[None], 0.0, good[None])


def test_bad_leads_and_operators_are_named() -> None:
    good = torch.ones(3, dtype=torch.float64)
    with pytest.raises(DomainError, match="lead is"):
        scattering.spectral_shift(good, 0.0, good, -1j)
    with pytest.raises(ShapeError, match="operator is"):
        scattering.dense_log_determinant(good)
    with pytest.raises(DomainError, match="operator has an entry"):
        scattering.dense_log_determinant(torch.full((1, 1), complex(math.nan, 0)))
