"""The exponent's schedules, and the sums that decide its Schatten class against zeta itself."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_bk.errors import DomainError
from resnet_bk.theory.schedules import Shape, epsilon_at, summed_norms


@pytest.mark.parametrize("shape", get_args(Shape))
@given(start=st.floats(1e-3, 3), end=st.floats(1e-3, 3))
def test_schedules_are_monotone_between_their_ends(shape: Shape, start: float, end: float) -> None:
    values = [epsilon_at(k / 50, start=start, end=end, shape=shape) for k in range(51)]
    assert values[0] == start and values[-1] == end
    sign = 1 if end >= start else -1
    assert all(sign * (after - before) >= -1e-15 for before, after in itertools.pairwise(values))


def test_shapes() -> None:
    assert epsilon_at(0.25, start=1, end=0, shape="linear") == 0.75
    assert epsilon_at(0.5, start=1, end=0, shape="cosine") == pytest.approx(0.5)
    assert epsilon_at(0.01, start=1, end=0, shape="cosine") > 0.999
    assert epsilon_at(0.5, start=1, end=0.25, shape="geometric") == pytest.approx(0.5)


@pytest.mark.parametrize("epsilon", [0.75, 1.0, 1.5])
def test_above_one_half_the_sum_is_the_logarithmic_derivative_of_zeta(epsilon: float) -> None:
    s = 0.5 + epsilon
    limit = float(-mpmath.zeta(s, derivative=1) / mpmath.zeta(s))
    found = summed_norms(2**20, epsilon)
    rest = (2**20) ** (0.5 - epsilon) / (epsilon - 0.5)  # the integral of x^-s beyond the last site
    assert float(found.absolute[-1]) + rest == pytest.approx(limit, rel=2e-4)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.25])
def test_below_one_half_the_sum_grows_with_the_length(epsilon: float) -> None:
    absolute = summed_norms(2**20, epsilon).absolute
    late, early = absolute[-1] - absolute[-3], absolute[-3] - absolute[-5]
    assert float(late / early) == pytest.approx(4 ** (0.5 - epsilon), rel=0.02)


def test_squares_converge_above_zero_and_not_at_zero() -> None:
    square = summed_norms(2**20, 0.5).square
    assert float(square[-1] - square[-5]) < 1e-3 * float(square[-1])
    critical = summed_norms(2**20, 0.0).square
    assert float(critical[-1]) == pytest.approx(math.log(2**20) ** 2 / 2, rel=0.1)
    assert float(critical[-1] - critical[-5]) > 0.2 * float(critical[-1])


def test_bad_parameters_are_named() -> None:
    for progress in (-0.1, 1.1, math.nan):
        with pytest.raises(DomainError, match="progress"):
            epsilon_at(progress)
    with pytest.raises(DomainError, match="start"):
        epsilon_at(0.5, start=-1)
    with pytest.raises(DomainError, match="end"):
        epsilon_at(0.5, end=math.inf)
    with pytest.raises(DomainError, match="never reaches 0"):
        epsilon_at(0.5, end=0, shape="geometric")
    with pytest.raises(DomainError, match="shape"):
        epsilon_at(0.5, shape="step")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DomainError, match="sites"):
        summed_norms(1, 0.1)
    with pytest.raises(DomainError, match="epsilon"):
        summed_norms(10, -0.1)
