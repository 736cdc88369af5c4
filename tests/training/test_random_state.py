from __future__ import annotations

import json
import random

import numpy as np
import torch

from resnet_bk.training.random_state import random_state, restore_random_state, seed_everything

CPU = torch.device("cpu")


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item(),
            torch.randn(()).item()]  # fmt: skip


def test_state_survives_json():
    seed_everything(3)
    draw()  # leaves a spare Gaussian in Python's and NumPy's generators
    state = json.loads(json.dumps(random_state(CPU)))
    expected = [draw() for _ in range(3)]
    seed_everything(4)
    assert draw() != expected[0]
    restore_random_state(state, CPU)
    assert [draw() for _ in range(3)] == expected


def test_seeding_repeats_and_takes_large_seeds():
    seed_everything(2**40 + 1)
    first = draw()
    seed_everything(2**40 + 1)
    assert draw() == first
