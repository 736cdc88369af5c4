"""The scans by the Triton kernels that their authors publish in the package `mamba_ssm`, where it can be imported."""
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from resnet_bk.errors import BackendError

MAMBA2_CHUNK = 256
MAMBA3_CHUNK = 64
_LARGEST_OFFSET = 2**31 - 1


def obstacle(operand: Tensor) -> str | None:
    """Why the published kernels cannot run on `operand`; None if they can."""
    if operand.dtype == torch.float64:
        return "the kernels compute in float32 and the operands are float64"
    if not _importable():
        return "the packages mamba_ssm and triton are not both importable"
    if operand.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the operands are on {operand.device.type!r}"
    return None


@cache
def _importable() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("mamba_ssm", "triton"))


def check_offsets(elements: int, what: str) -> None:
    """Raise `BackendError` if a tensor has more elements than the kernels, which count in 32 bits, can address."""
    if elements > _LARGEST_OFFSET:
        raise BackendError(
            f"The published kernels address at most {_LARGEST_OFFSET:,} elements of a tensor; {what} has {elements:,}. "
            "Use a smaller batch or segment, or backend='chunked'."
        )


def mamba2_published(
    value: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor, skip: Tensor, memory: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and final memory [rows, heads, state, value]; arguments as for `mamba2_scan`."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y, after = mamba_chunk_scan_combined(
        value,
        step,
        rate,
        write.unsqueeze(2),
        read.unsqueeze(2),
        MAMBA2_CHUNK,
        D=skip.float(),
        initial_states=None if memory is None else memory.transpose(-1, -2),
        return_final_states=True,
    )
    return y, after.float().transpose(-1, -2)


def mamba3_published(
    value: Tensor,
    step: Tensor,
    log_decay: Tensor,
    trapezoid: Tensor,
    write: Tensor,
    read: Tensor,
    turn: Tensor,
    skip: Tensor,
    write_bias: Tensor,
    read_bias: Tensor,
    gate: Tensor | None,
    state: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Output and final memory, angle, key and value; arguments as for `mamba3_scan`. Operands become bfloat16."""
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined

    given = None
    if state is not None:
        memory, angle, key, last_value = state
        given = (angle.float(), memory.float().transpose(-1, -2).contiguous(), key.float(), last_value.float())
    y, angle, memory, key, last_value = mamba3_siso_combined(
        Q=read.unsqueeze(2),
        K=write.unsqueeze(2),
        V=value,
        ADT=log_decay.transpose(1, 2),
        DT=step.transpose(1, 2),
        Trap=trapezoid.transpose(1, 2),
        Q_bias=read_bias.float(),
        K_bias=write_bias.float(),
        Angles=turn.unsqueeze(2).expand(-1, -1, value.shape[2], -1),
        D=skip.float(),
        Z=gate,
        Input_States=given,
        chunk_size=MAMBA3_CHUNK,
        return_final_states=True,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.int(),
    )
    return y, (memory.float().transpose(-1, -2), angle, key.float(), last_value.float())


def gate_then_norm_published(y: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See `resnet_bk.ops.state_space.gate_then_norm`."""
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return rmsnorm_fn(y, weight, None, z=gate, eps=epsilon, norm_before_gate=False)
