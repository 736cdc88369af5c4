"""Hierarchical semiseparable matrices against dense linear algebra, with transposes, gradients and storage."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory.hierarchical import Hierarchical, hierarchical_product, hierarchical_resolvent
from resnet_bk.theory.hierarchical_factor import factorise_hierarchical
from resnet_bk.theory.low_rank import default_rank

SIZES = [1, 2, 3, 63, 64, 65, 512]
CASES = 20  # per example of hypothesis, so that a bound meets 1,000 cases


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex128, generator=generator)


def random_parts(leaves: int, size: int, rank: int, sites: int, generator: torch.Generator) -> Hierarchical:
    """A matrix that is not Hermitian, from random parts; parts of the padding are masked."""
    levels = leaves.bit_length() - 1
    real = (torch.arange(leaves * size) < sites).unflatten(0, (leaves, size)).to(torch.complex128)
    blocks = normal(leaves, size, size, generator=generator) * real[..., None] * real[:, None]
    blocks = blocks + torch.diag_embed(1 - real)
    left, right = (normal(leaves, size, rank, generator=generator) * real[..., None] / size for _ in range(2))
    moves = [
        tuple(normal(leaves >> k, rank, rank, generator=generator) / rank for k in range(levels - 1)) for _ in range(2)
    ]
    pairs = tuple(normal(leaves >> (k + 1), 2, rank, rank, generator=generator) for k in range(levels))
    return Hierarchical(sites, blocks, left, right, moves[0], moves[1], pairs)


def expanded(matrix: Hierarchical) -> Tensor:
    """The matrix by its definition, block by block from the leaves up."""
    dense, left, right = (list(part) for part in (matrix.blocks, matrix.left, matrix.right))
    for level, pairs in enumerate(matrix.couplings):
        nodes = range(0, len(dense), 2)
        dense = [
            torch.cat(
                (
                    torch.cat((dense[k], left[k] @ pairs[k // 2, 0] @ right[k + 1].mH), 1),
                    torch.cat((left[k + 1] @ pairs[k // 2, 1] @ right[k].mH, dense[k + 1]), 1),
                )
            )
            for k in nodes
        ]
        if level < len(matrix.left_transfers):
            moves = matrix.left_transfers[level], matrix.right_transfers[level]
            left, right = (
                [torch.cat((basis[k] @ move[k], basis[k + 1] @ move[k + 1])) for k in nodes]
                for basis, move in zip((left, right), moves, strict=True)
            )
    return dense[0][: matrix.sites, : matrix.sites]


def smooth_matrix(sites: int) -> Tensor:
    """A Hermitian matrix whose off-diagonal blocks have rapidly falling singular values, and no finite rank."""
    place = torch.arange(sites, dtype=torch.float64)
    distance = place[:, None] - place[None, :]
    return torch.polar(1 / (1 + distance.abs()), 0.3 * distance)


def dense_resolvent(dense: Tensor, absorption: Tensor, energy: float) -> Tensor:
    return torch.linalg.inv(dense - torch.diag(energy + 1j * absorption))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("leaves", "size", "sites"), [(1, 5, 4), (2, 3, 6), (4, 3, 10), (16, 32, 512), (8, 9, 65)])
def test_product_resolvent_and_transposes_are_those_of_the_dense_twin(leaves: int, size: int, sites: int) -> None:
    generator = torch.Generator().manual_seed(sites)
    matrix = random_parts(leaves, size, 3, sites, generator)
    dense = expanded(matrix)
    assert relative(matrix.dense(), dense) < 1e-14
    vectors = normal(sites, 2, generator=generator)
    absorption = 0.1 + torch.rand(sites, dtype=torch.float64, generator=generator)
    for found, expected in ((matrix, dense), (matrix.adjoint, dense.mH), (matrix.transpose, dense.mT)):
        # Budget 1e-10 relative to N = 512; the worst case is 2e-14, of the resolvent.
        assert relative(hierarchical_product(found, vectors), expected @ vectors) < 1e-10
        solved = hierarchical_resolvent(found, absorption, vectors, energy=0.3)
        assert relative(solved, dense_resolvent(expected, absorption, 0.3) @ vectors) < 1e-10


@pytest.mark.parametrize("sites", SIZES)
@pytest.mark.parametrize("method", ["exact", "randomised"])
def test_semiseparable_matrices_are_recovered(sites: int, method) -> None:
    generator = torch.Generator().manual_seed(sites)
    hopping = torch.ones(sites - 1, dtype=torch.float64)
    line = torch.diag(torch.randn(sites, dtype=torch.float64, generator=generator))
    line = line + torch.diag(hopping, 1) + torch.diag(hopping, -1)
    green = torch.linalg.inv(line + 4j * torch.eye(sites))
    for dense in (line, (green + green.mH) / 2):
        found = factorise_hierarchical(dense, rank=4, method=method, generator=generator)
        assert relative(found.dense(), dense.to(torch.complex128)) < 1e-12
        assert found.error < 1e-12 * float(dense.norm()) + 1e-14


@given(seed=st.integers(0, 2**31), sites=st.integers(1, 40), rank=st.integers(1, 6))
def test_truncation_stays_hermitian_and_moves_the_resolvent_within_its_bound(seed: int, sites: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for case in range(CASES):
        raw = normal(sites, sites, generator=generator)
        dense = (raw + raw.mH) / 2
        method = ("exact", "randomised")[case % 2]
        found = factorise_hierarchical(dense, rank=rank, leaf_size=rank, method=method, generator=generator)
        near = found.dense()
        assert torch.allclose(near, near.mH, rtol=0, atol=1e-12)
        assert found.error == pytest.approx(float((near - dense).norm()), rel=1e-9, abs=1e-12)
        absorption = 0.05 + torch.rand(sites, dtype=torch.float64, generator=generator)
        identity = torch.eye(sites, dtype=torch.complex128)
        exact = dense_resolvent(dense, absorption, 0.2)
        moved = hierarchical_resolvent(found, absorption, identity, energy=0.2)
        floor = float(absorption.min())
        assert float(torch.linalg.matrix_norm(moved, ord=2)) <= (1 + 1e-9) / floor
        assert float(torch.linalg.matrix_norm(moved - exact, ord=2)) <= found.error / floor**2 * (1 + 1e-9) + 1e-9


def test_the_error_falls_with_the_rank() -> None:
    dense = smooth_matrix(256)
    errors = [factorise_hierarchical(dense, rank=rank, leaf_size=16).error for rank in (1, 2, 4, 8, 16)]
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors))
    assert factorise_hierarchical(dense).error < 2e-4 * float(dense.norm())
    sketch = factorise_hierarchical(dense, method="randomised", generator=torch.Generator().manual_seed(0))
    assert sketch.error < 2 * factorise_hierarchical(dense).error


@pytest.mark.parametrize("sites", [2**k for k in range(5, 12)])
def test_storage_is_of_order_n_log_n(sites: int) -> None:
    rank = default_rank(sites)
    leaves = 1 << (sites // (2 * rank)).bit_length() - 1
    size = -(-sites // leaves)
    matrix = random_parts(leaves, size, rank, sites, torch.Generator().manual_seed(0))
    assert matrix.numbers <= 12 * sites * math.log2(sites)


def test_gradients_of_every_part() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = random_parts(4, 2, 1, 7, generator)
    vectors = normal(7, 1, generator=generator).requires_grad_()
    absorption = (0.5 + torch.rand(7, dtype=torch.float64, generator=generator)).requires_grad_()
    # The couplings of the padded site are zero, so a step of gradcheck may touch them.
    parts = [matrix.blocks, matrix.left, matrix.right, *matrix.left_transfers, *matrix.right_transfers]
    parts = [part.clone().requires_grad_() for part in (*parts, *matrix.couplings)]

    def rebuilt(parts) -> Hierarchical:
        blocks, left, right, move_left, move_right, *couplings = parts
        return Hierarchical(7, blocks, left, right, (move_left,), (move_right,), tuple(couplings))

    assert torch.autograd.gradcheck(lambda x, *p: hierarchical_product(rebuilt(p), x), (vectors, *parts))
    assert torch.autograd.gradcheck(
        lambda eta, x, *p: hierarchical_resolvent(rebuilt(p), eta, x), (absorption, vectors, *parts)
    )


def test_bad_input_is_named() -> None:
    good = smooth_matrix(20)
    matrix = factorise_hierarchical(good, rank=2)
    vectors, absorption = torch.ones(20, 1, dtype=torch.complex128), torch.ones(20, dtype=torch.float64)
    with pytest.raises(ShapeError, match="vectors: found"):
        hierarchical_product(matrix, vectors[:19])
    with pytest.raises(DomainError, match=r"absorption\[0\] = 0\.0"):
        hierarchical_resolvent(matrix, 0 * absorption, vectors)
    with pytest.raises(DomainError, match="energy = inf"):
        hierarchical_resolvent(matrix, absorption, vectors, energy=math.inf)
    with pytest.raises(DomainError, match="differs from its adjoint"):
        factorise_hierarchical(good + torch.ones(20, 20).triu(1))
    with pytest.raises(ShapeError, match="matrix: found"):
        factorise_hierarchical(good[:3])
    with pytest.raises(DomainError, match="found 0 sites"):
        factorise_hierarchical(good[:0, :0])
    with pytest.raises(DomainError, match="rank = 0"):
        factorise_hierarchical(good, rank=0)
    with pytest.raises(DomainError, match="leaf_size = 0"):
        factorise_hierarchical(good, leaf_size=0)
    with pytest.raises(DomainError, match="generator = None"):
        factorise_hierarchical(good, method="randomised")
    with pytest.raises(DomainError, match="method = 'best'"):
        factorise_hierarchical(good, method="best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ShapeError, match="couplings: found"):
        dataclasses.replace(matrix, couplings=matrix.couplings[:1])
    with pytest.raises(ShapeError, match="leaves of"):
        dataclasses.replace(matrix, sites=200)
    with pytest.raises(ShapeError, match="left: found"):
        dataclasses.replace(matrix, left=matrix.left[0])
    with pytest.raises(DomainError, match="singular at E"):
        poles = (1j * torch.eye(matrix.blocks.shape[1], dtype=torch.complex128)).expand_as(matrix.blocks)
        hierarchical_resolvent(dataclasses.replace(matrix, blocks=poles), absorption, vectors)
