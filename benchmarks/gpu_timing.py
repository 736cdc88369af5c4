"""Timing on a GPU: measured ceilings, arms in turn, and rows that survive being cut off. On a CPU it only rehearses."""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_bk.errors import ResNetBKError
from resnet_bk.evaluation.ledger import BENCHMARKS, append_row, git_commit, hardware

Run = Callable[[], object]


def failures() -> tuple[type[Exception], ...]:
    """What one arm may raise without ending the benchmark: its kernels, its memory, its glue."""
    own = (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError, ValueError, LookupError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return (*own, AttributeError, ResNetBKError)
    return (*own, AttributeError, ResNetBKError, TritonError)


class DeviceLostError(Exception):
    """A kernel broke the device's context, as an illegal address does: this process can measure nothing more."""

    def __init__(self, arm: str, reason: str) -> None:
        super().__init__(f"{arm}: {reason}")
        self.arm, self.reason = arm, reason


@dataclass(frozen=True)
class Timing:
    """One arm's runs."""

    seconds: list[float]
    """On the device, run by run."""
    host_seconds: float
    """Until the call came back to the host: above the device's time, launches limit it."""
    peak_bytes: int
    """Most memory allocated during a run beyond what was there before."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        if len(self.seconds) < 3:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median


class Clock:
    """Times calls on one device, its caches overwritten before every one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        # Several times the L2 cache of any GPU of today.
        self._trash = torch.empty(256 << 20, dtype=torch.uint8, device=device) if self.on_gpu else None

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Run, *, lead: float = 0.0) -> tuple[float, float]:
        """Seconds of `run` on the device, and until it came back to the host.

        The device first sleeps for `lead` seconds, in which the host runs ahead: launches then cost nothing unless
        there are more of them than the device can hide, which is how they behave inside a model.
        """
        if self._trash is None:
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            return elapsed, elapsed
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._trash.zero_()
        torch.cuda._sleep(int(lead * 2e9))  # cycles; no GPU of today has a clock above 2 GHz
        start.record()
        began = time.perf_counter()
        run()
        host = time.perf_counter() - began
        end.record()
        self.synchronize()
        return start.elapsed_time(end) / 1e3, host

    def first_runs(self, run: Run) -> tuple[float, float, int]:
        """Device and host seconds and peak bytes of a second run; the first compiles, tunes and fills pools."""
        run()
        self.synchronize()
        before = 0
        if self.on_gpu:
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        device, host = self.seconds(run)
        peak = torch.cuda.max_memory_allocated(self.device) - before if self.on_gpu else 0
        return device, host, peak

    def alternate(
        self, arms: Mapping[str, Run], *, seconds: float, least: int = 3, most: int = 25, run_ahead: float = 0.05
    ) -> dict[str, Timing | str]:
        """What every arm took, arms in turn (A B A B ...), or why it failed.

        Args:
            arms: name -> what to time.
            seconds: roughly how long the counted runs may take together.
            least: counted runs of an arm at least; with none, the second of the two first ones counts.
            most: counted runs of an arm at most.
            run_ahead: seconds that the host may be ahead at most; 0 for what no other work surrounds.

        Raises:
            DeviceLostError: an arm left the device unusable.
        """
        found: dict[str, Timing | str] = {}
        first: dict[str, tuple[float, float, int]] = {}
        for name, run in arms.items():
            try:
                first[name] = self.first_runs(run)
            except failures() as error:
                found[name] = reason = summary(error)
                self.check_alive(name, reason)
                release_memory()
        total = sum(device for device, _, _ in first.values()) + 1e-9
        rounds = max(least, min(most, int(seconds / total)))
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in first}
        for _ in range(rounds):
            for name in first:
                if name in found:
                    continue
                lead = min(run_ahead, 1.5 * first[name][1])
                try:
                    runs[name].append(self.seconds(arms[name], lead=lead))
                except failures() as error:
                    found[name] = reason = summary(error)
                    self.check_alive(name, reason)
        for name, times in runs.items():
            if name not in found:
                times = times or [first[name][:2]]
                host = statistics.median(host for _, host in times)
                found[name] = Timing([device for device, _ in times], host, first[name][2])
        return found

    def check_alive(self, arm: str, reason: str) -> None:
        """Raise `DeviceLostError` if `arm`, which failed for `reason`, broke the device's context."""
        try:
            self.synchronize()
        except RuntimeError:
            raise DeviceLostError(arm, reason) from None


def summary(error: BaseException) -> str:
    """One line that says what was raised, without the paths of this machine."""
    text = re.sub(r"(/[\w.+-]+){2,}/?", "<path>", str(error).strip().split("\n")[0])
    return f"failed: {type(error).__name__}: {text[:200]}"


def release_memory() -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured."""

    copy_bytes_per_second: float
    """Read and written, large tensors."""
    matmul_flops_per_second: float
    """bfloat16, random data, square matrices."""

    def floor_seconds(self, moved_bytes: float, flops: float) -> float:
        """The least time in which so many bytes move and so many operations happen."""
        return max(moved_bytes / self.copy_bytes_per_second, flops / self.matmul_flops_per_second)


def measure_ceilings(clock: Clock, *, copy_bytes: int = 2 << 30, side: int = 8192) -> Ceilings:
    """Copy bandwidth and rate of matrix products of `side`."""
    source = torch.empty(copy_bytes // 2, dtype=torch.bfloat16, device=clock.device).normal_()
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=clock.device) for _ in range(2))
    product = torch.empty_like(left)
    timings = clock.alternate(
        {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(left, right, out=product)}, seconds=0.3
    )
    copy, matmul = timings["copy"], timings["matmul"]
    if isinstance(copy, str) or isinstance(matmul, str):
        raise RuntimeError(f"The ceilings could not be measured: {copy}; {matmul}.")
    return Ceilings(2 * source.nbytes / copy.median, 2 * side**3 / matmul.median)


class Rows:
    """Rows of one question, written as soon as they are known; what an earlier part of the run wrote is not redone.

    Args:
        question: the ledger's file.
        out: folder in which `results/<question>.jsonl` grows.
        run: label of the run; rows with the same label and GPU are done.
        device: where the run happens.
        config: everything that was chosen, for its hash.
        command: what repeats the run.
        commit: of the measured code, where this machine has no checkout.
        shown: metrics that are printed, with their widths; the others are in the row only.
    """

    def __init__(
        self,
        question: str,
        *,
        out: Path,
        run: str,
        device: torch.device,
        config: Any,
        command: str,
        commit: str | None,
        shown: dict[str, int],
    ) -> None:
        self.question, self.out, self.run, self.device = question, out, run, device
        self.config, self.command, self.commit, self.shown = config, command, commit, shown
        self._gpu = hardware(device).get("gpu")
        self._done: dict[tuple, dict[str, Any]] = {}
        for folder in {BENCHMARKS.resolve(), out.resolve()}:
            path = folder / "results" / f"{question}.jsonl"
            for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
                row = json.loads(line)
                if row["metrics"].get("run") == run and row["hardware"].get("gpu") == self._gpu:
                    self._done[self._key(row["metrics"])] = row["metrics"]
        self._began = time.perf_counter()
        self._headed = False

    @staticmethod
    def _key(metrics: Mapping[str, Any]) -> tuple:
        return tuple(metrics.get(name) for name in ("part", "arm", "pass", "batch", "length_tokens"))

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The metrics of the row with this part, arm, pass, batch and length_tokens, if there is one."""
        return self._done.get(self._key(key))

    def add(self, tokens: int | None = None, model: Any = None, **metrics: Any) -> None:
        """Append a row, and print it."""
        metrics = {"run": self.run, **{name: value for name, value in metrics.items() if value is not None}}
        now = time.perf_counter()
        append_row(
            self.question,
            command=self.command,
            config=self.config,
            seeds=[0],
            metrics=metrics,
            wall_seconds=now - self._began,
            model=model,
            tokens=tokens,
            device=self.device,
            benchmarks=self.out,
            commit=self.commit,
        )
        self._began = now
        self._done[self._key(metrics)] = metrics
        self._print([_cell(metrics.get(name)) for name in self.shown])

    def _print(self, cells: list[str]) -> None:
        if not self._headed:
            self._headed = True
            self._print(list(self.shown))
        print(" ".join(cell.ljust(width) for cell, width in zip(cells, self.shown.values(), strict=True)), flush=True)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def add_options(parser: argparse.ArgumentParser, parts: tuple[str, ...]) -> None:
    """Options that the GPU benchmarks share."""
    if parts:
        parser.add_argument("--only", action="append", choices=parts, help="parts to run; all by default")
    parser.add_argument("--toy", action="store_true", help="tiny sizes on the CPU: rehearses the script, times nothing")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which nothing new is begun")
    parser.add_argument("--out", type=Path, default=BENCHMARKS, help="folder that gets results/<question>.jsonl")
    parser.add_argument("--run", default=None, help="label of the run, to continue one; the commit by default")
    parser.add_argument("--commit", default=None, help="of the measured code, where this machine has no checkout")
    parser.add_argument("--deadline", type=float, default=None, help=argparse.SUPPRESS)


def settle(arguments: argparse.Namespace, *, on_cpu: bool = False) -> torch.device:
    """The device, after defaults that depend on it; ends the script where there is no GPU and it is not `on_cpu`."""
    on_cpu = on_cpu or arguments.toy
    if not on_cpu and not torch.cuda.is_available():
        sys.exit("torch.cuda.is_available() is False; this benchmark needs a GPU. --toy rehearses it on the CPU.")
    arguments.run = arguments.run or arguments.commit or git_commit()
    arguments.deadline = arguments.deadline or time.time() + arguments.budget
    return torch.device("cpu" if on_cpu else "cuda")


def out_of_time(arguments: argparse.Namespace, seconds: float = 0.0) -> bool:
    """Whether something that takes `seconds` would end after the budget."""
    return time.time() + seconds > arguments.deadline


def start_again(arguments: argparse.Namespace) -> None:
    """Replace this process, whose device context is lost, by a new one that skips what is done. Does not return."""
    sys.stdout.flush()
    again = [a for a in sys.argv if not a.startswith("--deadline")]
    os.execv(sys.executable, [sys.executable, *again, f"--deadline={arguments.deadline}"])
