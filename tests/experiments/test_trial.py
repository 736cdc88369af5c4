from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from resnet_bk.experiments import adapting
from resnet_bk.experiments.arms import make_arms
from resnet_bk.experiments.positions import parse_positions
from resnet_bk.experiments.readings import (
    choose_reading,
    curve_steps,
    format_curve,
    parse_curve,
    tokens_to_reach,
)
from resnet_bk.experiments.trial import DONE, Trial, run_trial

VARYING = ("tokens_per_second", "evaluation_seconds")


def make(toy_model, toy_training, *, arm: str = "bk", context: str = "fresh", **changes) -> Trial:
    (made,) = make_arms(toy_model, {arm: {"mixer": {"bk": "resolvent", "transformer": "attention"}[arm], **changes}})
    return Trial(made, toy_training, context)


def fixed(result) -> dict:
    return {name: value for name, value in result.metrics.items() if name not in VARYING}


@pytest.mark.parametrize("context", ["fresh", "carried", "documents"])
@pytest.mark.parametrize("arm", ["bk", "transformer"])
def test_a_run_that_was_stopped_twice_comes_to_the_same(toy_model, toy_training, corpus, tmp_path, context, arm):
    trial = make(toy_model, toy_training, arm=arm, context=context, attention_window=8, dropout=0.1)
    whole = run_trial(trial, corpus, folder=tmp_path / "whole")
    assert whole is not None and whole.outcome == DONE and whole.tokens == 8 * 16 * 3

    for _ in range(2):
        steps = iter(range(4))
        assert run_trial(trial, corpus, folder=tmp_path / "cut", abandoned=lambda s=steps: next(s) == 3) is None
    rest = run_trial(trial, corpus, folder=tmp_path / "cut")
    assert rest is not None and fixed(rest) == fixed(whole)
    assert not (tmp_path / "cut").exists()


def test_the_deadline_keeps_what_was_done(toy_model, toy_training, corpus, tmp_path):
    assert run_trial(make(toy_model, toy_training), corpus, folder=tmp_path / "run", deadline=0.0) is None
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-000000"]


def test_every_token_of_both_splits_is_read_both_ways(toy_model, toy_training, corpus, tmp_path):
    result = run_trial(make(toy_model, toy_training), corpus, folder=tmp_path)
    metrics = result.metrics
    assert metrics["validation_tokens"] == len(corpus.validation) - 1
    assert metrics["test_tokens"] == len(corpus.test) - 1
    best = min("windows", "stream", key=lambda name: metrics[f"validation_loss_{name}"])
    assert metrics["reading"] == best
    assert metrics["test_perplexity"] == math.exp(metrics[f"test_loss_{best}"])
    bits = metrics["test_loss"] / math.log(2) * metrics["test_tokens"] / corpus.text_bytes(corpus.test.tokens[1:])
    assert metrics["test_bits_per_byte"] == pytest.approx(bits)
    assert [point[0] for point in parse_curve(metrics["curve"])] == [48, 96, 192, 384]


def test_attention_that_sees_everything_carries_nothing(toy_model, toy_training, corpus, tmp_path):
    windowed = make(toy_model, toy_training, arm="transformer", context="carried", attention_window=8)
    unbounded = make(toy_model, toy_training, arm="transformer", context="carried")
    assert windowed.carries_state and not unbounded.carries_state
    result = run_trial(unbounded, corpus, folder=tmp_path)
    assert result.metrics["training_state"] == "fresh" and result.metrics["reading"] == "windows"
    assert "validation_loss_stream" not in result.metrics


def test_carrying_the_state_changes_the_training_but_not_the_batches(
    toy_model, toy_training, corpus, tmp_path, monkeypatch
):
    trial = make(toy_model, toy_training, context="carried")
    carried = run_trial(trial, corpus, folder=tmp_path / "a").metrics
    monkeypatch.setattr(Trial, "carries_state", False)
    dropped = run_trial(trial, corpus, folder=tmp_path / "b").metrics
    assert (carried["training_state"], dropped["training_state"]) == ("carried", "fresh")
    assert carried["batches"] == dropped["batches"]
    # The first batch has nothing before it.
    first, second = (parse_curve(metrics["curve"]) for metrics in (carried, dropped))
    assert first[0] == second[0] and first[-1] != second[-1]


def test_a_rate_that_is_too_high_is_a_result(toy_model, toy_training, corpus, tmp_path):
    training = dataclasses.replace(toy_training, learning_rate=1e30, warmup_steps=0, gradient_clip_norm=0.0)
    result = run_trial(Trial(make(toy_model, toy_training).arm, training), corpus, folder=tmp_path)
    assert result.outcome.startswith("diverged")
    assert "validation_loss" not in result.metrics


def test_running_out_of_memory_is_a_result(toy_model, toy_training, corpus, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")

    monkeypatch.setattr("resnet_bk.experiments.trial.linear_cross_entropy", refuse)
    result = run_trial(make(toy_model, toy_training), corpus, folder=tmp_path)
    assert result.outcome == "out of memory: CUDA out of memory. Tried to allocate 1 TiB."


def test_identity_is_what_decides_the_result(toy_model, toy_training, corpus):
    trial = make(toy_model, toy_training)
    same = dataclasses.replace(toy_training, output_dir="elsewhere", log_every=3)
    assert dataclasses.replace(trial, training=same).identity(corpus) == trial.identity(corpus)
    for other in (
        dataclasses.replace(trial, context="carried"),
        dataclasses.replace(trial, label="again"),
        dataclasses.replace(trial, training=dataclasses.replace(toy_training, seed=1)),
        make(toy_model, toy_training, arm="transformer"),
    ):
        assert other.identity(corpus) != trial.identity(corpus)


def test_curves_are_log_spaced_and_tell_when_a_loss_is_reached():
    assert curve_steps(100, 4) == [12, 25, 50, 100]
    assert curve_steps(2, 8) == [1, 2]
    curve = parse_curve(format_curve([[100, 6.0, 5.0], [200, 5.0, 4.0], [400, 4.0, 3.0]]))
    assert tokens_to_reach(curve, 5.5) == 100
    assert tokens_to_reach(curve, 3.5) == pytest.approx(200 * math.sqrt(2))
    assert tokens_to_reach(curve, 2.9) is None


def test_the_reading_is_chosen_on_validation_alone():
    metrics = {"validation_loss_windows": 2.0, "validation_loss_stream": 1.9, "test_loss_windows": 1.0}
    metrics |= {"test_loss_stream": 3.0}
    metrics |= {
        f"{split}_bits_per_byte_{name}": None for split in ("validation", "test") for name in ("windows", "stream")
    }
    chosen = choose_reading(metrics)
    assert chosen["reading"] == "stream" and chosen["test_loss"] == 3.0


def test_loss_by_position_is_measured_after_training(toy_model, toy_training, corpus, tmp_path):
    plain = make(toy_model, toy_training)
    trial = dataclasses.replace(plain, text_length=64, texts=3)
    metrics = run_trial(trial, corpus, folder=tmp_path).metrics
    bins = parse_positions(metrics["by_position"])
    assert [(start, stop) for start, stop, _, _ in bins] == [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64)]
    assert metrics["training_length"] == 16 and all(loss > 0 and error >= 0 for _, _, loss, error in bins)
    # It is part of what a run is, where it is asked for.
    assert trial.identity(corpus) != plain.identity(corpus)
    assert "texts" not in plain.identity(corpus)


def test_a_rate_that_diverges_on_the_test_split_has_no_figure(corpus, monkeypatch):
    def diverging(model, tokens, *_, rate, **__):
        return SimpleNamespace(loss=1e4 if tokens is corpus.splits["test"].tokens else 1 + rate)

    monkeypatch.setattr(adapting, "evaluate_dynamic", diverging)
    found = adapting.dynamic_readings(None, corpus, (1e-3, 1e-4))
    assert found == {"dynamic_rate": 1e-4, "dynamic_segment_tokens": 128, "validation_start_loss_dynamic": 1 + 1e-4}


def test_dynamic_evaluation_is_a_reading_of_its_own(toy_model, toy_training, corpus, tmp_path):
    plain = make(toy_model, toy_training)
    rates = (1e30, 1e-4, 0.0)
    trial = dataclasses.replace(plain, dynamic_rates=rates)
    assert "dynamic_rates" not in plain.identity(corpus) and trial.identity(corpus)["dynamic_rates"] == list(rates)
    metrics = run_trial(trial, corpus, folder=tmp_path).metrics
    without = run_trial(plain, corpus, folder=tmp_path).metrics
    assert metrics["test_loss"] == without["test_loss"] and "test_loss_dynamic" not in without
    assert metrics["dynamic_rate"] in rates[1:]
    assert metrics["test_perplexity_dynamic"] == math.exp(metrics["test_loss_dynamic"])
    still = run_trial(dataclasses.replace(plain, dynamic_rates=(0.0,)), corpus, folder=tmp_path).metrics
    assert still["test_loss_dynamic"] == pytest.approx(still["test_loss_stream"], rel=1e-5)
    assert (
        run_trial(dataclasses.replace(plain, dynamic_rates=(1e30,)), corpus, folder=tmp_path).metrics["dynamic_rate"]
        is None
    )
