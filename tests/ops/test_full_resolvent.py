"""The two-sided diagonal of the resolvent: its value, its gradient for all sites, and that it reads the future."""

from __future__ import annotations

import pytest
import torch
from resolvent_cases import BACKENDS, hamiltonian, medium

from resnet_bk.ops.resolvent import full_resolvent_diagonal


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sites", [1, 2, 63, 64, 65, 200])
def test_equals_the_diagonal_of_the_dense_inverse(backend, sites):
    detuning, absorption = medium(1, sites, 2)
    diagonal = torch.complex(*full_resolvent_diagonal(detuning, absorption, backend=backend))
    for head in range(2):
        exact = torch.diagonal(torch.linalg.inv(hamiltonian(detuning[0, :, head], absorption[0, :, head])))
        assert (diagonal[0, :, head] - exact).abs().max() < 1e-10  # measured 7e-15


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_reaches_all_sites(backend):
    """dG_ii/dv_j = -G_ij G_ji for all j (theorem 7), and i times that for the absorption."""
    sites = 12
    detuning, absorption = medium(1, sites, 1)
    exact = torch.linalg.inv(hamiltonian(detuning[0, :, 0], absorption[0, :, 0]))
    detuning, absorption = detuning.requires_grad_(), absorption.requires_grad_()
    real, imag = full_resolvent_diagonal(detuning, absorption, backend=backend)
    for site in range(sites):
        parts = [torch.autograd.grad(x[0, site, 0], (detuning, absorption), retain_graph=True) for x in (real, imag)]
        by_detuning, by_absorption = (torch.complex(*parts_of)[0, :, 0] for parts_of in zip(*parts, strict=True))
        expected = -exact[site] * exact[:, site]
        assert (by_detuning - expected).abs().max() < 1e-12  # measured 2e-14
        assert (by_absorption + 1j * expected).abs().max() < 1e-12


def test_gradient_is_not_minus_the_square_of_the_diagonal():
    """Counter-example to "-G_jj^2 is the gradient": on a free line it points away from that of sum_i Re G_ii."""
    detuning = torch.zeros(1, 40, 1, dtype=torch.float64, requires_grad=True)
    real, imag = full_resolvent_diagonal(detuning, torch.full_like(detuning, 0.1))
    (true,) = torch.autograd.grad(real.sum(), detuning)
    claimed = -torch.complex(real, imag).square().real
    assert torch.nn.functional.cosine_similarity(true.flatten(), claimed.flatten(), dim=0) < -0.2  # measured -0.25


def test_gradcheck():
    inputs = [x.requires_grad_() for x in medium(1, 7, 2)]
    assert torch.autograd.gradcheck(lambda d, a: full_resolvent_diagonal(d, 1 + a), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_not_causal(backend):
    detuning, absorption = medium(1, 20, 1)
    before = full_resolvent_diagonal(detuning, absorption, backend=backend)[1]
    detuning[:, -1] += 1e3
    after = full_resolvent_diagonal(detuning, absorption, backend=backend)[1]
    assert ((after - before).abs()[0, :-1, 0] > 1e-6).all()
