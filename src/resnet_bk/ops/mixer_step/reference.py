"""One decode step of the mixer, composed of the operators it stands for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.ops.dispatch import compute_dtype
from resnet_bk.ops.gated_norm import gated_norm
from resnet_bk.ops.resolvent import GreenState, causal_resolvent, flux_gate
from resnet_bk.ops.semiseparable import MixState, rotary_frequencies, semiseparable_step


class StepParameters(NamedTuple):
    """A mixer's parameters between its two projections."""

    query_bias: Float[Tensor, "heads state"]
    key_bias: Float[Tensor, "heads state"]
    absorption_bias: Float[Tensor, " heads"]
    potential_scale: Float[Tensor, " heads"]
    energy: Float[Tensor, " heads"]
    skip: Float[Tensor, " heads"]
    source_bias: Float[Tensor, " heads"] | None
    """None for source "unit"."""
    norm_weight: Float[Tensor, " inner"]
    key_shift: Float[Tensor, " state"] | None = None
    """None where keys do not know the token before."""

    def to(self, dtype: torch.dtype) -> StepParameters:
        """The parameters in `dtype`."""
        return self._make(part if part is None else part.to(dtype) for part in self)


def mixer_step_reference(
    projection: Tensor, parameters: StepParameters, memory: Tensor, position: Tensor, real: Tensor, imag: Tensor,
    previous: Tensor | None, source: str, floor: float, rotary_base: float, rotary_fraction: float, epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, memory and both parts of the Green function; see `resnet_bk.ops.mixer_step.mixer_step`."""
    heads, state = parameters.query_bias.shape
    inner = parameters.norm_weight.numel()
    sizes = [inner, inner, state, state, heads, heads, heads * (source != "unit")]
    wide = compute_dtype(projection, memory)
    gate, x, key, query, potential, absorption, raw_source = projection.to(wide).split(sizes, dim=-1)
    weights = parameters.to(wide)
    if weights.key_shift is not None and previous is not None:
        key = key + weights.key_shift * previous.to(wide)

    eta = F.softplus(absorption + weights.absorption_bias) + floor
    detuning = weights.potential_scale * potential - weights.energy
    before = GreenState(real, imag)
    _, green = causal_resolvent(detuning[:, None], eta[:, None], initial=before, backend="reference")
    log_decay, weight = flux_gate(imag, eta)
    if weights.source_bias is not None:
        raw_source = raw_source + weights.source_bias
        weight = weight * raw_source.sigmoid() if source == "gated" else F.softplus(raw_source)

    y, mixed = semiseparable_step(
        F.rms_norm(query, (state,), eps=epsilon),
        F.rms_norm(key, (state,), eps=epsilon),
        x.unflatten(-1, (heads, -1)),
        log_decay,
        MixState(memory, position),
        source=weight,
        query_bias=weights.query_bias,
        key_bias=weights.key_bias,
        frequencies=rotary_frequencies(state, rotary_base, rotary_fraction, device=projection.device),
        skip=weights.skip,
        scale=state**-0.5,
    )
    out = gated_norm(y, gate, weights.norm_weight, epsilon=epsilon, backend="reference")
    return out.to(projection.dtype), mixed.memory, green.real, green.imag
