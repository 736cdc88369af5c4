"""Weil's explicit formula with the zeros of mpmath: both sides agree, and each side matters."""

from __future__ import annotations

import math
import sys

import mpmath
import pytest
import torch

from resnet_bk.errors import DomainError, MissingDependencyError
from resnet_bk.theory.explicit_formula import (
    WeilPair,
    digamma_real_part,
    explicit_formula,
    gaussian_pair,
    sech_pair,
    spline_pair,
    zeta_zeros,
)
from resnet_bk.theory.potentials import jacobi_levels, prime_bump_potential

SMOOTH = [
    *(gaussian_pair(width) for width in (0.7, 1.0, 2.0, 5.0, 10.0)),
    gaussian_pair(1.0, 14.134725),
    gaussian_pair(1.0, 30.0),
    gaussian_pair(3.0, 60.0),
    *(sech_pair(width) for width in (2.2, 3.0, 3.5)),
]
SPLINES = [spline_pair(support) for support in (0.6, 1.0, 2.0, 4.0, 8.0, 14.0)]


def by_name(pair: WeilPair) -> str:
    return pair.name


@pytest.mark.parametrize("pair", SMOOTH, ids=by_name)
def test_both_sides_agree_to_rounding(pair: WeilPair) -> None:
    found = explicit_formula(pair, zeta_zeros(60))
    terms = (found.pole, found.archimedean, found.prime, found.spectral)
    assert abs(found.remainder) < 1e-15
    # Worst measured: 2.9e-15.
    assert abs(found.defect) < 1e-14 * max(1.0, *map(abs, terms))


@pytest.mark.parametrize("pair", SPLINES, ids=by_name)
def test_both_sides_agree_up_to_the_remainder(pair: WeilPair) -> None:
    found = explicit_formula(pair, zeta_zeros(60))
    # Worst measured: 6.6e-8, and 0.2 of the remainder: the zeros beyond, whose positions the mean density ignores.
    assert abs(found.defect) < 1.4e-7
    assert abs(found.defect) < 0.4 * found.remainder


def test_a_gaussian_at_a_zero_counts_it() -> None:
    zeros = zeta_zeros(60)
    found = explicit_formula(gaussian_pair(1.0, zeros[0]), zeros)
    assert found.pole + found.archimedean + found.prime == pytest.approx(2, abs=1e-6)


def test_no_term_can_be_left_out_or_changed() -> None:
    zeros = zeta_zeros(60)
    pair = gaussian_pair(1.0, 30.0)
    assert abs(explicit_formula(pair, zeros).defect) < 1e-14
    moved = (*zeros[:3], zeros[3] + 1e-3, *zeros[4:])
    assert abs(explicit_formula(pair, moved).defect) > 1e-5
    found = explicit_formula(pair, zeros)
    assert min(found.spectral, found.archimedean, found.prime) > 0.5


def test_the_zeros_are_not_levels_of_the_potential() -> None:
    # The levels of any Jacobi matrix with this potential lie in a bounded interval; the zeros do not.
    levels = jacobi_levels(prime_bump_potential(400, 0.0))
    assert float(levels.abs().max()) < 4 < zeta_zeros(1)[0]


@pytest.mark.parametrize("pair", [*SMOOTH, *SPLINES], ids=by_name)
def test_pairs_are_fourier_pairs(pair: WeilPair) -> None:
    t = torch.arange(-pair.height, pair.height, 0.04, dtype=torch.float64)
    for u in (0.0, 0.3, 1.1):
        transformed = torch.trapezoid(pair.transform(t) * torch.cos(u * t), t) / (2 * math.pi)
        expected = pair.kernel(torch.tensor(u, dtype=torch.float64))
        torch.testing.assert_close(transformed, expected, rtol=0, atol=1e-9)
    u = torch.arange(-1.2 * pair.reach, 1.2 * pair.reach, 1e-3, dtype=torch.float64)
    assert float(torch.trapezoid(pair.kernel(u) * (u / 2).exp(), u)) == pytest.approx(pair.at_half, rel=1e-5)
    assert torch.equal(pair.transform(t), pair.transform(-t))


def test_digamma_is_that_of_mpmath() -> None:
    t = torch.tensor([0.0, 0.1, 1.0, 7.0, 50.0, 2e4], dtype=torch.float64)
    exact = [float(mpmath.digamma(mpmath.mpc(0.25, x / 2)).real) for x in t.tolist()]
    torch.testing.assert_close(digamma_real_part(t), torch.tensor(exact, dtype=torch.float64), rtol=1e-13, atol=1e-13)


def test_zeros_are_zeros_and_none_is_missing() -> None:
    zeros = zeta_zeros(60)
    assert max(abs(mpmath.zeta(mpmath.mpc(0.5, gamma))) for gamma in zeros[::10]) < 1e-10
    assert zeros[0] == pytest.approx(14.134725141734693, abs=1e-12)
    assert int(mpmath.nzeros(zeros[-1] + 0.5)) == 60


def test_bad_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for make, value in ((gaussian_pair, 0.1), (gaussian_pair, math.nan), (sech_pair, 1.0), (spline_pair, 15.0)):
        with pytest.raises(DomainError, match=r"width|support"):
            make(value)
    with pytest.raises(DomainError, match="centre"):
        gaussian_pair(1.0, -1.0)
    with pytest.raises(DomainError, match="count"):
        zeta_zeros(0)
    for zeros in ((), (21.0, 14.1)):
        with pytest.raises(DomainError, match="zeros must ascend"):
            explicit_formula(gaussian_pair(1.0), zeros)
    monkeypatch.setitem(sys.modules, "mpmath", None)
    with pytest.raises(MissingDependencyError, match="resnet-bk\\[theory\\]"):
        zeta_zeros(3)
