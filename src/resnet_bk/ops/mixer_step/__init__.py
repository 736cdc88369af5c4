"""One decode step of the default mixer in one operator: gates, memory, readout, norm and gate."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.ops.dispatch import Backend, choose_backend
from resnet_bk.ops.mixer_step.reference import StepParameters, mixer_step_reference
from resnet_bk.ops.resolvent import GreenState
from resnet_bk.ops.semiseparable import MixState

__all__ = ["StepParameters", "mixer_step", "mixer_step_"]

Source = Literal["gated", "free", "unit"]


def mixer_step(
    projection: Float[Tensor, "batch width"],
    parameters: StepParameters,
    mix: MixState,
    green: GreenState,
    *,
    previous: Float[Tensor, "batch state"] | None = None,
    source: Source = "gated",
    absorption_floor: float = 1e-3,
    rotary_base: float = 10000.0,
    rotary_fraction: float = 1.0,
    epsilon: float = 1e-5,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "batch inner"], MixState, GreenState]:
    r"""What a mixer with exact dynamics and flux kernel does with one more token, between its two projections.

        eta = softplus(e + absorption_bias) + absorption_floor,     delta = potential_scale a - energy
        g = sqrt(u / (u + eta)),  b = sqrt(1 - g^2),  u = Im m,     m <- 1 / (delta - i eta - m)
        k = R(RMSNorm(k + key_shift previous) + key_bias),   q = R(RMSNorm(q) + query_bias)
        S <- g S + s k x^T,   y = state^(-1/2) S^T q + skip x,   out = RMSNorm(y) norm_weight silu(z)

    where R turns by rotary_base^(-2p / state) position, and s = b sigmoid(s + source_bias), softplus(s + source_bias)
    or b for source "gated", "free" or "unit".

    Args:
        projection: z, x (inner each), k, q (state each), a, e, s (heads each; no s for "unit") side by side.
        parameters: of any floating dtype.
        mix: memory S and position before the token.
        green: m before the token.
        previous: k of the token before; there exactly if `parameters.key_shift` is.
        source: weight of the token on entry.
        absorption_floor: smallest eta; > 0.
        rotary_base: ratio of the largest to the smallest rotary wavelength.
        rotary_fraction: share of the pairs of keys, the fastest, that positions turn.
        epsilon: added to mean squares.
        backend: "triton" is one kernel; "reference" composes the operators named above, and so does "chunked".

    Returns:
        The output in the dtype of `projection`, and the states after the token, float32 or wider.

    Raises:
        ShapeError: shapes that do not fit; the message names the tensor.
        DomainError: an unknown source, or absorption_floor <= 0.
        BackendError: an unknown backend, or one that cannot run here.

    Numerics: float32 or wider; the angle is reduced in float64, so positions beyond 2^24 are as exact as small ones.
    Not differentiable in the kernel: training runs `causal_resolvent` and `semiseparable_mix`.
    Cost: reads and writes the memory once.
    """
    chosen = _check(projection, parameters, mix, green, previous, source, absorption_floor, backend)
    state = (mix.memory, mix.position, green.real, green.imag)
    options = (previous, source, absorption_floor, rotary_base, rotary_fraction, epsilon)
    if chosen == "triton":
        from resnet_bk.ops.mixer_step.triton import mixer_step_triton

        memory, position, real, imag = state
        wide = (memory.float(), position, real.float(), imag.float())
        out, memory, real, imag = mixer_step_triton(projection, *parameters, *wide, *options)
    else:
        out, memory, real, imag = mixer_step_reference(projection, parameters, *state, *options)
    return out, MixState(memory, mix.position + 1), GreenState(real, imag)


def mixer_step_(
    projection: Float[Tensor, "batch width"],
    parameters: StepParameters,
    mix: MixState,
    green: GreenState,
    *,
    previous: Float[Tensor, "batch state"] | None = None,
    source: Source = "gated",
    absorption_floor: float = 1e-3,
    rotary_base: float = 10000.0,
    rotary_fraction: float = 1.0,
    epsilon: float = 1e-5,
    backend: Backend = "auto",
) -> Float[Tensor, "batch inner"]:
    """Output of `mixer_step`, with memory and Green function overwritten by those after the token.

    The previous key is left to the caller, who has the next one, and the position is left alone: the layers of a model
    may share one tensor, which their owner advances once a token. Nothing is allocated but the output, and no number
    reaches the host, so the step can be captured in a CUDA graph (after one run outside, in which the kernel is
    compiled and checked).

    Arguments and errors are those of `mixer_step`; memory and Green function must be contiguous float32 (float64 for
    a float64 projection).
    """
    chosen = _check(projection, parameters, mix, green, previous, source, absorption_floor, backend)
    held = {"mix.memory": mix.memory, "green.real": green.real, "green.imag": green.imag}
    wide = torch.float64 if projection.dtype == torch.float64 else torch.float32
    for name, part in held.items():
        if part.dtype != wide or not part.is_contiguous():
            raise ShapeError(
                f"{name} is {part.dtype} with strides {list(part.stride())}; a state is updated in place only if it "
                f"is contiguous {wide}. Pass {name}.to({wide}).contiguous(), and keep that tensor."
            )
    state = (mix.memory, mix.position, green.real, green.imag)
    options = (previous, source, absorption_floor, rotary_base, rotary_fraction, epsilon)
    if chosen == "triton":
        from resnet_bk.ops.mixer_step.triton import mixer_step_triton_

        return mixer_step_triton_(projection, *parameters, *state, *options)
    out, *after = mixer_step_reference(projection, parameters, *state, *options)
    for part, new in zip(held.values(), after, strict=True):
        part.copy_(new)
    return out


def _check(projection, parameters, mix, green, previous, source, absorption_floor, backend) -> str:
    """The backend that runs, once the arguments fit together."""
    chosen = choose_backend(backend, projection)
    if source not in ("gated", "free", "unit") or (parameters.source_bias is None) != (source == "unit"):
        held = "no source_bias" if parameters.source_bias is None else "a source_bias"
        raise DomainError(f"source is {source!r} with {held}; expected 'gated' or 'free' with one or 'unit' without.")
    if not absorption_floor > 0:
        raise DomainError(f"absorption_floor is {absorption_floor}; expected a number > 0.")
    if (parameters.key_shift is None) != (previous is None):
        there = "there" if previous is None else "missing"
        raise ShapeError(f"previous goes with parameters.key_shift, which is {there}; pass both or neither.")
    if mix.memory.dim() != 4:
        raise ShapeError(f"mix.memory must be [batch, heads, state, value]; got {list(mix.memory.shape)}.")
    batch, heads, state, value = mix.memory.shape
    if state % 2:
        raise ShapeError(f"rotary phases turn pairs of channels; the state size {state} must be even.")
    width = 2 * (heads * value + state + heads) + heads * (source != "unit")
    expected = {
        "projection": (projection, (batch, width)),
        "mix.position": (mix.position, (batch,)),
        "green.real": (green.real, (batch, heads)),
        "green.imag": (green.imag, (batch, heads)),
        "parameters.query_bias": (parameters.query_bias, (heads, state)),
        "parameters.key_bias": (parameters.key_bias, (heads, state)),
        "parameters.norm_weight": (parameters.norm_weight, (heads * value,)),
    }
    for name in ("absorption_bias", "potential_scale", "energy", "skip", "source_bias"):
        if (part := getattr(parameters, name)) is not None:
            expected[f"parameters.{name}"] = (part, (heads,))
    if previous is not None:
        expected |= {"previous": (previous, (batch, state)), "parameters.key_shift": (parameters.key_shift, (state,))}
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ShapeError(f"{name} must be {list(shape)}; got {list(tensor.shape)}.")
    return chosen
