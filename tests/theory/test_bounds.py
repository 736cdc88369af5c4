"""Every bound on 1,000 random media: 50 examples of 20 media each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory import bounds, bounds_flux, bounds_schatten
from resnet_bk.theory.bounds import Bound
from resnet_bk.theory.jacobi import free_root, green_kernel, half_line_green

MEDIA_PER_EXAMPLE = 20
# Relative to the bound: the worst violation measured is 1.4e-15, and every identity holds within the same budget.
ROUNDING = 1e-13

with_lead = [
    bounds.herglotz_bound,
    bounds.ward_bound,
    bounds.absorbed_row_bound,
    bounds.hardy_bound,
    bounds_flux.gradient_bound,
    bounds_flux.transmission_bound,
]
without_lead = [
    bounds.combes_thomas_bound,
    bounds.row_sum_bound,
    bounds_schatten.hilbert_schmidt_bound,
    bounds_schatten.trace_class_bound,
]
of_two_media = [bounds.block_perturbation_bound, bounds.causal_perturbation_bound]


def media(seed: int) -> Iterator[tuple[Tensor, Tensor, complex]]:
    """Lengths 1 to 12, detunings inside to far outside the band, absorptions 1e-4 to 10; every second one resonant."""
    generator = torch.Generator().manual_seed(seed)
    for medium in range(MEDIA_PER_EXAMPLE):
        sites = int(torch.randint(1, 13, (), generator=generator))
        scale, spread, level, real, imag = torch.rand(5, dtype=torch.float64, generator=generator).tolist()
        detuning = 10 ** (3 * scale - 1.5) * torch.randn(sites, dtype=torch.float64, generator=generator)
        exponent = 5 * level - 4 + spread * (torch.rand(sites, dtype=torch.float64, generator=generator) - 0.5)
        absorption = 10 ** exponent.clamp(-4, 1)
        if medium % 2:
            # The second site of each pair is tuned to the pole of its left neighbour.
            for i in range(1, sites, 2):
                detuning[i] = half_line_green(detuning[:i], absorption[:i])[-1].real
        yield detuning, absorption, complex(4 * real - 2, imag)


def check(result: Bound) -> None:
    assert result.value.shape == result.bound.shape == result.slack.shape
    assert torch.equal(result.slack, result.bound - result.value)
    assert bool((result.slack >= -ROUNDING * result.bound).all())


seeds = st.integers(0, 2**31)


@pytest.mark.parametrize("bound", with_lead)
@given(seed=seeds)
def test_bounds_with_and_without_lead(bound: Callable[..., Bound], seed: int) -> None:
    for detuning, absorption, lead in media(seed):
        check(bound(detuning, absorption))
        check(bound(detuning, absorption, lead))


@pytest.mark.parametrize("bound", without_lead)
@given(seed=seeds)
def test_bounds_of_a_block(bound: Callable[..., Bound], seed: int) -> None:
    for detuning, absorption, _ in media(seed):
        check(bound(detuning, absorption))


@pytest.mark.parametrize("bound", of_two_media)
@given(seed=seeds, size=st.floats(-6, 1))
def test_perturbation_bounds(bound: Callable[..., Bound], seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for detuning, absorption, _ in media(seed):
        noise = torch.randn(2, len(detuning), dtype=torch.float64, generator=generator) * 10**size
        value, limit, _ = bound(detuning, absorption, detuning + noise[0], absorption * noise[1].exp().clamp(0.1, 10))
        # The difference of two resolvents of size up to 1/eta is rounded at that size.
        floor = 1e-12 / absorption.min().square()
        assert bool((value <= limit * (1 + ROUNDING) + floor).all())


@given(seed=seeds)
def test_herglotz_identity_and_positivity(seed: int) -> None:
    for detuning, absorption, lead in media(seed):
        m = half_line_green(detuning, absorption, lead)
        before = torch.cat([m.new_tensor([lead]), m[:-1]])
        assert bool((m.imag > 0).all())
        torch.testing.assert_close(m.imag, m.abs().square() * (absorption + before.imag), rtol=ROUNDING, atol=0)


@given(seed=seeds)
def test_ward_and_gradient_are_equalities_behind_a_wall(seed: int) -> None:
    for detuning, absorption, lead in media(seed):
        for bound in (bounds.ward_bound, bounds_flux.gradient_bound):
            value, limit, _ = bound(detuning, absorption)
            torch.testing.assert_close(value, limit, rtol=ROUNDING, atol=0)
        value, limit, _ = bounds.ward_bound(detuning, absorption, lead)
        through = half_line_green(detuning, absorption, lead).abs().square().cumprod(0) * lead.imag
        torch.testing.assert_close(value + through, limit, rtol=ROUNDING, atol=0)


@given(seed=seeds)
def test_the_scattering_matrix_is_unitary(seed: int) -> None:
    for detuning, absorption, _ in media(seed):
        assert bounds.unitarity_defect(detuning, absorption) < 1e-10


@given(seed=seeds)
def test_flux_rows_have_unit_norm(seed: int) -> None:
    for detuning, absorption, lead in media(seed):
        for start in (0j, lead):
            kernel = bounds_flux.flux_kernel(detuning, absorption, start)
            norm = torch.linalg.vector_norm(kernel, dim=-1)
            torch.testing.assert_close(norm, torch.ones_like(norm), rtol=1e-14 * len(norm), atol=0)


@given(seed=seeds)
def test_the_flux_gate_is_the_normalised_transmission(seed: int) -> None:
    for detuning, absorption, lead in media(seed):
        m = half_line_green(detuning, absorption, lead)
        u = torch.cat([m.imag.new_tensor([lead.imag]), m.imag])
        gate = m.abs() * (u[:-1] / u[1:]).sqrt()
        lead_column = bounds_flux.flux_kernel(detuning, absorption, lead)[:, 0]
        torch.testing.assert_close(lead_column, gate.cumprod(0), rtol=ROUNDING, atol=1e-300)


def test_the_gradient_against_autograd() -> None:
    detuning = torch.tensor([0.3, -1.2, 0.7, 2.5], dtype=torch.float64)
    absorption = torch.tensor([0.1, 0.02, 0.5, 0.3], dtype=torch.float64)
    total = 0.0
    for part in ("real", "imag"):
        leaf = detuning.clone().requires_grad_()
        m = torch.zeros((), dtype=torch.complex128)
        for i in range(4):
            m = 1 / (torch.complex(leaf[i], -absorption[i]) - m)
        (gradient,) = torch.autograd.grad(getattr(m, part), leaf)
        total = total + gradient.square()
    expected = (absorption * torch.as_tensor(total).sqrt()).sum()
    torch.testing.assert_close(bounds_flux.gradient_bound(detuning, absorption).value[-1], expected)


def test_hardy_is_nearly_attained_and_never_reached() -> None:
    sites = 500
    result = bounds.hardy_bound(torch.zeros(sites), torch.full((sites,), 1e-6))
    assert 3.2 < float(result.value) < 4


def test_a_lead_keeps_a_constant_medium_transmitting_less_than_one() -> None:
    detuning, absorption = torch.full((200,), 0.1).double(), torch.full((200,), 1e-3).double()
    lead = complex(free_root(detuning[:1], absorption[:1])[0])
    assert bounds.herglotz_bound(detuning, absorption, lead).value.max() < 1
    wall = bounds.herglotz_bound(detuning, absorption).value
    assert wall.max() > 10


def test_decay_does_not_depend_on_length() -> None:
    generator = torch.Generator().manual_seed(0)
    detuning = torch.randn(512, dtype=torch.float64, generator=generator)
    absorption = 0.05 + torch.rand(512, dtype=torch.float64, generator=generator)
    check(bounds.combes_thomas_bound(detuning, absorption))
    check(bounds.row_sum_bound(detuning, absorption))
    absorption[0] = 0.05
    assert (
        bounds.row_sum_bound(detuning, absorption).bound[0]
        == bounds.row_sum_bound(detuning[:9], absorption[:9]).bound[0]
    )


def test_the_kernel_is_a_row_of_each_leading_block() -> None:
    detuning = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)
    absorption = torch.tensor([0.1, 0.02, 0.5], dtype=torch.float64)
    inverse = torch.linalg.inv(bounds.absorbing_jacobi(detuning, absorption))
    torch.testing.assert_close(green_kernel(half_line_green(detuning, absorption))[-1], inverse[-1])


@pytest.mark.parametrize("bound", with_lead + without_lead + [bounds.unitarity_defect, bounds_flux.flux_kernel])
def test_bad_input(bound: Callable[..., object]) -> None:
    good = torch.ones(3, dtype=torch.float64)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(DomainError, match=r"absorption.*expected"):
            bound(good, torch.tensor([1.0, bad, 1.0], dtype=torch.float64))
    with pytest.raises(DomainError, match=r"(detuning|potential).*expected"):
        bound(good * math.nan, good)
    with pytest.raises(ShapeError, match="expected"):
        bound(good, good[:2])
    with pytest.raises(ShapeError, match="expected"):
        bound(good[:0], good[:0])


@pytest.mark.parametrize("bound", of_two_media)
def test_bad_second_medium(bound: Callable[..., Bound]) -> None:
    good = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ShapeError, match="other_detuning"):
        bound(good, good, good[:2], good[:2])
    with pytest.raises(DomainError, match="absorption"):
        bound(good, good, good, good * 0)


def test_bad_energy_and_lead() -> None:
    good = torch.ones(3, dtype=torch.float64)
    with pytest.raises(DomainError, match="energy"):
        bounds_schatten.trace_class_bound(good, good, math.nan)
    with pytest.raises(DomainError, match="lead"):
        bounds_flux.flux_kernel(good, good, -1j)
