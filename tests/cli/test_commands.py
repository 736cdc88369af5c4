"""The commands do their work: train, generate, evaluate, info and demo on a toy model."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import pytest

from resnet_bk.cli import main

ROOT = Path(__file__).parents[2]


def test_train_leaves_a_complete_run(toy_run):
    run = toy_run / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [2, 4]
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [2, 4]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (run / "step-000004").iterdir()}
    log = (toy_run / "train.log").read_text()
    assert "unigram" in log and str(run / "step-000004") in log


def test_train_refuses_to_overwrite_a_run(toy_run, capsys):
    assert main(["train", "--config", str(toy_run / "config.yaml")]) == 2
    assert "training.resume" in capsys.readouterr().err


def test_train_resumes(toy_run, tmp_path, capsys):
    arguments = ["train", "--config", str(toy_run / "config.yaml"), f"--training.output_dir={tmp_path}"]
    assert main([*arguments, "--training.checkpoint_every=2", "--training.steps=2"]) == 0
    assert main([*arguments, "--training.resume=true", "--training.steps=3"]) == 0
    assert "step-000003" in capsys.readouterr().out


def test_script_translates_its_own_option():
    translate = runpy.run_path(str(ROOT / "train.py"))["translate"]
    expected = ["--config", "c.yaml", "--data.name", "wikitext-2"]
    assert translate(["--config", "c.yaml", "--dataset", "wikitext2"]) == expected
    assert translate(["--dataset=wikitext2", "--training.steps=3"]) == ["--data.name=wikitext-2", "--training.steps=3"]
    assert translate(["--dataset", "owner/name"]) == ["--data.name", "owner/name"]


def generate(capsys, *arguments: str) -> str:
    assert main(["generate", *arguments]) == 0
    return capsys.readouterr().out


def test_generate_continues_the_prompt_and_repeats_with_a_seed(checkpoint, capsys):
    arguments = ["--model", checkpoint, "--prompt", "def one", "--temperature=1", "--max-new-tokens=20", "--seed=3"]
    first = generate(capsys, *arguments)
    assert first.startswith("def one") and len(first) > len("def one") + 1
    assert generate(capsys, *arguments) == first
    assert generate(capsys, *arguments[:-1], "--seed=4") != first


def test_generate_from_a_file_prints_the_continuation_only(checkpoint, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("def one")
    arguments = ["--model", checkpoint, "--temperature=1", "--max-new-tokens=20", "--seed=3"]
    from_file = generate(capsys, *arguments, "--prompt-file", str(tmp_path / "prompt.txt"))
    assert generate(capsys, *arguments, "--prompt", "def one") == "def one" + from_file


def test_generate_without_a_prompt_begins_a_document(checkpoint, capsys):
    assert generate(capsys, "--model", checkpoint, "--max-new-tokens=5", "--temperature=1", "--seed=0").strip()


def test_generate_stops_at_a_string(checkpoint, capsys):
    arguments = ["--model", checkpoint, "--prompt", "def", "--temperature=2", "--max-new-tokens=200", "--seed=1"]
    free = generate(capsys, *arguments)[3:-1]
    stop = free[len(free) // 2 : len(free) // 2 + 2]
    assert generate(capsys, *arguments, "--stop", stop)[3:-1] == free[: free.index(stop)]


def test_evaluate_agrees_with_the_trainer(toy_run, checkpoint, capsys):
    rows = [json.loads(line) for line in (toy_run / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "validation"][-1]
    data = [
        f"--data.path={toy_run / 'text'}",
        f"--data.cache_dir={toy_run / 'cache'}",
        "--data.validation_fraction=0.1",
    ]
    arguments = ["evaluate", "--model", checkpoint, "--data.name=text", *data, "--tokens=256", "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"] == trained["evaluated_tokens"] == 255
    assert report["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    assert report["bits_per_byte"] == pytest.approx(trained["bits_per_byte"], rel=1e-5)
    assert report["perplexity"] == pytest.approx(math.exp(report["loss"]))


def test_evaluate_a_file_by_position(toy_run, checkpoint, capsys):
    text = str(toy_run / "text" / "one.txt")
    assert main(["evaluate", "--model", checkpoint, "--text", text, "--by-position", "--segment-length=100"]) == 0
    output = capsys.readouterr().out
    assert "bits per byte" in output and "preceding tokens" in output
    assert main(["evaluate", "--model", checkpoint, "--text", text, "--by-position", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    parts = report["by_position"]
    assert sum(part["count"] for part in parts) == report["tokens"]
    total = sum(part["mean"] * part["count"] for part in parts)
    assert total / report["tokens"] == pytest.approx(report["loss"], rel=1e-5), "the bins are parts of the same loss"


def test_info_of_the_installation(capsys):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert "torch" in output and "1,171,324" in output.replace(" ", " "), output


def test_info_of_a_checkpoint(checkpoint, capsys):
    assert main(["info", "--model", checkpoint]) == 0
    output = capsys.readouterr().out
    assert "training checkpoint: step 4, 256 tokens read" in output
    assert "d_model            32" in output and "tokenizer: 300 tokens" in output


def test_demo_compares_plots_and_writes(toy_run, tmp_path, capsys):
    arguments = ["demo", "--config", str(toy_run / "config.yaml"), f"--training.output_dir={tmp_path / 'run'}"]
    status = main([*arguments, "--training.steps=60", "--training.learning_rate=1e-2"])
    output = capsys.readouterr().out
    assert status == 0, output
    for part in ("unigram", "xz", "this model", "loss.png", "a sample, after the prompt 'def'"):
        assert part in output
    assert (tmp_path / "run" / "loss.png").is_file()

    again = [*arguments, "--training.steps=60", "--training.learning_rate=1e-2", "--training.resume=true"]
    assert main(again) == 0, "a finished demo shows its result again"
    repeated = capsys.readouterr().out
    assert "Continuing the run" in repeated
    assert repeated.split("Bits per byte")[1] == output.split("Bits per byte")[1]


def test_demo_fails_when_the_model_learned_nothing(toy_run, tmp_path, capsys):
    arguments = ["demo", "--config", str(toy_run / "config.yaml"), f"--training.output_dir={tmp_path / 'run'}"]
    assert main([*arguments, "--training.steps=1", "--training.learning_rate=1e-9"]) == 1
    assert "no better than token frequencies" in capsys.readouterr().out
