"""Synthetic tasks, one file an idea: each asks for one ability, is drawn on the fly and has a known right answer."""

from __future__ import annotations

from resnet_bk.experiments.tasks.base import Batch, Task
from resnet_bk.experiments.tasks.groups import ModularGroupWords, PermutationWords
from resnet_bk.experiments.tasks.induction import InductionHeads
from resnet_bk.experiments.tasks.modular import ModularExpressions, ModularSums
from resnet_bk.experiments.tasks.parity import Parity
from resnet_bk.experiments.tasks.passkey import Passkey
from resnet_bk.experiments.tasks.recall import AssociativeRecall
from resnet_bk.experiments.tasks.selective_copy import SelectiveCopy
from resnet_bk.experiments.tasks.uniform import UniformTokens

__all__ = ["TASKS", "Batch", "Task"]

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
