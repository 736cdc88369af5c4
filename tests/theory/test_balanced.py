"""Balanced truncation: Gramians against their equations, and the error bound on random systems."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory.balanced import balanced_truncation, gramians, transfer_function

seeds = st.integers(0, 2**31)
FREQUENCIES = torch.linspace(0, math.pi, 65, dtype=torch.float64)


def system(seed: int, dimension: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state, source, readout = torch.randn(3, dimension, dimension, dtype=torch.float64, generator=generator)
    radius = float(torch.rand((), generator=generator)) * 0.98 + 0.01
    return state * radius / torch.linalg.eigvals(state).abs().max(), source[:, :2], readout[:3]


@given(seed=seeds, dimension=st.integers(2, 12))
def test_gramians_solve_their_equations(seed: int, dimension: int) -> None:
    state, source, readout = system(seed, dimension)
    controlled, observed = gramians(state, source, readout)
    scale = float(controlled.abs().max()), float(observed.abs().max())
    torch.testing.assert_close(
        controlled, state @ controlled @ state.T + source @ source.T, rtol=0, atol=1e-10 * scale[0]
    )
    torch.testing.assert_close(
        observed, state.T @ observed @ state + readout.T @ readout, rtol=0, atol=1e-10 * scale[1]
    )


@given(seed=seeds)
def test_the_error_bound_holds(seed: int) -> None:
    for case in range(20):
        dimension = 3 + (seed + case) % 6
        state, source, readout = system(seed + case, dimension)
        whole = transfer_function(state, source, readout, FREQUENCIES)
        order = 1 + case % (dimension - 1)
        reduced = balanced_truncation(state, source, readout, order)
        part = transfer_function(reduced.state, reduced.source, reduced.readout, FREQUENCIES)
        error = torch.linalg.matrix_norm(whole - part, ord=2).max()
        assert float(error) <= reduced.bound * (1 + 1e-9) + 1e-10 * float(whole.abs().max())
        assert float(torch.linalg.eigvals(reduced.state).abs().max()) < 1
        assert bool((reduced.hankel_values.diff() <= 0).all())


def test_the_whole_order_changes_nothing() -> None:
    state, source, readout = system(1, 6)
    same = balanced_truncation(state, source, readout, 6)
    torch.testing.assert_close(
        transfer_function(same.state, same.source, same.readout, FREQUENCIES),
        transfer_function(state, source, readout, FREQUENCIES),
        rtol=1e-9,
        atol=1e-9,
    )
    assert same.bound == 0


def test_it_keeps_what_dropping_small_eigenvalues_loses() -> None:
    # The slow mode is hardly driven, the fast one strongly: by eigenvalue the wrong one would stay.
    state = torch.diag(torch.tensor([0.9, 0.01], dtype=torch.float64))
    source, readout = torch.tensor([[1e-3], [1.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    whole = transfer_function(state, source, readout, FREQUENCIES)
    reduced = balanced_truncation(state, source, readout, 1)
    balanced = transfer_function(reduced.state, reduced.source, reduced.readout, FREQUENCIES)
    by_eigenvalue = transfer_function(state[:1, :1], source[:1], readout[:, :1], FREQUENCIES)
    assert (whole - balanced).abs().max() <= reduced.bound < 0.03
    assert (whole - by_eigenvalue).abs().max() > 0.9


def test_bad_systems_are_named() -> None:
    state, source, readout = system(0, 4)
    with pytest.raises(DomainError, match="spectral radius"):
        gramians(state / torch.linalg.eigvals(state).abs().max(), source, readout)
    with pytest.raises(ShapeError, match="square"):
        gramians(state[:3], source, readout)
    with pytest.raises(ShapeError, match="do not fit"):
        gramians(state, source[:3], readout)
    with pytest.raises(DomainError, match="source holds"):
        gramians(state, source * math.inf, readout)
    with pytest.raises(DomainError, match="order is 5"):
        balanced_truncation(state, source, readout, 5)
    with pytest.raises(DomainError, match="order is 1"):
        balanced_truncation(state, 0 * source, readout, 1)
