"""The decode benchmark, rehearsed at toy size on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


@pytest.mark.slow
def test_decode_speed_at_toy_size(tmp_path):
    def rows():
        command = [sys.executable, "benchmarks/decode_speed.py", "--toy", "--out", str(tmp_path), "--run", "test"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "results" / "decode-speed.jsonl").read_text().splitlines()
        return [json.loads(line)["metrics"] for line in lines]

    found = rows()
    timed = {(row["part"], row["batch"], row["length_tokens"]) for row in found if row["milliseconds"] > 0}
    assert timed == {("kernel", b, 1) for b in (1, 3)} | {("model", b, n) for b in (1, 3) for n in (16, 64)}
    assert all(row["over_shortest"] > 0 for row in found if row["length_tokens"] == 64)
    assert len(rows()) == len(found)  # a second call finds everything done
