"""Each kind of bad input: exit status 2, one line that says what is wrong, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resnet_bk.cli import main


@pytest.fixture
def refused(capsys):
    """Runs a command that must be refused; returns its one line on standard error."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        *notes, error = capsys.readouterr().err.splitlines()
        assert error.startswith("resnet-bk: error: ")
        assert all(note.startswith(("Training a tokenizer", "Tokenizing", "Checkpoint ")) for note in notes), notes
        return error

    return run


@pytest.fixture
def train(toy_run, tmp_path, refused):
    """Runs `train` on the toy configuration with options that must be refused, and checks that no run began."""

    def run(*options: str) -> str:
        output = tmp_path / "new-run"
        cache = tmp_path / "new-cache"
        base = [
            "--config",
            str(toy_run / "config.yaml"),
            f"--training.output_dir={output}",
            f"--data.cache_dir={cache}",
        ]
        error = refused("train", *base, *options)
        assert not output.exists()
        assert not list(cache.glob(".*")), "a cache holds complete corpora only"
        return error

    return run


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A copy of the toy checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def damage(copy: Path, change) -> None:
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--model.d_modl=3", "did you mean 'model.d_model'?"),
        ("--model.n_seq=128", "use training.sequence_length"),
        ("--model.d_model=wide", "model.d_model is 'wide'; expected a whole number."),
        ("--model.absorption_floor=0", "model.absorption_floor is 0.0; expected a number > 0."),
        ("--model.absorption_floor=-1e-3", "model.absorption_floor is -0.001; expected a number > 0."),
        ("--training.learning_rate=nan", "training.learning_rate is 'nan'; expected a number."),
        ("--training.learning_rate=.nan", "training.learning_rate is nan; expected a number > 0."),
        ("--training.device=tpu", "expected auto, cpu, cuda or cuda:N."),
        ("--data.name=wikitext2 --data.path=null", "did you mean 'wikitext-2'?"),
        ("--config=nowhere.yaml", "nowhere.yaml: No such file or directory"),
        ("--data.path=nowhere", "nowhere does not exist"),
        ("--data.tokenizer=nowhere.json", "nowhere.json does not exist"),
        ("--model.vocab_size=100", "model.vocab_size is 100"),
    ],
)
def test_train_with_a_wrong_option(train, option, expected):
    assert expected in train(*option.split())


def test_tokenizer_with_more_ids_than_the_model(train, checkpoint):
    assert "the tokenizer has 300 ids" in train(f"--data.tokenizer={checkpoint}", "--model.vocab_size=299")


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "is empty"), (b"a" * 1000 + b"\xff\n", "byte 1000 is 0xff")],
    ids=["empty", "not-utf8"],
)
def test_unreadable_text(train, refused, checkpoint, tmp_path, content, expected):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert expected in train(f"--data.path={path}")
    assert expected in refused("evaluate", "--model", checkpoint, "--text", str(path))
    assert expected in refused("generate", "--model", checkpoint, "--prompt-file", str(path))


@pytest.mark.parametrize("command", ["generate", "evaluate", "info"])
def test_folder_that_is_no_checkpoint(refused, tmp_path, command):
    assert "config.json" in refused(command, "--model", str(tmp_path))
    assert "does not exist" in refused(command, "--model", str(tmp_path / "nowhere"))


def rename(tensors):
    tensors["norm.wieght"] = tensors.pop("norm.weight")


def change_shape(tensors):
    tensors["norm.weight"] = torch.ones(31)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: tensors.pop("norm.weight"), "'norm.weight' of shape [32] is missing"),
        (lambda tensors: tensors.update(extra=torch.ones(3)), "'extra' of shape [3] is unknown"),
        (rename, "'norm.weight' is missing, and 'norm.wieght'"),
        (change_shape, "'norm.weight' has shape [31]"),
    ],
    ids=["missing", "extra", "renamed", "shape"],
)
def test_checkpoint_with_wrong_tensors(refused, copy, change, expected):
    damage(copy, change)
    for command in ("generate", "evaluate", "info"):
        assert expected in refused(command, "--model", str(copy))


def test_truncated_checkpoint(refused, copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in refused("generate", "--model", str(copy))


def test_pickle_is_refused(refused, copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "pickle" in refused("generate", "--model", str(copy))


def test_checkpoint_with_absorption_below_zero(refused, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "absorption_floor": -1.0}))
    assert "absorption_floor is -1.0; expected a number > 0." in refused("info", "--model", str(copy))


def test_checkpoint_with_the_tokenizer_of_another_model(refused, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 280}))
    damage(copy, lambda tensors: tensors.update({"embedding.weight": tensors["embedding.weight"][:280].contiguous()}))
    assert "has 300 tokens, the model only 280" in refused("generate", "--model", str(copy), "--prompt", "def")


def test_checkpoint_with_nan(refused, copy, toy_run):
    damage(copy, lambda tensors: tensors["norm.weight"].fill_(torch.nan))
    text = str(toy_run / "text" / "one.txt")
    assert "not finite" in refused("generate", "--model", str(copy), "--prompt", "def")
    assert "loss of token 1" in refused("evaluate", "--model", str(copy), "--text", text)


def test_resume_from_a_damaged_checkpoint_leaves_it_alone(refused, toy_run, copy, tmp_path):
    run = tmp_path / "run"
    folder = Path(shutil.copytree(copy, run / "step-000004"))
    (file,) = (folder / "optimizer").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    before = sorted(path.name for path in run.rglob("*"))
    options = [f"--training.output_dir={run}", "--training.resume=true", "--training.steps=6"]
    assert f"{file} is truncated" in refused("train", "--config", str(toy_run / "config.yaml"), *options)
    assert sorted(path.name for path in run.rglob("*")) == before


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--temperature=-1", "temperature is -1.0"),
        ("--temperature=.nan", "temperature is nan"),
        ("--top-p=0", "top_p is 0.0"),
        ("--top-k=-1", "top_k is -1"),
        ("--max-new-tokens=0", "max_new_tokens is 0"),
        ("--top-q=1", "did you mean 'top-p'?"),
        ("--prompt=", "empty"),
    ],
)
def test_generate_with_a_wrong_option(refused, checkpoint, option, expected):
    assert expected in refused("generate", "--model", checkpoint, option)


def test_two_prompts(refused, checkpoint):
    assert "give one of them" in refused("generate", "--model", checkpoint, "--prompt=a", "--prompt-file=b")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tokens=1"], "--tokens is 1; expected a whole number >= 2."),
        (["--segment-length=0"], "segment_length is 0"),
        (["--split=dev"], "expected one of train, validation, test."),
        (["--device=cuda:99"], "cuda:99"),
    ],
)
def test_evaluate_with_a_wrong_option(refused, toy_run, checkpoint, options, expected):
    text = [] if "--split=dev" in options else ["--text", str(toy_run / "text" / "one.txt")]
    assert expected in refused("evaluate", "--model", checkpoint, *text, *options)


def test_model_is_required(refused):
    assert "model" in refused("generate")


def test_prompt_longer_than_memory_allows(refused, checkpoint, tmp_path, monkeypatch):
    class Memory:
        available = 1_000_000

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    (tmp_path / "long.txt").write_text("def f(x):\n    return x\n" * 5_000)
    error = refused("generate", "--model", checkpoint, "--prompt-file", str(tmp_path / "long.txt"))
    assert "GB" in error and "0.001 GB is free" in error
