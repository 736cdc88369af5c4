"""The benchmarks of the theory: rehearsed at toy size, and the parts that decide what their rows say."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def by_name(name: str) -> ModuleType:
        return importlib.import_module(name)

    return by_name


def rehearse(script: str, *options: str) -> list[str]:
    command = [sys.executable, str(BENCHMARKS / script), "--no-rows", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_every_routine_is_finite_at_toy_size() -> None:
    lines = rehearse("theory_scaling.py", "--sites", "50", "--repeats", "1")
    assert len(lines) >= 25
    assert all("finite True" in line for line in lines)


@pytest.mark.slow
def test_every_blend_trains_at_toy_size() -> None:
    lines = rehearse("gradient_study.py", "--steps", "4", "--seeds", "0")
    assert len(lines) == 11  # the unigram baseline, four weights on either base, the heuristic alone, frozen media
    assert "'base': 'exact', 'alpha': 0.0" in lines[1] and "'cosine_mean': 1.0" in lines[1]


def test_a_result_that_is_not_finite_is_seen(load) -> None:
    scaling = load("theory_scaling")
    assert scaling.is_finite((torch.ones(2), (1.0, 2j)))
    assert not scaling.is_finite((torch.ones(2), (math.nan, 1.0)))
    found = scaling.measure(lambda: torch.ones(1), lambda: torch.tensor([math.inf]), 2)
    assert found["finite"] == "False"


@pytest.mark.parametrize("sites", [1, 7, 8, 9, 1000])
def test_the_random_tree_is_hermitian(load, sites: int) -> None:
    tree = load("theory_scaling").random_tree(sites, torch.Generator().manual_seed(0))
    dense = tree.dense()
    torch.testing.assert_close(dense, dense.mH, rtol=0, atol=1e-12)


def test_masks_and_batches_repeat(load) -> None:
    study = load("gradient_study")
    text = torch.arange(1000) % 256
    first, second = (study.draw(text, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert 0 < first[1].float().mean() < 0.3
    assert (first[0][:, 1:] - first[0][:, :-1]).remainder(256).eq(1).all()


def test_only_masked_bytes_count_and_the_model_does_not_see_them(load) -> None:
    study = load("gradient_study")
    torch.manual_seed(0)
    model = study.MaskedModel()
    tokens, masked = study.draw(torch.randint(256, (500,)), torch.Generator().manual_seed(0))
    changed = torch.where(masked, (tokens + 1) % 256, tokens)
    seen = []
    model.head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].detach()))
    model.loss(tokens, masked)
    model.loss(changed, masked)
    assert torch.equal(seen[0], seen[1]) and len(seen[0]) == masked.sum()
