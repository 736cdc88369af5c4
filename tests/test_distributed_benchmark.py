"""The benchmark of many ranks, rehearsed on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_scaling_over_ranks_is_measured_against_one_process(tmp_path):
    command = [
        sys.executable, "benchmarks/distributed.py", "--toy", "--device", "cpu", "--sequence-length", "64",
        "--batch-size", "1", "--steps", "4", "--rounds", "1", "--kinds", "ddp,zero3", "--ranks", "2",
        "--benchmarks", str(tmp_path), "--commit", "none",
    ]  # fmt: skip
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    lines = (tmp_path / "results" / "distributed.jsonl").read_text().splitlines()
    found = {(row["metrics"]["kind"], row["metrics"]["ranks"]): row["metrics"] for row in map(json.loads, lines)}
    assert set(found) == {("ddp", 1), ("ddp", 2), ("zero3", 2)}
    one = found["ddp", 1]["tokens_per_second"]
    for (_, ranks), metrics in found.items():
        assert metrics["scaling_efficiency"] == pytest.approx(metrics["tokens_per_second"] / (ranks * one))
        assert metrics["batch_sequences"] == ranks and metrics["backend"] == "gloo"
