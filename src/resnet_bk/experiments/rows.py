"""Rows of the ledger, as runners and reports read them back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_bk.errors import DataError
from resnet_bk.evaluation.ledger import BENCHMARKS

_NEEDED = ("config_hash", "seeds", "metrics", "command", "commit", "hardware", "tokens", "wall_seconds")


def read_rows(question: str, benchmarks: Path = BENCHMARKS) -> list[dict[str, Any]]:
    """The rows of a question in order, each with its name `row`, such as `compare#3`; none if there is no file.

    Raises:
        DataError: a line that is not a row; names file and line.
    """
    path = Path(benchmarks) / "results" / f"{question}.jsonl"
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            missing = [name for name in _NEEDED if name not in row]
        except (json.JSONDecodeError, TypeError) as error:
            raise DataError(f"{path}, line {number} is not a row of the ledger ({error}); remove the line.") from None
        if missing:
            raise DataError(f"{path}, line {number} has no {missing[0]!r}; it is not a row of the ledger.")
        rows.append({**row, "row": f"{question}#{number}"})
    return rows


def questions(benchmarks: Path = BENCHMARKS) -> list[str]:
    """Every question that has rows."""
    return sorted(path.stem for path in (Path(benchmarks) / "results").glob("*.jsonl"))


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells as text in columns; the first line is the heading."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table; the first line is the heading."""
    rows = [list(lines[0]), ["---"] * len(lines[0]), *map(list, lines[1:])]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
