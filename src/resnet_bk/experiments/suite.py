"""Several models on several synthetic tasks: sweeps, seeds, one ledger row a run, and the table made from the rows."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_bk.errors import ConfigError, ResNetBKError
from resnet_bk.evaluation.ledger import BENCHMARKS, append_row, config_hash
from resnet_bk.experiments.arms import Arm, shape_only
from resnet_bk.experiments.rows import read_rows
from resnet_bk.experiments.state_size import decode_state_bytes
from resnet_bk.experiments.summary import by_model
from resnet_bk.experiments.synthetic import TaskBudget, train_on_task
from resnet_bk.experiments.tasks.base import Task

QUESTION = "synthetic"
"""Name of the ledger's file unless another is asked for."""

_ENDINGS = ("steps", "solved", "seconds", "diverged")

Row = dict[str, Any]


@dataclass(frozen=True)
class _Run:
    """One model on one task at one rate with one seed."""

    arm: Arm
    task: Task
    budget: TaskBudget
    seed: int
    device: str

    @property
    def identity(self) -> Row:
        """What a row's hash is made of: equal for runs that would come to the same result."""
        device = torch.device(self.device)
        return {
            "kind": "synthetic",
            "model": self.arm.model.to_dict(),
            "task": self.task.describe(),
            "budget": dataclasses.asdict(self.budget),
            "seed": self.seed,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        }

    @property
    def key(self) -> str:
        return config_hash(self.identity)


@dataclass(frozen=True)
class _Outcome:
    """What a run came to."""

    metrics: dict[str, float | int | str]
    tokens: int
    wall_seconds: float


def synthetic_suite(
    arms: Sequence[Arm],
    tasks: Sequence[Task],
    *,
    budget: TaskBudget | None = None,
    rates: Sequence[float] = (5e-4, 2e-3, 8e-3),
    seeds: Sequence[int] = (0, 1, 2),
    device: torch.device | str = "cpu",
    parallel: int = 1,
    seconds: float = math.inf,
    command: str = "resnet-bk benchmark synthetic",
    question: str = QUESTION,
    benchmarks: Path = BENCHMARKS,
    commit: str | None = None,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Ledger rows of every model on every task, those of earlier calls included.

    First every model meets every task at each learning rate, with the first seed; then with the other seeds, at the
    rate that gave it the least training loss on that task. A run that has a row is not made again, so a suite that was
    cut off continues; one that ran out of memory or could not be run has a row too, and is tried again.

    Args:
        arms: the models; their vocabulary becomes that of each task.
        tasks: the tasks.
        budget: what a run may spend; its rate is replaced.
        rates: peak learning rates of the sweep.
        seeds: at least one.
        device: where everything runs.
        parallel: runs at once, in processes of their own if more than one; small models do not fill a GPU.
        seconds: start no run that would, by the longest so far on its task, end later than this.
        command: what repeats the suite, for the ledger.
        question: ledger file the rows go to.
        benchmarks: folder of the ledger.
        commit: for the ledger, where git cannot tell.
        report: takes a line after every run, and the table at the end.

    Raises:
        ConfigError: no rates or seeds, or `parallel` < 1.
    """
    if not rates or not seeds or parallel < 1:
        raise ConfigError(
            f"rates is {list(rates)}, seeds is {list(seeds)} and parallel is {parallel}; expected at least one of each."
        )
    budget = TaskBudget() if budget is None else budget
    deadline = time.monotonic() + seconds
    rows = {r["config_hash"]: r for r in read_rows(question, benchmarks) if r["metrics"]["stopped"] in _ENDINGS}
    ours: dict[str, None] = {}
    unfinished = 0

    def run(arm: Arm, task: Task, rate: float, seed: int) -> _Run:
        model = dataclasses.replace(arm.model, vocab_size=task.vocab_size)
        spent = dataclasses.replace(budget, learning_rate=rate)
        return _Run(dataclasses.replace(arm, model=model), task, spent, seed, str(device))

    def best(arm: Arm, task: Task) -> float | None:
        found = [rows.get(run(arm, task, rate, seeds[0]).key) for rate in rates]
        losses = [math.inf if row is None else row["metrics"].get("training_loss_nats", math.inf) for row in found]
        if None in found or min(losses) == math.inf:
            return None
        return rates[losses.index(min(losses))]

    def sweep() -> list[_Run]:
        return [run(arm, task, rate, seeds[0]) for task in tasks for rate in rates for arm in arms]

    def repeat() -> list[_Run]:
        chosen = [(arm, task, best(arm, task)) for task in tasks for arm in arms]
        return [run(arm, task, rate, seed) for arm, task, rate in chosen if rate for seed in seeds[1:]]

    with _pool(parallel) as pool:
        for phase in (sweep, repeat):
            due = {each.key: each for each in phase()}
            ours |= dict.fromkeys(due)
            missing = [each for key, each in due.items() if key not in rows]
            unfinished += len(missing)
            for done, outcome in _outcomes(missing, pool, parallel, deadline):
                row = append_row(
                    question,
                    command=command,
                    config=done.identity,
                    seeds=[done.seed],
                    metrics={**_description(done, parallel), **outcome.metrics},
                    wall_seconds=outcome.wall_seconds,
                    model=shape_only(done.arm.model),
                    tokens=outcome.tokens,
                    device=device,
                    benchmarks=benchmarks,
                    commit=commit,
                )
                if row["metrics"]["stopped"] in _ENDINGS:
                    rows[done.key] = row
                    unfinished -= 1
                report(_line(row))
    found = {row["config_hash"]: row for row in read_rows(question, benchmarks)}
    named = [found[key] for key in ours if key in rows]
    report(suite_table(named))
    if unfinished:
        report(f"{unfinished} runs have no result, for lack of time or as the rows say; call again to continue.")
    return named


def _pool(parallel: int) -> Any:
    """Processes for several runs at once; nothing for one."""
    if parallel == 1:
        return nullcontext()
    # A forked process cannot use a GPU that its parent has touched.
    threads = max(1, torch.get_num_threads() // parallel)
    context = multiprocessing.get_context("spawn")
    arguments = threads, os.getpid()
    return ProcessPoolExecutor(parallel, mp_context=context, initializer=_start_worker, initargs=arguments)


def _start_worker(threads: int, parent: int) -> None:
    """Share the cores, and end with the process that started this one, even if that was killed."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int, every: float = 1.0) -> None:
    while os.getppid() == parent:
        time.sleep(every)
    os._exit(1)


def _outcomes(
    runs: Sequence[_Run], pool: ProcessPoolExecutor | None, parallel: int, deadline: float
) -> Iterator[tuple[_Run, _Outcome]]:
    """Runs with what they came to, as they end; none is started that would probably end after the deadline."""
    longest: dict[str, float] = {}
    waiting = list(reversed(runs))
    running: dict[Future[_Outcome], _Run] = {}

    def in_time() -> bool:
        return bool(waiting) and time.monotonic() + longest.get(waiting[-1].task.label, 0.0) <= deadline

    while in_time() or running:
        if pool is None:
            each = waiting.pop()
            ended = [(each, _carry_out(each))]
        else:
            while len(running) < parallel and in_time():
                each = waiting.pop()
                running[pool.submit(_carry_out, each)] = each
            futures, _ = wait(running, return_when=FIRST_COMPLETED)
            ended = [(running.pop(future), future.result()) for future in futures]
        for each, outcome in ended:
            label = each.task.label
            longest[label] = max(longest.get(label, 0.0), outcome.wall_seconds)
            yield each, outcome


def _carry_out(run: _Run) -> _Outcome:
    """The outcome of a run, in whatever process this is."""
    started = time.monotonic()
    metrics: dict[str, float | int | str] = {}
    tokens = 0
    try:
        metrics["state_bytes"] = decode_state_bytes(run.arm.model, context=run.task.length)
        result = train_on_task(run.arm.model, run.task, run.budget, run.seed, run.device)
        metrics |= result.metrics
        tokens = result.tokens
    except torch.OutOfMemoryError as error:
        metrics["stopped"] = f"out of memory: {str(error).splitlines()[0]}"
    except ResNetBKError as error:
        metrics["stopped"] = f"failed: {error}"
    return _Outcome(metrics, tokens, time.monotonic() - started)


def _description(run: _Run, parallel: int) -> Row:
    """What a reader of the row wants to know of the run."""
    budget = run.budget
    return {
        "kind": "synthetic",
        "task": run.task.label,
        "arm": run.arm.name,
        "learning_rate": budget.learning_rate,
        "model": run.arm.description,
        "recipe": f"{budget.steps} steps of {budget.rows(run.task.length)} x {run.task.length}, "
        f"warm-up {budget.warmup_steps}, decay {budget.weight_decay}, clip {budget.gradient_clip_norm}",
        "runs_at_once": parallel,
    }


def suite_table(rows: Sequence[Row]) -> str:
    """Markdown tables of the tail accuracy by length, one a task, one line a model at the best rate of its sweep.

    Cells are the mean over seeds, and in brackets the least and the largest of several; the tail is the last quarter
    of each row's labels. Rows of other recipes than the best one's are left out.
    """
    tasks = dict.fromkeys(row["metrics"]["task"] for row in rows)
    return "\n\n".join(_task_table(task, [row for row in rows if row["metrics"]["task"] == task]) for task in tasks)


def _task_table(task: str, rows: Sequence[Row]) -> str:
    lengths = sorted({length for row in rows for length in _tail(row)})
    header = [task, "rate", "seeds", "state bytes", *(f"{length:,}" for length in lengths)]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for arm, chosen in _best_rates(rows):
        cells = []
        for length in lengths:
            values = [_tail(row)[length] for row in chosen if length in _tail(row)]
            spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}" if values else "")
        metrics = chosen[0]["metrics"]
        state = f"{metrics['state_bytes']:,}" if "state_bytes" in metrics else ""
        lines.append([arm, f"{metrics['learning_rate']:g}", str(len(chosen)), state, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tail_curves(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """Arm -> pairs of length and mean tail accuracy of one task, at the best rate of each arm's sweep."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for arm, chosen in _best_rates(rows):
        lengths = sorted({length for row in chosen for length in _tail(row)})
        if lengths:
            curves[arm] = [
                (length, statistics.fmean(_tail(row)[length] for row in chosen if length in _tail(row)))
                for length in lengths
            ]
    return curves


def _best_rates(rows: Sequence[Row]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The runs of each model of one task at the best rate of its sweep."""
    found = []
    for arm, runs in by_model(rows).items():
        by_rate: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for row in runs:
            by_rate.setdefault((row["metrics"]["recipe"], row["metrics"]["learning_rate"]), []).append(row)
        # The rate that the other seeds were run at was chosen by the first.
        losses = {rate: same[0]["metrics"].get("training_loss_nats", math.inf) for rate, same in by_rate.items()}
        found.append((arm, by_rate[min(losses, key=losses.__getitem__)]))
    return found


def _tail(row: Mapping[str, Any]) -> dict[int, float]:
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
