"""Green functions of absorbing Jacobi matrices: dense inverses, the operator of `ops`, theorems 1, 2 and 5."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.ops.resolvent import causal_resolvent
from resnet_bk.theory.jacobi import (
    absorbing_jacobi,
    free_root,
    full_green_diagonal,
    green_kernel,
    half_line_green,
)

SITE_FUNCTIONS = (absorbing_jacobi, half_line_green, full_green_diagonal, free_root)


def random_sites(seed: int, sites: int, smallest: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    detuning = 3 * torch.randn(sites, generator=generator, dtype=torch.float64)
    exponent = torch.rand(sites, generator=generator, dtype=torch.float64)
    return detuning, smallest**exponent


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("sites", [1, 2, 3, 64, 512])
def test_sweeps_equal_the_dense_inverses(sites: int) -> None:
    detuning, absorption = random_sites(sites, sites)
    matrix = absorbing_jacobi(detuning, absorption)
    m = half_line_green(detuning, absorption)
    kernel = green_kernel(m)
    for i in sorted({1, 2, sites // 3, sites // 2, sites} & set(range(1, sites + 1))):
        last_row = torch.linalg.inv(matrix[:i, :i])[-1]
        assert relative_error(m[i - 1], last_row[-1]) < 1e-10  # worst of all three 1.1e-15
        assert relative_error(kernel[i - 1, :i], last_row) < 1e-10
    assert torch.equal(kernel.triu(1), torch.zeros_like(kernel))
    assert relative_error(full_green_diagonal(detuning, absorption), torch.linalg.inv(matrix).diagonal()) < 1e-10


def test_a_lead_is_a_shift_of_the_first_site() -> None:
    detuning, absorption = random_sites(5, 40)
    lead = 0.3 + 0.4j
    matrix = absorbing_jacobi(detuning, absorption)
    matrix[0, 0] -= lead
    m = half_line_green(detuning, absorption, lead)
    assert relative_error(m[-1], torch.linalg.inv(matrix)[-1, -1]) < 1e-10


@pytest.mark.parametrize("sites", [1, 65, 512])
def test_half_line_green_equals_the_operator(sites: int) -> None:
    detuning, absorption = random_sites(sites + 1, sites)
    (real, imaginary), _ = causal_resolvent(detuning[None, :, None], absorption[None, :, None], backend="reference")
    assert real.dtype == torch.float64
    other = torch.complex(real, imaginary).flatten()
    assert relative_error(half_line_green(detuning, absorption), other) < 1e-10


@given(seed=st.integers(0, 2**31), sites=st.integers(1, 60), smallest=st.sampled_from([1e-1, 1e-3, 1e-6]))
def test_herglotz_and_ward(seed: int, sites: int, smallest: float) -> None:
    for case in range(20):
        detuning, absorption = random_sites(seed + case, sites, smallest)
        lead = complex(torch.randn(1, generator=torch.Generator().manual_seed(seed + case)).item(), 0.5 * (case % 2))
        m = half_line_green(detuning, absorption, lead)
        u = m.imag
        before = torch.cat([torch.tensor([lead.imag], dtype=torch.float64), u[:-1]])
        assert (u > 0).all()
        assert (m.abs() * absorption <= 1 + 1e-12).all()
        torch.testing.assert_close(u, m.abs().square() * (absorption + before), rtol=1e-9, atol=0)
        ward = green_kernel(m).abs().square() @ absorption + m.abs().square().cumprod(0) * lead.imag
        torch.testing.assert_close(ward, u, rtol=1e-9, atol=0)


@given(seed=st.integers(0, 2**31))
def test_free_root_is_stationary_and_decays(seed: int) -> None:
    detuning, absorption = random_sites(seed, 100, 1e-8)
    detuning = detuning * torch.logspace(-3, 5, 100, dtype=torch.float64)
    m = free_root(detuning, absorption)
    assert (m.abs() < 1).all()
    assert (m.imag > 0).all()
    alpha = torch.complex(detuning, -absorption)
    assert ((m * (alpha - m) - 1).abs() < 1e-10).all()


def test_free_root_at_the_centre_of_the_band_is_the_limit_of_the_sweep() -> None:
    absorption = torch.tensor([1e-3, 0.1, 1.0, 10.0], dtype=torch.float64)
    root = free_root(torch.zeros_like(absorption), absorption)
    torch.testing.assert_close(root.abs(), torch.exp(-torch.asinh(absorption / 2)), rtol=1e-13, atol=0)
    for eta, m in zip(absorption.tolist(), root.tolist(), strict=True):
        constant = torch.full((50,), eta, dtype=torch.float64)
        swept = half_line_green(0 * constant, constant, m)
        assert relative_error(swept, torch.full_like(swept, m)) < 1e-12


def test_a_long_line_stays_finite() -> None:
    detuning, absorption = random_sites(7, 100_000, 1e-8)
    assert torch.isfinite(torch.view_as_real(half_line_green(detuning, absorption))).all()
    assert torch.isfinite(torch.view_as_real(full_green_diagonal(detuning, absorption))).all()


@pytest.mark.parametrize("function", SITE_FUNCTIONS)
def test_bad_sites_are_named(function) -> None:
    good = torch.ones(3, dtype=torch.float64)
    with pytest.raises(DomainError, match=r"absorption at \(1,\) is 0.0; expected .* add a floor"):
        function(good, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    with pytest.raises(DomainError, match=r"detuning at \(2,\) is nan"):
        function(torch.tensor([0.0, 0.0, math.nan], dtype=torch.float64), good)
    with pytest.raises(DomainError, match=r"absorption at \(0,\) is inf"):
        function(good, torch.tensor([math.inf, 1.0, 1.0], dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"absorption has shape \[2\]; expected \[3\]"):
        function(good, good[:2])
    with pytest.raises(ShapeError, match="at least one site"):
        function(good[:0], good[:0])
    with pytest.raises(ShapeError, match=r"detuning has dtype torch\.int64"):
        function(good.long(), good)


def test_bad_vectors_and_leads_are_named() -> None:
    good = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"detuning has shape \[1, 3\]; expected \[n\]"):
        half_line_green(good[None], good[None])
    for lead in (-0.1j, complex(math.nan, 0)):
        with pytest.raises(DomainError, match="lead is"):
            half_line_green(good, good, lead)
    with pytest.raises(ShapeError, match=r"m is torch\.float64"):
        green_kernel(good)
    with pytest.raises(DomainError, match="m at"):
        green_kernel(torch.full((2,), complex(math.inf, 0), dtype=torch.complex128))
