"""What several runs of an arm come to: mean, spread, and whether a difference is larger than the seeds make it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resnet_bk.experiments.readings import parse_curve, tokens_to_reach
from resnet_bk.experiments.rows import aligned
from resnet_bk.experiments.trial import DONE


@dataclass(frozen=True)
class Spread:
    """A quantity over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds, with n - 1; None for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def overlaps(self, other: Spread) -> bool:
        """Whether the ranges of the values overlap: then the seeds' spread covers the difference of the means."""
        return min(self.values) <= max(other.values) and min(other.values) <= max(self.values)

    def __str__(self) -> str:
        deviation = self.deviation
        return f"{self.mean:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


@dataclass(frozen=True)
class ArmSummary:
    """An arm at its best rate."""

    name: str
    rate: float
    rates: tuple[float, ...]
    """Those of the sweep."""
    parameters: int
    """Without embeddings."""
    seeds: tuple[int, ...]
    validation: Spread
    """Perplexity."""
    test: Spread | None
    """Perplexity; None without a test split."""
    bits_per_byte: Spread | None
    """Of the validation split; None where the bytes are not known."""
    tokens_per_second: float
    """Median."""
    peak_bytes: int | None
    reading: str
    """How validation and test were read: stream, windows, or both among the seeds."""
    curves: tuple[tuple[tuple[int, float, float], ...], ...]
    """One a seed; see `trial.parse_curve`."""

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the first or last of a sweep, so that a better one may lie beyond."""
        return len(self.rates) > 1 and self.rate in (min(self.rates), max(self.rates))


def by_arm(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows that have a result, by arm, in order of appearance; `by_model` names the arms."""
    return by_model(row for row in rows if row["metrics"]["outcome"] == DONE)


def by_model(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows by arm, in order of appearance.

    Models of one name that are not one model are arms of their own, named after what the first of them does not have.
    """
    models: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        metrics = row["metrics"]
        models.setdefault(metrics["arm"], {}).setdefault(metrics.get("model", ""), []).append(row)
    found = {}
    for name, of_name in models.items():
        first = next(iter(of_name))
        for model, runs in of_name.items():
            others = [field for field in model.split() if field not in first.split()]
            found[name if model == first else f"{name} ({' '.join(others)})"] = runs
    return found


def sweep_of(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs of an arm that make its sweep: those of the seed that was run at the most rates, the first such."""
    seeds = dict.fromkeys(run["seeds"][0] for run in runs)
    sweeps = [[run for run in runs if run["seeds"] == [seed]] for seed in seeds]
    return max(sweeps, key=len)


def best_runs(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The runs of each arm at the rate of the lowest validation loss in its sweep: the first of each seed.

    A run that was made twice differs from its repetition by rounding alone, so it counts once.
    """
    found = {}
    for name, runs in by_arm(rows).items():
        best = min(sweep_of(runs), key=lambda run: run["metrics"]["validation_loss"])
        rate = best["metrics"]["learning_rate"]
        by_seed: dict[int, Mapping[str, Any]] = {}
        for run in runs:
            if run["metrics"]["learning_rate"] == rate:
                by_seed.setdefault(run["seeds"][0], run)
        found[name] = list(by_seed.values())
    return found


def summarise(rows: Iterable[Mapping[str, Any]]) -> list[ArmSummary]:
    """One summary for each arm that has results, in order of appearance; runs at other rates than the best are out."""
    rows = list(rows)
    runs = by_arm(rows)
    return [_summary(name, chosen, sweep_of(runs[name])) for name, chosen in best_runs(rows).items()]


def _summary(name: str, chosen: list[Mapping[str, Any]], sweep: list[Mapping[str, Any]]) -> ArmSummary:
    metrics = [run["metrics"] for run in chosen]
    peaks = [m["peak_bytes"] for m in metrics if m["peak_bytes"] is not None]
    return ArmSummary(
        name=name,
        rate=metrics[0]["learning_rate"],
        rates=tuple(run["metrics"]["learning_rate"] for run in sweep),
        parameters=chosen[0]["parameters"]["without_embeddings"],
        seeds=tuple(run["seeds"][0] for run in chosen),
        validation=Spread(tuple(m["validation_perplexity"] for m in metrics)),
        test=_spread(metrics, "test_perplexity"),
        bits_per_byte=_spread(metrics, "validation_bits_per_byte"),
        tokens_per_second=statistics.median(m["tokens_per_second"] for m in metrics),
        peak_bytes=max(peaks) if peaks else None,
        reading=" or ".join(sorted({m["reading"] for m in metrics})),
        curves=tuple(tuple(parse_curve(m["curve"])) for m in metrics),
    )


def comparison_table(arms: Sequence[ArmSummary], *, reference: str) -> str:
    """Aligned text: one line an arm, its perplexity over that of `reference`, and whether the seeds cover that."""
    return "\n".join([aligned(comparison_cells(arms, reference=reference)), *notes(arms)])


def comparison_cells(arms: Sequence[ArmSummary], *, reference: str) -> list[list[str]]:
    """The cells of `comparison_table`, heading first."""
    header = [
        "arm", "parameters", "rate", "seeds", "validation", "test", "bits/byte", f"/ {reference}", "tokens to equal",
        "tokens/s", "peak MiB", "read in",
    ]  # fmt: skip
    base = next((arm for arm in arms if arm.name == reference), None)
    return [header] + [_cells(arm, base) for arm in arms]


def notes(arms: Sequence[ArmSummary]) -> list[str]:
    """What a reader of the table should know besides."""
    edges = [arm.name for arm in arms if arm.at_edge]
    if not edges:
        return []
    return [f"The best rate of {', '.join(edges)} is at the edge of the sweep; a better one may lie beyond."]


def verdict(arm: ArmSummary, base: ArmSummary) -> str:
    """Ratio of the perplexities, and what the seeds say about it."""
    ratio = f"{arm.validation.mean / base.validation.mean:.3f}"
    if len(arm.seeds) < 2 or len(base.seeds) < 2:
        return f"{ratio} (one seed)"
    return f"{ratio} (within the seeds' spread)" if arm.validation.overlaps(base.validation) else ratio


def tokens_to_equal(arm: ArmSummary, base: ArmSummary) -> float | None:
    """Share of `base`'s tokens after which `arm` has the validation loss that `base` ended with; None if never.

    Over the seeds' mean curves; both were evaluated at the same points.
    """
    ours, theirs = _mean_curve(arm), _mean_curve(base)
    if not ours or not theirs:
        return None
    reached = tokens_to_reach(ours, theirs[-1][2])
    return None if reached is None else reached / theirs[-1][0]


def _mean_curve(arm: ArmSummary) -> list[tuple[int, float, float]]:
    points = zip(*arm.curves, strict=False)
    return [
        (seeds[0][0], statistics.fmean(p[1] for p in seeds), statistics.fmean(p[2] for p in seeds)) for seeds in points
    ]


def _cells(arm: ArmSummary, base: ArmSummary | None) -> list[str]:
    share = None if base is None else tokens_to_equal(arm, base)
    return [
        arm.name,
        f"{arm.parameters:,}",
        f"{arm.rate:g}",
        str(len(arm.seeds)),
        str(arm.validation),
        "" if arm.test is None else str(arm.test),
        "" if arm.bits_per_byte is None else f"{arm.bits_per_byte.mean:.4f}",
        "" if base is None else "1" if arm is base else verdict(arm, base),
        "" if share is None else f"{share:.0%}",
        f"{arm.tokens_per_second:,.0f}",
        "" if arm.peak_bytes is None else f"{arm.peak_bytes / 2**20:,.0f}",
        arm.reading,
    ]


def _spread(metrics: Sequence[Mapping[str, Any]], name: str) -> Spread | None:
    values = [m[name] for m in metrics if m.get(name) is not None]
    return Spread(tuple(values)) if values else None
