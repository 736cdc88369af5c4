"""Sphinx configuration: pages in Markdown, API pages from the docstrings."""

from __future__ import annotations

import re

from resnet_bk import __version__

project = "ResNet-BK"
author = "The ResNet-BK authors"
copyright = author
release = __version__
html_theme = "furo"
html_title = f"ResNet-BK {__version__}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Fields of a tuple are members already; an attribute directive would describe them twice.
napoleon_use_ivar = True

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Cost|Source|Theorem|Not claimed)\b.*:$")

_LABEL = re.compile(r"^(Theorem|Measured|Checked numerically|Heuristic|Not claimed|Cost|Source)\b[^:]*: ")


def _markdown_to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text with backticks; spell what reStructuredText would take for markup of its own."""
    result: list[str] = []
    literal = False
    for line in lines:
        indented = line.startswith("    ")
        if literal and line.strip() and not indented:
            literal = False
        starts = indented and not literal and bool(result) and not result[-1].strip() and _plain(result)
        if starts:
            # An indented formula between paragraphs.
            result[-1:] = ["", "::", ""]
            literal = True
        elif _LABEL.match(line) and result and result[-1].strip():
            result.append("")
        result.append(line if literal else _escape(line))
    lines[:] = result


def _plain(before: list[str]) -> bool:
    """Whether the last paragraph stands at the margin and opens no section."""
    last = next((line for line in reversed(before) if line.strip()), "")
    return bool(last) and not last.startswith(" ") and not _SECTION.match(last) and not last.startswith("- ")


def _escape(line: str) -> str:
    """The line with code in double backticks, and bars, stars and trailing underscores outside it taken literally."""
    parts = line.split("`")
    parts[::2] = [re.sub(r"(\||\*(?=\S)|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
    return "``".join(parts)


_fields: dict[str, list[str]] = {}


def _keep_field(app, what, name, obj, options, lines: list[str]) -> None:
    """Remember a field's docstring as it is: napoleon takes what stands before a colon in it for the field's type."""
    if what in ("attribute", "property"):
        _fields[name] = list(lines)


def _restore_field(app, what, name, obj, options, lines: list[str]) -> None:
    if what in ("attribute", "property"):
        lines[:] = _fields[name]


def setup(app) -> None:
    # Around napoleon, which has priority 500.
    app.connect("autodoc-process-docstring", _markdown_to_rst, priority=400)
    app.connect("autodoc-process-docstring", _keep_field, priority=401)
    app.connect("autodoc-process-docstring", _restore_field, priority=600)
