"""Rewrites the tables in the documentation that come from the code; `--check` only says whether they are up to date.

A table stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import typing
from pathlib import Path

from resnet_bk.cli.arguments import describe_type
from resnet_bk.cli.migration import PROTOTYPE_KEYS
from resnet_bk.data.config import DataConfig
from resnet_bk.models.config import PRESETS, AdapterConfig, ModelConfig
from resnet_bk.training.config import DistributedConfig, MemoryConfig, TrainingConfig
from resnet_bk.training.stability.config import StabilityConfig

DOCS = Path(__file__).parent


def field_table(config: type, section: str) -> str:
    """The fields of a configuration dataclass: key, default, and the docstring below the field."""
    rows = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config)
    }
    types = typing.get_type_hints(config)
    (body,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(body, ast.ClassDef)
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), (
                f"{field.target.id}: no docstring"
            )
            name, default = field.target.id, defaults[field.target.id]
            shown = "required" if default is dataclasses.MISSING else f"`{default!r}`"
            meaning = _one_line(after.value.value)
            rows.append(f"| `{section}.{name}` | {describe_type(types[name])} | {shown} | {meaning} |")
    return "\n".join(rows)


def preset_table() -> str:
    """The presets with the fields that set them apart."""
    columns = ["d_model", "num_layers", "feed_forward_dim", "expand", "state_size", "vocab_size"]
    rows = [f"| preset | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for name in PRESETS:
        config = ModelConfig.preset(name)
        rows.append(f"| `{name}` | {' | '.join(f'{getattr(config, column):,}' for column in columns)} |")
    return "\n".join(rows)


def migration_table() -> str:
    """What each configuration key of the prototype became."""
    rows = ["| prototype | here |", "| --- | --- |"]
    return "\n".join(rows + [f"| `{key}` | {answer} |" for key, answer in PROTOTYPE_KEYS.items()])


TABLES = {
    "model": lambda: field_table(ModelConfig, "model"),
    "data": lambda: field_table(DataConfig, "data"),
    "training": lambda: field_table(TrainingConfig, "training"),
    "stability": lambda: field_table(StabilityConfig, "stability"),
    "distributed": lambda: field_table(DistributedConfig, "distributed"),
    "memory": lambda: field_table(MemoryConfig, "memory"),
    "adapters": lambda: field_table(AdapterConfig, "adapters"),
    "presets": preset_table,
    "migration": migration_table,
}


def regenerate(text: str) -> str:
    """The page with every generated table replaced by the current one."""
    pattern = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}", text)


def _one_line(value: object) -> str:
    return " ".join(inspect.cleandoc(str(value)).split()).replace("|", "\\|")


def main() -> int:
    """Exit status: 1 if `--check` found a page out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if regenerate(text) != text:
            stale.append(page.name)
            if not check:
                page.write_text(regenerate(text), encoding="utf-8")
    if stale:
        print(f"{'Out of date' if check else 'Rewritten'}: {', '.join(stale)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
