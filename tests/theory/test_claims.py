"""The table of claims: every test that it names exists, every status is one of four, every module is listed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLAIMS = (ROOT / "docs" / "theory" / "claims.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in CLAIMS.splitlines()
    if line.startswith("| ") and not line.startswith(("| ---", "| statement"))
]
STATUSES = ("Theorem", "Checked numerically", "Heuristic", "False")


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_test_named_exists() -> None:
    files = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", CLAIMS)
    assert len(named) > 80
    for file, name in named:
        assert file in files, f"claims.md names {file}, which does not exist"
        assert name in names_in(files[file]), f"claims.md names {file}::{name}, which does not exist"


def test_every_claim_has_a_status_and_a_test() -> None:
    assert len(ROWS) > 60
    for row in ROWS:
        assert len(row) == 4, row
        assert row[2].startswith(STATUSES), row
        assert re.search(r"`test_\w+\.py::\w+`", row[3]), row
    for status in STATUSES:
        assert any(row[2].startswith(status) for row in ROWS)


def test_every_theorem_is_claimed() -> None:
    theorems = (ROOT / "docs" / "theory" / "theorems.md").read_text(encoding="utf-8")
    numbers = re.findall(r"^\*\*(\d+)\. ", theorems, re.MULTILINE)
    assert [int(number) for number in numbers] == list(range(1, 18))
    assert theorems.count("*Proof.*") == len(numbers)
    for number in numbers:
        assert any(row[0].startswith(f"{number}. ") and row[2].startswith("Theorem") for row in ROWS), number


def test_every_module_is_listed() -> None:
    listed = (ROOT / "docs" / "theory" / "index.md").read_text(encoding="utf-8")
    reference = (ROOT / "docs" / "theory" / "reference.md").read_text(encoding="utf-8")
    for path in (ROOT / "src" / "resnet_bk" / "theory").glob("*.py"):
        if path.stem != "__init__":
            assert f"`{path.stem}`" in listed, f"docs/theory/index.md does not list {path.stem}"
            assert f"resnet_bk.theory.{path.stem}\n" in reference, f"docs/theory/reference.md lacks {path.stem}"
