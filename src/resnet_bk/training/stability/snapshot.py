"""A training run's state at one step, kept in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from resnet_bk.errors import ConfigError
from resnet_bk.models.resnet_bk import ModelState

if TYPE_CHECKING:
    from resnet_bk.training.trainer import Trainer


@dataclass(frozen=True)
class Snapshot:
    """Parameters, optimizer and everything else that continues a run; tensors are copies in the machine's memory.

    Of a sharded model every rank keeps its own shards.
    """

    step: int
    parameters: list[Tensor]
    optimizer: list[dict[str, Any]]
    """One state a parameter; empty for one that never had a gradient."""
    run: str
    """JSON of `Trainer.run_state`."""
    carried: ModelState | None
    """What this rank's rows leave to the next batch."""

    @classmethod
    @torch.no_grad()
    def take(cls, trainer: Trainer) -> Snapshot:
        """The present state of a run. Every rank must call.

        Raises:
            ConfigError: an optimizer that keeps its state elsewhere than in `optimizer.state`.

        Cost: one copy of parameters and optimizer state to the machine's memory.
        """
        state = trainer.optimizer.state
        if trainer.step and not state:
            raise ConfigError(
                f"stability.snapshot_every needs the state of {type(trainer.optimizer).__name__} in optimizer.state, "
                "where there is none; set it to 0 and go back to checkpoints."
            )
        parameters = _trained(trainer)
        return cls(
            trainer.step,
            [_copied(parameter) for parameter in parameters],
            [{name: _copied(value) for name, value in state.get(p, {}).items()} for p in parameters],
            json.dumps(trainer.run_state()),
            None if trainer.carry.state is None else trainer.carry.state.map(_copied),
        )

    @torch.no_grad()
    def restore(self, trainer: Trainer) -> None:
        """Put the run back to this state, in place; the snapshot can be used again."""
        trainer.load_run_state(json.loads(self.run))
        trainer.carry.state = None if self.carried is None else self.carried.map(lambda x: x.to(trainer.device))
        for parameter, saved, held in zip(_trained(trainer), self.parameters, self.optimizer, strict=True):
            _local(parameter).copy_(saved)
            if not held:
                trainer.optimizer.state.pop(parameter, None)
                continue
            state = trainer.optimizer.state[parameter]
            for name, value in held.items():
                if isinstance(value, Tensor):
                    _local(state[name]).copy_(value)
                else:
                    state[name] = value


def _trained(trainer: Trainer) -> list[Tensor]:
    """Parameters in order, without those that are frozen."""
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def _copied(value: Any) -> Any:
    """`value`; a tensor copied to the CPU, of a sharded one this rank's part.

    From a GPU the copy goes into pinned memory, which PyTorch keeps for the next, and the host does not wait for it:
    whatever changes the tensor, and whatever copies the snapshot back, comes later in the same stream.
    """
    if not isinstance(value, Tensor):
        return value
    local = _local(value).detach()
    if not local.is_cuda:
        return local.to("cpu", copy=True)
    return torch.empty_like(local, device="cpu", pin_memory=True).copy_(local, non_blocking=True)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
