from __future__ import annotations

import pytest
import torch

from resnet_bk.errors import ConfigError
from resnet_bk.experiments.arms import make_arms, named_arms
from resnet_bk.experiments.rows import read_rows
from resnet_bk.experiments.speed import SpeedCase, measure_speed, speed_cases, speed_table


@pytest.fixture
def arms(toy_model):
    return make_arms(toy_model, named_arms(["bk", "transformer"]))


def test_every_arm_is_timed_in_every_case_once(arms, tmp_path):
    cases = speed_cases([16, 40], 32)
    assert [(case.batch, case.length) for case in cases] == [(2, 16), (2, 16), (1, 40), (1, 40)]
    lines: list[str] = []
    options = {"command": "test", "device": "cpu", "repeats": 3, "benchmarks": tmp_path, "report": lines.append}
    rows = measure_speed(arms, cases, **options)
    assert len(rows) == 8
    for row in rows:
        metrics = row["metrics"]
        assert metrics["outcome"] == "done" and metrics["milliseconds"] > 0 and metrics["peak_bytes"] is None
        assert metrics["tokens_per_second"] == pytest.approx(row["tokens"] / metrics["milliseconds"] * 1e3)
    assert lines[0].splitlines()[1].split()[0] == "bk" and lines[0].splitlines()[1].endswith("1.00")
    again = measure_speed(arms, cases, **options)
    assert [row["metrics"] for row in again] == [row["metrics"] for row in rows]
    assert len(read_rows("speed", tmp_path)) == 8
    assert measure_speed(arms, cases, **options, label="again", budget=0.0) == []
    assert "The time was up" in lines[-1]


def test_a_model_that_does_not_fit_leaves_the_others(arms, tmp_path, monkeypatch):
    from resnet_bk.experiments import speed

    build = speed.LanguageModel

    def refuse(config):
        if config.mixer == "attention":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")
        return build(config)

    # Parameters are counted on shapes alone, elsewhere.
    monkeypatch.setattr(speed, "LanguageModel", refuse)
    rows = measure_speed(
        arms, [SpeedCase(8, 1, "forward")], command="test", device="cpu", repeats=1, benchmarks=tmp_path, report=str
    )
    assert [row["metrics"]["outcome"][:13] for row in rows] == ["done", "out of memory"]
    assert "out of memory" in speed_table(rows, reference="bk")


def test_bad_cases_are_refused(arms, tmp_path):
    with pytest.raises(ConfigError, match="at least one length >= 2"):
        speed_cases([1], 8)
    with pytest.raises(ConfigError, match="repeats is 0"):
        measure_speed(arms, speed_cases([8], 8), command="test", repeats=0, benchmarks=tmp_path)
