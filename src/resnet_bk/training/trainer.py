"""`Trainer`: the training loop of one process, or of each of the ranks that train one model together."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnet_bk.data.config import DataConfig
from resnet_bk.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DomainError,
    InstabilityError,
    ResNetBKError,
)
from resnet_bk.evaluation.ledger import library_versions
from resnet_bk.evaluation.perplexity import StreamEvaluation, Tokens, evaluate_stream
from resnet_bk.tokenizer import Tokenizer
from resnet_bk.training.batches import BatchLoader, count_targets, model_arguments
from resnet_bk.training.callbacks import Callback, MetricsFile, Progress, TensorBoard
from resnet_bk.training.carry import Carry
from resnet_bk.training.checkpoint import (
    check_same_config,
    checkpoint_name,
    latest_checkpoint,
    newest_intact_checkpoint,
    remove_checkpoints_after,
)
from resnet_bk.training.config import DistributedConfig, MemoryConfig, TrainingConfig
from resnet_bk.training.device import resolve_precision
from resnet_bk.training.distributed import Engine, share_out
from resnet_bk.training.finite import first_nonfinite
from resnet_bk.training.interval import Interval
from resnet_bk.training.memory import apply_memory
from resnet_bk.training.optimizer import build_optimizer, set_learning_rate
from resnet_bk.training.random_state import random_state, restore_random_state, seed_everything
from resnet_bk.training.ranks import join_ranks
from resnet_bk.training.saving.callback_state import callback_states, restore_callbacks
from resnet_bk.training.saving.saver import CheckpointSaver
from resnet_bk.training.saving.state import STATE_FILE, load_state, read_state
from resnet_bk.training.saving.together import checkpoint_group
from resnet_bk.training.schedules import learning_rate_at
from resnet_bk.training.stability.snapshot import Snapshot


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to."""

    step: int
    """Optimizer steps done, those before a resume included."""
    tokens: int
    """Tokens read by those steps."""
    validation: StreamEvaluation | None
    """The last evaluation; None without a validation split."""
    checkpoint: Path | None
    """The newest checkpoint."""


class Trainer:
    """Trains a language model: AdamW, a learning-rate schedule, clipping, accumulation, evaluation, checkpoints.

    Args:
        model: a `LanguageModel` or any module with its `forward`, `parameter_groups`, `hidden_states`, `output_weight`,
            `config`, `tokenizer` and `generation_config`. Parameters are float32 and stay so; it is moved to
            `config.device`. If they are on the meta device, they are drawn from `config.seed`, each rank keeping its
            part.
        train_loader: endless, with a position that can be saved; see `BatchLoader`.
        config: optimisation, evaluation and bookkeeping.
        distributed: how the ranks share the model, under `torchrun`.
        validation: token ids [N] of contiguous text; the first `config.evaluation_tokens` are evaluated.
        tokenizer: saved with every checkpoint, and tells the bytes behind the validation tokens; by default the
            model's own.
        data_config: recorded in checkpoints, so that a resume on other data is refused.
        memory: what is recomputed and where optimizer states lie; None leaves the model as it is.
        callbacks: called at every hook after the built-in ones (see `Callback`), on every rank.
        progress: show a bar on a terminal, lines elsewhere.

    Raises:
        ConfigError, BackendError: a device, precision or parameter dtype that cannot be used.
    """

    def __init__(
        self,
        model: Any,
        train_loader: BatchLoader,
        config: TrainingConfig,
        *,
        distributed: DistributedConfig | None = None,
        validation: Tokens | None = None,
        tokenizer: Tokenizer | None = None,
        data_config: DataConfig | None = None,
        memory: MemoryConfig | None = None,
        callbacks: Iterable[Callback] = (),
        progress: bool = True,
    ) -> None:
        self.config = config
        self.output_dir = Path(config.output_dir)
        distributed = DistributedConfig() if distributed is None else distributed
        self.ranks = join_ranks(
            config.device, timeout_seconds=distributed.timeout_seconds, alone=distributed.strategy == "fsdp"
        )
        self.device = self.ranks.device
        self.precision = resolve_precision(config.precision, self.device)
        self.engine = Engine(model, distributed, self.ranks, seed=config.seed)
        self.model = model
        self.carry = Carry(config, model, self.engine)
        if tokenizer is not None:
            self.model.tokenizer = tokenizer
        self.train_loader = train_loader
        self.data_config = data_config
        if memory is not None:
            apply_memory(self.model, memory)
        self.optimizer = build_optimizer(self.model, config, next(self.model.parameters()).device, memory)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        self.callbacks: list[Callback] = []
        if self.ranks.is_main:
            self.callbacks.append(MetricsFile())
            if config.tensorboard:
                self.callbacks.append(TensorBoard())
            if progress:
                self.callbacks.append(Progress())
        self.callbacks.extend(callbacks)

        self.validation = None if validation is None else validation[: config.evaluation_tokens]
        self._text_bytes = None
        tokenizer = getattr(self.model, "tokenizer", None)
        if self.validation is not None and tokenizer is not None and tokenizer.byte_lengths is not None:
            self._text_bytes = tokenizer.text_bytes(np.asarray(self.validation[1:]))

        self.step = 0
        """Optimizer steps done."""
        self.tokens = 0
        """Tokens read by those steps."""
        self.learning_rate_factor = 1.0
        """What the schedule's rate is multiplied by; a callback may lower it for a while."""
        self._interval = Interval()
        self._overflows = 0
        self._started = self._stopping = False
        self._group = checkpoint_group()
        self._saver = CheckpointSaver(
            self.output_dir,
            keep=config.keep_checkpoints,
            keep_best=config.keep_best_checkpoints,
            asynchronous=config.asynchronous_checkpoints,
            group=self._group,
        )
        self._checkpoint: Path | None = None
        self._evaluation: StreamEvaluation | None = None
        self._evaluated_step = -1

    def add_callback(self, callback: Callback) -> None:
        """Call `callback` at every hook, after those added before."""
        self.callbacks.append(callback)

    def stop(self) -> None:
        """End the run after the current step, with a checkpoint; one rank's word is enough."""
        self._stopping = True

    def train(self) -> TrainingResult:
        """Run the remaining steps, and return what they came to.

        Raises:
            InstabilityError: a loss or gradient that is not finite, or a step that a callback refused, and no callback
                recovered from it; names the step and the first module or parameter concerned. No parameter was
                changed by that step, and checkpoints on disk are untouched.
            CheckpointError: `output_dir` holds another run, or a checkpoint that does not fit this one, or a checkpoint
                could not be written; those before it are untouched.
            DataError: the loader ended, or a step had nothing to predict.
        """
        config = self.config
        self._start()
        self._stopping = False
        self._call("on_train_start")
        try:
            while self.step < config.steps and not self._stopping:
                try:
                    self._train_step()
                except InstabilityError as error:
                    self._note_checkpoint(wait=True)
                    if not any(callback.on_instability(self, error) for callback in self.callbacks):
                        raise
                    continue
                last = self.step == config.steps
                if last or self.step % config.log_every == 0:
                    self._log_training()
                if self.validation is not None and (last or _due(self.step, config.evaluate_every)):
                    self._log_validation(self.evaluate())
                # A hook may save or stop, so it comes after the rows that a checkpoint of this step must know.
                self._call("on_step_end")
                self._stopping = self.ranks.any(self._stopping)
                ends = last or self._stopping
                if ends or _due(self.step, config.checkpoint_every):
                    self.save_checkpoint(wait=ends)
                self._note_checkpoint(wait=False)
        finally:
            self._end()
        if self._evaluation is None and self.validation is not None and not self._stopping:
            self._evaluation = self.evaluate()
        return TrainingResult(self.step, self.tokens, self._evaluation, self._checkpoint)

    def evaluate(self) -> StreamEvaluation:
        """Loss over the validation tokens, each predicted from all before it; every rank must call."""
        if self.validation is None:
            raise DataError("This trainer has no validation tokens; pass validation=... to Trainer.")
        with self.engine.evaluating() as model, self._autocast():
            # As many tokens at a time as a training step reads: memory that is known to be there.
            return evaluate_stream(
                model,
                self.validation,
                segment_length=self.config.batch_size * self.config.sequence_length,
                text_bytes=self._text_bytes,
            )

    def save_checkpoint(self, *, wait: bool = True) -> Path:
        """The checkpoint of the current step, written unless it exists: now, or in the background unless `wait`.

        Every rank must call.

        Raises:
            CheckpointError: this checkpoint, or the one that was in flight, could not be written.
        """
        self._note_checkpoint(wait=True)
        folder = self.output_dir / checkpoint_name(self.step)
        if self._checkpoint != folder:
            self._saver.begin(self.model, self.optimizer, self.run_state(), carried=self.carry.tensors())
            self._note_checkpoint(wait=wait)
        return folder

    def load_checkpoint(self, folder: str | Path) -> None:
        """Continue from `folder` as if the run had never stopped, or never gone further; every rank must call.

        Raises:
            CheckpointError: the checkpoint is damaged or of another configuration.
            ConfigError: it has done more steps than the run.
        """
        folder = Path(folder)
        self._note_checkpoint(wait=True)
        try:
            state = read_state(folder)
            check_same_config(state["config"], self._configs(), folder)
            if state["step"] > self.config.steps:
                raise ConfigError(
                    f"training.steps is {self.config.steps}, but {folder} has done {state['step']} already."
                )
            load_state(folder, self.model, self.optimizer, group=self._group)
            self.carry.load(folder)
            self.load_run_state(state)
        except ResNetBKError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder / STATE_FILE} is damaged ({type(error).__name__}: {error}); use an older checkpoint."
            ) from error
        self._checkpoint = folder

    def roll_back(self, place: Snapshot | Path) -> None:
        """Continue from a snapshot in memory or a checkpoint, as if the steps since had not been.

        Checkpoints newer than `place`, if that is one, are removed: they are of an abandoned branch.
        """
        if isinstance(place, Path):
            self.load_checkpoint(place)
            self.ranks.on_main(lambda: remove_checkpoints_after(self.output_dir, self.step))
        else:
            place.restore(self)
        self._call("on_rollback")

    def _train_step(self) -> None:
        """One optimizer step over `gradient_accumulation_steps` batches."""
        started = time.perf_counter()
        self._call("on_step_start")
        drawn = [self._next_batch() for _ in range(self.config.gradient_accumulation_steps)]
        self.carry.begin_step(drawn)
        batches = [model_arguments(batch) for batch in drawn]
        targets = sum(count_targets(batch) for batch in batches)
        if targets == 0:
            raise DataError(f"Training step {self.step + 1} has no token to predict; check labels and cu_seqlens.")
        learning_rate = learning_rate_at(self.step, self.config) * self.learning_rate_factor
        set_learning_rate(self.optimizer, learning_rate)

        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        parts = share_out(batches, self.ranks, self.engine.context, in_order=self.carry.active)
        parts = [(part, count_targets(part)) for part in parts]
        if self.ranks.size == 1 and not self.carry.active:
            parts = [(part, count) for part, count in parts if count]
        due = 0
        for place, (part, count) in enumerate(parts):
            last = place == len(parts) - 1
            with self.engine.accumulating(last=last):
                # A part's loss is the mean over its own targets; weighted so, the sum is the mean over all.
                share = self._forward(part, count / targets, place)
                due = due + share
                if last or not self.carry.exact:
                    self.engine.backward(self.scaler.scale(due))
                    due = 0
            loss += share.detach()
        self.scaler.unscale_(self.optimizer)
        loss, norm = self.ranks.sum(loss), self.engine.gradient_norm()
        loss_value, norm_value = torch.stack([loss, norm.double()]).tolist()
        self._check_finite(loss_value, norm_value, batches)
        if math.isfinite(norm_value):
            self._call("on_gradients", loss_value, norm_value)
            if self.config.gradient_clip_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.gradient_clip_norm, norm)
            self.scaler.step(self.optimizer)
        self.scaler.update()

        tokens = sum(batch["input_ids"].numel() for batch in batches)
        self.carry.end_step()
        self.step += 1
        self.tokens += tokens
        self._interval.add(loss_value * targets, targets, norm_value, tokens, time.perf_counter() - started)

    def _forward(self, part: dict[str, Tensor], weight: float, place: int) -> Tensor:
        """`weight` times the mean loss of one part, the one of this number in the step."""
        on_device = {name: tensor.to(self.device, non_blocking=True) for name, tensor in part.items()}
        try:
            with self._autocast():
                loss, after = self.engine.loss(on_device, weight, self.carry.entering(place))
                self.carry.leave(after)
                return loss
        except DomainError as error:
            if self.ranks.size > 1:
                # The other ranks wait for this one in a collective call, so no recovery here: torchrun starts anew.
                raise
            # The operators refuse what is not finite; anything else that is wrong with a batch is no instability.
            where = self._first_nonfinite([part])
            if where is None:
                raise
            raise self._unstable("the forward pass broke off", where) from error

    def _next_batch(self) -> Any:
        try:
            return next(self.train_loader)
        except StopIteration:
            raise DataError(f"The training data ended before step {self.step + 1} of {self.config.steps}.") from None

    def _check_finite(self, loss: float, norm: float, batches: list[dict[str, Tensor]]) -> None:
        """Raise `InstabilityError` unless loss and gradients are finite.

        Under float16 a gradient that overflows is how the scaler learns its scale: that step changes nothing, is
        counted in the metrics as `overflow_steps`, and is an error once the scale has nothing left to give.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            return
        if math.isfinite(loss) and self.scaler.is_enabled() and self.scaler.get_scale() >= 2.0:
            self._overflows += 1
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradients is {norm}"
        where = self._first_nonfinite(batches)
        raise self._unstable(what, where or "every parameter, output and gradient is finite, so a sum overflowed")

    def _first_nonfinite(self, batches: list[dict[str, Tensor]]) -> str | None:
        with self.engine.evaluating(), self._autocast():
            return first_nonfinite(self.model, batches, self.device)

    def _unstable(self, what: str, where: str) -> InstabilityError:
        return InstabilityError(
            f"Training step {self.step + 1}: {what}; {where}. Lower training.learning_rate, lengthen "
            "training.warmup_steps or use training.precision float32, and resume from the last checkpoint."
        )

    def _log_training(self) -> None:
        """Send the mean over the steps since the last row to the callbacks."""
        row = {
            "kind": "train",
            "step": self.step,
            "tokens": self.tokens,
            **self._interval.means(),
            "learning_rate": learning_rate_at(self.step - 1, self.config) * self.learning_rate_factor,
        }
        if self.scaler.is_enabled():
            row |= {"overflow_steps": self._overflows, "gradient_scale": self.scaler.get_scale()}
        self._interval = Interval()
        self._call("on_log", row)

    def _log_validation(self, evaluation: StreamEvaluation) -> None:
        """Send an evaluation to the callbacks."""
        self._evaluation, self._evaluated_step = evaluation, self.step
        self._call("on_evaluate", evaluation)
        row = {
            "kind": "validation",
            "step": self.step,
            "tokens": self.tokens,
            "loss": evaluation.loss,
            "perplexity": evaluation.perplexity if math.isfinite(evaluation.perplexity) else None,
            "bits_per_byte": evaluation.bits_per_byte,
            "evaluated_tokens": evaluation.tokens,
        }
        self._call("on_log", row)

    def _start(self) -> None:
        """Seed a new run, or continue from the newest checkpoint."""
        if self._started:  # train() called again, after stop()
            return
        if self.ranks.on_main(self._has_checkpoint) and not (self.config.resume or self.ranks.restarted):
            raise CheckpointError(
                f"training.output_dir holds a run already ({latest_checkpoint(self.output_dir)}); set training.resume "
                "to continue it, or choose another folder."
            )
        folder = newest_intact_checkpoint(self.output_dir, self._group)
        if folder is None:
            # Rank 0 draws what one process would; the others draw other masks of dropout.
            seed_everything(self.config.seed + self.ranks.rank)
        else:
            self.load_checkpoint(folder)
        self._started = True

    def _has_checkpoint(self) -> bool:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        return latest_checkpoint(self.output_dir) is not None

    def _end(self) -> None:
        """Finish what is in flight and tell the callbacks."""
        try:
            self._note_checkpoint(wait=True)
        finally:
            self._saver.close()
            self._call("on_train_end")

    def _note_checkpoint(self, *, wait: bool) -> None:
        """Tell the callbacks of a checkpoint that was completed in the background; raises what went wrong there."""
        folder = self._saver.completed(wait=wait)
        if folder is not None:
            self._checkpoint = folder
            self._call("on_checkpoint", folder)

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Continue from what `run_state` returned, but for the tensors of model and optimizer."""
        self.train_loader.load_state_dict(state["data"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self._interval = Interval(**state["interval"])
        self._overflows, self.step, self.tokens = state["overflow_steps"], state["step"], state["tokens"]
        self.learning_rate_factor = state.get("learning_rate_factor", 1.0)
        restore_callbacks(self.callbacks, state.get("callbacks", {}))
        # More ranks than wrote the checkpoint: the new ones draw from seeds that no rank had.
        generators = [state["random"], *state.get("random_of_other_ranks", [])]
        if self.ranks.rank < len(generators):
            restore_random_state(generators[self.ranks.rank], self.device)
        else:
            seed_everything(hash((self.config.seed, self.step, self.ranks.rank)) % 2**63)
        # A checkpoint of a later step is of an abandoned branch: that step is saved again.
        self._checkpoint = None

    def run_state(self) -> dict[str, Any]:
        """Everything besides tensors that continues the run, in plain JSON types; every rank must call."""
        random, *random_of_others = self.ranks.gather(random_state(self.device))
        evaluation = self._evaluation
        return {
            "step": self.step,
            "tokens": self.tokens,
            "overflow_steps": self._overflows,
            "interval": dataclasses.asdict(self._interval),
            "data": self.train_loader.state_dict(),
            "learning_rate_factor": self.learning_rate_factor,
            "callbacks": callback_states(self.callbacks),
            "random": random,
            "random_of_other_ranks": random_of_others,
            "scaler": self.scaler.state_dict(),
            "validation_loss": evaluation.loss if evaluation and self._evaluated_step == self.step else None,
            "config": self._configs(),
            "versions": library_versions(),
        }

    def _configs(self) -> dict[str, Any]:
        """Sections of the run's configuration."""
        adapters = getattr(self.model, "adapters", None)
        return {
            "model": self.model.config.to_dict(),
            "adapters": None if adapters is None else adapters.to_dict(),
            "data": None if self.data_config is None else dataclasses.asdict(self.data_config),
            "training": dataclasses.asdict(self.config),
        }

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
