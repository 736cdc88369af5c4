"""`SpectralMonitor`: a callback that watches the media of a language model, and clips them only if asked to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resnet_bk.errors import ConfigError, DomainError, ShapeError
from resnet_bk.layers.mixer import Mixer
from resnet_bk.ops.resolvent import causal_resolvent, decaying_root
from resnet_bk.theory.spectral_monitor import MediumReport, clip_factors, medium_report, schatten_bound
from resnet_bk.training.callbacks import Callback, open_rows_of

if TYPE_CHECKING:
    from resnet_bk.training.trainer import Trainer

SPECTRAL_FILE = "spectral.jsonl"


class Medium(NamedTuple):
    """What one mixer's potential and absorption are for some tokens, and the Green function they make.

    A token takes `sites_per_token` sites, one after the other.

    Attributes:
        potential: v, the scaled potential without the head's energy, float32 or wider, units of the hopping.
        absorption: eta > 0, same units.
        real: Re m of the half-line Green function (of its semiclassical root where the dynamics has no scan).
        imag: Im m.
    """

    potential: Float[Tensor, "batch sites heads"]
    absorption: Float[Tensor, "batch sites heads"]
    real: Float[Tensor, "batch sites heads"]
    imag: Float[Tensor, "batch sites heads"]


@torch.no_grad()
def probe_media(model: Any, probe: Int[Tensor, "batch time"]) -> dict[int, Medium]:
    """The medium of every resolvent layer for some tokens, by the layer's number; the model is left as it was.

    One forward pass in evaluation mode. Layers with another mixer (attention, Mamba) have no medium.

    Args:
        model: a `LanguageModel`.
        probe: token ids, no more than the model's `segment_tokens`.

    Raises:
        ShapeError: `probe` is not [batch, time], or too long for one segment.
        DomainError: a token id outside the vocabulary, or media outside the domain of the resolvent.

    Cost: one forward pass and one scan a layer.
    """
    if probe.dim() != 2 or not 0 < probe.numel() <= model.segment_tokens:
        raise ShapeError(
            f"probe has shape {list(probe.shape)}; expected [batch, time] with 1 to {model.segment_tokens} tokens "
            "(model.segment_tokens): pass fewer"
        )
    projections: dict[Any, Tensor] = {}
    mixers = _mixers(model)

    def keep(module: Any, _inputs: Any, output: Any) -> None:
        projections[module] = output

    hooks = [mixer.in_proj.register_forward_hook(keep) for mixer in mixers.values()]
    try:
        with _evaluating(model):
            model.hidden_states(probe.to(model.output_weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: _medium(mixer, projections[mixer.in_proj]) for layer, mixer in mixers.items()}


class SpectralMonitor(Callback):
    """Writes a row about every layer's media to `spectral.jsonl`: absorption, |m| eta <= 1, Im m > 0, Schatten bounds.

    Every row is {"kind": "spectral", "step", "tokens", "layers": [...]}, one entry a resolvent layer with its number
    and the fields of `MediumReport`; with a limit also `clipped_heads` and `smallest_factor`. Training itself is not
    touched unless a limit is given: then the potential scale of every head whose bound exceeds it on the probe is
    multiplied by limit / bound, which brings that layer's bound to the limit for the inputs it just had.

    Args:
        probe: token ids [batch, time] whose media are measured, the same ones at every row.
        every: optimizer steps between rows, >= 1; the first row is written before training.
        limit: largest Schatten bound allowed a head and sequence, > 0; None (the default) never clips.
        order: p of the bound that the limit is for, in [1, infinity].
        strict: raise `DomainError` when a medium breaks theorem 1, instead of only writing `violations`.

    Raises:
        ConfigError: a number outside its domain; when training starts, a model without a resolvent layer, or a limit
            for one without potential.
    """

    def __init__(
        self,
        probe: Int[Tensor, "batch time"],
        *,
        every: int = 100,
        limit: float | None = None,
        order: float = 2.0,
        strict: bool = False,
    ) -> None:
        if every < 1:
            raise ConfigError(f"every is {every}; expected a number of steps >= 1.")
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            raise ConfigError(f"limit is {limit}; expected a finite number > 0, or None for no clipping.")
        if not order >= 1:
            raise ConfigError(f"order is {order}; expected a Schatten order in [1, infinity].")
        self.probe, self.every, self.limit, self.order, self.strict = probe, every, limit, order, strict
        self.reports: dict[int, MediumReport] = {}
        """By layer, of the last row."""

    def on_train_start(self, trainer: Trainer) -> None:
        """Keep the rows up to the current step, and write one for it if a new run starts here."""
        if trainer.engine.sharded:
            raise ConfigError("a probe needs whole parameters; set distributed.strategy ddp, or leave the monitor out.")
        if not _mixers(trainer.model):
            raise ConfigError("the model has no layer with a resolvent; expected at least one: leave the monitor out.")
        if self.limit is not None and trainer.model.config.dynamics == "decay_only":
            raise ConfigError("limit is set, but model.dynamics 'decay_only' has no potential to clip; leave it out.")
        self._file = open_rows_of(trainer, SPECTRAL_FILE)
        # Asked of rank 0 for all: the ranks of a sharded model measure together.
        if trainer.ranks.on_main(lambda: not (Path(trainer.output_dir) / SPECTRAL_FILE).stat().st_size):
            self._write(trainer)

    def on_rollback(self, trainer: Trainer) -> None:
        """Drop the rows beyond the current step."""
        self._file.close()
        self._file = open_rows_of(trainer, SPECTRAL_FILE)

    def on_step_end(self, trainer: Trainer) -> None:
        """Measure, clip if asked to, and write a row when one is due."""
        if trainer.step % self.every == 0:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, trainer: Trainer) -> None:
        media = probe_media(trainer.model, self.probe)
        self.reports = {layer: medium_report(*medium) for layer, medium in media.items()}
        layers = []
        for layer, report in self.reports.items():
            # JSON has no NaN or infinity.
            numbers = {name: x if math.isfinite(x) else str(x) for name, x in report._asdict().items()}
            entry: dict[str, Any] = {"layer": layer, **numbers}
            if self.limit is not None:
                entry |= self._clip(trainer.model.blocks[layer].mixer, media[layer])
            layers.append(entry)
        row = {"kind": "spectral", "step": trainer.step, "tokens": trainer.tokens, "layers": layers}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        sick = [(layer, report.violations) for layer, report in self.reports.items() if report.violations]
        if sick and self.strict:
            raise DomainError(
                f"Step {trainer.step}: layer {sick[0][0]} has {sick[0][1]} sites with Im m <= 0, |m| eta > 1 or values "
                f"that are not finite; expected none, by theorem 1. See {SPECTRAL_FILE}; lower the learning rate."
            )

    @torch.no_grad()
    def _clip(self, mixer: Mixer, medium: Medium) -> dict[str, Any]:
        """Scale the potential of the heads beyond the limit; what that did."""
        worst = schatten_bound(medium.potential, medium.absorption, self.order).amax(0)
        factors = clip_factors(worst, self.limit or math.inf)
        mixer.potential_scale.mul_(factors.to(mixer.potential_scale.dtype))
        return {"clipped_heads": int((factors < 1).sum()), "smallest_factor": factors.min().item()}


def _mixers(model: Any) -> dict[int, Mixer]:
    """The resolvent mixers by the number of their layer."""
    found = {layer: block.mixer for layer, block in enumerate(model.blocks)}
    return {layer: mixer for layer, mixer in found.items() if isinstance(mixer, Mixer)}


def _medium(mixer: Mixer, projection: Tensor) -> Medium:
    """The medium behind a mixer's raw projection."""
    raw, shift = projection.split(mixer.sizes, dim=-1)[4:6]
    detuning, absorption = mixer.medium(raw, shift)
    dynamics = mixer.config.dynamics
    potential = detuning if dynamics == "decay_only" else detuning + mixer.energy.to(detuning.dtype)
    if dynamics == "exact":
        (real, imag), _ = causal_resolvent(detuning, absorption, initial=mixer.lead(detuning.dtype))
    else:
        real, imag = decaying_root(detuning, absorption)
    return Medium(potential, absorption, real, imag)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout, so that no random number is drawn."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
