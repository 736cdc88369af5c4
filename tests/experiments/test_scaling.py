from __future__ import annotations

import dataclasses

import pytest

from resnet_bk.errors import ConfigError
from resnet_bk.experiments.arms import named_arms
from resnet_bk.experiments.compare import training_flops
from resnet_bk.experiments.corpora import CorpusSource
from resnet_bk.experiments.scaling import comparison_at, grid, scale, scaling_curves, scaling_table, training_of
from resnet_bk.models.sizes import num_parameters


def test_the_grid_grows_in_proportion(toy_model):
    models = grid(toy_model, [64, 32], [1, 2])
    assert {(m.d_model, m.num_layers, m.feed_forward_dim) for m in models} == {
        (32, 1, 64), (32, 2, 64), (64, 1, 128), (64, 2, 128)
    }  # fmt: skip
    sizes = [num_parameters(model) for model in models]
    assert sizes == sorted(sizes)
    with pytest.raises(ConfigError, match="expected whole numbers"):
        grid(toy_model, [], [2])


def test_steps_follow_the_size(toy_model, toy_training):
    training = dataclasses.replace(toy_training, warmup_steps=1000)
    found = training_of(toy_model, training, 20)
    tokens = found.steps * found.batch_size * found.sequence_length
    assert tokens == pytest.approx(20 * num_parameters(toy_model), rel=1e-3)
    assert found.warmup_steps == min(1000, found.steps // 5)
    assert training_of(toy_model, training, 0) is training
    with pytest.raises(ConfigError, match="expected a number >= 0"):
        training_of(toy_model, training, -1)


def test_every_size_is_a_fair_comparison(toy_model, toy_training, token_folder, tmp_path):
    lines: list[str] = []
    training = dataclasses.replace(toy_training, steps=2, warmup_steps=0)
    comparison = comparison_at(named_arms(["bk", "transformer"]), training, 0, rates=(1e-3,), seeds=(0,))
    models = grid(toy_model, [16, 32], [1, 2])
    options = {"command": "test", "benchmarks": tmp_path, "work_dir": tmp_path / "work", "commit": "c"}
    source = CorpusSource(str(token_folder))
    rows = scale(comparison, models, source, **options, report=lines.append)
    assert len(rows) == 8
    curves = scaling_curves(rows, samples=5)
    assert [(curve.name, curve.against) for curve in curves] == [
        ("bk", "parameters"), ("bk", "operations"), ("transformer", "parameters"), ("transformer", "operations")
    ]  # fmt: skip
    assert all(len(curve.sizes) == 4 and curve.law is not None and len(curve.laws) == 5 for curve in curves)
    trial = comparison(models[0]).trial(comparison(models[0]).arms[0], 1e-3, 0)
    assert curves[1].sizes[0] == training_flops(trial)
    assert "N^-" in lines[-1] and len(lines[-1].strip().splitlines()) == 5
    assert scale(comparison, models, source, **options, budget=0.0, report=lines.append) == rows


def test_two_sizes_make_no_law():
    def row(size: int, loss: float) -> dict:
        metrics = {"arm": "a", "outcome": "done", "learning_rate": 1.0, "validation_loss": loss}
        return {"seeds": [0], "parameters": {"without_embeddings": size}, "metrics": metrics}

    (curve,) = scaling_curves([row(10, 3.0), row(20, 2.0)])
    assert curve.law is None and curve.sizes == (10.0, 20.0)
    assert "too few sizes" in scaling_table([curve])
