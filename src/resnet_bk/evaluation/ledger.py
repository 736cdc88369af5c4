"""The results ledger: one JSON row per run in `benchmarks/results/<question>.jsonl`, and the table made from the rows.

    python -m resnet_bk.evaluation.ledger            # regenerates benchmarks/LEDGER.md

A figure in the README or the documentation names its row as `<question>#<line>`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_bk.errors import DataError

BENCHMARKS = Path("benchmarks")
"""Where rows and table live, relative to the working directory (the project's root)."""

_COLUMNS = ("commit", "command", "seeds", "hardware", "parameters", "tokens", "metrics", "wall_seconds")
_LIBRARIES = ("resnet-bk", "torch", "triton", "numpy", "tokenizers", "mamba-ssm")


def append_row(
    question: str,
    *,
    command: str,
    config: Any,
    seeds: Sequence[int],
    metrics: Mapping[str, Any],
    wall_seconds: float,
    model: nn.Module | None = None,
    tokens: int | None = None,
    device: torch.device | str = "cpu",
    benchmarks: str | Path = BENCHMARKS,
    commit: str | None = None,
) -> dict[str, Any]:
    """The row just appended to `benchmarks/results/<question>.jsonl`.

    Failures are rows too: put what happened in `metrics`.

    Args:
        question: what the run is to answer; lower-case words joined by hyphens, the file's name.
        command: the command that repeats the run, with paths relative to the project's root.
        config: dataclass or mapping of everything that was chosen; only its hash is kept.
        seeds: seeds used.
        metrics: name -> number, string or None, with the unit in the name.
        wall_seconds: duration of the run.
        model: the model measured, for its parameter counts.
        tokens: tokens trained on or processed.
        device: where it ran.
        benchmarks: folder that holds `results/`.
        commit: of the code that ran, where that machine has no checkout; default what git says here.

    Raises:
        DataError: a bad question name, a metric that is not finite, or a row that holds a path of this machine.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", question):
        raise DataError(f"The question {question!r} cannot name a file; use lower-case words joined by hyphens.")
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"metrics[{name!r}] is {value}; JSON has no such number. Write what happened as a string.")
    row = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit() if commit is None else commit,
        "command": command,
        "config_hash": config_hash(config),
        "seeds": list(seeds),
        "hardware": hardware(device),
        "versions": library_versions(),
        "tokens": tokens,
        "parameters": None if model is None else count_parameters(model),
        "metrics": dict(metrics),
        "wall_seconds": round(wall_seconds, 3),
    }
    line = json.dumps(row, allow_nan=False)
    for folder in {str(Path.home()), os.getcwd(), sys.prefix} - {"/"}:
        if re.search(re.escape(folder) + r"(?![\w.-])", line):
            raise DataError(f"The row would publish the path {folder!r}; write paths relative to the project's root.")
    path = Path(benchmarks) / "results" / f"{question}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    return row


def config_hash(config: Any) -> str:
    """First 12 hexadecimal digits of the SHA-256 of `config` (dataclass or mapping) as sorted JSON."""
    values = dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else config
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: `total`, and `without_embeddings` (token embedding and output head left out)."""
    total = sum(p.numel() for p in model.parameters())
    embeddings = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "output_weight", None)
    if head is not None:
        embeddings[id(head)] = head.numel()
    return {"total": total, "without_embeddings": total - sum(embeddings.values())}


def git_commit() -> str:
    """Commit of the working directory, with `-dirty` if tracked files differ from it.

    Outside a checkout what the environment's `RESNET_BK_COMMIT` says, or `unknown`.
    """
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("RESNET_BK_COMMIT", "unknown")
    # Rows and table change with every run; they do not make the measured code another.
    changed = [line[3:] for line in changes.splitlines()]
    ours = (f"{BENCHMARKS.name}/results/", f"{BENCHMARKS.name}/LEDGER.md")
    return commit + ("-dirty" if any(not name.startswith(ours) for name in changed) else "")


def hardware(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What the run ran on: processor, cores, threads, and the GPU's name if `device` is one. No names of machines."""
    device = torch.device(device)
    found: dict[str, Any] = {"cpu": _cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that decide a result."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_ledger(benchmarks: str | Path = BENCHMARKS) -> Path:
    """Path of `LEDGER.md`, regenerated from every row under `benchmarks/results`.

    Raises:
        DataError: a line that is not a row; names file and line.
    """
    benchmarks = Path(benchmarks)
    sections = [
        "# Ledger\n\nGenerated by `python -m resnet_bk.evaluation.ledger` from `results/*.jsonl`; do not edit. "
        "Configuration hashes, library versions and dates are in the rows.\n"
    ]
    for path in sorted((benchmarks / "results").glob("*.jsonl")):
        sections.append(f"## {path.stem}\n\n" + _table(path.stem, _read_rows(path)) + "\n")
    ledger = benchmarks / "LEDGER.md"
    ledger.write_text("\n".join(sections), encoding="utf-8")
    return ledger


def _read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Pairs of line number and row."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append((number, {key: row[key] for key in _COLUMNS}))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f"{path.name}, line {number} is not a ledger row ({error}); correct or remove it."
            ) from None
    return rows


def _table(question: str, rows: list[tuple[int, dict[str, Any]]]) -> str:
    """Markdown table of one question's rows; its metric columns are all metrics that occur, in order of appearance."""
    names = list(dict.fromkeys(name for _, row in rows for name in row["metrics"]))
    header = [
        "row",
        "commit",
        "command",
        "seeds",
        "hardware",
        "parameters (without embeddings)",
        "tokens",
        *names,
        "wall seconds",
    ]
    lines = [_line(header), _line(["---"] * len(header))]
    for number, row in rows:
        hardware_text = row["hardware"].get("gpu") or f"{row['hardware']['cpu']}, {row['hardware']['threads']} threads"
        parameters = row["parameters"]
        counts = "" if parameters is None else f"{parameters['total']:,} ({parameters['without_embeddings']:,})"
        commit = re.sub(r"^([0-9a-f]{10})[0-9a-f]+", r"\1", row["commit"])
        lines.append(
            _line(
                [
                    f"{question}#{number}",
                    commit,
                    f"`{row['command']}`",
                    ", ".join(map(str, row["seeds"])),
                    hardware_text,
                    counts,
                    _number(row["tokens"]),
                    *(_number(row["metrics"].get(name)) for name in names),
                    _number(row["wall_seconds"]),
                ]
            )
        )
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    """One table line; a bar inside a cell is escaped."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _number(value: Any) -> str:
    """A value as the table shows it: thousands separated, floats to five digits, None empty."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _cpu_model() -> str:
    """The processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return match.group(1)
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    print(write_ledger())
