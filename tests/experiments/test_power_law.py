from __future__ import annotations

import numpy as np
import pytest

from resnet_bk.errors import DomainError
from resnet_bk.experiments.power_law import bootstrap_power_laws, confidence_band, fit_power_law

SIZES = np.array([1e4, 3e4, 1e5, 3e5, 1e6, 3e6])


@pytest.mark.parametrize(("floor", "a", "b"), [(1.7, 40.0, 0.3), (0.0, 9.0, 0.076), (3.0, 5000.0, 1.1)])
def test_exact_laws_are_recovered(floor, a, b):
    law = fit_power_law(SIZES, floor + a * SIZES**-b)
    assert law.exponent == pytest.approx(b, rel=2e-3)
    assert law.floor == pytest.approx(floor, abs=0.02) and law.a == pytest.approx(a, rel=0.03)
    assert np.allclose(law.at(SIZES), floor + a * SIZES**-b, rtol=1e-4)


def test_losses_that_do_not_fall_are_flat():
    law = fit_power_law(SIZES, [3.0, 3.1, 3.2, 3.3, 3.4, 3.5])
    assert law.coefficient == 0 and law.floor == pytest.approx(3.25)


def test_the_band_covers_the_law_that_made_the_runs():
    draw = np.random.default_rng(0)
    sizes = np.repeat(SIZES, 3)
    truth = 1.5 + 30 * sizes**-0.3
    losses = truth + 0.01 * draw.standard_normal(len(sizes))
    laws = bootstrap_power_laws(sizes, losses, samples=100)
    inner = SIZES[1:-1]
    low, high = confidence_band(laws, inner)
    assert ((low < 1.5 + 30 * inner**-0.3 + 0.005) & (high > 1.5 + 30 * inner**-0.3 - 0.005)).all()
    assert (high - low < 0.03).all() and (high > low).all()
    wide_low, wide_high = confidence_band(laws, inner, level=1.0)
    assert (wide_low <= low).all() and (wide_high >= high).all()
    assert laws == bootstrap_power_laws(sizes, losses, samples=100)


@pytest.mark.parametrize(
    ("sizes", "losses", "said"),
    [([1, 2], [3, 2], "three different sizes"), ([1, 1, 2, 2], [3, 3, 2, 2], "three different sizes"),
     ([1, 2, 3], [3, 2, float("nan")], "not a finite number"), ([0, 2, 3], [3, 2, 1], "not a finite number")],
)  # fmt: skip
def test_what_has_no_law_is_refused(sizes, losses, said):
    with pytest.raises(DomainError, match=said):
        fit_power_law(sizes, losses)
