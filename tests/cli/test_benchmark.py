from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from resnet_bk.cli import main
from resnet_bk.cli.benchmark import BENCHMARKS
from resnet_bk.training.config import RunConfig

MODEL = [
    "--model.vocab_size", "16", "--model.d_model", "16", "--model.num_layers", "1", "--model.feed_forward_dim", "32",
    "--model.head_dim", "16", "--model.state_size", "8", "--model.attention_head_dim", "16",
]  # fmt: skip
TRAINING = [
    "--training.steps", "3", "--training.batch_size", "2", "--training.warmup_steps", "1", "--training.device", "cpu",
    "--training.evaluation_tokens", "64",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 16, 2000))
    return tmp_path


def compare(folder, *options: str) -> list[str]:
    where = ["--tokens", str(folder / "ids.npy"), "--benchmarks", str(folder / "b"), "--work", str(folder / "w")]
    return ["benchmark", "compare", *where, *MODEL, *TRAINING, "--seeds", "0", "--models", "bk", *options]


def test_compare_writes_a_row_a_run_and_a_table(folder, capsys):
    (folder / "arms.yaml").write_text("decay only: {dynamics: decay_only}\n")
    options = ["--arms", str(folder / "arms.yaml"), "--rates", "1e-3", "--sequence-length", "8"]
    assert main(compare(folder, *options)) == 0
    out = capsys.readouterr().out
    assert "2 of at least 2 runs have results, 2 new." in out and "decay only" in out
    rows = [json.loads(line) for line in (folder / "b/results/compare.jsonl").read_text().splitlines()]
    assert [row["metrics"]["arm"] for row in rows] == ["bk", "decay only"]
    assert "of 2 x 8," in rows[0]["metrics"]["recipe"]
    # The folder is not the project's; the ledger is told the file alone.
    assert rows[0]["command"].startswith("resnet-bk benchmark compare --tokens ids.npy ")
    assert main(compare(folder, *options)) == 0
    assert "0 new" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["benchmark", "compar"], "Unknown benchmark 'compar'; did you mean 'compare'?"),
        (["benchmark", "compare", "--modells", "bk"], "did you mean 'models'?"),
        (["benchmark", "compare", "--parralel", "2"], "did you mean 'parallel'?"),
        (["benchmark", "compare", "--data.name", "wikitext-3"], "did you mean 'wikitext-"),
        (["benchmark", "compare", "--context", "carry"], "context is 'carry'"),
    ],
)
def test_bad_names_tell_the_nearest(arguments, said, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--models", "bk,mamba"], "did you mean 'mamba"),
        (["--rates", "fast"], "--rates is 'fast'"),
        (["--arms", "ids.npy"], "ids.npy"),
        (["--rates", "0"], "at least one learning rate > 0"),
    ],
)
def test_bad_values_are_one_line(folder, options, said, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(compare(folder, *options)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_option_is_documented(name, capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", name, "--help"])
    sections = {"--help", "--config", "--print_config", "--task", *(f"--{f.name}" for f in fields(RunConfig))}
    options = set(re.findall(r"--[a-z][a-z_-]+(?![\w.])", capsys.readouterr().out)) - sections
    page = (Path(__file__).parents[2] / "docs" / "benchmarking.md").read_text()
    assert options and not {option for option in options if option not in page}


def test_help_lists_the_benchmarks(capsys):
    assert main(["benchmark"]) == 0
    assert "compare" in capsys.readouterr().out


def test_speed_times_each_model(folder, capsys):
    options = ["--lengths", "8,16", "--batch-tokens", "16", "--repeats", "1", "--models", "bk,transformer"]
    command = ["benchmark", "speed", *MODEL, "--device", "cpu", "--benchmarks", str(folder / "b"), *options]
    assert main(command) == 0
    assert "forward and backward" in capsys.readouterr().out
    assert len((folder / "b/results/speed.jsonl").read_text().splitlines()) == 8
    assert main([*command, "--lengths", "x"]) == 2


def test_flops_are_counted_without_running_anything(capsys):
    assert main(["benchmark", "flops", *MODEL, "--models", "bk,transformer", "--length", "64", "--by-part"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("| model |") and "| transformer |" in out and out.count("total per token |") == 3
    assert main(["benchmark", "flops", "--lenght", "64"]) == 2
    assert "did you mean 'length'?" in capsys.readouterr().err


def test_synthetic_trains_each_model_on_each_task(folder, capsys):
    budget = ["--task.steps", "2", "--task.tokens_per_step", "64", "--task.evaluation_tokens", "64"]
    tasks = ["--tasks", "parity:length=8"]
    options = [*tasks, "--models", "bk", "--rates", "1e-3", "--seeds", "0", "--device", "cpu", *budget]
    command = ["benchmark", "synthetic", *MODEL, *options, "--benchmarks", str(folder / "b")]
    assert main(command) == 0
    (row,) = (json.loads(line) for line in (folder / "b/results/synthetic.jsonl").read_text().splitlines())
    assert (row["metrics"]["task"], row["metrics"]["arm"]) == ("parity:length=8", "bk")
    assert main([*command, "--tasks", "paritty"]) == 2
    assert "Unknown task 'paritty'; did you mean 'parity'?" in capsys.readouterr().err


def test_long_context_reads_beyond_the_training_length(folder, capsys):
    command = compare(folder, "--rates", "1e-3", "--sequence-length", "8", "--models", "bk,transformer")
    command[1] = "long-context"
    assert main([*command, "--times", "4", "--texts", "1"]) == 0
    out = capsys.readouterr().out
    assert "trained at 8; 1 concatenations of documents, 32 tokens each" in out and "16-31" in out
    assert len((folder / "b/results/long-context.jsonl").read_text().splitlines()) == 2
    assert main([*command, "--times", "0"]) == 2


def test_scaling_puts_laws_through_a_grid(folder, capsys):
    command = compare(folder, "--rates", "1e-3", "--sequence-length", "8", "--widths", "16,32", "--depths", "1,2")
    command[1] = "scaling"
    command += ["--tokens-per-parameter", "0.005"]
    assert main(command) == 0
    assert "bk   parameters  4     4 " in capsys.readouterr().out
    assert main([*command, "--widths", "20"]) == 2
    assert "head_dim" in capsys.readouterr().err


def test_report_is_written_from_the_ledger(folder, capsys):
    assert main(compare(folder, "--rates", "1e-3", "--sequence-length", "8")) == 0
    assert main(["benchmark", "report", "--benchmarks", str(folder / "b")]) == 0
    assert "4 files in" in capsys.readouterr().out
    assert (folder / "b" / "REPORT.md").is_file() and (folder / "b" / "LEDGER.md").is_file()
