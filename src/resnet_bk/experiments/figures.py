"""Figures of the report, each as PNG and SVG."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from resnet_bk.experiments.long_context import PositionCurve
from resnet_bk.experiments.readings import parse_curve
from resnet_bk.experiments.scaling import ScalingCurve
from resnet_bk.experiments.summary import ArmSummary, best_runs

FORMATS = ("png", "svg")

# Distinguishable with and without colour vision; arms that have a name keep their colour in every figure.
_COLOURS = {
    "bk": "#1f4e79", "transformer": "#b5482f", "mamba2": "#3b8a4d", "mamba3": "#d08a1d",
    "bk-hybrid": "#5b8fc7", "mamba2-hybrid": "#8fc59c", "mamba3-hybrid": "#ecc27c",
}  # fmt: skip
_OTHERS = ("#6b4c9a", "#4a4a4a", "#c2568d", "#2a9d9d", "#8c6d31", "#9c9ede", "#7b4173", "#637939")
_MARKERS = "osD^vPX*"


def loss_figure(arms: Sequence[ArmSummary], path: Path, *, title: str) -> list[Path]:
    """Files just written: validation loss against tokens trained on, mean over seeds with their range."""
    with _figure(path, title) as (axes, files):
        for name, colour, marker in _styles(arm.name for arm in arms):
            arm = next(arm for arm in arms if arm.name == name)
            columns = list(zip(*arm.curves, strict=False))
            if not columns:
                continue
            tokens = [column[0][0] for column in columns]
            losses = np.array([[point[2] for point in column] for column in columns])
            axes.plot(tokens, losses.mean(axis=1), color=colour, marker=marker, markersize=4, label=_seeds(arm))
            axes.fill_between(tokens, losses.min(axis=1), losses.max(axis=1), color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_xlabel("tokens trained on")
        axes.set_ylabel("validation loss (nats per token)")
    return files


def position_figure(curves: Sequence[PositionCurve], path: Path, *, title: str) -> list[Path]:
    """Files just written: loss by preceding tokens, all arms, the training length marked.

    The axis shows what lies beyond a sixteenth of the training length: the first tokens' loss would hide the rest.
    """
    with _figure(path, title) as (axes, files):
        for name, colour, marker in _styles(curve.name for curve in curves):
            curve = next(curve for curve in curves if curve.name == name)
            middles = np.sqrt(np.array(curve.starts) * np.array(curve.stops, dtype=float))
            axes.errorbar(
                middles,
                curve.means,
                yerr=curve.errors,
                color=colour,
                marker=marker,
                markersize=4,
                capsize=2,
                label=name,
            )
        length = curves[0].training_length
        axes.axvline(length, color="#4a4a4a", linestyle="--", linewidth=1, label=f"training length, {length:,}")
        _doubling(axes)
        later = [m for c in curves for start, m in zip(c.starts, c.means, strict=True) if 16 * start >= length]
        if later:
            margin = 0.1 * (max(later) - min(later)) + 0.01
            axes.set_ylim(min(later) - margin, max(later) + margin)
        axes.set_xlabel(f"preceding tokens ({curves[0].texts})")
        axes.set_ylabel("loss (nats per token)")
    return files


def scaling_figure(curves: Sequence[ScalingCurve], path: Path, *, title: str) -> list[Path]:
    """Files just written: loss against size with power laws and their 95 % bands; curves of one kind of size."""
    with _figure(path, title) as (axes, files):
        for name, colour, marker in _styles(curve.name for curve in curves):
            curve = next(curve for curve in curves if curve.name == name)
            label = name if curve.law is None else f"{name}: {curve.law_text}"
            axes.plot(curve.sizes, curve.losses, marker, color=colour, markersize=5, label=label)
            if curve.law is not None:
                sizes = np.geomspace(min(curve.sizes), max(curve.sizes), 60)
                axes.plot(sizes, curve.law.at(sizes), color=colour, linewidth=1.5)
                low, high = curve.band(sizes)
                axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        against = curves[0].against
        what = "parameters without embeddings" if against == "parameters" else "operations of the training"
        axes.set_xlabel(what)
        axes.set_ylabel("validation loss (nats per token)")
    return files


def frontier_figure(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> list[Path]:
    """Files just written: the lowest validation perplexity of each arm within so many operations.

    Every point of every run's curve counts, at the share of its operations that the tokens until then took.
    """
    with _figure(path, title) as (axes, files):
        points = frontier_points(rows)
        for name, colour, marker in _styles(points):
            spent, losses = (np.array(values) for values in zip(*points[name], strict=True))
            least = np.minimum.accumulate(losses)
            axes.plot(spent, np.exp(losses), marker, color=colour, markersize=3, alpha=0.35)
            axes.step(spent, np.exp(least), where="post", color=colour, linewidth=1.8, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("operations of the training, forward and backward (counted, not measured)")
        axes.set_ylabel("validation perplexity")
        _plain_ticks(axes)
    return files


def frontier_points(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Arm -> pairs of operations and validation loss, operations rising, of the runs at each size's best rate."""
    sizes: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["metrics"].get("training_flops"):
            sizes.setdefault(row["parameters"]["without_embeddings"], []).append(row)
    found: dict[str, list[tuple[float, float]]] = {}
    for same_size in sizes.values():
        for name, runs in best_runs(same_size).items():
            for run in runs:
                per_token = run["metrics"]["training_flops"] / run["tokens"]
                curve = parse_curve(run["metrics"]["curve"])
                found.setdefault(name, []).extend((per_token * tokens, loss) for tokens, _, loss in curve)
    return {name: sorted(points) for name, points in found.items() if points}


def speed_figure(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> list[Path]:
    """Files just written: tokens a second against the sequence length, both passes."""
    done = [row["metrics"] for row in rows if row["metrics"]["outcome"] == "done"]
    with _figure(path, title) as (axes, files):
        for name, colour, marker in _styles(m["arm"] for m in done):
            for kind, style in (("forward", ":"), ("forward and backward", "-")):
                line = {m["length"]: m["tokens_per_second"] for m in done if (m["arm"], m["pass"]) == (name, kind)}
                lengths = sorted(line)
                rates = [line[length] for length in lengths]
                axes.plot(lengths, rates, style, color=colour, marker=marker, markersize=4, label=f"{name}, {kind}")
        _doubling(axes)
        axes.set_yscale("log")
        axes.set_xlabel("sequence length (tokens)")
        axes.set_ylabel("tokens per second")
        _plain_ticks(axes)
    return files


def accuracy_figure(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path, *, title: str) -> list[Path]:
    """Files just written: accuracy against length for each arm (name -> pairs of length and accuracy)."""
    with _figure(path, title) as (axes, files):
        for name, colour, marker in _styles(curves):
            lengths, values = zip(*curves[name], strict=True)
            axes.plot(lengths, values, color=colour, marker=marker, markersize=4, label=name)
        _doubling(axes)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("length (tokens)")
        axes.set_ylabel("accuracy in the last quarter of a row")
    return files


def _styles(names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Each different name with its colour and marker."""
    others = 0
    for place, name in enumerate(dict.fromkeys(names)):
        colour = _COLOURS.get(name)
        if colour is None:
            colour, others = _OTHERS[others % len(_OTHERS)], others + 1
        yield name, colour, _MARKERS[place % len(_MARKERS)]


def _seeds(arm: ArmSummary) -> str:
    count = len(arm.seeds)
    return f"{arm.name} ({count} seed{'s' if count > 1 else ''})"


def _doubling(axes: Any) -> None:
    """A horizontal axis of lengths, each tick twice the one before, in ordinary numbers."""
    from matplotlib.ticker import StrMethodFormatter

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _plain_ticks(axes: Any) -> None:
    """Label a logarithmic axis that may span less than a decade with ordinary numbers."""
    from matplotlib.ticker import EngFormatter, LogLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_minor_formatter("")


@contextmanager
def _figure(path: Path, title: str) -> Iterator[tuple[Any, list[Path]]]:
    """Axes to draw on and the list of files, which is filled when the figure is written at the end."""
    # Agg draws without a display; the pyplot state machine stays untouched.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    files: list[Path] = []
    yield axes, files
    axes.set_title(title, fontsize=10, wrap=True)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind in FORMATS:
        file = path.with_name(f"{path.name}.{kind}")
        # The same rows give the same bytes.
        with rc_context({"svg.hashsalt": path.name}):
            figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        files.append(file)
