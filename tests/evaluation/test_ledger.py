from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_bk.errors import DataError
from resnet_bk.evaluation import ledger


@dataclass(frozen=True)
class Inner:
    width: int = 4


@dataclass(frozen=True)
class Config:
    rate: float = 0.1
    inner: Inner = field(default_factory=Inner)


class TinyModel(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.core = nn.Linear(4, 4)
        self.head = self.embedding.weight if tied else nn.Parameter(torch.zeros(10, 4))

    @property
    def output_weight(self):
        return self.head


def append(folder: Path, question: str = "some-question", **changes):
    values = dict(
        command="resnet-bk train --config configs/tiny.yaml",
        config=Config(),
        seeds=[0, 1],
        metrics={"bits_per_byte": 1.5},
        wall_seconds=2.0,
        benchmarks=folder,
    )
    return ledger.append_row(question, **{**values, **changes})


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_rows_are_appended_and_complete(tmp_path):
    first = append(tmp_path, model=TinyModel(tied=True), tokens=1000)
    append(tmp_path, metrics={"failure": "loss is nan at step 3"})
    lines = (tmp_path / "results" / "some-question.jsonl").read_text().splitlines()
    assert [json.loads(line)["metrics"] for line in lines] == [first["metrics"], {"failure": "loss is nan at step 3"}]
    row = json.loads(lines[0])
    assert row == first
    assert row["seeds"] == [0, 1] and row["tokens"] == 1000 and row["wall_seconds"] == 2.0
    assert row["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert row["hardware"]["cores"] == os.cpu_count() and row["hardware"]["cpu"]


def test_rows_name_no_machine(tmp_path):
    append(tmp_path)
    text = (tmp_path / "results" / "some-question.jsonl").read_text()
    values = [value for value in re.findall(r'"([^"]*)"', text)]
    assert socket.gethostname() not in values
    assert not any(value.startswith("/") for value in values)
    with pytest.raises(DataError, match="would publish the path"):
        append(tmp_path, command=f"python {sys.prefix}/script.py")
    assert len((tmp_path / "results" / "some-question.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "tied, expected",
    [(True, {"total": 60, "without_embeddings": 20}), (False, {"total": 100, "without_embeddings": 20})],
)
def test_parameter_counts(tied, expected):
    assert ledger.count_parameters(TinyModel(tied)) == expected


def test_config_hash_depends_on_values_only():
    assert ledger.config_hash(Config()) == ledger.config_hash({"inner": {"width": 4}, "rate": 0.1})
    assert ledger.config_hash(Config()) != ledger.config_hash(Config(inner=Inner(width=5)))
    assert re.fullmatch(r"[0-9a-f]{12}", ledger.config_hash(Config()))


def test_commit_marks_changed_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("RESNET_BK_COMMIT", raising=False)
    assert ledger.git_commit() == "unknown"
    monkeypatch.setenv("RESNET_BK_COMMIT", "abc")
    assert ledger.git_commit() == "abc"
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    append(Path("benchmarks"))
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "start")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    append(Path("benchmarks"))
    assert ledger.git_commit() == commit
    (tmp_path / "code.py").write_text("a = 2\n")
    assert ledger.git_commit() == commit + "-dirty"


@pytest.mark.parametrize("question", ["", "Upper", "a b", "../escape", "a_b"])
def test_question_must_name_a_file(tmp_path, question):
    with pytest.raises(DataError, match="cannot name a file"):
        append(tmp_path, question)
    assert not list(tmp_path.iterdir())


def test_metric_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"metrics\['loss'\] is nan"):
        append(tmp_path, metrics={"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_ledger_is_regenerated_from_the_rows(tmp_path):
    append(tmp_path, "second", metrics={"loss": 1.23456789, "tokens_per_second": 12345})
    append(tmp_path, "second", metrics={"loss": 2.0, "note": "a|b"}, model=TinyModel(tied=False))
    append(tmp_path, "first")
    path = ledger.write_ledger(tmp_path)
    text = path.read_text()
    assert path == tmp_path / "LEDGER.md"
    assert text.index("## first") < text.index("## second")
    tables = [line for line in text.splitlines() if line.startswith("| second#")]
    assert "| 1.2346 | 12,345 |  | 2 |" in tables[0]
    assert "| 100 (20) |" in tables[1] and "a\\|b" in tables[1]
    assert ledger.write_ledger(tmp_path).read_text() == text


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"commit": "a"}'])
def test_bad_row_is_located(tmp_path, line):
    append(tmp_path)
    with (tmp_path / "results" / "some-question.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"some-question.jsonl, line 2 is not a ledger row"):
        ledger.write_ledger(tmp_path)


def test_module_regenerates_the_table(tmp_path):
    append(tmp_path / "benchmarks")
    result = subprocess.run(
        [sys.executable, "-m", "resnet_bk.evaluation.ledger"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert result.stdout.strip() == "benchmarks/LEDGER.md"
    assert "some-question#1" in (tmp_path / "benchmarks" / "LEDGER.md").read_text()
