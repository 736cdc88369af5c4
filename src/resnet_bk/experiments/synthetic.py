"""A model trained on one synthetic task under a budget, and its accuracy at several lengths."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.errors import ConfigError, DomainError
from resnet_bk.experiments.tasks.base import IGNORED, Batch, Task
from resnet_bk.models.config import ModelConfig
from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.device import resolve_precision
from resnet_bk.training.optimizer import build_optimizer
from resnet_bk.training.random_state import seed_everything
from resnet_bk.training.schedules import learning_rate_at

# Steps between looks at the loss and the clock: every look waits for the device.
_LOOK_EVERY = 50
# Evaluation rows are the same for every model and seed.
_EVALUATION_SEED = 20_240_229


@dataclass(frozen=True)
class TaskBudget:
    """What a model may spend on a task, and how it is trained: AdamW, warm-up, cosine, clipping."""

    steps: int = 2000
    """Optimizer steps."""
    tokens_per_step: int = 32768
    """Tokens of a step; rows = this over the task's length, at least one."""
    learning_rate: float = 1e-3
    """Peak rate."""
    minimum_learning_rate_ratio: float = 0.05
    """Final over peak rate."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices."""
    gradient_clip_norm: float = 1.0
    """Global L2 norm above which gradients are scaled down; 0 disables."""
    stop_at_accuracy: float = 0.0
    """Stop when that share of the training labels of the last 50 steps was right; 0 never stops early."""
    seconds: float = 0.0
    """Stop training after so long, whatever was reached; 0 is no limit."""
    evaluation_tokens: int = 1 << 18
    """Tokens read to evaluate at one length; rows = this over the length, at least one."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; parameters stay float32. auto = bfloat16 on a GPU that has it, else float32."""

    def __post_init__(self) -> None:
        """Check every field; raises `ConfigError` naming the first that is wrong."""
        for name in ("tokens_per_step", "evaluation_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"budget.{name} is {getattr(self, name)!r}; expected a whole number >= 1.")
        if not 0 <= self.stop_at_accuracy <= 1:
            raise ConfigError(f"budget.stop_at_accuracy is {self.stop_at_accuracy!r}; expected a share in [0, 1].")
        if not self.seconds >= 0:
            raise ConfigError(f"budget.seconds is {self.seconds!r}; expected a number >= 0.")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"budget.precision is {self.precision!r}; expected auto, float32 or bfloat16.")
        self.training(2, 0)

    def dtype(self, device: torch.device) -> torch.dtype:
        """Compute dtype on `device`; never float16, whose gradients would have to be scaled."""
        found = resolve_precision(self.precision, device)
        return torch.float32 if found == torch.float16 else found

    def rows(self, length: int) -> int:
        """Rows of a training step."""
        return max(1, self.tokens_per_step // length)

    def training(self, length: int, seed: int) -> TrainingConfig:
        """The same choices as `TrainingConfig`, for optimizer and schedule."""
        return TrainingConfig(
            steps=self.steps,
            sequence_length=length,
            batch_size=self.rows(length),
            learning_rate=self.learning_rate,
            minimum_learning_rate_ratio=self.minimum_learning_rate_ratio,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            gradient_clip_norm=self.gradient_clip_norm,
            seed=seed,
        )


@dataclass(frozen=True)
class TaskEvaluation:
    """How well a model does at one length. Rows are the independent units of the standard error."""

    length: int
    """Tokens of a row."""
    rows: int
    """Rows evaluated."""
    accuracy: float
    """Share of the scored labels that were right."""
    tail_accuracy: float
    """The same over the last quarter of each row's labels: what length really costs."""
    exact: float
    """Share of the rows with every label right."""
    loss: float
    """Nats per scored label, mean over rows of their means."""
    loss_standard_error: float
    """Standard error of `loss`; 0 for a single row."""


@dataclass(frozen=True)
class TaskResult:
    """What came of one model on one task."""

    evaluations: dict[str, dict[int, TaskEvaluation]]
    """Name in `Task.evaluations` -> length -> evaluation; empty if training diverged."""
    loss: float
    """Training loss in nats per scored label over the last 50 steps or fewer; infinite if training diverged."""
    steps: int
    """Optimizer steps done."""
    tokens: int
    """Tokens trained on."""
    wall_seconds: float
    """Duration of training and evaluation."""
    stopped: str
    """Why training ended: steps, solved, seconds or diverged."""

    @property
    def accuracy(self) -> dict[int, float]:
        """Accuracy by length, on the task as it counts."""
        return {length: found.accuracy for length, found in self.evaluations.get("", {}).items()}

    @property
    def metrics(self) -> dict[str, float | int | str]:
        """Everything as flat names for the ledger."""
        found: dict[str, float | int | str] = {"stopped": self.stopped, "steps": self.steps}
        if math.isfinite(self.loss):
            found["training_loss_nats"] = self.loss
        for name, by_length in self.evaluations.items():
            for length, value in by_length.items():
                suffix = f"{name}_{length}" if name else str(length)
                found[f"accuracy_{suffix}"] = value.accuracy
                found[f"tail_accuracy_{suffix}"] = value.tail_accuracy
                found[f"exact_{suffix}"] = value.exact
                if not name:
                    found[f"loss_nats_{suffix}"] = value.loss
                    found[f"loss_standard_error_{suffix}"] = value.loss_standard_error
        return found


def train_on_task(
    config: ModelConfig, task: Task, budget: TaskBudget, seed: int, device: torch.device | str = "cpu"
) -> TaskResult:
    """The result of a fresh model trained on `task`.

    Args:
        config: the model; its vocabulary becomes that of the task.
        task: where training and evaluation rows come from.
        budget: steps, rate and limits.
        seed: of the parameters and of the training rows. Evaluation rows do not depend on it.
        device: where everything runs.

    Cost: one wait for the device a step (the model's check of the token ids) and one more every 50 steps.
    """
    started = time.monotonic()
    device = torch.device(device)
    # Drawn on the CPU, so that a seed means the same parameters on every machine.
    seed_everything(seed)
    model = LanguageModel(dataclasses.replace(config, vocab_size=task.vocab_size)).to(device)
    training = budget.training(task.length, seed)
    optimizer = build_optimizer(model, training, device)
    generator = torch.Generator(device).manual_seed(seed)
    precision = budget.dtype(device)
    # Tiny models: nothing has to be computed twice to save memory.
    model.segment_tokens = max(model.segment_tokens, training.batch_size * task.length)
    model.train()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    loss, stopped, step, tokens = math.inf, "steps", 0, 0
    while step < budget.steps:
        length = task.training_length(step)
        rows = budget.rows(length)
        batch = task.sample(rows, generator, length=length)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, training)
        try:
            sums += _train_step(model, optimizer, batch, task.scored(length), budget.gradient_clip_norm, precision)
        except DomainError:
            if all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
                raise
            loss, stopped = math.inf, "diverged"  # an operator refused to work on what was left of the parameters
            break
        step, tokens = step + 1, tokens + rows * length
        if step % _LOOK_EVERY and step < budget.steps:
            continue
        total, right, scored = sums.tolist()
        loss = total / ((step - 1) % _LOOK_EVERY + 1)
        sums.zero_()
        if not math.isfinite(loss):
            loss, stopped = math.inf, "diverged"
            break
        if budget.stop_at_accuracy and right >= budget.stop_at_accuracy * scored:
            stopped = "solved"
            break
        if budget.seconds and time.monotonic() - started > budget.seconds:
            stopped = "steps" if step == budget.steps else "seconds"
            break
    evaluations = {}
    if stopped != "diverged":
        evaluations = {
            name: {length: evaluate_on_task(model, other, length, budget) for length in other.evaluation_lengths}
            for name, other in task.evaluations().items()
        }
    return TaskResult(
        evaluations=evaluations,
        loss=loss,
        steps=step,
        tokens=tokens,
        wall_seconds=time.monotonic() - started,
        stopped=stopped,
    )


def _train_step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, batch: Batch, most: int, clip: float, precision: torch.dtype
) -> Tensor:
    """Mean loss before the step, labels that were right, and labels, float64 [3] on the device."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(batch.labels.device.type, precision, enabled=precision != torch.float32):
        logits, targets = scored_logits(model, batch, most)
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    nats.backward()
    if clip > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    with torch.no_grad():
        counts = (logits.argmax(-1) == targets).sum(), (targets != IGNORED).sum()
        return torch.stack([part.double() for part in (nats.detach(), *counts)])


@torch.no_grad()
def evaluate_on_task(model: LanguageModel, task: Task, length: int, budget: TaskBudget) -> TaskEvaluation:
    """How well `model` does on rows of `length` tokens; the same rows for every model on one kind of device.

    Rows longer than `budget.tokens_per_step` are read in segments with the state carried.
    """
    device = model.output_weight.device
    precision = budget.dtype(device)
    generator = torch.Generator(device).manual_seed(_EVALUATION_SEED)
    rows = max(1, budget.evaluation_tokens // length)
    model.eval()
    model.segment_tokens = max(64, budget.tokens_per_step)
    columns = []
    for start in range(0, rows, budget.rows(length)):
        batch = task.sample(min(budget.rows(length), rows - start), generator, length=length)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits, targets = scored_logits(model, batch, task.scored(length))
        nats = F.cross_entropy(logits.float().mT, targets, ignore_index=IGNORED, reduction="none").double()
        scored = targets != IGNORED
        right = logits.argmax(-1) == targets
        rank = scored.cumsum(1)
        tail = scored & (4 * rank > 3 * rank[:, -1:])
        parts = (nats, right, scored, right & tail, tail)
        columns.append(torch.stack([part.sum(1).double() for part in parts]))
    nats, right, scored, tail_right, tail = torch.cat(columns, dim=1).cpu()
    losses = nats / scored
    return TaskEvaluation(
        length=length,
        rows=rows,
        accuracy=float(right.sum() / scored.sum()),
        tail_accuracy=float(tail_right.sum() / tail.sum()),
        exact=float((right == scored).double().mean()),
        loss=float(losses.mean()),
        loss_standard_error=float(losses.std() / math.sqrt(rows)) if rows > 1 else 0.0,
    )


def scored_logits(
    model: LanguageModel, batch: Batch, most: int
) -> tuple[Float[Tensor, "batch scored vocabulary"], Int[Tensor, "batch scored"]]:
    """Logits where labels are scored, and those labels in order of time.

    Places are picked without asking the device how many there are: every row gives `most`, the surplus with the
    label -100.
    """
    hidden, _ = model.hidden_states(batch.input_ids)
    hidden, targets = hidden[:, :-1], batch.labels[:, 1:]
    if most < targets.shape[1]:
        places = (targets != IGNORED).int().topk(most, dim=1).indices.sort(dim=1).values
        hidden, targets = hidden.take_along_dim(places[..., None], dim=1), targets.gather(1, places)
    return F.linear(hidden, model.output_weight), targets


def sweep_learning_rates(
    config: ModelConfig,
    task: Task,
    budget: TaskBudget,
    rates: Sequence[float],
    seed: int,
    device: torch.device | str = "cpu",
) -> dict[float, TaskResult]:
    """Results of one seed at every peak learning rate; see `best_rate`. Arguments are those of `train_on_task`."""
    return {
        rate: train_on_task(config, task, dataclasses.replace(budget, learning_rate=rate), seed, device)
        for rate in rates
    }


def best_rate(results: Mapping[float, Any]) -> float:
    """The rate with the least final training loss, which every task has; rows for it are always fresh.

    Args:
        results: rate -> anything with a `loss`, such as what `sweep_learning_rates` returned.

    Raises:
        ConfigError: training diverged at every rate.
    """
    best = min(results, key=lambda rate: results[rate].loss)
    if not math.isfinite(results[best].loss):
        raise ConfigError(f"Training diverged at every learning rate ({', '.join(map(str, results))}); lower them.")
    return best
