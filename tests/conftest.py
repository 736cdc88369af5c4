"""What every test shares: the GPU marker's condition, Triton's interpreter and reproducible property tests."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# Shared machines are slow at times, so no deadline; the same examples in every run, so that a failure repeats.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")

# Read when a kernel is defined, so before any test imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch.cuda.is_available() is False"))
