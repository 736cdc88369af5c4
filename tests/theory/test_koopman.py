"""Dynamic modes of linear maps, and how large an error the dropped eigenvalues of a matrix that is not normal make."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory.koopman import dynamic_modes, keep_modes, predict, truncate_spectrum

seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(seed=seeds, dimension=st.integers(1, 12))
def test_a_linear_map_is_recovered(seed: int, dimension: int) -> None:
    matrix, states = normal(seed, dimension, dimension), normal(seed + 1, 4 * dimension, dimension)
    modes = dynamic_modes(states, states @ matrix.T, dimension)
    assert modes.residual < 1e-9
    fresh = normal(seed + 2, 5, dimension)
    torch.testing.assert_close(predict(modes, fresh), fresh @ matrix.T, rtol=1e-7, atol=1e-7)
    found, exact = (values.abs().sort().values for values in (modes.eigenvalues, torch.linalg.eigvals(matrix)))
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)
    assert bool((modes.eigenvalues.abs().diff() <= 1e-12).all())


@given(seed=seeds, rank=st.integers(1, 5))
def test_an_invariant_subspace_is_reproduced_at_its_dimension(seed: int, rank: int) -> None:
    basis = torch.linalg.qr(normal(seed, 12, rank)).Q
    inner = normal(seed + 1, rank, rank)
    coordinates = normal(seed + 2, 40, rank)
    before, after = coordinates @ basis.T, coordinates @ inner.T @ basis.T
    assert dynamic_modes(before, after, rank).residual < 1e-9
    with pytest.raises(DomainError, match="numerical rank"):
        dynamic_modes(before, after, rank + 1)


@given(seed=seeds, dimension=st.integers(2, 10), noise=st.floats(0.01, 1.0))
def test_the_residual_is_that_of_the_prediction(seed: int, dimension: int, noise: float) -> None:
    before = normal(seed, 60, dimension)
    after = before @ normal(seed + 1, dimension, dimension).T + noise * normal(seed + 2, 60, dimension)
    modes = dynamic_modes(before, after, dimension)
    missed = torch.linalg.vector_norm(after - predict(modes, before)) / torch.linalg.vector_norm(after)
    assert modes.residual == pytest.approx(float(missed), rel=1e-9)
    assert modes.residual > 0.1 * noise / dimension
    assert bool((modes.mode_residual > 0).all())
    # Least squares: no other matrix fits these snapshots better.
    other = torch.linalg.lstsq(before, after).solution
    best = torch.linalg.vector_norm(after - before @ other) / torch.linalg.vector_norm(after)
    assert modes.residual == pytest.approx(float(best), rel=1e-6)


@given(seed=seeds, dimension=st.integers(2, 8))
def test_kept_modes_are_measured_and_come_in_pairs(seed: int, dimension: int) -> None:
    matrix, before = normal(seed, dimension, dimension), normal(seed + 1, 50, dimension)
    after = before @ matrix.T
    whole = dynamic_modes(before, after, dimension)
    threshold = float(whole.eigenvalues.abs().median())
    kept = keep_modes(whole, before, after, threshold)
    assert 1 <= len(kept.eigenvalues) <= dimension
    assert bool((kept.eigenvalues.abs() >= threshold * (1 - 1e-9)).all())
    assert float(kept.eigenvalues.sum().imag) == pytest.approx(0, abs=1e-9)
    truncated = truncate_spectrum(matrix, threshold)
    torch.testing.assert_close(predict(kept, before), before @ truncated.matrix.T, rtol=1e-6, atol=1e-6)
    assert kept.residual >= whole.residual - 1e-12


@given(seed=seeds)
def test_the_bound_of_the_truncation_holds(seed: int) -> None:
    for case in range(20):
        matrix = normal(seed + case, 8, 8)
        threshold = float(torch.linalg.eigvals(matrix).abs().median())
        found = truncate_spectrum(matrix, threshold)
        assert found.error <= found.bound * (1 + 1e-9)
        gap = torch.linalg.matrix_norm(matrix - found.matrix, ord=2)
        assert found.error == pytest.approx(float(gap), rel=1e-9)
        assert int(torch.linalg.matrix_rank(found.matrix, rtol=1e-9)) == found.kept


@given(seed=seeds, dimension=st.integers(2, 12))
def test_a_normal_matrix_errs_by_the_eigenvalue_dropped(seed: int, dimension: int) -> None:
    matrix = normal(seed, dimension, dimension)
    matrix = matrix + matrix.T
    values = torch.linalg.eigvalsh(matrix).abs().sort().values
    found = truncate_spectrum(matrix, float(values[1]))
    assert found.error == pytest.approx(float(values[0]), rel=1e-6)
    assert found.condition == pytest.approx(1, abs=1e-6)


def test_without_normality_a_small_eigenvalue_is_no_small_error() -> None:
    matrix = torch.tensor([[1.0, 100.0], [0.0, 0.01]], dtype=torch.float64)
    found = truncate_spectrum(matrix, 0.5)
    assert (found.kept, found.error) == (1, pytest.approx(1.01, abs=0.01))
    assert found.error > 50 * 0.01


def test_bad_snapshots_and_thresholds_are_named() -> None:
    states = normal(0, 10, 3)
    modes = dynamic_modes(states, states, 3)
    with pytest.raises(ShapeError, match="after has shape"):
        dynamic_modes(states, states[1:], 2)
    with pytest.raises(ShapeError, match="before is"):
        dynamic_modes(states[0], states, 2)
    with pytest.raises(DomainError, match="after holds"):
        dynamic_modes(states, states * math.nan, 2)
    with pytest.raises(DomainError, match="zero throughout"):
        dynamic_modes(states, 0 * states, 2)
    with pytest.raises(DomainError, match="rank is 0"):
        dynamic_modes(states, states, 0)
    with pytest.raises(DomainError, match="largest"):
        keep_modes(modes, states, states, 2.0)
    with pytest.raises(DomainError, match="threshold is -1"):
        keep_modes(modes, states, states, -1)
    with pytest.raises(ShapeError, match="channels"):
        keep_modes(modes, states[:, :2], states[:, :2], 0.5)
    with pytest.raises(ShapeError, match="states has shape"):
        predict(modes, states[:, :2])
    with pytest.raises(ShapeError, match="square"):
        truncate_spectrum(states, 0.5)
    with pytest.raises(DomainError, match="balanced_truncation"):
        truncate_spectrum(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), 0.5)
