"""Figures drawn from metric files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from resnet_bk.errors import DataError


def plot_loss_curve(
    metrics: str | Path,
    output: str | Path,
    *,
    baselines: Mapping[str, float] | None = None,
    log_x: bool = False,
    title: str | None = None,
) -> Path:
    """Path of the PNG just written: training and validation loss against tokens trained on.

    The left axis is nats per token. Where validation rows carry bits per byte, a right axis shows them too, at the
    validation text's bytes per token, and `baselines` become horizontal lines.

    Args:
        metrics: a run's `metrics.jsonl`.
        output: PNG to write; its folder must exist.
        baselines: name -> bits per byte of the same validation text.
        log_x: logarithmic token axis.
        title: heading; none by default.

    Raises:
        DataError: no rows to draw, or baselines without a validation row in bits per byte.
    """
    train, validation = _read(Path(metrics))
    if not train and not validation:
        raise DataError(f"{metrics} holds no training or validation rows; expected the metrics.jsonl of a run.")
    nats_per_bit = _nats_per_bit_of_byte(validation)
    if baselines and nats_per_bit is None:
        raise DataError(f"{metrics} has no validation row with bits_per_byte; baselines need one for their scale.")

    # Agg draws without a display; the pyplot state machine stays untouched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(
            [r["tokens"] for r in train], [r["loss"] for r in train], color="#9bb8d3", linewidth=1.2, label="training"
        )
    if validation:
        last = validation[-1]
        final = f"{last['loss']:.3f} nats per token"
        if last.get("bits_per_byte") is not None:
            final += f", {last['bits_per_byte']:.3f} bits per byte"
        axes.plot(
            [r["tokens"] for r in validation],
            [r["loss"] for r in validation],
            color="#1f4e79",
            linewidth=2,
            marker="o",
            markersize=4,
            label=f"validation, last {final}",
        )
    if baselines and nats_per_bit is not None:
        for (name, bits), style in zip(baselines.items(), _line_styles(len(baselines)), strict=True):
            axes.axhline(
                bits * nats_per_bit,
                color="#b5482f",
                linestyle=style,
                linewidth=1.3,
                label=f"{name}, {bits:.3f} bits per byte",
            )
    if log_x:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("loss (nats per token)")
    if nats_per_bit is not None:
        ratio = nats_per_bit
        right = axes.secondary_yaxis(
            "right", functions=(lambda y: np.divide(y, ratio), lambda y: np.multiply(y, ratio))
        )
        right.set_ylabel("bits per byte of the validation text")
    if title:
        axes.set_title(title)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    # Below the axes: inside, a baseline would strike through the text.
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(output, format="png", dpi=150)
    return Path(output)


def _read(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training rows and validation rows of a metrics file."""
    kinds: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number} is not JSON ({error.msg}); expected the metrics of a run."
            ) from None
        if row.get("kind") in kinds:
            kinds[row["kind"]].append(row)
    return kinds["train"], kinds["validation"]


def _nats_per_bit_of_byte(validation: list[dict[str, Any]]) -> float | None:
    """Nats per token that one bit per byte amounts to: bytes per token times ln 2; None without such rows."""
    for row in reversed(validation):
        bits = row.get("bits_per_byte")
        if bits is not None and bits > 0 and math.isfinite(bits):
            return row["loss"] / bits
    return None


def _line_styles(count: int) -> list[str]:
    """Distinguishable line styles, repeated as needed."""
    styles = ["--", ":", "-."]
    return [styles[k % len(styles)] for k in range(count)]
