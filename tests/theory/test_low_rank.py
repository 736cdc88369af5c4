"""Semiseparable algebra against dense linear algebra, and why the correction must stay Hermitian."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory.low_rank import (
    Semiseparable,
    default_rank,
    factorise_hermitian,
    semiseparable_product,
    semiseparable_resolvent,
    tridiagonal_resolvent,
)

CASES = 20  # per example of hypothesis, so that a bound meets 1,000 cases
seeds = st.integers(0, 2**31)


def complex_normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex128, generator=generator)


def random_matrix(sites: int, rank: int, generator: torch.Generator, *, hermitian: bool) -> Semiseparable:
    diagonal = 2.0 * torch.randn(sites, dtype=torch.float64, generator=generator)
    hopping = complex_normal(sites - 1, generator=generator)
    right = complex_normal(sites, rank, generator=generator) / math.sqrt(sites)
    weights = torch.randn(rank, dtype=torch.float64, generator=generator)
    left = right * weights if hermitian else complex_normal(sites, rank, generator=generator) / math.sqrt(sites)
    return Semiseparable(diagonal, hopping, left, right)


def absorptions(sites: int, generator: torch.Generator, *, smallest: float) -> Tensor:
    return smallest * (1.0 / smallest) ** torch.rand(sites, dtype=torch.float64, generator=generator)


def dense_resolvent(dense: Tensor, absorption: Tensor, energy: float) -> Tensor:
    return torch.linalg.inv(dense - torch.diag(energy + 1j * absorption))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("sites", [1, 2, 3, 63, 64, 65, 512])
@pytest.mark.parametrize("rank", [0, 1, 9])
@pytest.mark.parametrize("hermitian", [True, False])
def test_product_and_resolvent_are_those_of_the_dense_twin(sites: int, rank: int, hermitian: bool):
    generator = torch.Generator().manual_seed(sites + 1000 * rank)
    matrix = random_matrix(sites, rank, generator, hermitian=hermitian)
    vectors = complex_normal(sites, 3, generator=generator)
    absorption = absorptions(sites, generator, smallest=1e-2)
    dense = matrix.dense()
    assert relative(semiseparable_product(matrix, vectors), dense @ vectors) < 1e-13
    found = semiseparable_resolvent(matrix, absorption, vectors, energy=0.3)
    assert relative(found, dense_resolvent(dense, absorption, 0.3) @ vectors) < 1e-10  # worst 6e-15


@given(seed=seeds, sites=st.integers(1, 40), energy=st.floats(-5.0, 5.0))
def test_tridiagonal_resolvent_is_the_dense_inverse(seed: int, sites: int, energy: float):
    generator = torch.Generator().manual_seed(seed)
    matrix = random_matrix(sites, 0, generator, hermitian=True)
    absorption = absorptions(sites, generator, smallest=1e-3)
    identity = torch.eye(sites, dtype=torch.complex128)
    found = tridiagonal_resolvent(matrix.diagonal, matrix.hopping, absorption, identity, energy=energy)
    assert relative(found, dense_resolvent(matrix.dense(), absorption, energy)) < 1e-10


def test_vanishing_potential_needs_no_pivoting():
    # Every odd leading block is singular at eta = 0; plain elimination survives because the pivots stay above eta.
    sites = 101
    diagonal, hopping = torch.zeros(sites, dtype=torch.float64), torch.ones(sites - 1, dtype=torch.complex128)
    absorption = torch.full((sites,), 1e-4, dtype=torch.float64)
    identity = torch.eye(sites, dtype=torch.complex128)
    matrix = Semiseparable(diagonal, hopping, identity[:, :0], identity[:, :0])
    found = tridiagonal_resolvent(diagonal, hopping, absorption, identity)
    assert relative(found, dense_resolvent(matrix.dense(), absorption, 0.0)) < 1e-10


@given(seed=seeds, sites=st.integers(1, 24), rank=st.integers(0, 4))
def test_hermitian_correction_keeps_the_resolvent_below_one_over_absorption(seed: int, sites: int, rank: int):
    generator = torch.Generator().manual_seed(seed)
    identity = torch.eye(sites, dtype=torch.complex128)
    for _ in range(CASES):
        matrix = random_matrix(sites, rank, generator, hermitian=True)
        absorption = absorptions(sites, generator, smallest=1e-2)
        found = semiseparable_resolvent(matrix, absorption, identity)
        norm = float(torch.linalg.matrix_norm(found, ord=2))
        assert norm <= (1 + 1e-8) / float(absorption.min())


@given(seed=seeds, sites=st.integers(1, 24), method=st.sampled_from(["exact", "randomised"]))
def test_factorisation_reports_its_error_and_moves_the_resolvent_by_no_more(seed: int, sites: int, method):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(CASES):
        whole = complex_normal(sites, sites, generator=generator)
        whole = whole + whole.mH
        found = factorise_hermitian(whole, method=method, generator=generator)
        assert found.left.shape == (sites, default_rank(sites))
        dense = found.dense()
        assert float((dense - dense.mH).abs().max()) < 1e-12
        assert abs(found.error - float((dense - whole).norm())) < 1e-11
        absorption = absorptions(sites, generator, smallest=0.05)
        eta = float(absorption.min())
        before, after = dense_resolvent(whole, absorption, 0.1), dense_resolvent(dense, absorption, 0.1)
        assert float(torch.linalg.matrix_norm(after, ord=2)) <= (1 + 1e-10) / eta
        assert float(torch.linalg.matrix_norm(after - before, ord=2)) <= found.error / eta**2 + 1e-9


@given(seed=seeds, sites=st.integers(3, 40), rank=st.integers(0, 3))
def test_exact_factorisation_is_as_good_as_the_truncated_svd(seed: int, sites: int, rank: int):
    generator = torch.Generator().manual_seed(seed)
    whole = complex_normal(sites, sites, generator=generator)
    whole = whole + whole.mH
    found = factorise_hermitian(whole, rank=rank)
    singular = torch.linalg.svdvals(whole.tril(-2) + whole.triu(2))
    assert abs(found.error - float(singular[rank:].norm())) < 1e-11
    # Full rank leaves nothing out.
    assert factorise_hermitian(whole, rank=sites).error < 1e-11


@given(seed=seeds, sites=st.integers(3, 30), rank=st.integers(0, 3))
def test_refinement_of_the_tridiagonal_part_never_loses_and_stays_hermitian(seed: int, sites: int, rank: int):
    generator = torch.Generator().manual_seed(seed)
    whole = complex_normal(sites, sites, generator=generator)
    whole = whole + whole.mH
    found = [factorise_hermitian(whole, rank=rank, refinements=steps) for steps in range(4)]
    for before, after in itertools.pairwise(found):
        assert after.error <= before.error + 1e-11
        assert abs(after.error - float((after.dense() - whole).norm())) < 1e-11
        assert float((after.dense() - after.dense().mH).abs().max()) < 1e-12


@pytest.mark.parametrize("method", ["exact", "randomised"])
def test_refinement_recovers_a_matrix_that_is_semiseparable(method):
    whole = random_matrix(64, 2, torch.Generator().manual_seed(3), hermitian=True).dense()
    generator = torch.Generator().manual_seed(0)
    plain = factorise_hermitian(whole, rank=2, method=method, generator=generator)
    refined = factorise_hermitian(whole, rank=2, method=method, refinements=40, generator=generator)
    assert refined.error < 1e-12  # measured 9e-16, from 0.12 without refinement
    assert plain.error > 0.1


def long_range(sites: int) -> Tensor:
    position = torch.linspace(0.0, 1.0, sites, dtype=torch.float64)
    return torch.exp(-((position[:, None] - position[None, :]) ** 2))


@pytest.mark.parametrize("sites", [64, 256])
def test_randomised_factorisation_is_nearly_the_best_on_a_smooth_kernel(sites: int):
    whole = long_range(sites)
    exact = factorise_hermitian(whole, rank=6)
    found = factorise_hermitian(whole, rank=6, method="randomised", generator=torch.Generator().manual_seed(0))
    again = factorise_hermitian(whole, rank=6, method="randomised", generator=torch.Generator().manual_seed(0))
    assert exact.error <= found.error <= 1.05 * exact.error  # worst 1.012 over three seeds
    assert torch.equal(found.left, again.left)


def test_truncated_svd_breaks_the_bound_that_the_eigendecomposition_keeps():
    # R = c (e_1 e_n^H + e_n e_1^H) has the double singular value c; a rank-1 SVD may keep c e_1 e_n^H alone.
    sites, c, eta = 6, 0.4, 0.1
    rest = torch.zeros(sites, sites, dtype=torch.float64)
    rest[0, -1] = rest[-1, 0] = c
    left, singular, right = torch.linalg.svd(rest)
    cut = Semiseparable(
        torch.zeros(sites, dtype=torch.float64),
        torch.zeros(sites - 1, dtype=torch.complex128),
        (left[:, :1] * singular[:1]).to(torch.complex128),
        right[:1].mH.to(torch.complex128),
    )
    absorption = torch.full((sites,), eta, dtype=torch.float64)
    identity = torch.eye(sites, dtype=torch.complex128)
    norm = float(torch.linalg.matrix_norm(semiseparable_resolvent(cut, absorption, identity), ord=2))
    ratio = c / eta
    assert abs(norm - (ratio + math.sqrt(ratio**2 + 4)) / (2 * eta)) < 1e-9  # 42.36 against 1 / eta = 10
    kept = factorise_hermitian(rest, rank=1)
    norm = float(torch.linalg.matrix_norm(semiseparable_resolvent(kept, absorption, identity), ord=2))
    assert norm <= (1 + 1e-12) / eta
    # Neither is closer to R: the violation buys nothing.
    assert abs(kept.error - float((cut.dense() - rest).norm())) < 1e-12


def test_gradients_of_product_and_resolvent():
    generator = torch.Generator().manual_seed(5)
    matrix = random_matrix(5, 2, generator, hermitian=True)
    absorption = absorptions(5, generator, smallest=0.1)
    vectors = complex_normal(5, 2, generator=generator)
    parts = (matrix.diagonal, matrix.hopping, matrix.left, matrix.right, absorption, vectors)
    inputs = [part.detach().clone().requires_grad_() for part in parts]

    def resolvent(diagonal, hopping, left, right, absorption, vectors):
        return semiseparable_resolvent(Semiseparable(diagonal, hopping, left, right), absorption, vectors, energy=0.2)

    def product(diagonal, hopping, left, right, vectors):
        return semiseparable_product(Semiseparable(diagonal, hopping, left, right), vectors)

    assert torch.autograd.gradcheck(resolvent, inputs)
    assert torch.autograd.gradcheck(product, [*inputs[:4], inputs[5]])


def test_default_rank():
    assert [default_rank(n) for n in (1, 2, 3, 4, 5, 512, 513)] == [0, 1, 2, 2, 3, 9, 10]


def test_bad_input_is_named():
    generator = torch.Generator().manual_seed(0)
    matrix = random_matrix(4, 1, generator, hermitian=True)
    vectors, eta = complex_normal(4, 1, generator=generator), torch.ones(4, dtype=torch.float64)
    with pytest.raises(DomainError, match=r"absorption\[2\] = 0.0"):
        semiseparable_resolvent(matrix, eta * torch.tensor([1.0, 1.0, 0.0, 1.0]), vectors)
    with pytest.raises(ShapeError, match="absorption"):
        semiseparable_resolvent(matrix, eta[:3], vectors)
    with pytest.raises(DomainError, match="energy"):
        tridiagonal_resolvent(matrix.diagonal, matrix.hopping, eta, vectors, energy=math.nan)
    with pytest.raises(ShapeError, match="vectors"):
        semiseparable_product(matrix, vectors[:, 0])
    with pytest.raises(DomainError, match="vectors"):
        semiseparable_product(matrix, vectors * math.inf)
    with pytest.raises(ShapeError, match="hopping"):
        Semiseparable(matrix.diagonal, matrix.hopping[:2], matrix.left, matrix.right)
    with pytest.raises(DomainError, match="0 sites"):
        Semiseparable(matrix.diagonal[:0], matrix.hopping[:0], matrix.left[:0], matrix.right[:0])
    with pytest.raises(DomainError, match="singular"):
        # i Gamma = i, so the rank-one correction i e_1 e_1^H cancels a diagonal entry.
        corner = torch.eye(4, 1, dtype=torch.complex128)
        zeros = torch.zeros(4, dtype=torch.float64), torch.zeros(3, dtype=torch.complex128)
        semiseparable_resolvent(Semiseparable(*zeros, 1j * corner, corner), eta, vectors)


def test_bad_matrices_to_factorise_are_named():
    whole = long_range(8)
    with pytest.raises(ShapeError, match="matrix"):
        factorise_hermitian(whole[:4])
    with pytest.raises(DomainError, match="adjoint"):
        factorise_hermitian(whole.tril())
    with pytest.raises(DomainError, match="rank"):
        factorise_hermitian(whole, rank=9)
    with pytest.raises(DomainError, match="refinements"):
        factorise_hermitian(whole, refinements=-1)
    with pytest.raises(DomainError, match="generator"):
        factorise_hermitian(whole, method="randomised")
    with pytest.raises(DomainError, match="method"):
        factorise_hermitian(whole, method="svd")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DomainError, match="finite"):
        factorise_hermitian(whole * math.nan)
    with pytest.raises(DomainError, match="at least 1"):
        factorise_hermitian(whole[:0, :0])
