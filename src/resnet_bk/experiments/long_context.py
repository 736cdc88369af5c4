"""Models trained on short sequences and read on long texts: does the loss go on falling beyond the training length?"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resnet_bk.experiments.positions import parse_positions
from resnet_bk.experiments.rows import aligned
from resnet_bk.experiments.summary import best_runs

QUESTION = "long-context"


@dataclass(frozen=True)
class PositionCurve:
    """Loss by position of one arm at its best rate, over seeds."""

    name: str
    training_length: int
    texts: str
    """What was read."""
    starts: tuple[int, ...]
    """Fewest preceding tokens of each bin."""
    stops: tuple[int, ...]
    """One more than the most."""
    means: tuple[float, ...]
    """Nats per token."""
    errors: tuple[float, ...]
    """Standard error over texts, or the standard deviation over seeds if that is larger; 0 where neither is known."""
    seeds: int

    @property
    def beyond(self) -> float:
        """Loss in the last bin less that of the last bin within the training length: above 0, length hurts."""
        within = max(place for place, start in enumerate(self.starts) if start < self.training_length or place == 0)
        return self.means[-1] - self.means[within]

    @property
    def rises(self) -> list[int]:
        """Starts of the bins beyond the training length whose loss exceeds the least before by over two errors."""
        found = []
        for place, start in enumerate(self.starts):
            if start >= self.training_length and place:
                least = min(range(place), key=self.means.__getitem__)
                noise = 2 * (self.errors[place] ** 2 + self.errors[least] ** 2) ** 0.5
                if self.means[place] > self.means[least] + noise:
                    found.append(start)
        return found


def position_curves(rows: Sequence[Mapping[str, Any]]) -> list[PositionCurve]:
    """One curve for each arm that has rows with positions, in order of appearance."""
    rows = [row for row in rows if row["metrics"].get("by_position")]
    return [_curve(name, runs) for name, runs in best_runs(rows).items()]


def _curve(name: str, runs: Sequence[Mapping[str, Any]]) -> PositionCurve:
    bins = [parse_positions(run["metrics"]["by_position"]) for run in runs]
    columns = list(zip(*bins, strict=False))
    means = [statistics.fmean(part[2] for part in column) for column in columns]
    between = [statistics.stdev(p[2] for p in column) if len(column) > 1 else 0.0 for column in columns]
    within = [statistics.fmean(part[3] or 0.0 for part in column) for column in columns]
    metrics = runs[0]["metrics"]
    return PositionCurve(
        name=name,
        training_length=metrics["training_length"],
        texts=metrics["texts"],
        starts=tuple(column[0][0] for column in columns),
        stops=tuple(column[0][1] for column in columns),
        means=tuple(means),
        errors=tuple(max(pair) for pair in zip(between, within, strict=True)),
        seeds=len(runs),
    )


def position_table(curves: Sequence[PositionCurve]) -> str:
    """Aligned text: loss of each arm in the bins around and beyond the training length, and what length does to it."""
    if not curves:
        return "No run has a loss by position."
    first = curves[0]
    heading = f"Loss by preceding tokens; trained at {first.training_length:,}; {first.texts}."
    return f"{heading}\n{aligned(position_cells(curves))}"


def position_cells(curves: Sequence[PositionCurve]) -> list[list[str]]:
    """The cells of `position_table`, heading first; at least one curve."""
    first = curves[0]
    shown = [place for place, stop in enumerate(first.stops) if stop > first.training_length // 4]
    heading = [
        "arm",
        "seeds",
        *(f"{first.starts[k]:,}-{first.stops[k] - 1:,}" for k in shown),
        "last - trained",
        "rises",
    ]
    lines = [heading]
    for curve in curves:
        cells = [f"{curve.means[k]:.3f}" if k < len(curve.means) else "" for k in shown]
        rises = f"from {curve.rises[0]:,}" if curve.rises else "nowhere beyond noise"
        lines.append([curve.name, str(curve.seeds), *cells, f"{curve.beyond:+.3f}", rises])
    return lines
