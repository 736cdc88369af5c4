"""Loss against size: models over a grid of widths and depths, power laws through their losses."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resnet_bk.errors import ConfigError
from resnet_bk.evaluation.ledger import BENCHMARKS
from resnet_bk.experiments.arms import make_arms
from resnet_bk.experiments.compare import Comparison, compare
from resnet_bk.experiments.corpora import CorpusSource
from resnet_bk.experiments.power_law import PowerLaw, bootstrap_power_laws, confidence_band, fit_power_law
from resnet_bk.experiments.rows import aligned
from resnet_bk.experiments.summary import best_runs
from resnet_bk.models.config import ModelConfig
from resnet_bk.models.sizes import num_parameters
from resnet_bk.training.config import TrainingConfig

QUESTION = "scaling"


def grid(base: ModelConfig, widths: Sequence[int], depths: Sequence[int]) -> list[ModelConfig]:
    """`base` at every width and depth, smallest first, its feed-forward as wide in proportion (a multiple of 16).

    Raises:
        ConfigError: no widths or depths, or one at which heads do not divide the width.
    """
    if not widths or not depths or min(*widths, *depths) < 1:
        raise ConfigError(f"widths is {list(widths)} and depths is {list(depths)}; expected whole numbers >= 1.")
    ratio = base.feed_forward_dim / base.d_model
    models = [
        dataclasses.replace(
            base, d_model=width, num_layers=depth, feed_forward_dim=max(16, 16 * round(ratio * width / 16))
        )
        for width in widths
        for depth in depths
    ]
    return sorted(models, key=num_parameters)


def training_of(model: ModelConfig, training: TrainingConfig, tokens_per_parameter: float) -> TrainingConfig:
    """`training` with so many steps that the model reads that many tokens per parameter; unchanged for 0.

    Warm-up is at most a fifth of the steps.
    """
    if tokens_per_parameter < 0:
        raise ConfigError(f"tokens-per-parameter is {tokens_per_parameter}; expected a number >= 0.")
    if tokens_per_parameter == 0:
        return training
    step = training.batch_size * training.sequence_length
    steps = max(1, round(tokens_per_parameter * num_parameters(model) / step))
    return dataclasses.replace(training, steps=steps, warmup_steps=min(training.warmup_steps, steps // 5))


def scale(
    comparison: Callable[[ModelConfig], Comparison],
    models: Sequence[ModelConfig],
    source: CorpusSource,
    *,
    command: str,
    question: str = QUESTION,
    benchmarks: Path = BENCHMARKS,
    work_dir: Path = Path("runs/scaling"),
    budget: float | None = None,
    parallel: int = 1,
    commit: str | None = None,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """The ledger rows of the comparison at every size, smallest first, and the power laws reported at the end.

    Args:
        comparison: what is run at a size, from the model there.
        models: sizes; see `grid`.
        source: as in `compare`, and so are the other arguments.
        command: for the ledger.
        question: ledger file.
        benchmarks: its folder.
        work_dir: for what a broken run continues from.
        budget: seconds for everything.
        parallel: runs at once.
        commit: for the ledger.
        report: receives every line.
    """
    deadline = math.inf if budget is None else time.monotonic() + budget
    corpus = source.open()
    rows: list[dict[str, Any]] = []
    for model in models:
        left = None if budget is None else max(0.0, deadline - time.monotonic())
        report(f"\n{model.d_model} wide, {model.num_layers} deep, {num_parameters(model):,} parameters")
        rows += compare(
            comparison(model),
            source,
            command=command,
            question=question,
            benchmarks=benchmarks,
            work_dir=work_dir,
            budget=left,
            parallel=parallel,
            commit=commit,
            corpus=corpus,
            report=report,
        )
    report("\n" + scaling_table(scaling_curves(rows)))
    return rows


@dataclass(frozen=True)
class ScalingCurve:
    """Final losses of one arm over sizes, and the power law through them."""

    name: str
    against: str
    """`parameters` or `operations`."""
    sizes: tuple[float, ...]
    """One a run, at the best rate of each size."""
    losses: tuple[float, ...]
    """Validation, nats per token."""
    law: PowerLaw | None
    """None with fewer than three different sizes."""
    laws: tuple[PowerLaw, ...]
    """Through resampled runs."""

    def band(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """95 % confidence band of the loss."""
        return confidence_band(self.laws, sizes)

    @property
    def law_text(self) -> str:
        """The law in N parameters or C operations."""
        return str(self.law) if self.against == "parameters" else str(self.law).replace("N", "C")

    @property
    def exponent_range(self) -> tuple[float, float]:
        """95 % confidence interval of the exponent."""
        low, high = np.quantile([law.exponent for law in self.laws], [0.025, 0.975])
        return float(low), float(high)


def scaling_curves(rows: Sequence[Mapping[str, Any]], *, samples: int = 300) -> list[ScalingCurve]:
    """Two curves for each arm with results: against parameters without embeddings, and against operations.

    Args:
        rows: of the ledger, as `compare` wrote them.
        samples: resampled fits for the confidence band.
    """
    by_size: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = row["metrics"]["arm"], row["parameters"]["without_embeddings"]
        by_size.setdefault(key, []).append(row)
    best: dict[str, list[Mapping[str, Any]]] = {}
    for (name, _), runs in by_size.items():
        best.setdefault(name, []).extend(best_runs(runs).get(name, []))
    curves = []
    for name, runs in best.items():
        losses = tuple(run["metrics"]["validation_loss"] for run in runs)
        sizes = {
            "parameters": tuple(float(run["parameters"]["without_embeddings"]) for run in runs),
            "operations": tuple(float(run["metrics"].get("training_flops") or 0) for run in runs),
        }
        for against, values in sizes.items():
            if runs and all(values):
                enough = len(set(values)) >= 3
                law = fit_power_law(values, losses) if enough else None
                laws = bootstrap_power_laws(values, losses, samples=samples) if enough else []
                curves.append(ScalingCurve(name, against, values, losses, law, tuple(laws)))
    return curves


def scaling_table(curves: Sequence[ScalingCurve]) -> str:
    """Aligned text: the law of each arm, and the confidence interval of its exponent."""
    return aligned(scaling_cells(curves))


def scaling_cells(curves: Sequence[ScalingCurve]) -> list[list[str]]:
    """The cells of `scaling_table`, heading first."""
    lines = [["arm", "against", "runs", "sizes", "validation loss", "exponent, 95 %"]]
    for curve in curves:
        fit, interval = "too few sizes for a law", ""
        if curve.law is not None:
            fit = curve.law_text
            interval = "{:.3f} to {:.3f}".format(*curve.exponent_range)
        lines.append([curve.name, curve.against, str(len(curve.losses)), str(len(set(curve.sizes))), fit, interval])
    return lines


def comparison_at(
    changes: Mapping[str, Mapping[str, Any]], training: TrainingConfig, tokens_per_parameter: float, **options: Any
) -> Callable[[ModelConfig], Comparison]:
    """What `scale` asks for: arms that change a model, trained for its size, with further fields of `Comparison`."""

    def comparison(model: ModelConfig) -> Comparison:
        return Comparison(
            arms=make_arms(model, changes), training=training_of(model, training, tokens_per_parameter), **options
        )

    return comparison
