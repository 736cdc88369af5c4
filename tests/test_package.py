"""The package as a whole: public names, an import that costs nothing, and the order of its layers."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_bk

ROOT = Path(__file__).parents[1]


def test_public_names_load():
    for name in resnet_bk.__all__:
        assert getattr(resnet_bk, name) is not None
    assert set(resnet_bk.__all__) <= set(dir(resnet_bk))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Languagemodel'; it has LanguageModel"):
        _ = resnet_bk.Languagemodel


def test_import_brings_no_torch():
    code = "import sys, resnet_bk; print({'torch', 'numpy', 'jsonargparse'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.stdout == "set()\n"


def test_version_is_that_of_the_distribution_and_the_citation():
    assert importlib.metadata.version("resnet-bk") == resnet_bk.__version__
    assert f"version: {resnet_bk.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_layers_and_fences_hold():
    """The contracts of pyproject.toml: imports point down, heavy libraries stay where they belong."""
    program = Path(sys.executable).with_name("lint-imports")
    process = subprocess.run([program, "--no-logo"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "0 broken" in process.stdout


def test_no_file_is_named_for_leftovers():
    banned = {"utils.py", "common.py", "helpers.py", "misc.py"}
    assert not [path for path in (ROOT / "src").rglob("*.py") if path.name in banned]


def test_constraints_pin_every_dependency():
    """`make setup` would otherwise install a version that nothing was tested with."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(Requirement(line).name) for line in lines if line and not line.startswith("#")}
    required = [Requirement(text) for text in importlib.metadata.requires("resnet-bk") or []]
    required = [r for r in required if not str(r.specifier).startswith("==")]  # says itself which version
    missing = {r.name for r in required if canonicalize_name(r.name) not in pinned and "data" not in str(r.marker)}
    assert not missing
