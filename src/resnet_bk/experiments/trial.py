"""One run of a comparison: a model trained by a recipe on a corpus, and what came of it."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnet_bk.data.shards import TokenDataset
from resnet_bk.errors import DomainError, ResNetBKError
from resnet_bk.evaluation.perplexity import StreamEvaluation, evaluate_stream, loss_by_position
from resnet_bk.experiments.adapting import dynamic_readings
from resnet_bk.experiments.arms import Arm
from resnet_bk.experiments.batches import TrainingBatch, TrainingBatches
from resnet_bk.experiments.corpora import ExperimentCorpus
from resnet_bk.experiments.positions import format_positions, long_texts, position_edges
from resnet_bk.experiments.progress import load_run, remove_run, save_run
from resnet_bk.experiments.readings import choose_reading, curve_steps, format_curve
from resnet_bk.experiments.windows import evaluate_windows
from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.ops.linear_cross_entropy import linear_cross_entropy
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.device import resolve_device, resolve_precision
from resnet_bk.training.optimizer import build_optimizer
from resnet_bk.training.random_state import seed_everything
from resnet_bk.training.schedules import learning_rate_at

DONE = "done"
"""Outcome of a run that came to its end with a finite loss."""

# Fields of `TrainingConfig` that this loop does not read.
_UNUSED = (
    "output_dir", "gradient_accumulation_steps", "log_every", "evaluate_every", "checkpoint_every",
    "keep_checkpoints", "resume", "tensorboard", "device", "precision", "curriculum", "curriculum_from",
)  # fmt: skip
_CHECK_EVERY = 50
_MOST_UNSEGMENTED = 1 << 17


@dataclass(frozen=True)
class Trial:
    """Everything that decides the result of one run, but for the tokens themselves."""

    arm: Arm
    training: TrainingConfig
    """Its rate and its seed are this run's; `gradient_accumulation_steps` is one."""
    context: str = "fresh"
    """How training sequences begin; see `batches.CONTEXTS`."""
    window: int = 0
    """Tokens of the windows in which validation and test are read besides the stream; 0 is the training length."""
    curve_points: int = 8
    """Evaluations on the way, at shares 1, 1/2, 1/4, ... of the steps."""
    label: str = ""
    """Anything that tells this run from an equal one made before; rows with another label do not count for it."""
    text_length: int = 0
    """Tokens of the long texts on which the loss by position is measured after training; 0 leaves that out."""
    texts: int = 16
    """Most of those texts."""
    dynamic_rates: tuple[float, ...] = ()
    """Rates of dynamic evaluation to choose from, after training; none leaves that out."""

    @property
    def tokens(self) -> int:
        """Predictions trained on."""
        return self.training.steps * self.training.batch_size * self.training.sequence_length

    @property
    def carries_state(self) -> bool:
        """Whether the state is carried between batches: asked for, and of a size that does not grow."""
        return self.context == "carried" and not self.unbounded

    @property
    def unbounded(self) -> bool:
        """Whether the state grows with every token read: attention without a window."""
        return "attention" in self.arm.model.mixers and self.arm.model.attention_window == 0

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return resolve_device(self.training.device)

    @property
    def precision(self) -> str:
        """Compute dtype; parameters are float32."""
        return str(resolve_precision(self.training.precision, self.device)).removeprefix("torch.")

    def identity(self, corpus: ExperimentCorpus) -> dict[str, Any]:
        """What a ledger row's hash is made of: equal for two runs that would come to the same result.

        The kind of device counts, and its precision; where the tokens lie and what the arm is called do not.
        """
        device = self.device
        training = {name: v for name, v in dataclasses.asdict(self.training).items() if name not in _UNUSED}
        long: dict[str, Any] = {"text_length": self.text_length, "texts": self.texts} if self.text_length else {}
        dynamic = {"dynamic_rates": list(self.dynamic_rates)} if self.dynamic_rates else {}
        return {
            "kind": "trial",
            "model": self.arm.model.to_dict(),
            "training": training,
            "precision": self.precision,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "context": self.context,
            "window": self.window,
            "curve_points": self.curve_points,
            "label": self.label,
            "corpus": corpus.identity,
            **long,
            **dynamic,
        }


@dataclass(frozen=True)
class TrialResult:
    """What one run came to."""

    outcome: str
    """`DONE`, or why there is no result."""
    metrics: dict[str, float | int | str | None] = field(default_factory=dict)
    """What the ledger keeps of it, units in the names."""
    tokens: int = 0
    wall_seconds: float = 0.0


def run_trial(
    trial: Trial,
    corpus: ExperimentCorpus,
    *,
    folder: Path,
    deadline: float = math.inf,
    save_every: float = 120.0,
    abandoned: Callable[[], bool] = lambda: False,
) -> TrialResult | None:
    """The result of a run, or None where `deadline` came first and `folder` holds the run so far.

    The run continues from `folder` if that holds a part of it, and comes to the same result as without the break.
    A loss that stops being finite, and memory that runs out, are results too.

    Args:
        trial: what to run.
        corpus: its tokens.
        folder: for what a broken run needs to continue; removed when it is complete.
        deadline: value of `time.monotonic()` at which to stop.
        save_every: seconds between two savings of the run.
        abandoned: asked before every step; true stops the run as the deadline does.
    """
    try:
        return _Run(trial, corpus, folder).finish(deadline, save_every, abandoned)
    except torch.OutOfMemoryError as error:
        return TrialResult(f"out of memory: {str(error).splitlines()[0]}")
    except DomainError as error:
        # Parameters that overflowed without a loss that did: the evaluation finds them.
        return TrialResult(f"diverged: {error}")
    except ResNetBKError as error:
        return TrialResult(f"failed: {error}")


class _Run:
    """A model, its optimizer, its batches, and how far they are."""

    def __init__(self, trial: Trial, corpus: ExperimentCorpus, folder: Path) -> None:
        training = trial.training
        self.trial, self.corpus, self.folder = trial, corpus, folder
        self.device = resolve_device(training.device)
        self.precision = resolve_precision(training.precision, self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        # Drawn on the CPU, so that a seed means the same parameters on every machine.
        seed_everything(training.seed)
        self.model = LanguageModel(trial.arm.model).to(self.device)
        if self.device.type == "cuda":
            # Models of a comparison are small: nothing has to be computed twice to save memory.
            step_tokens = min(training.batch_size * training.sequence_length, _MOST_UNSEGMENTED)
            self.model.segment_tokens = max(self.model.segment_tokens, step_tokens)
        self.optimizer = build_optimizer(self.model, training, self.device)
        self.batches = TrainingBatches(
            corpus.train,
            sequence_length=training.sequence_length,
            batch_size=training.batch_size,
            context=trial.context,
            seed=training.seed,
        )
        self.progress, self.state = load_run(folder, self.model, self.optimizer, self.batches)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.pending_steps = 0
        self.interval_started = time.perf_counter()

    def finish(self, deadline: float, save_every: float, abandoned: Callable[[], bool]) -> TrialResult | None:
        """The result, or None at the deadline."""
        progress, training = self.progress, self.trial.training
        marks = curve_steps(training.steps, self.trial.curve_points)
        began = saved = time.monotonic()
        before = progress.wall_seconds
        while progress.step < training.steps:
            now = time.monotonic()
            stop = now >= deadline or abandoned()
            if stop or now - saved >= save_every:
                self._collect()
                progress.wall_seconds = before + now - began
                save_run(self.folder, self.model, self.optimizer, self.batches, progress, self.state)
                if stop:
                    return None
                saved = time.monotonic()
                self.interval_started = time.perf_counter()
            self._step()
            if progress.step in marks or progress.step % _CHECK_EVERY == 0:
                self._collect()
                if not math.isfinite(progress.nats):
                    return self._result(f"diverged by step {progress.step}", before, began)
            if progress.step in marks:
                self._mark(progress.step)
        result = self._result(DONE, before, began)
        remove_run(self.folder)
        return result

    def _step(self) -> None:
        """One optimizer step."""
        training = self.trial.training
        batch = next(self.batches)
        learning_rate = learning_rate_at(self.progress.step, training)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        with self._autocast():
            loss = self._loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if training.gradient_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.gradient_clip_norm)
        self.optimizer.step()
        self.loss_sum += loss.detach()
        self.progress.step += 1
        self.pending_steps += 1

    def _loss(self, batch: TrainingBatch) -> Tensor:
        """Mean loss of a batch; keeps the state that follows it where it is carried."""
        inputs, targets = (tensor.to(self.device, non_blocking=True) for tensor in (batch.inputs, batch.targets))
        boundaries = None if batch.cu_seqlens is None else batch.cu_seqlens.to(self.device)
        before = None if batch.restart else self.state
        hidden, after = self.model.hidden_states(inputs, state=before, cu_seqlens=boundaries)
        self.state = after.detach() if self.trial.carries_state else None
        return linear_cross_entropy(hidden.flatten(0, 1), self.model.output_weight, targets.flatten())

    def _collect(self) -> None:
        """Bring the losses of the steps since the last time over from the device, and time them."""
        if not self.pending_steps:
            return
        progress, training = self.progress, self.trial.training
        progress.nats += float(self.loss_sum)  # waits for the device
        seconds = time.perf_counter() - self.interval_started
        done = self.pending_steps * training.batch_size * training.sequence_length
        progress.summed_steps += self.pending_steps
        progress.speeds.append(done / seconds)
        if self.device.type == "cuda":
            progress.peak_bytes = max(progress.peak_bytes, torch.cuda.max_memory_allocated(self.device))
        self.loss_sum.zero_()
        self.pending_steps = 0
        self.interval_started = time.perf_counter()

    def _mark(self, step: int) -> None:
        """Add a point to the curve, from the first `evaluation_tokens` of the validation split."""
        progress, training = self.progress, self.trial.training
        tokens = self.corpus.validation.tokens[: training.evaluation_tokens]
        validation = self._windows(tokens, None).loss
        predictions = step * training.batch_size * training.sequence_length
        progress.curve.append([predictions, progress.nats / progress.summed_steps, validation])
        progress.nats, progress.summed_steps = 0.0, 0
        self.interval_started = time.perf_counter()

    def _result(self, outcome: str, before: float, began: float) -> TrialResult:
        """The metrics of the run as it is now."""
        trial, training, progress = self.trial, self.trial.training, self.progress
        predictions = progress.step * training.batch_size * training.sequence_length
        metrics: dict[str, float | int | str | None] = {
            "outcome": outcome,
            "tokens_per_second": statistics.median(progress.speeds) if progress.speeds else None,
            "peak_bytes": progress.peak_bytes or None,
            "batches": self.batches.digest[:12],
            "curve": format_curve(progress.curve),
        }
        if outcome == DONE:
            started = time.perf_counter()
            for split in self.corpus.splits.values():
                metrics |= self._evaluate(split)
            metrics |= choose_reading(metrics)
            if trial.text_length:
                metrics |= self._by_position()
            if trial.dynamic_rates:
                with self._autocast():
                    metrics |= dynamic_readings(self.model, self.corpus, trial.dynamic_rates)
            metrics["evaluation_seconds"] = round(time.perf_counter() - started, 3)
        metrics["training_state"] = trial.context if trial.context != "carried" or trial.carries_state else "fresh"
        return TrialResult(outcome, metrics, predictions, before + time.monotonic() - began)

    def _evaluate(self, split: TokenDataset) -> dict[str, float | int | str | None]:
        """Every reading of every token of a split."""
        tokens = split.tokens
        text_bytes = self.corpus.text_bytes(tokens[1:])
        readings = {"windows": self._windows(tokens, text_bytes)}
        if not self.trial.unbounded:
            with self._autocast():
                readings["stream"] = evaluate_stream(
                    self.model, tokens, segment_length=self.model.segment_tokens, text_bytes=text_bytes
                )
        metrics: dict[str, float | int | str | None] = {f"{split.name}_tokens": len(tokens) - 1}
        for name, reading in readings.items():
            metrics[f"{split.name}_loss_{name}"] = reading.loss
            metrics[f"{split.name}_bits_per_byte_{name}"] = reading.bits_per_byte
        return metrics

    def _by_position(self) -> dict[str, float | int | str | None]:
        """Loss by position in long texts, one segment at a time with the state carried."""
        trained = self.trial.training.sequence_length
        texts, what = long_texts(self.corpus, self.trial.text_length, self.trial.texts)
        edges = position_edges(trained, self.trial.text_length)
        with self._autocast():
            bins = loss_by_position(self.model, texts, segment_length=self.model.segment_tokens, bins=edges)
        return {"by_position": format_positions(bins), "texts": what, "training_length": trained}

    def _windows(self, tokens: np.ndarray, text_bytes: int | None) -> StreamEvaluation:
        length = self.trial.window or self.trial.training.sequence_length
        rows = max(1, self.model.segment_tokens // length)
        with self._autocast():
            return evaluate_windows(self.model, tokens, length=length, batch_size=rows, text_bytes=text_bytes)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)
