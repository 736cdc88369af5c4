from __future__ import annotations

import dataclasses
import json

from resnet_bk.errors import BackendError
from resnet_bk.evaluation.ledger import write_ledger
from resnet_bk.experiments import suite
from resnet_bk.experiments.suite import read_rows, suite_table, synthetic_suite, task_label
from resnet_bk.experiments.synthetic import TaskBudget
from resnet_bk.experiments.tasks.modular import ModularSums
from resnet_bk.experiments.tasks.parity import Parity
from resnet_bk.models.config import ModelConfig

TINY = ModelConfig(vocab_size=1, d_model=16, num_layers=1, feed_forward_dim=16, head_dim=16, state_size=16)
ARMS = {"exact": TINY, "decay only": dataclasses.replace(TINY, dynamics="decay_only")}
TASKS = [Parity(length=6, evaluation_lengths=(6, 12)), ModularSums(length=6, evaluation_lengths=(6,), modulus=3)]
BUDGET = TaskBudget(steps=6, tokens_per_step=48, warmup_steps=2, evaluation_tokens=96)
OPTIONS = dict(budget=BUDGET, rates=(1e-6, 1e-2), seeds=(0, 1), commit="test")


def run(folder, **changes):
    lines: list[str] = []
    options = {**OPTIONS, **changes}
    rows = synthetic_suite(
        options.pop("arms", ARMS), options.pop("tasks", TASKS), benchmarks=folder, report=lines.append, **options
    )
    return rows, lines


def test_a_suite_sweeps_repeats_and_is_not_run_again(tmp_path, monkeypatch):
    rows, lines = run(tmp_path)
    assert len(rows) == 2 * 2 * (2 + 1) == len(read_rows(tmp_path))
    assert len(lines) == 12 + 2  # one a run, a table a task
    for row in rows:
        assert row["metrics"]["stopped"] == "steps" and row["tokens"] == 6 * 48
        assert row["parameters"]["total"] > 0 and row["metrics"]["state_bytes"] > 0
    for place in (0, 3, 6, 9):
        sweep, other = rows[place : place + 2], rows[place + 2]
        assert [row["metrics"]["learning_rate"] for row in sweep] == [1e-6, 1e-2]
        best = min(sweep, key=lambda row: row["metrics"]["training_loss_nats"])
        assert other["seeds"] == [1] and other["config_hash"] == best["config_hash"]
    write_ledger(tmp_path)  # every row can be shown

    monkeypatch.setattr(suite, "train_on_task", None)  # must not be called
    again, lines = run(tmp_path)
    assert again == rows and len(lines) == 2
    monkeypatch.undo()
    more, _ = run(tmp_path, seeds=(0, 1, 2))
    assert len(more) == 16 and len(read_rows(tmp_path)) == 16


def test_a_suite_stops_in_time_and_continues(tmp_path, monkeypatch):
    moments = iter(range(0, 1000, 10))
    monkeypatch.setattr(suite.time, "monotonic", lambda: float(next(moments)))
    rows, lines = run(tmp_path, seconds=100.0)
    monkeypatch.undo()
    assert 0 < len(rows) < 12
    assert "Out of time before" in lines[-1]
    continued, _ = run(tmp_path)
    assert continued[: len(rows)] == rows and len(continued) == 12


def test_failures_are_rows(tmp_path):
    rows, lines = run(
        tmp_path,
        rates=(1e30,),
        budget=dataclasses.replace(BUDGET, warmup_steps=0, gradient_clip_norm=0.0),
        arms={"exact": TINY},
    )
    # Where every rate diverges there is none to repeat.
    assert [row["metrics"]["stopped"] for row in rows] == ["diverged"] * 2
    assert "| parity length=6 | exact | 1e+30 | 1 |" in lines[1]


def test_errors_are_rows(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise BackendError("no such kernel; use another.")

    monkeypatch.setattr(suite, "train_on_task", refuse)
    rows, _ = run(tmp_path, arms={"exact": TINY}, tasks=TASKS[:1])
    assert [row["metrics"]["stopped"] for row in rows] == ["failed: no such kernel; use another."] * 2


def test_table_shows_mean_and_spread_of_the_best_rate():
    def row(seed, rate, loss, tail, hash):
        metrics = {
            "task": "parity", "arm": "a", "learning_rate": rate, "state_bytes": 1234, "training_loss_nats": loss,
            "tail_accuracy_64": tail, "tail_accuracy_128": 0.5, "tail_accuracy_deep_64": 0.1,
        }  # fmt: skip
        return {"seeds": [seed], "config_hash": hash, "metrics": metrics}

    rows = [row(0, 0.1, 0.9, 0.1, "x"), row(0, 0.2, 0.1, 0.9, "y"), row(1, 0.2, 3.0, 0.7, "y")]
    assert suite_table(rows).splitlines() == [
        "| task | model | rate | seeds | state bytes | 64 | 128 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| parity | a | 0.2 | 2 | 1,234 | 0.800 (0.700-0.900) | 0.500 (0.500-0.500) |",
    ]


def test_labels():
    assert task_label(Parity()) == "parity"
    assert task_label(TASKS[1]) == "modular_sums length=6 modulus=3"
    assert json.dumps(TASKS[1].describe())


def test_no_time_no_rows(tmp_path):
    rows, _ = run(tmp_path, seconds=-1.0)
    assert rows == [] and read_rows(tmp_path) == []
