"""The envelope of the kernel's decay: never violated, never above that of one weight, and its rate is attained."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory.bounds import combes_thomas_bound
from resnet_bk.theory.bounds_decay import decay_bound, decay_envelope
from resnet_bk.theory.jacobi import half_line_green

seeds = st.integers(0, 2**31)


@given(seed=seeds)
def test_no_medium_violates_the_envelope(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for medium in range(20):
        sites = 1 + (seed + medium) % 24
        scale, level = torch.rand(2, dtype=torch.float64, generator=generator).tolist()
        detuning = 10 ** (3 * scale - 1.5) * torch.randn(sites, dtype=torch.float64, generator=generator)
        absorption = 10 ** (5 * level - 4) * (1 + torch.rand(sites, dtype=torch.float64, generator=generator))
        if medium % 2:
            for i in range(1, sites, 2):  # at the pole of what lies before it
                detuning[i] = half_line_green(detuning[:i], absorption[:i])[-1].real
        found = decay_bound(detuning, absorption)
        assert bool((found.slack >= -1e-12 * found.bound).all())
        plain = combes_thomas_bound(detuning, absorption)
        torch.testing.assert_close(found.value, plain.value, rtol=0, atol=0)
        assert bool((found.bound <= plain.bound * (1 + 1e-12)).all())


@given(eta=st.floats(-4, 1).map(lambda exponent: 10.0**exponent), distance=st.integers(0, 300))
def test_the_weight_is_the_best_one(eta: float, distance: int) -> None:
    envelope = decay_envelope(distance + 1, eta)
    weight = torch.linspace(0, math.asinh(eta / 2), 2001, dtype=torch.float64)[:-1]
    best = (torch.exp(-weight * distance) / (eta - 2 * weight.sinh())).min()
    assert float(envelope[-1]) <= float(best) * (1 + 1e-9)
    assert float(envelope[-1]) >= float(best) * 0.9 - 1e-300
    assert float(envelope[0]) == pytest.approx(1 / eta)
    assert bool((envelope.diff() <= 0).all())


@pytest.mark.parametrize("eta", [0.05, 0.3, 2.0])
def test_the_free_line_attains_the_rate(eta: float) -> None:
    sites = 400
    free, absorption = torch.zeros(sites, dtype=torch.float64), torch.full((sites,), eta, dtype=torch.float64)
    found = decay_bound(free, absorption)
    rates = [-(torch.log(column[399] / column[300]) / 99) for column in (found.value[:, 0], found.bound[:, 0])]
    assert float(rates[0]) == pytest.approx(math.asinh(eta / 2), rel=0.05)
    # The prefactor still grows like the distance: 1 / 350 off.
    assert float(rates[1]) == pytest.approx(math.asinh(eta / 2), rel=0.1, abs=4e-3)
    assert float(rates[1]) > 1.3 * math.asinh(eta / 4)


def test_bad_input_is_named() -> None:
    line = torch.zeros(3, dtype=torch.float64)
    for eta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(DomainError, match="absorption is"):
            decay_envelope(3, eta)
    with pytest.raises(DomainError, match="sites is 0"):
        decay_envelope(0, 0.1)
    with pytest.raises(DomainError, match="absorption"):
        decay_bound(line, line)
    with pytest.raises(ShapeError, match="absorption"):
        decay_bound(line, torch.ones(2, dtype=torch.float64))
