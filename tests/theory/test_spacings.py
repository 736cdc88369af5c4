"""Spacing statistics of the prime-bump potential beside its controls."""

from __future__ import annotations

import pytest
import torch

from resnet_bk.errors import DomainError
from resnet_bk.theory.potentials import GUE_RATIO, POISSON_RATIO, jacobi_levels, prime_bump_potential
from resnet_bk.theory.spacings import CONTROLS, compare_spacings, windowed_levels


def test_every_potential_has_an_error_bar_and_none_has_the_statistics_of_zeta() -> None:
    found = compare_spacings(sites=256, windows=16, epsilon=0.1, strength=1.0)
    assert set(found) == {"prime-bump", *CONTROLS}
    assert found["none"].mean > 0.95
    for kind in ("prime-bump", "random", "shuffled", "shuffled-odd"):
        mean, error, ratios = found[kind]
        assert ratios == 16 * 254
        assert 0.002 < error < 0.01
        # Near independent levels (measured: 0.37 to 0.40), tens of errors from the zeros' 0.60.
        assert abs(mean - POISSON_RATIO) < 0.03
        assert mean < GUE_RATIO - 20 * error


def test_windows_are_those_of_one_potential_at_one_strength() -> None:
    levels = windowed_levels("prime-bump", sites=32, windows=3, epsilon=0.2, strength=0.7, first=100)
    assert levels.shape == (3, 32)
    window = prime_bump_potential(96, 0.2, first=100)[32:64]
    torch.testing.assert_close(levels[1], jacobi_levels(window * 0.7 / window.square().mean().sqrt()))
    # The trace of H^2 is the potential's square and twice the bonds.
    expected = torch.full((3,), 32 * 0.49 + 2 * 31, dtype=torch.float64)
    torch.testing.assert_close(levels.square().sum(-1), expected)


@pytest.mark.parametrize("kind", CONTROLS)
def test_controls_follow_the_seed_and_keep_the_norm(kind: str) -> None:
    options = {"sites": 64, "windows": 2, "epsilon": 0.1, "strength": 1.0}
    first, same = (windowed_levels(kind, seed=3, **options) for _ in range(2))
    assert torch.equal(first, same)
    square = first.square().sum(-1) - 2 * 63
    torch.testing.assert_close(square, torch.full_like(square, 0.0 if kind == "none" else 64.0), rtol=1e-9, atol=1e-9)
    if kind != "none":
        assert not torch.equal(first, windowed_levels(kind, seed=4, **options))


def test_bad_parameters_are_named() -> None:
    options = {"sites": 64, "windows": 2, "epsilon": 0.1, "strength": 1.0}
    for kind, change, name in (
        ("zeta", {}, "kind"),
        ("none", {"sites": 10}, "sites"),
        ("none", {"windows": 0}, "windows"),
        ("none", {"strength": 0.0}, "strength"),
        ("none", {"epsilon": -1.0}, "epsilon"),
        ("none", {"sites": 12, "first": 1332}, "no prime power"),
    ):
        with pytest.raises(DomainError, match=name):
            windowed_levels(kind, **{**options, **change})
