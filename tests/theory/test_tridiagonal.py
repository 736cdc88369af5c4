"""The tridiagonal solve against dense linear algebra, its adjoint by gradcheck, and a long line."""

from __future__ import annotations

import pytest
import torch

from resnet_bk.theory.tridiagonal import TridiagonalSolve


def parts(sites: int, columns: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sites)
    lower = torch.randn(sites - 1, dtype=torch.complex128, generator=generator)
    diagonal = torch.randn(sites, dtype=torch.complex128, generator=generator) - 3j
    vectors = torch.randn(sites, columns, dtype=torch.complex128, generator=generator)
    return [diagonal.real - 1j * diagonal.imag.abs(), lower, lower.conj(), vectors]


@pytest.mark.parametrize("sites", [1, 2, 63, 64, 65, 512])
@pytest.mark.parametrize("columns", [0, 1, 3])
def test_it_solves(sites: int, columns: int) -> None:
    diagonal, lower, upper, vectors = parts(sites, columns)
    dense = torch.diag(diagonal) + torch.diag(lower, -1) + torch.diag(upper, 1)
    found = TridiagonalSolve.apply(diagonal, lower, upper, vectors)
    expected = torch.linalg.solve(dense, vectors)
    assert (found - expected).norm() <= 1e-13 * expected.norm()  # measured 6e-16


def test_its_adjoint_is_exact_and_can_be_differentiated_again() -> None:
    inputs = [part.clone().resolve_conj().requires_grad_() for part in parts(6, 2)]
    assert torch.autograd.gradcheck(TridiagonalSolve.apply, inputs)
    assert torch.autograd.gradgradcheck(TridiagonalSolve.apply, inputs)


def test_a_long_line_stays_finite_and_leaves_its_input_alone() -> None:
    inputs = parts(50_000, 2)
    before = inputs[3].clone()
    assert torch.isfinite(TridiagonalSolve.apply(*inputs)).all()
    assert torch.equal(inputs[3], before)
