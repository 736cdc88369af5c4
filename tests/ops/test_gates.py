"""Leads, semiclassical roots, flux gates and scattering phases: closed forms against complex128 and their bounds."""

from __future__ import annotations

import pytest
import torch

from resnet_bk.ops.resolvent import causal_resolvent, decaying_root, flux_gate, scattering_phase, semiclassical_root

DETUNINGS = [0.0, 1e-6, 0.3, 1.999, 2.0, 2.001, 5.0, 1e2, 1e4, 1e8]
ABSORPTIONS = [1e-6, 1e-3, 0.1, 1.0, 30.0]


def grid(dtype=torch.float64):
    """Every pair of a detuning of either sign and an absorption."""
    detuning = torch.tensor([sign * value for value in DETUNINGS for sign in (1, -1)], dtype=dtype)
    absorption = torch.tensor(ABSORPTIONS, dtype=dtype)
    return tuple(x.flatten() for x in torch.meshgrid(detuning, absorption, indexing="ij"))


def exact_root(detuning, absorption):
    """The decaying root in complex128 as 1 / (z + sqrt(z - 1) sqrt(z + 1)), z = alpha / 2: nothing cancels."""
    z = torch.complex(detuning.double(), -absorption.double()) / 2
    return 1 / (z + torch.sqrt(z - 1) * torch.sqrt(z + 1))


@pytest.mark.parametrize(
    ("dtype", "budget"),
    # Worst relative errors seen: 9e-16 and 4e-7, of log|m|, of the angle, of m and of Im m alone.
    [(torch.float64, 1e-14), (torch.float32, 2e-6)],
)
def test_roots_are_exact_to_rounding(dtype, budget):
    detuning, absorption = grid(dtype)
    exact = exact_root(detuning, absorption)
    log_modulus, angle = semiclassical_root(detuning, absorption)
    real, imag = decaying_root(detuning, absorption)
    # Near 1 the logarithm of exact.abs() cancels; 1 - |m|^2 = |m|^2 eta / Im m (theorem 1) does not.
    square = exact.abs().square()
    near_one = torch.log1p(-square * absorption.double() / exact.imag)
    exact_log = 0.5 * torch.where(square > 0.5, near_one, torch.log(square))
    assert ((log_modulus - exact_log) / exact_log).abs().max() < budget
    assert ((angle - exact.angle()) / exact.angle()).abs().max() < budget
    assert ((torch.complex(real, imag) - exact).abs() / exact.abs()).max() < budget
    assert ((imag - exact.imag) / exact.imag).abs().max() < budget
    assert imag.min() > 0
    assert log_modulus.max() < 0


def test_the_root_solves_its_equation_and_is_a_fixed_point_of_the_sweep():
    detuning, absorption = grid()
    m = decaying_root(detuning, absorption)
    root, alpha = torch.complex(*m), torch.complex(detuning, -absorption)
    assert ((root * root - alpha * root + 1).abs()).max() < 1e-14  # measured 9e-16
    constant = [x.expand(1, 50, -1) for x in (detuning, absorption)]
    swept, _ = causal_resolvent(*constant, initial=m)
    drift = (torch.complex(*swept) - root).abs() / root.abs()
    assert drift.max() < 1e-12  # measured 6e-15


def test_gradients_are_exact_and_finite_also_at_the_band_edge():
    detuning = torch.tensor([-2.0, 2.0, 0.0, 0.3, -1.9, 7.0, 1e8, -1e8], dtype=torch.float64, requires_grad=True)
    absorption = torch.full_like(detuning, 1e-2).requires_grad_()
    root = exact_root(detuning.detach(), absorption.detach())
    slope = root * root / (root * root - 1)  # dm/dalpha, from m + 1/m = alpha
    for outputs, expected in ((decaying_root, slope), (semiclassical_root, slope / root)):
        for part, exact in zip(outputs(detuning, absorption), (expected.real, expected.imag), strict=True):
            gradient, _ = torch.autograd.grad(part.sum(), (detuning, absorption), retain_graph=True)
            assert (gradient - exact).abs().max() < 1e-13  # measured 5e-15
    for value in (1e-30, 1e4, 1e8):
        extreme = [torch.tensor([x], requires_grad=True) for x in (value, 1e-3)]
        gradients = torch.autograd.grad(sum(part.sum() for part in semiclassical_root(*extreme)), extreme)
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_free_line_decays_by_the_inverse_hyperbolic_sine():
    absorption = torch.tensor(ABSORPTIONS, dtype=torch.float64)
    log_modulus, angle = semiclassical_root(torch.zeros_like(absorption), absorption)
    torch.testing.assert_close(log_modulus, -torch.asinh(absorption / 2), rtol=1e-15, atol=0)
    torch.testing.assert_close(angle, torch.full_like(angle, torch.pi / 2), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flux_gate_is_the_ratio_of_currents_and_never_above_one(dtype):
    previous = torch.tensor([0.0, 1e-30, 1e-9, 1e-3, 1.0, 1e3], dtype=dtype)[:, None]
    absorption = torch.tensor([1e-9, 1e-3, 1.0, 1e4], dtype=dtype)[None]
    log_decay, weight = flux_gate(previous, absorption)
    assert log_decay.max() <= 0
    assert weight.min() >= 0
    assert weight.max() <= 1
    u, eta = previous.double(), absorption.double()
    budget = 4 * torch.finfo(dtype).eps  # measured 1.0 times epsilon
    assert ((weight - torch.sqrt(eta / (u + eta))).abs() <= budget * weight).all()
    exact = 0.5 * torch.log(u[1:] / (u[1:] + eta))
    assert ((log_decay[1:] - exact).abs() <= budget * exact.abs() + 1e-15).all()
    # Nothing lies behind a hard wall: all weight is on the token, and the empty memory is not scaled.
    assert (log_decay[0] == 0).all()
    assert (weight[0] == 1).all()


def test_flux_gate_equals_the_modulus_in_a_stationary_medium():
    detuning, absorption = grid()
    log_modulus, _ = semiclassical_root(detuning, absorption)
    log_decay, weight = flux_gate(decaying_root(detuning, absorption)[1], absorption)
    torch.testing.assert_close(log_decay, log_modulus, rtol=1e-14, atol=0)  # measured 5e-16
    torch.testing.assert_close(weight, torch.sqrt(-torch.expm1(2 * log_modulus)), rtol=1e-14, atol=0)


def test_flux_gate_shows_a_negative_current_instead_of_hiding_it():
    """Im m < 0 cannot happen (theorem 1); were it to, the gate must not turn it into a plausible number."""
    _, weight = flux_gate(torch.tensor([-1.0]), torch.tensor([0.5]))
    assert weight.isnan().all()


def test_flux_gate_gradients():
    previous = torch.tensor([1e-3, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    absorption = torch.tensor([1e-2, 0.3, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(flux_gate, (previous, absorption), eps=1e-8)
    wall = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    gradients = torch.autograd.grad(sum(part.sum() for part in flux_gate(wall, absorption)), (wall, absorption))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_scattering_phase_of_no_potential_is_zero():
    m = decaying_root(*grid())
    assert scattering_phase(m, m).abs().max() == 0
