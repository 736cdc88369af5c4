"""Synthetic tasks, one file an idea: each asks for one ability, is drawn on the fly and has a known right answer."""

from __future__ import annotations

import dataclasses
from typing import Any

from resnet_bk.errors import ConfigError
from resnet_bk.experiments.tasks.base import Batch, Task
from resnet_bk.experiments.tasks.groups import ModularGroupWords, PermutationWords
from resnet_bk.experiments.tasks.induction import InductionHeads
from resnet_bk.experiments.tasks.modular import ModularExpressions, ModularSums
from resnet_bk.experiments.tasks.parity import Parity
from resnet_bk.experiments.tasks.passkey import Passkey
from resnet_bk.experiments.tasks.recall import AssociativeRecall
from resnet_bk.experiments.tasks.selective_copy import SelectiveCopy
from resnet_bk.experiments.tasks.uniform import UniformTokens
from resnet_bk.models.config import unknown_key_message

__all__ = ["TASKS", "Batch", "Task", "make_task"]

TASKS: dict[str, type[Task]] = {
    "recall": AssociativeRecall,
    "selective_copy": SelectiveCopy,
    "passkey": Passkey,
    "parity": Parity,
    "modular_sums": ModularSums,
    "modular_expressions": ModularExpressions,
    "permutation_words": PermutationWords,
    "modular_group_words": ModularGroupWords,
    "induction": InductionHeads,
    "uniform": UniformTokens,
}
"""Every task by the name that commands and ledger rows use; `TASKS[name]()` is the task at its usual size."""


def make_task(text: str) -> Task:
    """The task that `text` describes: its name, then fields in which it differs from its usual size.

    For example `recall:pairs=256:length=1024`, or `passkey:length=64:evaluation_lengths=64/512:depth=none`.
    Evaluation lengths that are not given grow with the length.

    Raises:
        ConfigError: a task or field that does not exist (names the nearest), or a value that does not fit.
    """
    name, *changes = text.strip().split(":")
    if name not in TASKS:
        raise ConfigError(unknown_key_message(name, list(TASKS), what="task"))
    usual = TASKS[name]()
    fields = [field.name for field in dataclasses.fields(usual)]
    values: dict[str, Any] = {}
    for change in changes:
        field, separator, value = change.partition("=")
        if not separator:
            raise ConfigError(f"The task {text!r} holds {change!r}; expected field=value.")
        if field not in fields:
            raise ConfigError(unknown_key_message(f"{name}.{field}", [f"{name}.{known}" for known in fields]))
        values[field] = _value(f"{name}.{field}", getattr(usual, field), value)
    if "length" in values and "evaluation_lengths" not in values:
        scaled = (length * values["length"] // usual.length for length in usual.evaluation_lengths)
        values["evaluation_lengths"] = tuple(scaled)
    return dataclasses.replace(usual, **values)


def _value(field: str, usual: Any, text: str) -> Any:
    """The value that `text` stands for, of the kind of `usual`."""
    try:
        if isinstance(usual, tuple):
            kind = float if any(isinstance(value, float) for value in usual) else int
            return tuple(kind(part) for part in text.split("/") if part)
        if isinstance(usual, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(usual, int):
            return int(text)
        return None if usual is None and text.lower() == "none" else float(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{field} is {text!r}; expected a value such as {usual!r}.") from None
