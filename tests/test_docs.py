"""Documentation that can go stale without anyone noticing: generated tables, options, links between pages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "theory").glob("*.md")])


def test_generated_tables_are_up_to_date():
    process = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.parametrize("command", ["generate", "evaluate", "theory", "info"])
def test_every_option_is_documented(command, capsys):
    from resnet_bk.cli import main

    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = set(re.findall(r"--[a-z][a-z-]+(?![\w.])", capsys.readouterr().out)) - {"--help", "--data"}
    page = (ROOT / "docs" / "cli.md").read_text()
    assert options and not {option for option in options if option not in page}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
