from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from resnet_bk import Trainer
from resnet_bk.errors import DataError
from resnet_bk.training.callbacks import MetricsFile, Progress, TensorBoard

TRAIN = {"kind": "train", "step": 2, "tokens": 64, "loss": 2.5, "gradient_norm": None, "tokens_per_second": 1234.5,
         "learning_rate": 1e-3}  # fmt: skip
VALIDATION = {"kind": "validation", "step": 2, "tokens": 64, "loss": 2.0, "perplexity": 7.389, "bits_per_byte": 1.25}


def at_step(folder, step: int, *, resume: bool = False):
    """What callbacks read of a trainer."""
    return SimpleNamespace(output_dir=folder, step=step, config=SimpleNamespace(steps=10, resume=resume))


def test_metrics_file_keeps_what_the_checkpoint_knew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"kind": "train", "step": k}) + "\n" for k in range(1, 6)) + '{"kind": "tr')
    metrics = MetricsFile()
    metrics.on_train_start(at_step(tmp_path, 3))
    metrics.on_log(at_step(tmp_path, 4), TRAIN | {"step": 4})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]  # before it is closed
    metrics.on_train_end(at_step(tmp_path, 4))
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_of_a_run_without_checkpoint_are_replaced(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("anything\n")
    metrics = MetricsFile()
    metrics.on_train_start(at_step(tmp_path, 0))
    metrics.on_train_end(at_step(tmp_path, 0))
    assert path.read_text() == ""


@pytest.mark.parametrize("line", ["not json", "[]", '{"step": "one"}'])
def test_damaged_metrics_are_located_and_left_alone(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2 is not a row of metrics"):
        MetricsFile().on_train_start(at_step(tmp_path, 3))
    assert path.read_text().endswith(line + "\n")


def test_tensorboard_holds_every_number(tiny):
    trainer = Trainer(
        tiny.model(), tiny.loader(), tiny.config(tensorboard=True), validation=tiny.validation, progress=False
    )
    trainer.train()
    events = EventAccumulator(str(trainer.output_dir / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/gradient_norm", "train/tokens_per_second", "train/learning_rate", "validation/loss",
            "validation/perplexity"} <= set(events.Tags()["scalars"])  # fmt: skip
    rows = [json.loads(line) for line in (trainer.output_dir / "metrics.jsonl").read_text().splitlines()]
    expected = {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(expected, rel=1e-6)


def test_tensorboard_leaves_out_what_is_not_a_number(tmp_path):
    board = TensorBoard()
    board.on_train_start(at_step(tmp_path, 0))
    board.on_log(at_step(tmp_path, 2), TRAIN)
    board.on_train_end(at_step(tmp_path, 2))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        f"train/{n}" for n in ("tokens", "loss", "tokens_per_second", "learning_rate")
    }


def run_progress(trainer) -> None:
    progress = Progress()
    progress.on_train_start(trainer)
    progress.on_step_end(trainer)
    progress.on_log(trainer, TRAIN)
    progress.on_log(trainer, VALIDATION)
    progress.on_log(trainer, VALIDATION | {"perplexity": None, "bits_per_byte": None})
    progress.on_train_end(trainer)


def test_progress_is_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    run_progress(at_step(tmp_path, 2))
    assert capsys.readouterr().out.splitlines() == [
        "Resumed at step 2.",
        "step 2/10  loss 2.5000  rate 1.00e-03  1,234 tokens/s",
        "step 2/10  validation loss 2.0000  perplexity 7.39  1.2500 bits per byte",
        "step 2/10  validation loss 2.0000  perplexity beyond float64",
    ]


def test_progress_is_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    run_progress(at_step(tmp_path, 0))
    output = capsys.readouterr().out
    assert "2/10" in output or "0/10" in output
    assert "loss 2.5000" in output and "validation loss 2.0000" in output and "\x1b[" in output
