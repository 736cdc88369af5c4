from __future__ import annotations

import itertools
import math

import pytest

from resnet_bk import TrainingConfig
from resnet_bk.training.schedules import learning_rate_at


def rates(**fields) -> list[float]:
    config = TrainingConfig(**{"steps": 100, "warmup_steps": 10, "learning_rate": 2.0, **fields})
    return [learning_rate_at(step, config) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule):
    assert rates(schedule=schedule)[:10] == pytest.approx([0.2 * k for k in range(1, 11)])
    assert rates(schedule=schedule, warmup_steps=0)[0] == pytest.approx(2.0, rel=1e-2)


def test_cosine_falls_to_the_final_rate():
    found = rates(schedule="cosine", minimum_learning_rate_ratio=0.1)
    assert all(a > b for a, b in itertools.pairwise(found[9:]))
    assert found[54] == pytest.approx(2.0 * 0.55)  # half of the 90 steps after warm-up
    assert found[-1] == pytest.approx(0.2)
    assert found[32] == pytest.approx(2 * (0.1 + 0.9 * (1 + math.cos(math.pi * 23 / 90)) / 2))


def test_wsd_is_stable_then_linear():
    found = rates(schedule="wsd", decay_fraction=0.2, minimum_learning_rate_ratio=0.0)
    assert found[9:80] == [2.0] * 71
    assert found[80:] == pytest.approx([2.0 * (1 - k / 20) for k in range(1, 21)], abs=1e-12)


def test_wsd_without_decay_and_constant_stay_at_the_peak():
    assert rates(schedule="wsd", decay_fraction=0.0)[9:] == [2.0] * 91
    assert rates(schedule="constant")[9:] == [2.0] * 91


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup_steps", [99, 100, 300])
def test_runs_hardly_longer_than_their_warm_up(schedule, warmup_steps):
    found = rates(schedule=schedule, warmup_steps=warmup_steps)
    assert all(0 < rate <= 2.0 for rate in found)
    assert found[:99] == pytest.approx([2.0 * (k + 1) / warmup_steps for k in range(99)])
