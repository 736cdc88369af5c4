"""`StabilityMonitor`: loss and gradient norm against their recent past, updates against weights, media of a probe."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resnet_bk.errors import ConfigError, DomainError, InstabilityError
from resnet_bk.layers.mixer import Mixer
from resnet_bk.theory.spectral_monitor import medium_report
from resnet_bk.training.callbacks import Callback, open_rows_of
from resnet_bk.training.spectral import probe_media
from resnet_bk.training.stability.config import StabilityConfig

if TYPE_CHECKING:
    from resnet_bk.training.trainer import Trainer

STABILITY_FILE = "stability.jsonl"

# Standard deviation of a normal distribution over its median absolute deviation.
_MAD_TO_DEVIATION = 1.4826
# The least scale of a loss, over its median, and of the logarithm of a gradient norm: a run whose numbers hardly move
# would else call every ripple a spike.
_LEAST_RELATIVE_LOSS, _LEAST_LOG_NORM = 0.01, 0.25


class StabilityMonitor(Callback):
    """Judges every step before it changes a parameter, and writes what it sees to `stability.jsonl`.

    A step is a spike if its loss, or the logarithm of its gradient norm, lies more than a number of robust standard
    deviations (`robust_score`) above the median of the steps before. It is written as a row {"kind": "spike", ...} and,
    if `refuse` is set, raised as `InstabilityError`: the parameters stay as they were, and an `AutoRecovery` may go on.
    A loss or gradient that is not finite is refused by the trainer itself, which names the first module concerned.

    Every `every` steps a row {"kind": "stability", ...} holds both scores, the norm of the step's update over that of
    the weights for every part of the model, and for every resolvent layer on the probe the smallest Im m, the largest
    |m| eta and the number of sites outside Im m > 0, |m| eta <= 1; such a site is raised too if `refuse` is set.

    Args:
        config: thresholds and intervals; see `StabilityConfig`.
        probe: token ids [batch, time] whose media are looked at; None looks at none.
        refuse: raise instead of only writing; by default as `config` says.

    Cost: two medians of `window` numbers a step; every `every` steps one copy of the parameters, and one forward pass
    over the probe.
    """

    def __init__(self, config: StabilityConfig, probe: Tensor | None = None, *, refuse: bool | None = None) -> None:
        self.config, self.probe = config, probe
        self.refuse = config.recovery or config.on_spike == "stop" if refuse is None else refuse
        self.losses: deque[float] = deque(maxlen=config.window)
        """Of the last steps."""
        self.log_norms: deque[float] = deque(maxlen=config.window)
        """Natural logarithms of their gradient norms."""
        self._row: dict[str, Any] | None = None
        self._before: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer) -> None:
        """Open the file with the rows up to the current step kept."""
        if self.probe is not None and not any(isinstance(module, Mixer) for module in trainer.model.modules()):
            raise ConfigError("the model has no layer with a resolvent; leave the probe out.")
        if self.probe is not None and trainer.engine.sharded:
            raise ConfigError("a probe needs whole parameters; set distributed.strategy ddp, or leave the probe out.")
        self._file = open_rows_of(trainer, STABILITY_FILE)

    def on_rollback(self, trainer: Trainer) -> None:
        """Drop the rows beyond the current step."""
        self._file.close()
        self._file = open_rows_of(trainer, STABILITY_FILE)

    def on_train_end(self, trainer: Trainer) -> None:
        """Close the file."""
        self._file.close()

    def on_gradients(self, trainer: Trainer, loss: float, gradient_norm: float) -> None:
        """Judge the step; keep what a row about it needs."""
        # A norm of zero has no logarithm, and is no spike.
        log_norm = math.log(gradient_norm) if gradient_norm > 0 else None
        scores = {"loss_score": self._score(loss, self.losses, _LEAST_RELATIVE_LOSS), "gradient_score": None}
        if log_norm is not None:
            scores["gradient_score"] = self._score(log_norm, self.log_norms, None)
        row = {
            "step": trainer.step + 1,
            "tokens": trainer.tokens,
            "loss": loss,
            "gradient_norm": gradient_norm,
            **scores,
        }
        for what, value in (("loss", loss), ("gradient norm", gradient_norm)):
            name = f"{what.split()[0]}_score"
            score, limit = scores[name], getattr(self.config, name)
            if limit and score is not None and score > limit:
                self._spike(row, f"the {what} is {value:.6g}, {score:.1f} robust deviations above the median", name)
                break
        self.losses.append(loss)
        if log_norm is not None:
            self.log_norms.append(log_norm)
        self._row = None
        if (trainer.step + 1) % self.config.every == 0:
            self._row = {"kind": "stability", **row, "layers": self._media(trainer)}
            trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
            self._before = {name: p.detach().clone() for name, p in trained.items()}

    def on_step_end(self, trainer: Trainer) -> None:
        """Write the row that is due."""
        if self._row is not None:
            self._write({**self._row, "update_over_weight": update_ratios(trainer.model, self._before)})
            self._row, self._before = None, {}

    def state_dict(self) -> dict[str, Any]:
        """The steps that the next one is judged by."""
        return {"losses": list(self.losses), "log_norms": list(self.log_norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Judge by those steps."""
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.log_norms.clear()
        self.log_norms.extend(state["log_norms"])
        self._row, self._before = None, {}

    def _score(self, value: float, past: Sequence[float], relative: float | None) -> float | None:
        if len(past) < self.config.least_steps:
            return None
        median = statistics.median(past)
        return robust_score(value, past, least=_LEAST_LOG_NORM if relative is None else relative * abs(median))

    def _spike(self, row: dict[str, Any], what: str, field: str) -> None:
        self._write({"kind": "spike", **row, "refused": self.refuse})
        if self.refuse:
            raise InstabilityError(
                f"Training step {row['step']}: {what} of the last {len(self.losses)} steps; expected at most "
                f"{getattr(self.config, field):g} (stability.{field}). Set stability.recovery to go back and skip it, "
                "or lower training.learning_rate."
            )

    def _media(self, trainer: Trainer) -> list[dict[str, Any]]:
        """What the probe shows of every resolvent layer."""
        if self.probe is None:
            return []
        try:
            media = probe_media(trainer.model, self.probe)
        except DomainError as error:
            raise InstabilityError(f"Training step {trainer.step + 1}, media of the probe: {error}") from error
        layers = []
        for layer, medium in media.items():
            report = medium_report(*medium)
            numbers = {"smallest_imaginary": report.smallest_imaginary, "largest_product": report.largest_product}
            # JSON has no NaN or infinity.
            shown = {name: x if math.isfinite(x) else str(x) for name, x in numbers.items()}
            layers.append({"layer": layer, **shown, "violations": report.violations})
            if report.violations and self.refuse:
                raise InstabilityError(
                    f"Training step {trainer.step + 1}: layer {layer} has {report.violations} sites with Im m <= 0, "
                    "|m| eta > 1 or values that are not finite on the probe; expected none, by theorem 1. Lower "
                    "training.learning_rate."
                )
        return layers

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()


def robust_score(value: float, past: Sequence[float], *, least: float) -> float:
    """How many robust standard deviations `value` lies above the median of `past`.

        (value - median) / max(1.4826 MAD, least),   MAD = median |past - median|

    For normal numbers 1.4826 MAD estimates the standard deviation, and no minority of outliers moves it far.

    Args:
        value: finite.
        past: at least one finite number.
        least: smallest scale, > 0 unless a `past` that does not vary has no score (infinite above it).
    """
    median = statistics.median(past)
    scale = max(_MAD_TO_DEVIATION * statistics.median(abs(x - median) for x in past), least)
    if scale == 0:
        return math.copysign(math.inf, value - median) if value != median else 0.0
    return (value - median) / scale


@torch.no_grad()
def update_ratios(model: Any, before: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the change since `before` over the norm then, for every part of a model.

    A part is the embedding, the head, a norm, or the mixer, feed-forward or norms of one block: the parameter's name up
    to the third dot. A part of zeros has ratio infinity, which is left out, as JSON has none.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if name not in before:  # frozen
            continue
        pieces = name.split(".")
        part = ".".join(pieces[:3] if pieces[0] == "blocks" else pieces[:1])
        old = before[name]
        changes = _square(parameter - old), _square(old)
        known = sums.get(part)
        sums[part] = changes if known is None else (known[0] + changes[0], known[1] + changes[1])
    if not sums:
        return {}
    changed, held = (torch.stack([pair[k] for pair in sums.values()]).sqrt().tolist() for k in (0, 1))
    return {part: c / h for part, c, h in zip(sums, changed, held, strict=True) if h > 0}


def _square(tensor: Tensor) -> Tensor:
    """Sum of squares, of a sharded tensor over all its shards."""
    norm = torch.linalg.vector_norm(tensor)
    whole = getattr(norm, "full_tensor", None)
    return (norm if whole is None else whole()).double().square()
