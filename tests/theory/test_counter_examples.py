"""Statements that look true and are not (docs/theory/claims, "False"): each test shows one failing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from resnet_bk.theory.bounds import causal_perturbation_bound
from resnet_bk.theory.bounds_flux import flux_kernel, transmission_bound
from resnet_bk.theory.jacobi import absorbing_jacobi, full_green_diagonal, green_kernel, half_line_green
from resnet_bk.theory.mourre import conjugate_operator, free_hamiltonian


def continuum_operator(potential: Tensor, position: Tensor, z: complex) -> Tensor:
    """Quadrature of `|V|^{1/2} (i/2) e^{iz|x-y|} |V|^{1/2}` on a uniform grid; its singular values are those of K."""
    root = (potential.abs() * (position[1] - position[0])).sqrt()
    distance = (position[:, None] - position[None, :]).abs()
    return root[:, None] * (0.5j * torch.exp(1j * z * distance)) * root


def two_gaussians(points: int) -> tuple[Tensor, Tensor]:
    position = torch.linspace(-9, 9, points, dtype=torch.float64)
    return torch.exp(-((position - 2) ** 2) / 2) + 0.8 * torch.exp(-((position + 2) ** 2) / 2), position


def trace_norm_and_l1(points: int, z: complex) -> tuple[float, float]:
    potential, position = two_gaussians(points)
    norm = torch.linalg.matrix_norm(continuum_operator(potential, position, z), ord="nuc")
    return float(norm), float(potential.sum() * (position[1] - position[0]))


def test_trace_norm_is_not_half_the_l1_norm_over_im_z() -> None:
    coarse, _ = trace_norm_and_l1(201, 5 + 1j)
    fine, l1 = trace_norm_and_l1(401, 5 + 1j)
    assert fine == pytest.approx(4.28, abs=0.02)
    assert l1 / 2 == pytest.approx(2.256, abs=0.001)
    assert abs(fine - coarse) < 0.05  # far below the violation, so the grid is not its cause
    assert fine > 1.8 * l1 / 2


def test_the_true_trace_bound_holds_where_the_false_one_fails() -> None:
    z = 5 + 1j
    # Momentum p = tan t maps the line to (-pi/2, pi/2), where the midpoint rule converges geometrically.
    angle = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * math.pi - math.pi / 2
    momentum = angle.tan()
    integrand = abs(z) / (momentum.square() - z * z).abs() * (1 + momentum.square())
    factor = float(integrand.mean() * math.pi / (2 * math.pi))
    norm, l1 = trace_norm_and_l1(401, z)
    assert norm <= l1 * factor
    assert factor > 0.5


@pytest.mark.parametrize("eta", [0.25, 1.0, 4.0])
def test_on_the_imaginary_axis_the_false_bound_holds_only_up_to_one(eta: float) -> None:
    norm, l1 = trace_norm_and_l1(201, 1j * eta)
    assert norm == pytest.approx(l1 / 2, rel=1e-10)  # i times a positive operator: the norm is the trace
    assert (norm <= l1 / (2 * eta) * (1 + 1e-10)) == (eta <= 1)


def test_hilbert_schmidt_bound_of_the_continuum_holds() -> None:
    potential, position = two_gaussians(401)
    step = position[1] - position[0]
    for z in (5 + 1j, 0.3 + 0.1j, 2j):
        norm = torch.linalg.matrix_norm(continuum_operator(potential, position, z))
        assert norm <= 0.5 * z.imag**-0.5 * (potential.square().sum() * step).sqrt()


@pytest.mark.parametrize("sites", [2, 7, 64])
def test_no_commutator_of_matrices_is_the_identity(sites: int) -> None:
    hamiltonian, generator = free_hamiltonian(sites).to(torch.complex128), conjugate_operator(sites)
    commutator = hamiltonian @ (1j * generator) - 1j * generator @ hamiltonian
    assert abs(complex(commutator.trace())) < 1e-10
    assert float(torch.eye(sites).trace()) == sites


def medium(sites: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    detuning = torch.randn(sites, dtype=torch.float64, generator=generator)
    return detuning, torch.full((sites,), 0.1, dtype=torch.float64)


def test_the_gradient_of_the_diagonal_is_not_its_own_square() -> None:
    detuning, absorption = medium()
    resolvent = torch.linalg.inv(absorbing_jacobi(detuning, absorption))
    exact = -(resolvent * resolvent.T)  # entry (i, j): dG_ii / dv_j
    step = 1e-6
    for j in (0, 5, 23):
        change = torch.zeros_like(detuning)
        change[j] = step
        ahead = full_green_diagonal(detuning + change, absorption)
        behind = full_green_diagonal(detuning - change, absorption)
        torch.testing.assert_close((ahead - behind) / (2 * step), exact[:, j], rtol=1e-5, atol=1e-6)
    off_diagonal = exact - torch.diag(exact.diagonal())
    assert torch.linalg.vector_norm(off_diagonal) > 0.5 * torch.linalg.vector_norm(exact)
    # Loss: Re sum_i w_i G_ii for random readouts w. The cosine of the claimed with the true gradient is measured, not
    # chosen: mean 0.44, from -0.45 to 0.95.
    readout = torch.randn(1000, len(detuning), dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    true, claimed = (readout @ exact).real, (readout * exact.diagonal()).real
    cosine = torch.nn.functional.cosine_similarity(true, claimed)
    assert cosine.mean() < 0.75
    assert cosine.max() < 0.99


def test_the_argument_of_the_diagonal_is_not_a_scattering_phase() -> None:
    detuning, absorption = medium()
    free = torch.zeros_like(detuning)
    # A free line scatters nothing, and every argument is about pi / 2.
    assert full_green_diagonal(free, absorption).angle().min() > 0.5
    phases = half_line_green(free, absorption).angle() - half_line_green(detuning, absorption).angle()
    assert phases.abs().max() < math.pi
    # Up to whole turns the phases per token add up to the argument of det(I + K); the diagonal's arguments do not.
    determinant = torch.linalg.det(absorbing_jacobi(detuning, absorption))
    determinant = determinant / torch.linalg.det(absorbing_jacobi(free, absorption))
    turn = determinant / determinant.abs()
    torch.testing.assert_close(torch.exp(1j * phases.sum()), turn, rtol=0, atol=1e-9)
    difference = full_green_diagonal(free, absorption).angle() - full_green_diagonal(detuning, absorption).angle()
    assert (torch.exp(1j * difference.sum()) - turn).abs() > 0.1


def test_the_diagonal_reads_later_sites_and_the_phases_do_not() -> None:
    detuning, absorption = medium()
    changed = detuning.clone()
    changed[-1] += 1e3
    assert torch.equal(half_line_green(detuning, absorption)[:-1], half_line_green(changed, absorption)[:-1])
    before, after = full_green_diagonal(detuning, absorption), full_green_diagonal(changed, absorption)
    assert (before[:-1].angle() - after[:-1].angle()).abs().max() > 1e-2


def test_the_continuum_kernel_without_the_absolute_value_grows() -> None:
    position = torch.linspace(0, 30, 61, dtype=torch.float64)
    offset = position[:, None] - position[None, :]
    without = torch.exp(1j * (5 + 1j) * offset) * offset.sign()
    assert without.abs().max() > 1e13
    assert torch.exp(1j * (5 + 1j) * offset.abs()).abs().max() <= 1


def test_the_bare_transmission_exceeds_one_and_the_flux_kernel_does_not() -> None:
    absorption = torch.full((2,), 1e-4, dtype=torch.float64)
    # A far-off first site and a second one tuned to its pole: |m_2| is nearly 1 / eta.
    detuning = torch.tensor([1e3, 1e-3], dtype=torch.float64)
    value, bound, _ = transmission_bound(detuning, absorption)
    assert value[1, 1] > 0.99e4
    assert bool((value <= bound * (1 + 1e-9)).all())
    assert flux_kernel(detuning, absorption).max() <= 1 + 1e-14


def test_the_perturbation_constant_is_not_an_operator_norm_bound_for_the_causal_kernel() -> None:
    # The same rows that obey the bound one by one exceed it together.
    detuning, absorption = torch.zeros(200, dtype=torch.float64), torch.full((200,), 0.02, dtype=torch.float64)
    other = torch.full_like(detuning, 1e-4)
    rows = causal_perturbation_bound(detuning, absorption, other, absorption)
    assert bool((rows.slack >= 0).all())
    difference = green_kernel(half_line_green(other, absorption)) - green_kernel(half_line_green(detuning, absorption))
    assert torch.linalg.matrix_norm(difference, ord=2) > 1.2 * rows.bound[0]
