from __future__ import annotations

import dataclasses

import pytest

from resnet_bk.errors import BackendError, ConfigError
from resnet_bk.evaluation.ledger import write_ledger
from resnet_bk.experiments import suite
from resnet_bk.experiments.arms import Arm
from resnet_bk.experiments.rows import read_rows
from resnet_bk.experiments.suite import QUESTION, suite_table, synthetic_suite
from resnet_bk.experiments.synthetic import TaskBudget
from resnet_bk.experiments.tasks.modular import ModularSums
from resnet_bk.experiments.tasks.parity import Parity
from resnet_bk.models.config import ModelConfig

TINY = ModelConfig(vocab_size=1, d_model=16, num_layers=1, feed_forward_dim=16, head_dim=16, state_size=16)
EXACT = Arm("exact", TINY)
ARMS = [EXACT, Arm("decay only", dataclasses.replace(TINY, dynamics="decay_only"))]
PARITY = Parity(length=6, evaluation_lengths=(6, 12))
SUMS = ModularSums(length=6, evaluation_lengths=(6,), modulus=3)
BUDGET = TaskBudget(steps=6, tokens_per_step=48, warmup_steps=2, evaluation_tokens=96)
RATES = (1e-6, 1e-2)


def run(folder, arms=ARMS, tasks=(PARITY, SUMS), **changes):
    lines: list[str] = []
    options = {"budget": BUDGET, "rates": RATES, "seeds": (0, 1), "commit": "test", **changes}
    rows = synthetic_suite(arms, tasks, benchmarks=folder, report=lines.append, **options)
    return rows, lines


def test_a_suite_sweeps_repeats_and_is_not_run_again(tmp_path, monkeypatch):
    rows, lines = run(tmp_path)
    assert len(rows) == 2 * 2 * (2 + 1) == len(read_rows(QUESTION, tmp_path))
    assert len(lines) == 12 + 1  # one a run, and the table
    for row in rows:
        assert row["metrics"]["stopped"] == "steps" and row["tokens"] == 6 * 48
        assert row["parameters"]["total"] > 0 and row["metrics"]["state_bytes"] > 0
    for task in ("parity:length=6", "modular_sums:length=6:modulus=3"):
        for arm in ("exact", "decay only"):
            found = [row for row in rows if (row["metrics"]["task"], row["metrics"]["arm"]) == (task, arm)]
            sweep, other = found[:2], found[2]
            assert [row["metrics"]["learning_rate"] for row in sweep] == list(RATES)
            best = min(sweep, key=lambda row: row["metrics"]["training_loss_nats"])
            assert other["seeds"] == [1]
            assert other["metrics"]["learning_rate"] == best["metrics"]["learning_rate"]
            assert other["metrics"]["training_loss_nats"] != best["metrics"]["training_loss_nats"]
    write_ledger(tmp_path)  # every row can be shown

    monkeypatch.setattr(suite, "train_on_task", None)  # must not be called
    again, lines = run(tmp_path)
    assert again == rows and len(lines) == 1
    monkeypatch.undo()
    more, _ = run(tmp_path, seeds=(0, 1, 2))
    assert len(more) == 16 == len(read_rows(QUESTION, tmp_path))


def test_a_suite_stops_in_time_and_continues(tmp_path, monkeypatch):
    moments = iter(range(0, 100_000, 10))
    monkeypatch.setattr(suite.time, "monotonic", lambda: float(next(moments)))
    rows, lines = run(tmp_path, seconds=200.0)
    monkeypatch.undo()
    assert 0 < len(rows) < 8
    assert "have no result" in lines[-1]
    continued, lines = run(tmp_path)
    assert len(continued) == 12 and all(row in continued for row in rows)
    assert "have no result" not in lines[-1]
    assert run(tmp_path / "none", seconds=-1.0)[0] == []


@pytest.mark.slow
def test_runs_in_processes_come_to_the_same(tmp_path):
    alone, _ = run(tmp_path / "alone")
    together, _ = run(tmp_path / "together", parallel=2)
    assert [row["config_hash"] for row in alone] == [row["config_hash"] for row in together]
    for one, other in zip(alone, together, strict=True):
        assert one["metrics"] | {"runs_at_once": 2} == other["metrics"]


def test_a_worker_ends_with_its_parent(monkeypatch):
    """Else it would hold the GPU of a suite that was killed."""
    parents, ended = iter([7, 7, 1]), []
    monkeypatch.setattr(suite.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(suite.os, "_exit", ended.append)
    suite._end_with(7, every=0.0)
    assert ended == [1] and next(parents, None) is None


def test_divergence_is_a_result(tmp_path):
    wild = dataclasses.replace(BUDGET, warmup_steps=0, gradient_clip_norm=0.0)
    rows, lines = run(tmp_path, rates=(1e30,), budget=wild, arms=[EXACT])
    # Where every rate diverges there is none to repeat.
    assert [row["metrics"]["stopped"] for row in rows] == ["diverged"] * 2
    assert "| exact | 1e+30 | 1 |" in lines[-1]


def test_errors_are_rows_and_tried_again(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise BackendError("no such kernel; use another.")

    monkeypatch.setattr(suite, "train_on_task", refuse)
    rows, lines = run(tmp_path, arms=[EXACT], tasks=[PARITY])
    assert rows == [] and lines[-1].startswith("2 runs have no result")
    found = [row["metrics"]["stopped"] for row in read_rows(QUESTION, tmp_path)]
    assert found == ["failed: no such kernel; use another."] * 2
    monkeypatch.undo()
    rows, _ = run(tmp_path, arms=[EXACT], tasks=[PARITY])
    assert [row["metrics"]["stopped"] for row in rows] == ["steps"] * 3


def test_table_shows_mean_and_spread_of_the_best_rate():
    def row(seed, rate, loss, tail, recipe="long", task="parity"):
        metrics = {
            "task": task, "arm": "a", "model": "", "recipe": recipe, "learning_rate": rate, "state_bytes": 1234,
            "training_loss_nats": loss, "tail_accuracy_64": tail, "tail_accuracy_128": 0.5, "tail_accuracy_deep_64": 0,
        }  # fmt: skip
        return {"seeds": [seed], "metrics": metrics}

    rows = [
        row(0, 0.1, 0.9, 0.1),
        row(0, 0.2, 0.1, 0.9),
        row(1, 0.2, 3.0, 0.7),
        row(0, 0.2, 0.5, 0.0, "short"),
        row(0, 0.2, 0.5, 0.25, task="other"),
    ]
    assert suite_table(rows).splitlines() == [
        "| parity | rate | seeds | state bytes | 64 | 128 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| a | 0.2 | 2 | 1,234 | 0.800 (0.700-0.900) | 0.500 (0.500-0.500) |",
        "",
        "| other | rate | seeds | state bytes | 64 | 128 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| a | 0.2 | 1 | 1,234 | 0.250 | 0.500 |",
    ]


@pytest.mark.parametrize("changes", [dict(rates=()), dict(seeds=()), dict(parallel=0)])
def test_nothing_to_run(tmp_path, changes):
    with pytest.raises(ConfigError, match="expected at least one of each"):
        run(tmp_path, **changes)
