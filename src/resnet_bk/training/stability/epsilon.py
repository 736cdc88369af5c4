"""`EpsilonSchedule`: the absorption floor, or the exponent of the prime bumps, as a function of the step."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from resnet_bk.errors import ConfigError
from resnet_bk.layers.mixer import Mixer
from resnet_bk.layers.positional import PositionalPotential
from resnet_bk.theory.schedules import Shape, epsilon_at
from resnet_bk.training.callbacks import Callback

if TYPE_CHECKING:
    from resnet_bk.training.trainer import Trainer

FIELDS = ("absorption_floor", "position_epsilon")


class EpsilonSchedule(Callback):
    """Moves a number of every resolvent layer's medium from `start` to its value in `model.config`.

    There are two: the absorption floor, which is the epsilon of the spectral parameter E + i epsilon (a large one damps
    the memory to about 1 / epsilon tokens, so the model first learns what is near), and the exponent of the prime
    bumps of a model with `position_potential` (a large one lets only the first of them stand). Either follows from the
    step alone, so a resumed or rolled-back run has the right one. `model.config` keeps the final value throughout: a
    checkpoint written on the way is saved with that, and is the model that was trained once the schedule has ended.

    Args:
        start: value at the first step, > 0.
        field: "absorption_floor" or "position_epsilon".
        share: share of the run over which it moves, in (0, 1].
        shape: how; see `theory.schedules.epsilon_at`.

    Raises:
        ConfigError: a value outside its domain; when training starts, a model that has no such number.

    Heuristic: that either helps. Nothing here measures that it does.
    """

    def __init__(
        self, start: float, *, field: str = "absorption_floor", share: float = 0.5, shape: Shape = "geometric"
    ) -> None:
        if not 0 < start < math.inf:
            raise ConfigError(f"start is {start}; expected a finite number > 0.")
        if field not in FIELDS:
            raise ConfigError(f"field is {field!r}; expected one of {', '.join(FIELDS)}.")
        if not 0 < share <= 1:
            raise ConfigError(f"share is {share}; expected a share of the run in (0, 1].")
        self.start, self.field, self.share = start, field, share
        self.shape: Shape = shape

    def value_at(self, step: int, steps: int, end: float) -> float:
        """The value during optimizer step `step`, counted from 0, of `steps`."""
        moving = max(1, round(self.share * steps) - 1)
        # A run goes on after its schedule has ended.
        return epsilon_at(min(step, moving) / moving, start=self.start, end=end, shape=self.shape)

    def on_train_start(self, trainer: Trainer) -> None:
        """Check that there is something to schedule."""
        config = trainer.model.config
        if not any(isinstance(module, Mixer) for module in trainer.model.modules()):
            raise ConfigError("the model has no layer with a resolvent; expected at least one: leave the schedule out.")
        if self.field == "position_epsilon" and config.position_potential != "prime_bump":
            raise ConfigError(
                f"model.position_potential is {config.position_potential!r}, which has no exponent to move; set it to "
                "prime_bump, or leave the schedule out."
            )

    def on_step_start(self, trainer: Trainer) -> None:
        """Set the value of this step, which the evaluations after it see too."""
        end = getattr(trainer.model.config, self.field)
        value = self.value_at(trainer.step, trainer.config.steps, end)
        for module in trainer.model.modules():
            if isinstance(module, Mixer) and getattr(module.config, self.field) != value:
                changed: dict[str, Any] = {self.field: value}
                module.config = dataclasses.replace(module.config, **changed)
                if self.field == "position_epsilon":
                    module._position_potential = PositionalPotential(module.config.position_potential, value)
