"""What every test shares: the GPU marker's condition and reproducible property tests."""

from __future__ import annotations

import pytest
from hypothesis import settings

# Shared machines are slow at times, so no deadline; the same examples in every run, so that a failure repeats.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="torch.cuda.is_available() is False"))
