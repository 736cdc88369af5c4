from __future__ import annotations

import json
import re

import pytest
from matplotlib.image import imread

from resnet_bk.errors import DataError
from resnet_bk.experiments.figures import frontier_points
from resnet_bk.experiments.report import comparison_groups, row_names, write_report

DATE = "2026-01-01T00:00:00+00:00"


def row(metrics: dict, *, size: int = 1000, seed: int = 0, gpu: str | None = None) -> dict:
    hardware = {"cpu": "made up", "cores": 2, "threads": 1} | ({"gpu": gpu} if gpu else {})
    return {
        "date": DATE, "commit": "0123456789abcdef", "command": "test", "config_hash": f"{size}{seed}", "seeds": [seed],
        "hardware": hardware, "versions": {}, "tokens": 400, "parameters": {"total": size, "without_embeddings": size},
        "metrics": metrics, "wall_seconds": 1.0,
    }  # fmt: skip


def compared(arm: str, loss: float, *, size: int = 1000, seed: int = 0, **changes) -> dict:
    metrics = {
        "kind": "compare", "arm": arm, "corpus": "made", "outcome": "done", "learning_rate": 1e-3, "recipe": "4 steps",
        "context": "fresh", "label": None, "model": "", "validation_loss": loss, "validation_perplexity": 2.718**loss,
        "tokens_per_second": 10.0, "peak_bytes": None, "reading": "stream", "training_flops": 6 * size * 400,
        "curve": f"100:{loss + 2}:{loss + 1} 400:{loss + 1}:{loss}", **changes,
    }  # fmt: skip
    return row(metrics, size=size, seed=seed)


def everything() -> dict[str, list[dict]]:
    positions = {"by_position": "1:4:5.0:0.1 4:8:4.0:0.1 8:16:3.9:0.1", "texts": "2 documents", "training_length": 8}
    compare = [
        compared(arm, 3.0 + k / 10 + seed / 50, seed=seed)
        for k, arm in enumerate(("bk", "mamba2"))
        for seed in range(3)
    ]
    compare.append(compared("transformer", 9.0, outcome="diverged by step 3"))
    speed = {"kind": "speed", "outcome": "done", "precision": "float32", "spread_milliseconds": 0.1, "peak_bytes": None}
    speed |= {"pass": "forward", "tokens_per_second": 9.0}
    shapes = [(arm, length) for arm in ("bk", "mamba2") for length in (8, 16)]
    parity = {
        "kind": "synthetic", "task": "parity", "arm": "bk", "learning_rate": 1e-3, "model": "", "recipe": "",
        "stopped": "steps", "training_loss_nats": 0.5, "tail_accuracy_64": 0.9, "tail_accuracy_128": 0.7,
    }  # fmt: skip
    return {
        "compare": compare,
        "long-context": [compared("bk", 3.0, **positions), compared("mamba3", 3.1, **positions)],
        "scaling": [compared("bk", 4.0 - k / 4, size=10**k * 1000) for k in range(4)],
        "speed": [
            row({**speed, "arm": arm, "shape": f"1 x {length}", "length": length, "milliseconds": length / 9})
            for arm, length in shapes
        ],
        "synthetic": [row(parity)],
        "other": [row({"something": 1})],
    }


def write(folder, content: dict[str, list[dict]]) -> None:
    (folder / "results").mkdir(parents=True)
    for question, rows in content.items():
        text = "".join(json.dumps(each) + "\n" for each in rows)
        (folder / "results" / f"{question}.jsonl").write_text(text)


def named(question: str, rows: list[dict]) -> list[dict]:
    return [{**each, "row": f"{question}#{number}"} for number, each in enumerate(rows, start=1)]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    write(folder, everything())
    return folder, write_report(folder), (folder / "REPORT.md").read_text()


def test_every_kind_of_row_has_its_tables_and_figures(report):
    folder, files, text = report
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert sections == [
        "What was run", "What was not", "Comparisons", "Loss by position", "Loss against size: made",
        "Perplexity against operations: made", "Speed: 1k parameters, on made up, 1 thread, float32",
        "Synthetic tasks, on made up, 1 thread",
    ]  # fmt: skip
    linked = set(re.findall(r"\((figures/[^)]*)\)", text))
    assert linked == {f"figures/{file.name}" for file in files[2:]}
    for kinds in ("frontier", "scaling-parameters", "scaling-operations", "positions", "speed-", "synthetic-parity"):
        assert any(kinds in link for link in linked)
    for link in linked:
        content = (folder / link).read_bytes()
        assert content.startswith(b"\x89PNG") if link.endswith(".png") else b"</svg>" in content
    first = next(link for link in sorted(linked) if link.endswith(".png"))
    assert imread(folder / first).shape[:2] == (780, 1200)


def test_the_report_says_what_was_run_where_and_what_was_not(report):
    _, _, text = report
    run, missing = text.split("## What was not")[0], text.split("## What was not")[1].split("## Comparisons")[0]
    assert "| compare | 7 | bk, mamba2, transformer | made | made up, 1 thread | 0123456789 |" in run
    assert "| other | 1 |" in run
    assert "without mamba3" in missing and "compare#7, transformer at rate 0.001: diverged by step 3" in missing
    assert "fewer than 3 seeds of bk (1), mamba3 (1)" in missing
    assert "not run" not in missing


def test_ratios_are_to_the_first_of_the_known_arms(report):
    _, _, text = report
    table = text.split("## Comparisons")[1].split("![")[0]
    assert "| / bk |" in table and re.search(r"\| mamba2 \| 1,000 .* \| 1\.105 \|", table)
    assert "Rows compare#1 to #7." in table


def test_figures_are_the_same_every_time_and_stale_ones_go(report, tmp_path):
    _, files, text = report
    write(tmp_path, everything())
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "old.png").write_bytes(b"stale")
    again = write_report(tmp_path)
    assert [file.name for file in again] == [file.name for file in files]
    assert not (tmp_path / "figures" / "old.png").exists()
    assert (tmp_path / "REPORT.md").read_text() == text
    for one, other in zip(files, again, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_an_empty_ledger_says_what_is_missing(tmp_path):
    write(tmp_path, {})
    write_report(tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    assert text.count(": not run") == 5 and "## Comparisons" not in text


def test_only_equal_conditions_are_compared():
    rows = [
        compared("bk", 3.0), compared("mamba2", 3.0, size=1015), compared("bk", 3.0, size=1200),
        compared("bk", 3.0, recipe="8 steps"), compared("bk", 3.0, context="carried"), compared("bk", 3.0, label="x"),
        compared("bk", 3.0, corpus="other"), {**compared("bk", 3.0), "hardware": {"gpu": "big"}}, row({"part": "x"}),
    ]  # fmt: skip
    groups = comparison_groups(named("compare", rows))
    assert [row_names(group.rows) for group in groups] == [
        "compare#1 to #2", *(f"compare#{number}" for number in range(3, 9))
    ]  # fmt: skip


def test_corpora_of_one_name_are_told_apart_by_their_tokens():
    rows = named("compare", [compared("bk", 3.0, corpus_hash=text) for text in "aba"])
    assert [row_names(group.rows) for group in comparison_groups(rows)] == ["compare#1, #3", "compare#2"]
    early = named("compare", [compared("bk", 3.0), compared("bk", 3.0, corpus_hash="a")])
    assert [row_names(group.rows) for group in comparison_groups(early)] == ["compare#1 to #2"]


def test_rows_are_named_by_their_spans():
    rows = named("compare", [{}] * 9)
    assert row_names([rows[0], rows[1], rows[2], rows[5], rows[8], rows[7]]) == "compare#1 to #3, #6, #8 to #9"


def test_frontier_counts_operations_until_each_point():
    points = frontier_points([compared("bk", 3.0), compared("bk", 2.0, size=2000)])
    assert points == {"bk": [(600_000, 4.0), (1_200_000, 3.0), (2_400_000, 3.0), (4_800_000, 2.0)]}


def test_a_broken_ledger_is_named(tmp_path):
    write(tmp_path, {})
    (tmp_path / "results" / "compare.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"compare\.jsonl, line 1"):
        write_report(tmp_path)
