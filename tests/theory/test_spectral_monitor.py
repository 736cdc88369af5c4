"""The Schatten bounds against singular values, what a report says of good and bad media, and what clipping does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.ops.resolvent import causal_resolvent
from resnet_bk.theory import spectral_monitor as monitor
from resnet_bk.theory.jacobi import absorbing_jacobi
from resnet_bk.theory.scattering import birman_schwinger

CASES = 20  # per example of hypothesis, so that a bound meets 1,000 cases
ORDERS = (1.0, 1.5, 2.0, 4.0, math.inf)


def media(seed: int, sites: int, smallest: float, strength: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    potential = strength * torch.randn(1, sites, CASES, generator=generator, dtype=torch.float64)
    return potential, smallest ** torch.rand(1, sites, CASES, generator=generator, dtype=torch.float64)


@given(seed=st.integers(0, 2**31), sites=st.integers(1, 16), smallest=st.sampled_from([0.9, 1e-1, 1e-3]))
def test_every_schatten_norm_keeps_its_bound(seed: int, sites: int, smallest: float) -> None:
    potential, absorption = media(seed, sites, smallest)
    bounds = {order: monitor.schatten_bound(potential, absorption, order)[0] for order in ORDERS}
    for case in range(CASES):
        v, eta = potential[0, :, case], absorption[0, :, case]
        free = birman_schwinger(v, 0.4, eta, (0j, 0.3 + 0.4j)[case % 2])
        root = v.abs().sqrt()
        perturbed = (v.sign() * root)[:, None] * torch.linalg.inv(absorbing_jacobi(v - 0.4, eta)) * root
        for operator in (free, perturbed):
            singular = torch.linalg.svdvals(operator)
            for order in ORDERS:
                assert torch.linalg.vector_norm(singular, ord=order) <= bounds[order][case] * (1 + 1e-9)


def test_one_strong_site_in_a_deep_well_attains_the_bound() -> None:
    # Alone on its site the resolvent is i / eta at resonance.
    potential, absorption = torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 0.1)
    operator = birman_schwinger(potential[0, :, 0], 0.0, absorption[0, :, 0])
    assert monitor.schatten_bound(potential, absorption).item() == pytest.approx(operator.abs().item())


@given(seed=st.integers(0, 2**31), sites=st.integers(1, 40), smallest=st.sampled_from([0.9, 1e-2, 1e-5]))
def test_a_healthy_medium_is_reported_healthy(seed: int, sites: int, smallest: float) -> None:
    for dtype in (torch.float32, torch.float64):
        potential, absorption = (part.to(dtype) for part in media(seed, sites, smallest))
        (real, imag), _ = causal_resolvent(potential, absorption, backend="reference")
        report = monitor.medium_report(potential, absorption, real, imag)
        assert report.violations == 0
        assert report.smallest_imaginary > 0 and report.largest_product <= 1 + 1e-6
        assert report.trace_bound >= report.hilbert_schmidt_bound >= report.operator_bound > 0
        assert report.hilbert_schmidt_bound == monitor.schatten_bound(potential, absorption).max().item()


def test_a_sick_medium_is_reported_and_not_mended() -> None:
    ones = torch.ones(1, 4, 2)
    assert monitor.medium_report(ones, ones, 0 * ones, ones).violations == 0
    assert monitor.medium_report(ones, ones, 0 * ones, -ones).violations == 8
    assert monitor.medium_report(ones, ones, ones, ones).violations == 8  # |m| eta = sqrt 2
    absorption = ones.clone()
    absorption[0, 0, 0] = 0
    assert monitor.medium_report(ones, absorption, 0 * ones, ones).violations == 1
    broken = monitor.medium_report(ones * math.nan, ones, 0 * ones, ones)
    assert broken.violations == 8 and math.isnan(broken.trace_bound)


@given(
    seed=st.integers(0, 2**31),
    sites=st.integers(1, 16),
    limit=st.floats(1e-2, 10.0),
    order=st.sampled_from(ORDERS),
)
def test_clipping_is_a_projection_with_its_effect(seed: int, sites: int, limit: float, order: float) -> None:
    potential, absorption = media(seed, sites, 1e-2)
    found = monitor.clip_potential(potential, absorption, limit, order=order)
    assert (monitor.schatten_bound(found.potential, absorption, order) <= limit * (1 + 1e-12)).all()
    again = monitor.clip_potential(found.potential, absorption, limit * (1 + 1e-12), order=order)
    assert torch.equal(again.potential, found.potential) and again.sites == 0 and again.moved == 0
    change = (found.potential - potential).norm() / potential.norm()
    assert found.moved == pytest.approx(change.item()) and 0 <= found.moved <= 1
    assert found.sites == int((found.potential != potential).sum())
    inside = monitor.schatten_bound(potential, absorption, order) <= limit
    assert torch.equal(found.potential[:, :, inside[0]], potential[:, :, inside[0]])


def test_the_clamp_is_the_nearest_potential() -> None:
    potential, absorption = media(3, 8, 0.1)
    found = monitor.clip_potential(potential, absorption, 0.5).potential
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        other = 0.5 * absorption * (2 * torch.rand(potential.shape, dtype=torch.float64, generator=generator) - 1)
        assert (found - potential).norm() <= (other - potential).norm()


def test_gradients_pass_where_nothing_is_clipped() -> None:
    potential = torch.tensor([[[0.1], [5.0]]], requires_grad=True)
    monitor.clip_potential(potential, torch.ones(1, 2, 1), 1.0).potential.sum().backward()
    assert potential.grad is not None and potential.grad.flatten().tolist() == [1.0, 0.0]


def test_a_long_line_costs_no_scan() -> None:
    potential = torch.randn(1, 1_000_000, 1)
    report = monitor.medium_report(
        potential, torch.ones_like(potential), 0 * potential, 0.5 * torch.ones_like(potential)
    )
    assert report.violations == 0 and math.isfinite(report.trace_bound)


def test_bad_input_is_named() -> None:
    good = torch.ones(1, 3, 2)
    functions: Any = (
        monitor.schatten_bound,
        lambda v, eta: monitor.clip_potential(v, eta, 1.0),
        lambda v, eta: monitor.clip_potential(v, eta, 1.0, order=2.0),
    )
    for function in functions:
        with pytest.raises(DomainError, match=r"absorption at \[0, 0, 0\] is 0\.0"):
            function(good, 0 * good)
        with pytest.raises(DomainError, match=r"potential at \[0, 0, 0\] is inf"):
            function(good * math.inf, good)
        with pytest.raises(ShapeError, match="absorption is"):
            function(good, good[:, :2])
        with pytest.raises(ShapeError, match="potential is"):
            function(good[0], good[0])
    with pytest.raises(ShapeError, match="imag is"):
        monitor.medium_report(good, good, good, good.double())
    for order in (0.5, math.nan):
        with pytest.raises(DomainError, match="order is"):
            monitor.schatten_bound(good, good, order)
    for limit in (0.0, math.inf, math.nan):
        with pytest.raises(DomainError, match="limit is"):
            monitor.clip_potential(good, good, limit)
    with pytest.raises(DomainError, match="norms hold"):
        monitor.clip_factors(-good, 1.0)
