"""Several models on several synthetic tasks: sweeps, seeds, one ledger row a run, and the table made from the rows."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from resnet_bk.errors import ResNetBKError
from resnet_bk.evaluation.ledger import BENCHMARKS, append_row, config_hash
from resnet_bk.experiments.state_size import decode_state_bytes
from resnet_bk.experiments.synthetic import TaskBudget, train_on_task
from resnet_bk.experiments.tasks import TASKS
from resnet_bk.experiments.tasks.base import Task
from resnet_bk.models.config import ModelConfig
from resnet_bk.models.resnet_bk import LanguageModel

QUESTION = "synthetic"
"""Name of the ledger file."""

Row = dict[str, Any]


def synthetic_suite(
    arms: Mapping[str, ModelConfig],
    tasks: Sequence[Task],
    *,
    budget: TaskBudget | None = None,
    rates: Sequence[float] = (5e-4, 2e-3, 8e-3),
    seeds: Sequence[int] = (0, 1, 2),
    device: torch.device | str = "cpu",
    command: str = "resnet-bk benchmark synthetic",
    seconds: float = math.inf,
    benchmarks: str | Path = BENCHMARKS,
    commit: str | None = None,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Ledger rows of every model on every task, those of earlier calls included.

    For each task and model the first seed is run at every learning rate, and the other seeds at the rate that had
    the least training loss. A run whose row exists is not run again, so a suite that was cut off continues. Memory
    that runs out, and errors that name a remedy, are rows too.

    Args:
        arms: name -> model; its vocabulary becomes that of each task.
        tasks: the tasks.
        budget: what a run may spend; its rate is replaced.
        rates: peak learning rates of the sweep.
        seeds: at least one.
        device: where everything runs.
        command: what repeats the suite, for the ledger.
        seconds: start no run that would, by the longest so far on its task, end later than this.
        benchmarks: folder of the ledger.
        commit: see `append_row`.
        report: takes a line after every run, and a table after every task.
    """
    budget = TaskBudget() if budget is None else budget
    deadline = time.monotonic() + seconds
    known = {(row["config_hash"], *row["seeds"]): row for row in read_rows(benchmarks)}
    rows: list[Row] = []
    for task in tasks:
        longest = 0.0
        for name, config in arms.items():
            config = dataclasses.replace(config, vocab_size=task.vocab_size)
            losses: dict[float, float] = {}
            # The sweep's best rate is known when the plan comes to the other seeds.
            for rate, seed in [*((rate, seeds[0]) for rate in rates), *((None, seed) for seed in seeds[1:])]:
                if rate is None:
                    rate = min(losses, key=losses.__getitem__)
                    if not math.isfinite(losses[rate]):
                        break
                identity = _identity(config, task, dataclasses.replace(budget, learning_rate=rate), device)
                row = known.get((config_hash(identity), seed))
                if row is None:
                    if time.monotonic() + longest > deadline:
                        report(f"Out of time before {name} on {task.name}; call again to continue.")
                        return rows
                    started = time.monotonic()
                    row = _run(name, config, task, identity, seed, device, command, benchmarks, commit)
                    longest = max(longest, time.monotonic() - started)
                    report(_line(row))
                rows.append(row)
                if seed == seeds[0]:
                    losses[rate] = row["metrics"].get("training_loss_nats", math.inf)
        report(suite_table([row for row in rows if row["metrics"]["task"] == task_label(task)]))
    return rows


def _identity(config: ModelConfig, task: Task, budget: TaskBudget, device: torch.device | str) -> Row:
    """What a row's hash is made of: equal for runs that would come to the same result."""
    device = torch.device(device)
    return {
        "kind": QUESTION,
        "model": config.to_dict(),
        "task": task.describe(),
        "budget": dataclasses.asdict(budget),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def _run(
    name: str, config: ModelConfig, task: Task, identity: Row, seed: int, device: torch.device | str, command: str,
    benchmarks: str | Path, commit: str | None,
) -> Row:  # fmt: skip
    """The row of one run, appended to the ledger."""
    budget = TaskBudget(**identity["budget"])
    metrics: Row = {"task": task_label(task), "arm": name, "learning_rate": budget.learning_rate}
    started, tokens = time.monotonic(), 0
    try:
        metrics["state_bytes"] = decode_state_bytes(config, context=task.length)
        result = train_on_task(config, task, budget, seed, device)
        metrics |= result.metrics
        tokens = result.tokens
    except torch.OutOfMemoryError as error:
        metrics["stopped"] = f"out of memory: {str(error).splitlines()[0]}"
    except ResNetBKError as error:
        metrics["stopped"] = f"failed: {error}"
    with torch.device("meta"):
        model = LanguageModel(config)
    return append_row(
        QUESTION,
        command=command,
        config=identity,
        seeds=[seed],
        metrics=metrics,
        wall_seconds=time.monotonic() - started,
        model=model,
        tokens=tokens,
        device=device,
        benchmarks=benchmarks,
        commit=commit,
    )


def read_rows(benchmarks: str | Path = BENCHMARKS) -> list[Row]:
    """All rows of the suite in the ledger, oldest first."""
    path = Path(benchmarks) / "results" / f"{QUESTION}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def task_label(task: Task) -> str:
    """Name of the task, with the fields that differ from its usual size."""
    usual, found = TASKS[task.name]().describe(), task.describe()
    changed = [f"{key}={value}" for key, value in found.items() if value != usual[key] and key != "evaluation_lengths"]
    return " ".join([task.name, *changed])


def suite_table(rows: Sequence[Row]) -> str:
    """Markdown table of the tail accuracy by length, one line a task and model at the best rate of its sweep.

    Cells are the mean over seeds, and in brackets the least and the largest of several; the tail is the last quarter
    of each row's labels.
    """
    lengths = sorted({length for row in rows for length in _tail(row)})
    header = ["task", "model", "rate", "seeds", "state bytes", *(f"{length:,}" for length in lengths)]
    lines = [header, ["---"] * len(header)]
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        metrics = row["metrics"]
        # A rate of a sweep has a hash of its own, and so has any other budget.
        by_hash = groups.setdefault((metrics["task"], metrics["arm"]), {})
        by_hash.setdefault(row["config_hash"], []).append(row)
    for (task, arm), by_hash in groups.items():
        # The rate that the other seeds were run at was chosen by the first.
        chosen = min(by_hash.values(), key=lambda runs: runs[0]["metrics"].get("training_loss_nats", math.inf))
        rate = chosen[0]["metrics"]["learning_rate"]
        cells = []
        for length in lengths:
            values = [_tail(row)[length] for row in chosen if length in _tail(row)]
            spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}" if values else "")
        state = chosen[0]["metrics"].get("state_bytes")
        lines.append([task, arm, f"{rate:g}", str(len(chosen)), "" if state is None else f"{state:,}", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _tail(row: Row) -> dict[int, float]:
    """Tail accuracy by length, on the task as it counts."""
    prefix = "tail_accuracy_"
    names = [name for name in row["metrics"] if name.startswith(prefix) and name.removeprefix(prefix).isdigit()]
    return {int(name.removeprefix(prefix)): row["metrics"][name] for name in names}


def _line(row: Row) -> str:
    """One run in one line."""
    metrics = row["metrics"]
    found = ", ".join(f"{length}: {value:.3f}" for length, value in _tail(row).items())
    return (
        f"{metrics['task']} | {metrics['arm']} | rate {metrics['learning_rate']:g} | seed {row['seeds'][0]} | "
        f"{metrics['stopped']} | {row['wall_seconds']:.0f} s | tail accuracy {found}"
    )
