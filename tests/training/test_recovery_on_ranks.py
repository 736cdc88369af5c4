"""Two ranks see the same spike, go back together and come to what one process comes to."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("recover_on_ranks.py")


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_recover_as_one_process_does(tmp_path, strategy: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    runpy.run_path(str(SCRIPT))["run"](one, "ddp")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        str(SCRIPT), str(two), strategy,
    ]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-4000:]
    for folder in (one, two):
        actions = [(row["action"], row["step"]) for row in rows(folder, "recovery.jsonl")]
        assert actions == [("roll back", 30), ("calm", 38)]
        assert rows(folder, "recovery.jsonl")[0]["left_out"] == [32]
    losses = [[row["loss"] for row in rows(folder, "metrics.jsonl")] for folder in (one, two)]
    assert len(losses[0]) == 40
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    ratios = [rows(folder, "stability.jsonl")[-1]["update_over_weight"] for folder in (one, two)]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.05)
