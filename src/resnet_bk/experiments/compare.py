"""Fair comparison of models: equal parameters, tokens, order, batches, schedule, learning-rate sweep and seeds.

Every arm is first run once at each rate of the sweep, with the first seed, then with all other seeds at the rate that
gave it the lowest validation loss. Each run is one row of the ledger; a run that has a row is not run again.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_bk.errors import ConfigError
from resnet_bk.evaluation.flops import model_flops
from resnet_bk.evaluation.ledger import BENCHMARKS, append_row, config_hash
from resnet_bk.experiments.arms import Arm, check_equal_parameters, shape_only
from resnet_bk.experiments.corpora import CorpusSource, ExperimentCorpus
from resnet_bk.experiments.pool import run_trials
from resnet_bk.experiments.rows import read_rows
from resnet_bk.experiments.summary import comparison_table, summarise
from resnet_bk.experiments.trial import DONE, Trial, TrialResult
from resnet_bk.training.config import TrainingConfig

QUESTION = "compare"
"""Name of the ledger's file unless another is asked for."""


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how every arm is trained and read."""

    arms: tuple[Arm, ...]
    """The first is what the others are related to in the table."""
    training: TrainingConfig
    """Of every arm, but for rate and seed."""
    rates: tuple[float, ...]
    """Peak learning rates of the sweep, tried with the first seed; one rate is no sweep."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is one initialisation and one order of the tokens, the same for every arm."""
    context: str = "fresh"
    """How training sequences begin; see `batches.CONTEXTS`."""
    window: int = 0
    """Tokens of the windows in which validation and test are read besides the stream; 0 is the training length."""
    curve_points: int = 8
    """Evaluations of each run on the way."""
    label: str = ""
    """Part of every run's identity, for running again what has rows already."""
    text_length: int = 0
    """Tokens of the long texts on which the loss by position is measured after training; 0 leaves that out."""
    texts: int = 16
    """Most of those texts."""
    dynamic_rates: tuple[float, ...] = ()
    """Rates of dynamic evaluation to choose from, after training; none leaves that out."""

    def __post_init__(self) -> None:
        """Check what can be known before anything runs; raises `ConfigError`."""
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ConfigError(f"Arms are called {', '.join(names)}; expected different names.")
        if not self.rates or any(not rate > 0 for rate in self.rates):
            raise ConfigError(f"rates is {list(self.rates)}; expected at least one learning rate > 0.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds is {list(self.seeds)}; expected at least one, all different.")
        if self.training.gradient_accumulation_steps != 1:
            raise ConfigError(
                f"training.gradient_accumulation_steps is {self.training.gradient_accumulation_steps}; a comparison "
                "makes one pass a step. Set it to 1 and training.batch_size to the sequences of a step."
            )
        check_equal_parameters(self.arms)

    def trial(self, arm: Arm, rate: float, seed: int) -> Trial:
        """One run."""
        training = dataclasses.replace(self.training, learning_rate=rate, seed=seed)
        return Trial(
            arm,
            training,
            self.context,
            self.window,
            self.curve_points,
            self.label,
            self.text_length,
            self.texts,
            self.dynamic_rates,
        )

    def due(self, done: Callable[[Trial], Mapping[str, Any] | None]) -> Iterator[Trial]:
        """The runs that are known to belong to the comparison, arms in turn, those with results among them.

        Args:
            done: the metrics of a run; None if it has no row yet.
        """
        first, *others = self.seeds
        for rate in self.rates:
            for arm in self.arms:
                yield self.trial(arm, rate, first)
        for seed in others:
            for arm in self.arms:
                rate = self.best_rate(arm, done)
                if rate is not None:
                    yield self.trial(arm, rate, seed)

    def best_rate(self, arm: Arm, done: Callable[[Trial], Mapping[str, Any] | None]) -> float | None:
        """The rate of the lowest validation loss with the first seed; None while the sweep runs, or if all diverged."""
        results = {rate: done(self.trial(arm, rate, self.seeds[0])) for rate in self.rates}
        if any(result is None for result in results.values()):
            return None
        losses = {rate: result["validation_loss"] for rate, result in results.items() if result["outcome"] == DONE}  # type: ignore[index]
        return min(losses, key=losses.__getitem__) if losses else None


def compare(
    comparison: Comparison,
    source: CorpusSource,
    *,
    command: str,
    question: str = QUESTION,
    benchmarks: Path = BENCHMARKS,
    work_dir: Path = Path("runs/compare"),
    budget: float | None = None,
    parallel: int = 1,
    commit: str | None = None,
    corpus: ExperimentCorpus | None = None,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """The ledger rows of the comparison's runs, those made before included.

    Args:
        comparison: what to run.
        source: where the tokens come from.
        command: the command that repeats this, for the ledger.
        question: ledger file the rows go to.
        benchmarks: folder of the ledger.
        work_dir: folder for what a broken run needs to continue.
        budget: seconds after which to stop; running it again continues.
        parallel: runs at once.
        commit: for the ledger, where git cannot tell.
        corpus: what `source` opens, if it is open already.
        report: receives every line of the progress, and the table.

    Raises:
        ConfigError, DataError: models, corpus or ledger cannot be used.
    """
    if parallel < 1:
        raise ConfigError(f"parallel is {parallel}; expected a number of runs at once >= 1.")
    deadline = math.inf if budget is None else time.monotonic() + budget
    corpus = source.open() if corpus is None else corpus
    if comparison.dynamic_rates and "test" not in corpus.splits:
        raise ConfigError(
            f"dynamic_rates is {list(comparison.dynamic_rates)}, but corpus {corpus.name!r} has no test split to read "
            "with the rate that is chosen on validation; leave it out."
        )
    for arm in comparison.arms:
        if arm.model.vocab_size < corpus.vocab_size:
            raise ConfigError(
                f"model.vocab_size of arm {arm.name!r} is {arm.model.vocab_size}, but the corpus has "
                f"{corpus.vocab_size} ids; set it to {corpus.vocab_size}."
            )
    rows = {row["config_hash"]: row for row in read_rows(question, benchmarks) if finished(row["metrics"])}
    failed: dict[str, TrialResult] = {}

    def key(trial: Trial) -> str:
        return config_hash(trial.identity(corpus))

    def done(trial: Trial) -> Mapping[str, Any] | None:
        row = rows.get(key(trial))
        return None if row is None else row["metrics"]

    def runnable() -> list[tuple[str, Trial]]:
        keyed = [(key(trial), trial) for trial in comparison.due(done)]
        return [(k, trial) for k, trial in keyed if k not in rows and k not in failed]

    def add(k: str, trial: Trial, result: TrialResult) -> None:
        row = append_row(
            question,
            command=command,
            config=trial.identity(corpus),
            seeds=[trial.training.seed],
            metrics=_description(trial, corpus, parallel) | result.metrics | {"outcome": result.outcome},
            wall_seconds=result.wall_seconds,
            model=shape_only(trial.arm.model),
            tokens=result.tokens,
            device=trial.device,
            benchmarks=benchmarks,
            commit=commit,
        )
        if finished(row["metrics"]):
            rows[k] = row
        else:
            failed[k] = result
        report(f"{len(rows)} done: {_line(trial, row)}")

    before = len(rows)
    complete = run_trials(
        runnable, add, source=source, corpus=corpus, work_dir=work_dir, parallel=parallel, deadline=deadline
    )
    ours = {key(trial): None for trial in comparison.due(done)}
    named = {row["config_hash"]: row for row in read_rows(question, benchmarks) if finished(row["metrics"])}
    found = [named[k] for k in ours if k in named]
    report(f"\n{corpus.name}: {len(found)} of at least {len(ours)} runs have results, {len(rows) - before} new.")
    report(comparison_table(summarise(found), reference=comparison.arms[0].name))
    if not complete:
        report("The time was up; the same command continues.")
    for k, result in failed.items():
        report(f"Without result, and tried again by the same command: {k}, {result.outcome}")
    return found


def finished(metrics: Mapping[str, Any]) -> bool:
    """Whether a row says how a run ended; one that ran out of memory or could not be run is tried again."""
    return metrics["outcome"] == DONE or metrics["outcome"].startswith("diverged")


def _description(trial: Trial, corpus: ExperimentCorpus, parallel: int) -> dict[str, Any]:
    """What a reader of the row wants to know of the run."""
    return {
        "kind": "compare",
        "arm": trial.arm.name,
        "corpus": corpus.name,
        "corpus_hash": config_hash(corpus.identity),
        "outcome": "",
        "learning_rate": trial.training.learning_rate,
        "model": trial.arm.description,
        "recipe": recipe(trial),
        "context": trial.context,
        "label": trial.label or None,
        "window": trial.window or trial.training.sequence_length,
        "runs_at_once": parallel,
        "training_flops": training_flops(trial),
    }


def recipe(trial: Trial) -> str:
    """How a run trains, but for its rate: what is always told, then what differs from the defaults."""
    training = trial.training
    told = (
        f"{training.steps} steps of {training.batch_size} x {training.sequence_length}, {training.schedule}, "
        f"warm-up {training.warmup_steps}, decay {training.weight_decay}, clip {training.gradient_clip_norm}, "
        f"{trial.precision}"
    )
    defaults = TrainingConfig()
    others = ("minimum_learning_rate_ratio", "decay_fraction", "beta1", "beta2")
    changed = [name for name in others if getattr(training, name) != getattr(defaults, name)]
    return ", ".join([told, *(f"{name} {getattr(training, name)}" for name in changed)])


def training_flops(trial: Trial) -> int:
    """Operations of the whole training of a run, forward and backward, counted from the shapes."""
    training = trial.training
    step = model_flops(trial.arm.model, batch=training.batch_size, time=max(2, training.sequence_length))
    return training.steps * step.total


def _line(trial: Trial, row: Mapping[str, Any]) -> str:
    """One line of progress."""
    metrics = row["metrics"]
    start = f"{trial.arm.name}, rate {trial.training.learning_rate:g}, seed {trial.training.seed}: "
    if metrics["outcome"] != DONE:
        return start + metrics["outcome"]
    bits = metrics.get("validation_bits_per_byte")
    shown = "" if bits is None else f", {bits:.4f} bits per byte"
    speed = metrics["tokens_per_second"]
    return (
        f"{start}validation perplexity {metrics['validation_perplexity']:.3f}{shown} ({metrics['reading']}), "
        f"{speed:,.0f} tokens/s, {row['wall_seconds']:.0f} s"
    )


def default_rates(rate: float) -> tuple[float, ...]:
    """The sweep around `rate` that is made when none is given."""
    return (rate / 2, rate, rate * 2)


def parse_numbers(text: str, option: str, kind: type = float) -> tuple[Any, ...]:
    """The numbers in a list such as `1e-3,2e-3`; raises `ConfigError` naming `option`."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"--{option} is {text!r}; expected numbers joined by commas.") from None
