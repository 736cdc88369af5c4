"""The prime-bump potential against arithmetic by hand, its controls, and the spacing ratio on random matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory import potentials
from resnet_bk.theory.potentials import (
    GOE_RATIO,
    GUE_RATIO,
    POISSON_RATIO,
    control_potential,
    jacobi_levels,
    prime_bump_potential,
    spacing_ratio,
    von_mangoldt,
)


def mangoldt_by_division(n: int) -> float:
    for p in range(2, n + 1):
        if n % p == 0:
            while n % p == 0:
                n //= p
            return math.log(p) if n == 1 else 0.0
    return 0.0


def bumps_one_by_one(sites: int, epsilon: float, smoothing: float, first: int) -> torch.Tensor:
    result = torch.zeros(sites, dtype=torch.float64)
    for q in range(2, first + sites + math.ceil(smoothing) + 1):
        height = mangoldt_by_division(q) * q ** (-0.5 - epsilon)
        for i in range(sites):
            distance = q * math.log((first + i) / q) / smoothing
            if height and abs(distance) < 1.0:
                result[i] += height * 0.5 * (1.0 + math.cos(math.pi * distance))
    return result


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_von_mangoldt_is_the_function_of_the_definition():
    expected = torch.tensor([mangoldt_by_division(n) for n in range(1, 1025)], dtype=torch.float64)
    assert torch.equal(von_mangoldt(1, 1024), expected)


def test_von_mangoldt_sums_over_divisors_to_the_logarithm():
    last = 5000
    values = von_mangoldt(1, last)
    total = torch.zeros(last + 1, dtype=torch.float64)
    for d in range(1, last + 1):
        total[d::d] += values[d - 1]
    torch.testing.assert_close(total[1:], torch.arange(1, last + 1, dtype=torch.float64).log(), rtol=1e-14, atol=1e-14)


def test_chebyshev_sum_and_count_of_primes_to_a_million():
    values = von_mangoldt(1, 10**6)
    assert abs(float(values.sum()) - 999586.597496) < 1e-5  # psi(10^6), a tabulated value
    n = torch.arange(1, 10**6 + 1, dtype=torch.float64)
    assert int((values == n.log()).logical_and(values > 0).sum()) == 78498


@given(first=st.integers(1, 3000), length=st.integers(1, 500), segment=st.sampled_from([1, 7, 64, 1000]))
def test_segments_and_windows_agree_with_one_sieve(first: int, length: int, segment: int):
    whole = von_mangoldt(1, 3500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(potentials, "SEGMENT", segment)
        assert torch.equal(von_mangoldt(first, first + length - 1), whole[first - 1 : first + length - 1])


def test_window_far_from_one_holds_the_known_primes():
    values = von_mangoldt(10**12, 10**12 + 100)
    assert [int(i) for i in values.nonzero()] == [39, 61, 63, 91]  # the first primes above 10^12


@given(sites=st.integers(1, 300), epsilon=st.floats(0.0, 2.0))
def test_unsmoothed_potential_is_the_definition_and_bounded(sites: int, epsilon: float):
    n = torch.arange(1, sites + 1, dtype=torch.float64)
    value = prime_bump_potential(sites, epsilon)
    torch.testing.assert_close(value, von_mangoldt(1, sites) / n ** (0.5 + epsilon), rtol=1e-14, atol=0.0)
    assert bool((value >= 0).all())
    assert bool((value <= n.log() / n ** (0.5 + epsilon) * (1 + 1e-14)).all())


@given(
    sites=st.integers(1, 40),
    epsilon=st.floats(0.0, 1.0),
    smoothing=st.floats(0.01, 12.0),
    first=st.integers(1, 80),
)
def test_smoothed_potential_is_the_sum_of_its_bumps(sites: int, epsilon: float, smoothing: float, first: int):
    value = prime_bump_potential(sites, epsilon, smoothing=smoothing, first=first)
    torch.testing.assert_close(value, bumps_one_by_one(sites, epsilon, smoothing, first), rtol=1e-12, atol=1e-13)


def test_small_smoothing_changes_nothing_and_length_does_not_change_a_prefix():
    plain = prime_bump_potential(512, 0.25)
    torch.testing.assert_close(prime_bump_potential(512, 0.25, smoothing=0.5), plain, rtol=1e-14, atol=1e-16)
    assert torch.equal(
        prime_bump_potential(2000, 0.1, smoothing=3.5)[:700], prime_bump_potential(700, 0.1, smoothing=3.5)
    )


def test_width_of_one_over_n_keeps_the_potential_bounded():
    value = prime_bump_potential(10**6, 0.0, smoothing=4.0)
    # A width fixed in log n would grow like n^{1/2}; this one decays.
    assert float(value[-(10**5) :].max()) < float(value[:100].max()) < 3.0


@given(seed=st.integers(0, 2**31), sites=st.integers(2, 400))
def test_controls_have_equal_norm_and_follow_the_seed(seed: int, sites: int):
    potential = prime_bump_potential(sites, 0.1)
    random = control_potential(potential, "random", generator=generator(seed))
    shuffled = control_potential(potential, "shuffled", generator=generator(seed))
    assert not bool(control_potential(potential, "none", generator=generator(seed)).any())
    torch.testing.assert_close(random.norm(), potential.norm(), rtol=1e-13, atol=0.0)
    assert torch.equal(shuffled.sort().values, potential.sort().values)
    assert torch.equal(random, control_potential(potential, "random", generator=generator(seed)))
    assert torch.equal(shuffled, control_potential(potential, "shuffled", generator=generator(seed)))


def ensemble(kind: str) -> torch.Tensor:
    samples, size = 40, 150
    if kind == "poisson":
        return torch.rand(samples, size, dtype=torch.float64, generator=generator(1))
    dtype = torch.complex128 if kind == "gue" else torch.float64
    matrix = torch.randn(samples, size, size, dtype=dtype, generator=generator(2))
    return torch.linalg.eigvalsh(matrix + matrix.mH)


@pytest.mark.parametrize(("kind", "expected"), [("poisson", POISSON_RATIO), ("goe", GOE_RATIO), ("gue", GUE_RATIO)])
def test_spacing_ratio_of_the_reference_ensembles(kind: str, expected: float):
    found = spacing_ratio(ensemble(kind))
    assert found.ratios == 40 * 148
    assert 0.001 < found.standard_error < 0.006
    assert abs(found.mean - expected) < 3.5 * found.standard_error


def test_error_bar_is_the_scatter_of_repeated_experiments():
    found = [spacing_ratio(torch.rand(400, dtype=torch.float64, generator=generator(seed))) for seed in range(300)]
    scatter = torch.tensor([one.mean for one in found]).std()
    quoted = torch.tensor([one.standard_error for one in found]).mean()
    assert 0.8 < float(quoted / scatter) < 1.25


@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 100.0), shift=st.floats(-10.0, 10.0))
def test_spacing_ratio_ignores_unit_origin_and_order(seed: int, scale: float, shift: float):
    levels = torch.rand(60, dtype=torch.float64, generator=generator(seed))
    shuffled = levels[torch.randperm(60, generator=generator(seed))] * scale + shift
    assert abs(spacing_ratio(levels).mean - spacing_ratio(shuffled).mean) < 1e-6


def test_equally_spaced_levels_have_ratio_one():
    assert spacing_ratio(torch.arange(50, dtype=torch.float64)).mean == 1.0


def test_levels_of_the_free_line_and_their_bounds():
    k = torch.arange(1, 65, dtype=torch.float64)
    free = (2.0 * torch.cos(math.pi * k / 65)).sort().values
    torch.testing.assert_close(jacobi_levels(torch.zeros(64, dtype=torch.float64)), free, rtol=0.0, atol=1e-13)
    potential = prime_bump_potential(300, 0.1, smoothing=2.0)
    levels = jacobi_levels(potential)
    assert float(potential.min()) - 2 <= float(levels[0]) and float(levels[-1]) <= float(potential.max()) + 2
    assert bool((levels.diff() > 0).all())


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        ((0, 0.1), {}, "sites"),
        ((8, -0.1), {}, "epsilon"),
        ((8, math.nan), {}, "epsilon"),
        ((8, 0.1), {"smoothing": -1.0}, "smoothing"),
        ((8, 0.1), {"smoothing": math.inf}, "smoothing"),
        ((8, 0.1), {"first": 0}, "first"),
        ((8, 0.1), {"first": 2**50}, "last"),
    ],
)
def test_bad_parameters_are_named(arguments: tuple, options: dict, name: str):
    with pytest.raises(DomainError, match=name):
        prime_bump_potential(*arguments, **options)


def test_bad_tensors_are_named():
    line = torch.zeros(12, dtype=torch.float64)
    with pytest.raises(ShapeError, match="potential"):
        control_potential(line.float(), "none", generator=generator(0))
    with pytest.raises(DomainError, match="kind"):
        control_potential(line, "constant", generator=generator(0))  # pyright: ignore[reportArgumentType]
    with pytest.raises(DomainError, match=r"potential\[3\]"):
        jacobi_levels(line.clone().index_fill_(0, torch.tensor([3]), math.nan))
    with pytest.raises(DomainError, match="0 sites"):
        jacobi_levels(line[:0])
    with pytest.raises(DomainError, match="three equal"):
        spacing_ratio(line)
    with pytest.raises(DomainError, match="at least 11"):
        spacing_ratio(line[:10])
    with pytest.raises(DomainError, match="finite"):
        spacing_ratio(line + math.inf)
    with pytest.raises(ShapeError, match="levels"):
        spacing_ratio(line.float())
