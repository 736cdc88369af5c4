"""The slack benchmark at a small size: a row for every bound and every potential, and no violation."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "theory_slack.py"


def rows(path: Path) -> list[dict]:
    return [json.loads(line)["metrics"] for line in path.read_text().splitlines()]


def test_a_row_for_every_bound_and_potential(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--media", "12", "--windows", "1", "--out", str(tmp_path)])
    script = runpy.run_path(str(SCRIPT), run_name="__main__")
    slack = rows(tmp_path / "results" / "theory-slack.jsonl")
    assert [row["bound"] for row in slack] == list(script["CASES"])
    for row in slack:
        assert row["violations"] == 0 and row["ratio_largest"] <= 1 + 1e-12
        assert 0 <= row["ratio_percentile_1"] <= row["ratio_median"] <= row["ratio_percentile_99"]
    spacings = rows(tmp_path / "results" / "theory-spacings.jsonl")
    assert {row["potential"] for row in spacings} == {"prime-bump", "none", "random", "shuffled", "shuffled-odd"}
    assert all(row["standard_error"] > 0 for row in spacings)
