"""The operators against the theory: two implementations that share no code, and every bound on the operators' outputs.

Lines are batch rows and heads; theory takes one line at a time and sweeps in Python complex numbers.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resnet_bk.ops.dispatch import Backend
from resnet_bk.ops.resolvent import (
    GreenState,
    causal_resolvent,
    decaying_root,
    flux_gate,
    flux_gates,
    full_resolvent_diagonal,
    previous_imag,
    scattering_phase,
    semiclassical_root,
)
from resnet_bk.ops.resolvent.chunked import _carry
from resnet_bk.ops.semiseparable import semiseparable_mix
from resnet_bk.theory import bounds, bounds_flux, scattering
from resnet_bk.theory.jacobi import absorbing_jacobi, free_root, full_green_diagonal, green_kernel, half_line_green

BACKENDS: list[Backend] = ["reference", "chunked"]
LENGTHS = [1, 2, 7, 64, 65, 512]
seeds = st.integers(0, 2**31)


def media(seed: int, sites: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, complex]:
    """Two rows of two heads [2, sites, 2]: quiet, wild, resonant and nearly free media; and a lead."""
    generator = torch.Generator().manual_seed(seed)
    detuning = torch.randn(2, sites, 2, dtype=torch.float64, generator=generator)
    detuning *= torch.tensor([[0.3, 30.0], [1.0, 1e-3]], dtype=torch.float64)[:, None]
    absorption = 10 ** (3 * torch.rand(2, sites, 2, dtype=torch.float64, generator=generator) - 2.5)
    real, imag = torch.rand(2, dtype=torch.float64, generator=generator).tolist()
    detuning, absorption = detuning.to(dtype), absorption.to(dtype)
    for i in range(1, min(sites, 32), 2):  # every second site at the pole of what lies before it
        behind = half_line_green(detuning[1, :i, 0], absorption[1, :i, 0])[-1]
        detuning[1, i, 0] = behind.real.to(dtype)
    return detuning, absorption, complex(2 * real - 1, imag)


def as_state(lead: complex, dtype: torch.dtype = torch.float64) -> GreenState:
    return GreenState(torch.full((2,), lead.real, dtype=dtype), torch.full((2,), lead.imag, dtype=dtype))


def per_line(function, *tensors: Tensor) -> Tensor:
    """The result of a function of lines [sites] for each row and head, stacked to [2, sites, 2, ...]."""
    rows = [
        torch.stack([function(*(tensor[row, :, head] for tensor in tensors)) for head in range(2)], dim=1)
        for row in range(2)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sites", LENGTHS)
def test_the_causal_resolvent_is_the_half_line_green_function(sites: int, backend: Backend) -> None:
    detuning, absorption, lead = media(sites, sites)
    (real, imag), last = causal_resolvent(detuning, absorption, initial=as_state(lead), backend=backend)
    expected = per_line(lambda d, a: half_line_green(d, a, lead), detuning, absorption)
    # Worst of 20 seeds a length: 3.7e-15, and 7.5e-15 for the diagonal below.
    torch.testing.assert_close(torch.complex(real, imag), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.complex(*last), expected[:, -1], rtol=1e-13, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sites", LENGTHS)
def test_the_full_diagonal_is_that_of_the_sweeps_and_of_the_inverse(sites: int, backend: Backend) -> None:
    detuning, absorption, _ = media(sites, sites)
    found = torch.complex(*full_resolvent_diagonal(detuning, absorption, backend=backend))
    expected = per_line(full_green_diagonal, detuning, absorption)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    if sites <= 65:
        dense = per_line(lambda d, a: torch.linalg.inv(absorbing_jacobi(d, a)).diagonal(), detuning, absorption)
        torch.testing.assert_close(found, dense, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, sites=st.integers(1, 24))
def test_the_bounds_hold_for_what_a_model_computes(backend: Backend, seed: int, sites: int) -> None:
    detuning, absorption, lead = media(seed, sites, torch.float32)
    (real, imag), _ = causal_resolvent(detuning, absorption, initial=as_state(lead, torch.float32), backend=backend)
    m = torch.complex(real, imag)
    assert m.dtype == torch.complex64
    assert bool((imag > 0).all())
    # Worst of 20,000 lines in float32: |m| eta never above 1, the Ward identity exceeded by 4.9e-7.
    assert bool((m.abs() * absorption <= 1 + 1e-6).all())
    ward = per_line(lambda line, eta: green_kernel(line).abs().square() @ eta.double(), m, absorption)
    assert bool((ward <= imag * (1 + 1e-6)).all())


@given(seed=seeds, sites=st.integers(1, 32))
def test_behind_a_wall_the_operators_kernel_obeys_combes_thomas(seed: int, sites: int) -> None:
    detuning, absorption, _ = media(seed, sites)
    (real, imag), _ = causal_resolvent(detuning, absorption)
    for row in range(2):
        for head in range(2):
            line = detuning[row, :, head], absorption[row, :, head]
            value = green_kernel(torch.complex(real, imag)[row, :, head]).abs()
            found = bounds.combes_thomas_bound(*line)
            assert bool((value <= found.bound * (1 + 1e-12)).all())
            torch.testing.assert_close(value, found.value, rtol=1e-9, atol=0)


@given(seed=seeds, sites=st.integers(1, 24))
def test_the_flux_gates_make_the_kernel_of_theorem_8(seed: int, sites: int) -> None:
    detuning, absorption, lead = media(seed, sites)
    state = as_state(lead)
    (_, imag), _ = causal_resolvent(detuning, absorption, initial=state)
    log_decay, weight = flux_gate(previous_imag(imag, state.imag, None), absorption)
    # The operator that applies the kernel, with one key, is given the unit vectors one after the other.
    ones = torch.ones(2, sites, 1, dtype=torch.float64)
    channels = torch.eye(sites, dtype=torch.float64).expand(2, 2, sites, sites).transpose(1, 2)
    applied, _ = semiseparable_mix(ones, ones, channels.contiguous(), log_decay, source=weight)
    for row in range(2):
        for head in range(2):
            line = detuning[row, :, head], absorption[row, :, head]
            expected = bounds_flux.flux_kernel(*line, lead)
            torch.testing.assert_close(applied[row, :, head], expected[:, 1:], rtol=1e-9, atol=1e-12)
            through = log_decay[row, :, head].cumsum(0).exp()
            norms = applied[row, :, head].square().sum(-1) + through.square()
            torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-12, atol=0)


def test_the_fused_gates_are_those_of_the_theory() -> None:
    generator = torch.Generator().manual_seed(4)
    raw, absorption, source = torch.randn(3, 2, 40, 2, dtype=torch.float64, generator=generator)
    scale, energy, bias = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    (log_decay, weight), _ = flux_gates(
        raw,
        absorption,
        source,
        potential_scale=scale,
        energy=energy,
        absorption_bias=bias,
        absorption_floor=1e-3,
        source_kind="unit",
    )
    eta = torch.nn.functional.softplus(absorption + bias) + 1e-3
    detuning = scale * raw - energy
    leads = free_root(-energy, torch.nn.functional.softplus(bias) + 1e-3)
    for row in range(2):
        for head in range(2):
            lead = complex(leads[head])
            u = half_line_green(detuning[row, :, head], eta[row, :, head], lead).imag
            before = torch.cat([u.new_tensor([lead.imag]), u[:-1]])
            share = before / (before + eta[row, :, head])
            torch.testing.assert_close(log_decay[row, :, head].exp().square(), share, rtol=1e-11, atol=0)
            torch.testing.assert_close(weight[row, :, head].square(), 1 - share, rtol=1e-9, atol=1e-12)


@given(seed=seeds)
def test_the_decaying_root_is_the_free_root(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    detuning = 10 ** (4 * torch.rand(20, dtype=torch.float64, generator=generator) - 2)
    detuning *= torch.randn(20, dtype=torch.float64, generator=generator).sign()
    absorption = 10 ** (8 * torch.rand(20, dtype=torch.float64, generator=generator) - 7)
    expected = free_root(detuning, absorption)
    torch.testing.assert_close(torch.complex(*decaying_root(detuning, absorption)), expected, rtol=1e-13, atol=0)
    log_modulus, argument = semiclassical_root(detuning, absorption)
    torch.testing.assert_close(log_modulus, expected.abs().log(), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(argument, expected.angle(), rtol=1e-9, atol=1e-15)


@given(seed=seeds, sites=st.integers(1, 40), energy=st.floats(-1.9, 1.9))
def test_the_scattering_phases_are_those_of_the_determinant(seed: int, sites: int, energy: float) -> None:
    detuning, absorption, lead = media(seed, sites)
    state = as_state(lead)
    free, _ = causal_resolvent(torch.full_like(detuning, -energy), absorption, initial=state)
    m, _ = causal_resolvent(detuning, absorption, initial=state)
    found = scattering_phase(m, free)
    expected = per_line(lambda d, a: scattering.scattering_phase(d + energy, energy, a, lead), detuning, absorption)
    # detuning + energy - energy rounds, and a resonance turns the phase over a width eta.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert float(found.abs().max()) < math.pi


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, sites=st.integers(1, 16))
def test_the_operators_gradient_is_that_of_theorem_7(backend: Backend, seed: int, sites: int) -> None:
    detuning, absorption, _ = media(seed, sites)
    detuning.requires_grad_()
    absorption.requires_grad_()
    (real, imag), _ = causal_resolvent(detuning, absorption, backend=backend)
    readout = torch.randn(2, sites, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (real * readout[..., 0] + imag * readout[..., 1]).sum().backward()
    assert detuning.grad is not None and absorption.grad is not None
    for row in range(2):
        for head in range(2):
            line = detuning.detach()[row, :, head], absorption.detach()[row, :, head]
            m = half_line_green(*line)
            derivative = -green_kernel(m).square()  # dm_i / d alpha_j
            weight = torch.complex(readout[row, :, head, 0], -readout[row, :, head, 1])
            exact = weight @ derivative
            scale = float(exact.abs().max())
            torch.testing.assert_close(detuning.grad[row, :, head], exact.real, rtol=1e-9, atol=1e-11 * scale)
            torch.testing.assert_close(absorption.grad[row, :, head], exact.imag, rtol=1e-9, atol=1e-11 * scale)
            bound = bounds_flux.gradient_bound(*line)
            torch.testing.assert_close(bound.value, imag.detach()[row, :, head], rtol=1e-9, atol=0)


@pytest.mark.parametrize(("eta", "error"), [(1e-3, 2e-3), (1e-4, 0.1)])
def test_composing_and_carrying_in_single_precision_fails_at_resonances(eta: float, error: float) -> None:
    # In every chunk a barrier of 1 and behind it a denominator without real part, for 192 lines at once.
    length, chunks, lines = 16, 32, 192
    generator = torch.Generator().manual_seed(0)
    detuning = torch.randn(length * chunks, lines, generator=generator)
    m = torch.zeros(lines, dtype=torch.complex128)
    for t in range(length * chunks):
        if t >= length and t % length == 0:
            detuning[t] = 1.0
        if t >= length and t % length == 1:
            detuning[t] = m.real.float()
        m = 1 / (detuning[t].double() - 1j * eta - m)
    alpha = (detuning.double() - 1j * eta).unflatten(0, (chunks, length)).transpose(0, 1)
    lead = torch.zeros(1, lines, dtype=torch.complex128)
    exact = _carry(alpha, lead, 1, {})
    single = _carry(alpha.to(torch.complex64), lead.to(torch.complex64), 1, {}).to(torch.complex128)
    worst = 0.0
    for site in alpha:  # applied in double precision, so that the carry alone errs
        exact, single = 1 / (site - exact), 1 / (site - single)
        worst = max(worst, float(((single - exact) / exact).abs().max()))
    assert worst > error
