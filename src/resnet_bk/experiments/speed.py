"""How fast whole models of equal size run on this machine: milliseconds, tokens a second, peak bytes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_bk.errors import ConfigError
from resnet_bk.evaluation.ledger import BENCHMARKS, append_row, config_hash, hardware
from resnet_bk.experiments.arms import Arm, shape_only
from resnet_bk.experiments.rows import aligned, read_rows
from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.training.device import resolve_device, resolve_precision

QUESTION = "speed"
PASSES = ("forward", "forward and backward")

_INPUT_SETS = 4
_WARM_UP = 2


@dataclass(frozen=True)
class SpeedCase:
    """What is timed."""

    length: int
    """Tokens of a sequence."""
    batch: int
    """Sequences."""
    kind: str
    """One of `PASSES`; both include the loss."""


def speed_cases(lengths: Sequence[int], batch_tokens: int) -> list[SpeedCase]:
    """Both passes at every length, with as many sequences as `batch_tokens` allow, at least one."""
    if not lengths or min(lengths) < 2:
        raise ConfigError(f"lengths is {list(lengths)}; expected at least one length >= 2.")
    return [SpeedCase(length, max(1, batch_tokens // length), kind) for length in lengths for kind in PASSES]


def measure_speed(
    arms: Sequence[Arm],
    cases: Sequence[SpeedCase],
    *,
    command: str,
    device: str = "auto",
    precision: str = "auto",
    repeats: int = 10,
    question: str = QUESTION,
    benchmarks: Path = BENCHMARKS,
    label: str = "",
    budget: float | None = None,
    commit: str | None = None,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """The ledger rows of every arm in every case, those made before included.

    The arms of a case are timed in turn (A B A B ...) on inputs that change from run to run, after two runs of
    warm-up; the median counts. A case of which some arm has no row is timed for all arms.

    Args:
        arms: models, usually of equal size.
        cases: lengths and passes.
        command: for the ledger.
        device: where to run.
        precision: compute dtype; `auto` as in training.
        repeats: timed runs of each arm, >= 1.
        question: ledger file.
        benchmarks: folder of the ledger.
        label: part of the rows' identity, for measuring again.
        budget: seconds after which no further case is begun.
        commit: for the ledger, where git cannot tell.
        report: receives every line.

    Raises:
        ConfigError: no repeats, or a device that is not there.
    """
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}; expected a number of timed runs >= 1.")
    where = resolve_device(device)
    dtype = resolve_precision(precision, where)
    deadline = math.inf if budget is None else time.monotonic() + budget
    rows = {row["config_hash"]: row for row in read_rows(question, benchmarks)}
    found = []
    for case in cases:
        identity = {
            arm.name: {
                "kind": "speed", "model": arm.model.to_dict(), "case": vars(case), "precision": str(dtype),
                "repeats": repeats, "hardware": hardware(where), "label": label,
            }
            for arm in arms
        }  # fmt: skip
        keys = {name: config_hash(values) for name, values in identity.items()}
        if any(key not in rows for key in keys.values()):
            if time.monotonic() >= deadline:
                report("The time was up; the same command continues.")
                break
            timed = _time_case(arms, case, where, dtype, repeats)
            for arm in arms:
                rows[keys[arm.name]] = append_row(
                    question,
                    command=command,
                    config=identity[arm.name],
                    seeds=[0],
                    metrics=_description(arm, case, dtype) | timed[arm.name][0],
                    wall_seconds=timed[arm.name][1],
                    model=shape_only(arm.model),
                    tokens=case.batch * case.length,
                    device=where,
                    benchmarks=benchmarks,
                    commit=commit,
                )
        ours = [rows[key] for key in keys.values()]
        found += ours
        report(speed_table(ours, reference=arms[0].name) + "\n")
    return found


def speed_table(rows: Sequence[Mapping[str, Any]], *, reference: str) -> str:
    """Aligned text: one line a row, with its time over that of `reference` in the same case."""
    return aligned(speed_cells(rows, reference=reference))


def speed_cells(rows: Sequence[Mapping[str, Any]], *, reference: str) -> list[list[str]]:
    """The cells of `speed_table`, heading first."""
    lines = [["arm", "pass", "batch x length", "ms", "tokens/s", "peak MiB", f"/ {reference}"]]
    cases = {(m["pass"], m["shape"]): m["milliseconds"] for m in _metrics(rows) if m["arm"] == reference}
    for m in _metrics(rows):
        base = cases.get((m["pass"], m["shape"]))
        if m["outcome"] != "done":
            lines.append([m["arm"], m["pass"], m["shape"], m["outcome"], "", "", ""])
            continue
        lines.append(
            [
                m["arm"],
                m["pass"],
                m["shape"],
                f"{m['milliseconds']:.2f} ± {m['spread_milliseconds']:.2f}",
                f"{m['tokens_per_second']:,.0f}",
                "" if m["peak_bytes"] is None else f"{m['peak_bytes'] / 2**20:,.0f}",
                "" if base is None else f"{m['milliseconds'] / base:.2f}",
            ]
        )
    return lines


def _metrics(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [row["metrics"] for row in rows]


def _description(arm: Arm, case: SpeedCase, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "kind": "speed",
        "arm": arm.name,
        "pass": case.kind,
        "shape": f"{case.batch} x {case.length}",
        "length": case.length,
        "precision": str(dtype).removeprefix("torch."),
        "model": arm.description,
    }


def _time_case(
    arms: Sequence[Arm], case: SpeedCase, device: torch.device, dtype: torch.dtype, repeats: int
) -> dict[str, tuple[dict[str, Any], float]]:
    """Metrics and wall seconds of every arm."""
    outcomes: dict[str, str] = {}
    runs: dict[str, _TimedModel] = {}
    wall = dict.fromkeys((arm.name for arm in arms), 0.0)
    for arm in arms:
        began = time.perf_counter()
        try:
            runs[arm.name] = _TimedModel(arm, case, device, dtype)
        except torch.OutOfMemoryError as error:
            outcomes[arm.name] = f"out of memory: {str(error).splitlines()[0]}"
            torch.cuda.empty_cache()
        wall[arm.name] += time.perf_counter() - began
    for _ in range(repeats):
        for name, run in runs.items():
            wall[name] += run.time()
    found: dict[str, tuple[dict[str, Any], float]] = {}
    for arm in arms:
        if arm.name in outcomes:
            metrics: dict[str, Any] = {"outcome": outcomes[arm.name], "milliseconds": None}
        else:
            metrics = {"outcome": "done"} | runs[arm.name].metrics()
        found[arm.name] = metrics, wall[arm.name]
    return found


class _TimedModel:
    """A model, inputs for it, and how long its runs took."""

    def __init__(self, arm: Arm, case: SpeedCase, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        torch.manual_seed(0)
        self.model = LanguageModel(arm.model).to(device)
        shape = (_INPUT_SETS, case.batch, case.length)
        self.inputs = torch.randint(arm.model.vocab_size, shape, device=device)
        self.seconds: list[float] = []
        self.peak_bytes: int | None = None
        for _ in range(_WARM_UP):
            self._run(self.inputs[0])
        self._synchronize()
        if device.type == "cuda":
            # Other arms' parameters do not count, this one's do.
            own = sum(parameter.nbytes for parameter in self.model.parameters())
            before = torch.cuda.memory_allocated(device) - own
            torch.cuda.reset_peak_memory_stats(device)
            self._run(self.inputs[0])
            self._synchronize()
            self.peak_bytes = torch.cuda.max_memory_allocated(device) - before

    def time(self) -> float:
        """Seconds of one more run, which is kept."""
        ids = self.inputs[len(self.seconds) % _INPUT_SETS]
        self._synchronize()
        began = time.perf_counter()
        self._run(ids)
        self._synchronize()
        self.seconds.append(time.perf_counter() - began)
        return self.seconds[-1]

    def metrics(self) -> dict[str, Any]:
        """Median and interquartile range of the runs, and what follows."""
        median = statistics.median(self.seconds)
        spread = 0.0
        if len(self.seconds) > 2:
            low, _, high = statistics.quantiles(self.seconds, n=4)
            spread = high - low
        return {
            "milliseconds": 1e3 * median,
            "spread_milliseconds": 1e3 * spread,
            "tokens_per_second": self.case.batch * self.case.length / median,
            "peak_bytes": self.peak_bytes,
        }

    def _run(self, ids: Tensor) -> None:
        backward = self.case.kind == PASSES[1]
        with (
            torch.set_grad_enabled(backward),
            torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32),
        ):
            loss = self.model(ids, labels=ids).loss
        if backward:
            loss.backward()
            self.model.zero_grad(set_to_none=True)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
