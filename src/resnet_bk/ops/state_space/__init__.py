"""The selective scans of Mamba-2 and Mamba-3, so that the baselines are what their authors published."""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.errors import BackendError, ShapeError
from resnet_bk.ops.dispatch import Backend, choose_backend, compute_dtype, document_boundaries
from resnet_bk.ops.state_space import published
from resnet_bk.ops.state_space.chunked import mamba2_chunked, mamba3_chunked
from resnet_bk.ops.state_space.reference import mamba2_reference, mamba3_reference

__all__ = ["ScanBackend", "TrapezoidState", "choose_scan_backend", "gate_then_norm", "mamba2_scan", "mamba3_scan"]

ScanBackend = Literal["auto", "reference", "chunked", "triton", "published"]


_PUBLISHED_SIZES = (16, 32, 64, 128, 256)


class TrapezoidState(NamedTuple):
    """All that Mamba-3's scan needs of earlier tokens, float32 or wider."""

    memory: Float[Tensor, "rows heads state value"]
    angle: Float[Tensor, "rows heads quarter_state"]
    """Accumulated turns in radians, modulo 2 pi."""
    key: Float[Tensor, "rows heads state"]
    """Of the last token, biased and turned."""
    value: Float[Tensor, "rows heads value"]
    """Of the last token."""


def choose_scan_backend(backend: ScanBackend, operand: Tensor, *, unable: str | None = None) -> str:
    """The backend that runs a scan.

    "auto" is "published", the kernels of the package `mamba_ssm`, on a CUDA device if that can be imported and the
    operands are bfloat16 or float16 (their matrix products round float32 operands); else this library's own form:
    "triton" on a CUDA device, otherwise "chunked".

    Args:
        backend: a name of `ScanBackend`.
        operand: the values.
        unable: what the published kernels cannot do of what is asked; None if they can.

    Raises:
        BackendError: an unknown name, or one that cannot run here; the message says why.
    """
    if backend not in ("auto", "published"):
        if backend not in ("reference", "chunked", "triton"):
            names = "'auto', 'reference', 'chunked', 'triton', 'published'"
            raise BackendError(f"backend is {backend!r}; expected one of {names}.")
        return choose_backend(backend, operand)
    unable = published.obstacle(operand) or unable
    if backend == "published":
        if unable:
            raise BackendError(f"backend 'published' cannot run: {unable}. Use 'auto' or 'chunked'.")
        return "published"
    narrow = operand.is_cuda and operand.dtype in (torch.bfloat16, torch.float16)
    return "published" if narrow and not unable else choose_backend("auto", operand)


def mamba2_scan(
    value: Float[Tensor, "batch time heads value"],
    step: Float[Tensor, "batch time heads"],
    rate: Float[Tensor, " heads"],
    write: Float[Tensor, "batch time state"],
    read: Float[Tensor, "batch time state"],
    *,
    skip: Float[Tensor, " heads"],
    initial: Float[Tensor, "rows heads state value"] | None = None,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    backend: ScanBackend = "auto",
) -> tuple[Float[Tensor, "batch time heads value"], Float[Tensor, "rows heads state value"]]:
    r"""Outputs of Mamba-2's recurrence, head by head, and the memory that continues it.

        S_t = exp(step_t rate) S_{t-1} + step_t write_t value_t^T,     y_t = S_t^T read_t + skip value_t

    Args:
        value: x.
        step: size of the time step, > 0, float32 or wider.
        rate: A, < 0, float32 or wider.
        write: B, shared by all heads.
        read: C, shared by all heads.
        skip: D.
        initial: memory before the first token of every row (document with `cu_seqlens`); None is empty.
        cu_seqlens: boundaries of documents packed along time (batch 1).
        backend: "reference" runs token by token, "chunked" and "triton" are those of `semiseparable_mix`, "published"
            calls `mamba_ssm` (no packed documents); see `choose_scan_backend`. "auto" takes one step of its own for
            a single token that continues a memory, where there is no gradient.

    Returns:
        y in the dtype of `value`, and the memory in float32 or wider.

    Raises:
        ShapeError: shapes that do not fit. BackendError: an unknown backend, or one that cannot run here.

    Cost: that of `semiseparable_mix`, with keys shared by the heads.
    Source: state-space duality (Dao and Gu, 2024); DERIVATION.md.
    """
    batch, time, heads, width, state = _check_shapes(value, step, write, read, {"rate": rate, "skip": skip})
    unable = None if cu_seqlens is None else "the kernels do not return the memories of packed documents"
    chosen = choose_scan_backend(backend, value, unable=unable)
    if backend == "auto" and _is_step(time, initial):
        chosen = "chunked"
    bounds = None if cu_seqlens is None else document_boundaries(cu_seqlens, batch, time)
    rows = batch if bounds is None else len(bounds) - 1
    dtype = compute_dtype(value, step)
    step, rate = step.to(dtype), rate.to(dtype)
    if initial is not None:
        _check_state({"initial": initial}, {"initial": (rows, heads, state, width)})
        initial = initial.to(dtype)
    if chosen == "published":
        # A view of the projection reaches as far as its strides.
        published.check_offsets(max(value.numel(), batch * value.stride(0)), "value")
        return published.mamba2_published(value, step, rate, write, read, skip, initial)
    if chosen != "reference":
        skip = skip.to(dtype)
        return mamba2_chunked(value, step, rate, write, read, skip, initial, cu_seqlens, cast(Backend, chosen))
    memory = value.new_zeros(rows, heads, state, width, dtype=dtype) if initial is None else initial
    tokens = (value.to(dtype), step, write.to(dtype), read.to(dtype))
    outputs, finals = [], []
    for row, start, end in _pieces(bounds, time):
        x, d, b, c = (part[:, start:end] for part in tokens)
        y, after = mamba2_reference(x, d, rate, b, c, skip.to(dtype), memory[row])
        outputs.append(y)
        finals.append(after)
    return torch.cat(outputs, dim=1).to(value.dtype), torch.cat(finals)


def mamba3_scan(
    value: Float[Tensor, "batch time heads value"],
    step: Float[Tensor, "batch time heads"],
    log_decay: Float[Tensor, "batch time heads"],
    trapezoid: Float[Tensor, "batch time heads"],
    write: Float[Tensor, "batch time state"],
    read: Float[Tensor, "batch time state"],
    turn: Float[Tensor, "batch time quarter_state"],
    *,
    skip: Float[Tensor, " heads"],
    write_bias: Float[Tensor, "heads state"],
    read_bias: Float[Tensor, "heads state"],
    gate: Float[Tensor, "batch time heads value"] | None = None,
    initial: TrapezoidState | None = None,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    backend: ScanBackend = "auto",
) -> tuple[Float[Tensor, "batch time heads value"], TrapezoidState]:
    r"""Outputs of Mamba-3's recurrence (single input and output), head by head, and the state that continues it.

        h_t = a_t h_{t-1} + (1 - s_t) step_t a_t k_{t-1} x_{t-1}^T + s_t step_t k_t x_t^T,    y_t = h_t^T q_t + skip x_t
        k_t = R(angle_t) (write_t + write_bias),  q_t = R(angle_t) (read_t + read_bias)
        angle_t = angle_{t-1} + pi tanh(turn_t) step_t,  a_t = exp(log_decay_t),  s_t = sigmoid(trapezoid_t)

    R turns the channel pair (2p, 2p + 1) by the p-th angle for p < state / 4; the other half of the channels rests.

    Args:
        value: x.
        step: size of the time step, > 0, float32 or wider.
        log_decay: rate times step, < 0, float32 or wider.
        trapezoid: raw weight of the present token against the last one.
        write: B after its norm, shared by all heads.
        read: C after its norm, shared by all heads.
        turn: raw speed of the rotation, shared by all heads.
        skip: D.
        write_bias: added per head before the rotation.
        read_bias: added per head before the rotation.
        gate: raw; y is multiplied by its silu.
        initial: state before the first token of every row (document with `cu_seqlens`); None is empty.
        cu_seqlens: boundaries of documents packed along time (batch 1).
        backend: "reference" runs token by token, "chunked" and "triton" are those of `semiseparable_mix`, "published"
            calls `mamba_ssm`, whose kernels round to bfloat16; "auto" as for `mamba2_scan`.

    Returns:
        y in the dtype of `value`, and the state in float32 or wider.

    Raises:
        ShapeError: shapes that do not fit. BackendError: an unknown backend, or one that cannot run here.

    Cost: that of `semiseparable_mix` with keys and queries of each head, which are written out.
    Source: Mamba-3 (2026); DERIVATION.md, which also says why no output sees a later step size.
    """
    batch, time, heads, width, state = _check_shapes(value, step, write, read, {"skip": skip})
    if gate is not None:
        _check_state({"gate": gate}, {"gate": tuple(value.shape)})
    expected = {"log_decay": step.shape, "trapezoid": step.shape, "turn": (batch, time, state // 4)}
    _check_state({"log_decay": log_decay, "trapezoid": trapezoid, "turn": turn}, expected)
    biases = {"write_bias": write_bias, "read_bias": read_bias}
    _check_state(biases, dict.fromkeys(biases, (heads, state)))
    if state % 4:
        raise ShapeError(f"half of the state's channels are turned in pairs; {state} must be a multiple of 4.")
    fit = all(size in _PUBLISHED_SIZES for size in (state, width))
    unable = (
        None if fit else f"the kernels take states and values of 16, 32, 64, 128 or 256 channels, not {state}, {width}"
    )
    chosen = choose_scan_backend(backend, value, unable=unable)
    if backend == "auto" and _is_step(time, initial):
        chosen = "chunked"
    bounds = None if cu_seqlens is None else document_boundaries(cu_seqlens, batch, time)
    rows = batch if bounds is None else len(bounds) - 1
    dtype = compute_dtype(value, step)
    shapes = {
        "memory": (rows, heads, state, width),
        "angle": (rows, heads, state // 4),
        "key": (rows, heads, state),
        "value": (rows, heads, width),
    }
    if initial is not None:
        _check_state(initial._asdict(), shapes)
        initial = TrapezoidState(*(part.to(dtype) for part in initial))
    step, log_decay = step.to(dtype), log_decay.to(dtype)
    if chosen == "published":
        published.check_offsets(batch * time * heads * max(state, width), "the turned keys")
        y, after = published.mamba3_published(
            value, step, log_decay, trapezoid, write, read, turn, skip, write_bias, read_bias, gate, initial, cu_seqlens
        )
        return y.to(value.dtype), TrapezoidState(*after)
    trapezoid, turn, skip = trapezoid.to(dtype), turn.to(dtype), skip.to(dtype)
    write, read = (x.to(dtype).unsqueeze(2) + bias.to(dtype) for x, bias in ((write, write_bias), (read, read_bias)))
    if chosen != "reference":
        operands = (value, step, log_decay, trapezoid, write, read, turn, skip)
        y, after = mamba3_chunked(*operands, initial, bounds, cu_seqlens, cast(Backend, chosen))
        return _gated(y, gate), TrapezoidState(*after)
    if initial is None:
        initial = TrapezoidState(*(value.new_zeros(shape, dtype=dtype) for shape in shapes.values()))
    tokens = (value.to(dtype), step, log_decay, trapezoid, write, read, turn)
    outputs, finals = [], []
    for row, start, end in _pieces(bounds, time):
        part = [x[:, start:end] for x in tokens]
        before = (initial.memory[row], initial.angle[row], initial.key[row], initial.value[row])
        y, after = mamba3_reference(part[0], part[1], part[2], part[3], part[4], part[5], part[6], skip, before)
        outputs.append(y)
        finals.append(after)
    ends = (torch.cat(parts) for parts in zip(*finals, strict=True))
    return _gated(torch.cat(outputs, dim=1).to(value.dtype), gate), TrapezoidState(*ends)


def gate_then_norm(
    y: Float[Tensor, "*batch inner"],
    gate: Float[Tensor, "*batch inner"],
    weight: Float[Tensor, " inner"],
    *,
    epsilon: float = 1e-5,
    backend: ScanBackend = "auto",
) -> Float[Tensor, "*batch inner"]:
    """RMS norm of y silu(gate) over all channels, times weight: what stands behind Mamba-2's scan.

    Args:
        y: output of the scan, all heads side by side.
        gate: raw.
        weight: one a channel.
        epsilon: added to the mean square.
        backend: "published" calls `mamba_ssm`; every other name is plain PyTorch. "auto" as in `choose_scan_backend`.

    Returns:
        The result in the dtype of `y`, computed in float32 or wider.
    """
    _check_state({"gate": gate, "weight": weight}, {"gate": tuple(y.shape), "weight": tuple(y.shape[-1:])})
    if choose_scan_backend(backend, y) == "published":
        return published.gate_then_norm_published(y, gate, weight, epsilon)
    wide = compute_dtype(y)
    gated = y.to(wide) * F.silu(gate.to(wide))
    return F.rms_norm(gated, gated.shape[-1:], weight.to(wide), epsilon).to(y.dtype)


def _gated(y: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return y
    wide = compute_dtype(y)
    return (y.to(wide) * F.silu(gate.to(wide))).to(y.dtype)


def _is_step(time: int, initial: object) -> bool:
    """Whether this is one token that continues a state, without gradient."""
    return time == 1 and initial is not None and not torch.is_grad_enabled()


def _pieces(bounds: list[int] | None, time: int) -> list[tuple[slice, int, int]]:
    """(rows, first token, end token) of what runs alone: the whole batch, or each document."""
    if bounds is None:
        return [(slice(None), 0, time)]
    return [(slice(row, row + 1), bounds[row], bounds[row + 1]) for row in range(len(bounds) - 1)]


def _check_shapes(value: Tensor, step: Tensor, write: Tensor, read: Tensor, per_head: dict[str, Tensor]):
    """(batch, time, heads, value, state); raises `ShapeError` naming the first tensor that does not fit."""
    if value.dim() != 4 or 0 in value.shape:
        raise ShapeError(f"value must be a non-empty [batch, time, heads, value]; got {list(value.shape)}.")
    batch, time, heads, width = value.shape
    state = write.shape[-1]
    shapes: dict[str, tuple[int, ...]] = {
        "step": (batch, time, heads),
        "write": (batch, time, state),
        "read": (batch, time, state),
        **dict.fromkeys(per_head, (heads,)),
    }
    _check_state({"step": step, "write": write, "read": read, **per_head}, shapes)
    return batch, time, heads, width, state


def _check_state(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise ShapeError(f"{name} must be {list(shape)}; got {list(tensors[name].shape)}.")
