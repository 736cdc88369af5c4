"""State that one batch leaves to the next where rows continue, so that documents may be longer than a sequence.

`truncated`: the next batch starts from the state without its history, so no gradient crosses from batch to batch.
`exact`: inside a step it does, and the step is that of one batch with the segments side by side; between steps, where
the parameters change, it does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from resnet_bk.errors import CheckpointError, ConfigError
from resnet_bk.models.resnet_bk import ModelState
from resnet_bk.training.batches import batch_fields
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.context_parallel import last_state
from resnet_bk.training.distributed import Engine
from resnet_bk.training.saving.state import CARRIED_FILE

_SHARDED = (
    "distributed.strategy is 'fsdp', with which rows cannot start anew while others continue; set training.stream "
    "window, or strategy ddp."
)


class Carry:
    """What a run carries from batch to batch, of this rank's rows.

    Args:
        config: `carry` and `stream` count.
        model: with `config` and `hidden_states`.
        engine: of the model.

    Attributes:
        active: whether anything is carried.
        exact: whether gradients cross the batches of a step.
        state: after the last step that was completed, without history; None where the next batch starts afresh.

    Raises:
        ConfigError: attention that sees everything, whose state would grow with the stream; exact gradients where
            ranks share sequences; documents as streams where parameters are sharded.
    """

    def __init__(self, config: TrainingConfig, model: Any, engine: Engine) -> None:
        self.active, self.exact = config.carry != "none", config.carry == "exact"
        self.state: ModelState | None = None
        self._passed: ModelState | None = None
        self._continues: list[Tensor] = []
        self._model, self._engine, self._ranks = model, engine, engine.ranks
        if not self.active:
            return
        if "attention" in model.config.mixers and not model.config.attention_window:
            raise ConfigError(
                f"training.carry is {config.carry!r}, but attention without a window would carry every token of a "
                "stream; set model.attention_window, or training.carry none."
            )
        if engine.sharded and config.stream == "document":
            raise ConfigError(_SHARDED)
        if self.exact and engine.context is not None:
            raise ConfigError(
                "training.carry is 'exact', but ranks that share sequences pass states on without gradient; set "
                "training.carry truncated, or distributed.context_parallel 1 and longer sequences."
            )

    def begin_step(self, batches: list[Any]) -> None:
        """Read from the loader's batches which of their rows continue.

        Raises:
            ConfigError: batches that do not say so, or of packed documents.
        """
        if not self.active:
            return
        self._passed, self._continues = self.state, []
        for batch in batches:
            fields = batch_fields(batch)
            if fields.get("continues") is None or fields.get("cu_seqlens") is not None:
                raise ConfigError(
                    "training.carry needs batches of whole rows with a field `continues`, as those of StreamLoader and "
                    "DocumentLoader; use one of them, or set carry none."
                )
            if self._engine.sharded and fields["continues"].any() != fields["continues"].all():
                raise ConfigError(_SHARDED)
            groups, place = self._place
            self._continues.append(fields["continues"].tensor_split(groups)[place])

    def entering(self, place: int) -> ModelState | None:
        """The state before the batch of this number in the step."""
        if not self.active or self._passed is None or not self._continues[place].any():
            return None
        if self._continues[place].all():
            return self._passed
        return self._model.restarted(self._passed, self._continues[place].to(self._ranks.device))

    def leave(self, after: ModelState) -> None:
        """Pass on the state after a batch."""
        if self.active:
            if self._engine.context is not None:
                after = last_state(after, self._engine.context)
            # In memory of its own: a view would keep alive what it is a part of.
            after = after if self.exact else after.detach()
            self._passed = after.map(lambda x: x.clone(memory_format=torch.contiguous_format))

    def end_step(self) -> None:
        """Keep what the step passed on: it was completed."""
        if self._passed is not None:
            self.state, self._passed = self._passed.detach(), None

    def reset(self) -> None:
        """Let the next batch start afresh."""
        self.state = None

    def tensors(self) -> dict[str, Tensor]:
        """The state of all rows by name, on the CPU; empty if there is none. Every rank must call."""
        if self.state is None:
            return {}
        parts = self._ranks.gather({name: tensor.cpu() for name, tensor in _named(self.state).items()})
        parts = parts[:: self._sharers]
        return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def load(self, folder: Path) -> None:
        """This rank's rows of what `tensors` found when the checkpoint was written. Every rank must call.

        Raises:
            CheckpointError: a file that cannot be read or is of another model.
        """
        self.state, path = None, folder / CARRIED_FILE
        if not self.active or not path.is_file():
            return
        try:
            stored = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); use an older checkpoint.") from error
        structure = self._structure()
        names = _named(structure)
        if stored.keys() != names.keys():
            odd = sorted(stored.keys() ^ names.keys())[0]
            raise CheckpointError(f"{path} and the state of this model differ in {odd!r}; use an older checkpoint.")
        groups, place = self._place
        values = (stored[name].tensor_split(groups)[place].to(self._ranks.device) for name in names)
        self.state = structure.map(lambda _: next(values))

    @property
    def _sharers(self) -> int:
        """Neighbouring ranks that hold the same rows."""
        return 1 if self._engine.context is None else self._engine.context.size

    @property
    def _place(self) -> tuple[int, int]:
        """Number of parts that the rows of a batch are cut into, and which of them this rank has."""
        return self._ranks.size // self._sharers, self._ranks.rank // self._sharers

    @torch.no_grad()
    def _structure(self) -> ModelState:
        """Some state of the model: one token through it tells the kinds of its parts."""
        was_training = self._model.training
        self._model.train(False)
        try:
            with self._engine.evaluating() as model:
                return model.hidden_states(torch.zeros(1, 1, dtype=torch.long, device=self._ranks.device))[1]
        finally:
            self._model.train(was_training)


def _named(value: Any, name: str = "") -> dict[str, Tensor]:
    """Tensors of a state in the order of `ModelState.map`, by the path of field names and numbers to each."""
    if isinstance(value, Tensor):
        return {name: value}
    if not isinstance(value, tuple):
        return {}
    fields = getattr(value, "_fields", range(len(value)))
    path = f"{name}." if name else ""
    return {
        key: x for field, part in zip(fields, value, strict=True) for key, x in _named(part, f"{path}{field}").items()
    }
