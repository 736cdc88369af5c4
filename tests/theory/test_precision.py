"""Conditions, norms and products in O(N) against dense twins; promoted sweeps against rational numbers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory import precision
from resnet_bk.theory.bounds_schatten import hilbert_schmidt_bound
from resnet_bk.theory.jacobi import half_line_green
from resnet_bk.theory.scattering import birman_schwinger

CASES = 20  # per example of hypothesis, so that a bound meets 1,000 cases
LEADS = (0j, 0.3 + 0.4j)


def block(seed: int, sites: int, smallest: float = 1e-2) -> tuple[torch.Tensor, float, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    potential = torch.randn(sites, generator=generator, dtype=torch.float64)
    absorption = smallest ** torch.rand(sites, generator=generator, dtype=torch.float64)
    return potential, 3 * torch.rand(1, generator=generator).item() - 1.5, absorption


def dense_operator(arguments: tuple[torch.Tensor, float, torch.Tensor], lead: complex) -> torch.Tensor:
    return torch.eye(len(arguments[0])) + birman_schwinger(*arguments, lead)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("sites", [1, 2, 65, 512])
def test_products_and_norms_equal_their_dense_twins(sites: int, lead: complex) -> None:
    arguments = block(sites, sites)
    dense = dense_operator(arguments, lead)
    vectors = torch.randn(sites, 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    identity = torch.eye(sites, dtype=torch.complex128)
    inverse = torch.linalg.inv(dense)
    for inverted, matrix in ((False, dense), (True, inverse)):
        for adjoint, expected in ((False, matrix @ vectors), (True, matrix.mH @ vectors)):
            found = precision.birman_schwinger_product(*arguments, vectors, lead, inverse=inverted, adjoint=adjoint)
            assert (found - expected).norm() < 1e-10 * expected.norm()  # measured 2e-13
        norm = precision.hilbert_schmidt_norm(*arguments, lead, perturbed=inverted)
        expected = torch.linalg.matrix_norm(matrix - identity).item()
        assert norm == pytest.approx(expected, rel=1e-10)  # measured 3e-13
    if lead == 0:
        twin = hilbert_schmidt_bound(arguments[0], arguments[2], arguments[1]).value.item()
        assert precision.hilbert_schmidt_norm(*arguments) == pytest.approx(twin, rel=1e-10)


@given(seed=st.integers(0, 2**31), sites=st.integers(1, 16), smallest=st.sampled_from([0.5, 1e-1, 1e-3]))
def test_the_condition_lies_between_estimate_and_bound(seed: int, sites: int, smallest: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for case in range(CASES):
        potential, energy, absorption = block(seed + case, sites, smallest)
        arguments, lead = (10 ** (case % 3 - 1) * potential, energy, absorption), LEADS[case % 2]
        exact = torch.linalg.cond(dense_operator(arguments, lead)).item()
        found = precision.condition_estimate(*arguments, lead, generator=generator, steps=1)
        assert found.estimate <= exact * (1 + 1e-9) and exact <= found.bound * (1 + 1e-9)


def test_the_estimate_comes_near() -> None:
    arguments = block(3, 200, 1e-2)
    exact = torch.linalg.cond(dense_operator(arguments, 0j)).item()
    found = precision.condition_estimate(*arguments, generator=torch.Generator().manual_seed(0), steps=20)
    assert 0.8 * exact < found.estimate <= exact


def exact_sweep(alpha: list[complex], lead: complex) -> torch.Tensor:
    """m by leading minors in rational numbers, rounded once."""

    def times(a: tuple[Fraction, Fraction], b: tuple[Fraction, Fraction]) -> tuple[Fraction, Fraction]:
        return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]

    before, minor = (Fraction(lead.real), Fraction(lead.imag)), (Fraction(1), Fraction(0))
    found = []
    for a in alpha:
        real, imag = times((Fraction(a.real), Fraction(a.imag)), minor)
        before, minor = minor, (real - before[0], imag - before[1])
        square = minor[0] ** 2 + minor[1] ** 2
        m = times(before, (minor[0], -minor[1]))
        found.append(complex(float(m[0] / square), float(m[1] / square)))
    return torch.tensor(found, dtype=torch.complex128)


@given(seed=st.integers(0, 2**31), sites=st.integers(1, 20), smallest=st.sampled_from([0.5, 1e-2, 1e-4, 1e-6]))
def test_the_error_is_below_the_bound_in_either_precision(seed: int, sites: int, smallest: float) -> None:
    for case in range(CASES):
        potential, energy, absorption = block(seed + case, sites, smallest)
        detuning, lead = 10 ** (case % 4 - 2) * potential - energy, LEADS[case % 2]
        budget = (0.5, 1e-3, 1e-5, 1e-7)[case // 5]
        found = precision.half_line_green_within(detuning, absorption, budget=budget, lead=lead)
        exact = exact_sweep(torch.complex(detuning, -absorption).tolist(), lead)
        error = (found.m.to(torch.complex128) - exact).abs() / found.m.abs().double()
        assert (found.error <= budget).all()
        # The rational number is rounded to a double: two units.
        assert (error <= found.error + 2.0**-51).all()


def test_promotion_happens_where_it_must_and_only_there() -> None:
    quiet = precision.half_line_green_within(torch.zeros(100).double(), torch.full((100,), 0.1).double(), budget=1e-4)
    assert quiet.m.dtype == torch.complex64
    # Quiet media cost little: the bound is within 100 of the error that occurs.
    exact = half_line_green(torch.zeros(100).double(), torch.full((100,), 0.1).double())
    assert quiet.error.max() < 100 * (quiet.m - exact).abs().max() + 1e-6
    potential, energy, absorption = block(1, 200, 1e-5)
    wide = precision.half_line_green_within(potential - energy, absorption, budget=1e-7)
    assert wide.m.dtype == torch.complex128
    assert torch.equal(wide.m, half_line_green(potential - energy, absorption))
    # What complex64 cannot even hold is promoted too.
    ones = torch.ones(3, dtype=torch.float64)
    huge = precision.half_line_green_within(1e39 * ones, 1e30 * ones, budget=1e-3)
    assert huge.m.dtype == torch.complex128
    with pytest.raises(DomainError, match="the bound of complex128 at site 1"):
        precision.half_line_green_within(0 * ones, 1e-12 * ones, budget=1e-9)


def test_a_required_precision_keeps_the_budget_of_a_solve() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = set()
    for case in range(200):
        arguments = block(case, 30, 10 ** -(case % 4))
        dense = dense_operator(arguments, 0j)
        budget = 10 ** -(3 + case % 5)
        dtype = precision.required_dtype(torch.linalg.cond(dense).item(), budget)
        chosen.add(dtype)
        vectors = torch.randn(30, 1, dtype=torch.complex128, generator=generator)
        found = torch.linalg.solve(dense.to(dtype), vectors.to(dtype)).to(torch.complex128)
        exact = torch.linalg.solve(dense, vectors)
        assert (found - exact).norm() <= budget * exact.norm()
    assert chosen == {torch.complex64, torch.complex128}


def test_bad_input_is_named() -> None:
    good = torch.ones(3, dtype=torch.float64)
    vectors, generator = torch.ones(3, 1, dtype=torch.complex128), torch.Generator()
    with pytest.raises(ShapeError, match="vectors is"):
        precision.birman_schwinger_product(good, 0.0, good, vectors[:2])
    with pytest.raises(DomainError, match="vectors has an entry"):
        precision.birman_schwinger_product(good, 0.0, good, vectors * math.inf)
    functions: Any = (
        (precision.birman_schwinger_product, {"vectors": vectors}),
        (precision.hilbert_schmidt_norm, {}),
        (precision.condition_estimate, {"generator": generator}),
    )
    for function, more in functions:
        with pytest.raises(DomainError, match=r"absorption at \(0,\) is 0\.0"):
            function(good, 0.0, 0 * good, **more)
        with pytest.raises(DomainError, match="energy is nan"):
            function(good, math.nan, good, **more)
        with pytest.raises(DomainError, match="lead is"):
            function(good, 0.0, good, lead=-1j, **more)
    with pytest.raises(DomainError, match="steps is 0"):
        precision.condition_estimate(good, 0.0, good, generator=generator, steps=0)
    for condition in (0.5, math.inf, math.nan):
        with pytest.raises(DomainError, match="condition is"):
            precision.required_dtype(condition, 0.1)
    for budget in (0.0, 1.0, math.nan):
        with pytest.raises(DomainError, match="budget is"):
            precision.required_dtype(1.0, budget)
        with pytest.raises(DomainError, match="budget is"):
            precision.half_line_green_within(good, good, budget=budget)
    with pytest.raises(DomainError, match="expected >="):
        precision.required_dtype(1e12, 1e-9)
