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
    arms = {"ddp", "zero3", "context, split"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--",
        "benchmarks/distributed.py", "--toy", "--run", "test", "--commit", "none", "--out", str(tmp_path),
        *(option for arm in sorted(arms) for option in ("--only", arm)),
    ]  # fmt: skip

    def rows() -> dict[tuple[str, int], dict]:
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert finished.returncode == 0, finished.stderr[-2000:]
        lines = (tmp_path / "results" / "distributed.jsonl").read_text().splitlines()
        return {(m["arm"], m["length_tokens"]): m for m in (json.loads(line)["metrics"] for line in lines)}

    found = rows()
    assert set(found) == {(f"alone{when}", n) for when in ("", ", after") for n in (64, 256)} | {
        (arm, 256 if arm == "context, split" else 64) for arm in arms
    }
    for arm in arms:
        metrics = found[arm, 256 if arm == "context, split" else 64]
        one = found["alone", metrics["length_tokens"]]["tokens_per_second"]
        assert metrics["scaling_efficiency"] == pytest.approx(metrics["tokens_per_second"] / (2 * one))
        assert metrics["ranks"] == 2 and metrics["backend"] == "gloo"
    split = found["context, split", 256]
    assert split["loss_relative_error"] < 1e-6 and split["norm_relative_error"] < 1e-5
    # A second launch finds everything done.
    assert rows() == found
