"""`EpsilonSchedule`: the absorption floor of every resolvent layer as a function of the step."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from resnet_bk.errors import ConfigError
from resnet_bk.layers.mixer import Mixer
from resnet_bk.theory.schedules import Shape, epsilon_at
from resnet_bk.training.callbacks import Callback

if TYPE_CHECKING:
    from resnet_bk.training.trainer import Trainer


class EpsilonSchedule(Callback):
    """Moves the smallest absorption from `start` to the model's own `absorption_floor` over the first part of a run.

    The resolvent's spectral parameter is E + i eta with eta = softplus(...) + floor: the floor is the epsilon of this
    model, whose potential is computed from the tokens and has no exponent. A large floor damps the memory to about
    1 / floor tokens, so the model first learns what is near. The floor follows from the step alone, so a resumed or
    rolled-back run has the right one. `model.config` keeps the final floor throughout: a checkpoint written on the way
    is saved with that, and is the model that was trained only once the schedule has ended.

    Args:
        start: floor at the first step, > 0, in units of the hopping.
        share: share of the run over which it moves, in (0, 1].
        shape: how; see `theory.schedules.epsilon_at`.

    Raises:
        ConfigError: a number outside its domain; when training starts, a model without a resolvent layer.

    Heuristic: that starting with short memory helps. Nothing here measures that it does.
    """

    def __init__(self, start: float, *, share: float = 0.5, shape: Shape = "geometric") -> None:
        if not 0 < start < math.inf:
            raise ConfigError(f"start is {start}; expected a finite absorption > 0.")
        if not 0 < share <= 1:
            raise ConfigError(f"share is {share}; expected a share of the run in (0, 1].")
        self.start, self.share = start, share
        self.shape: Shape = shape

    def floor_at(self, step: int, steps: int, end: float) -> float:
        """The floor during optimizer step `step`, counted from 0, of `steps`."""
        moving = max(1, round(self.share * steps) - 1)
        # A run goes on after its schedule has ended.
        return epsilon_at(min(step, moving) / moving, start=self.start, end=end, shape=self.shape)

    def on_train_start(self, trainer: Trainer) -> None:
        """Check that there is something to schedule."""
        if not any(isinstance(module, Mixer) for module in trainer.model.modules()):
            raise ConfigError("the model has no layer with a resolvent; expected at least one: leave the schedule out.")

    def on_step_start(self, trainer: Trainer) -> None:
        """Set the floor of this step, which the evaluations after it see too."""
        floor = self.floor_at(trainer.step, trainer.config.steps, trainer.model.config.absorption_floor)
        for module in trainer.model.modules():
            if isinstance(module, Mixer) and module.config.absorption_floor != floor:
                module.config = dataclasses.replace(module.config, absorption_floor=floor)
