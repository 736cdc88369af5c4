"""Rotary (Peierls) phases: rotations of channel pairs (p, p + size / 2) by frequency_p times position."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotary_frequencies(
    state_size: int, base: float, fraction: float = 1.0, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Angular frequencies [state_size / 2] in radians per token, float64: base^(-p / (state_size / 2)) for pair p.

    Of the pairs only this `fraction`, the fastest, turn at all; the others have frequency 0.
    """
    half = state_size // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    if fraction < 1:
        frequencies[math.ceil(fraction * half) :] = 0
    return frequencies


def phase_table(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of frequencies * positions [*positions, size / 2] in `dtype`.

    The product is taken and reduced modulo 2 pi in float64: at position 2^24 its error is below 1e-8 rad, where a
    float32 product would be wrong by more than 1 rad.
    """
    angle = torch.remainder(positions.double()[..., None] * frequencies.double(), 2 * math.pi)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [..., size] with every pair turned by the angle of (cos, sin) [..., size / 2]; -sin turns it back."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def turn_into(out: Tensor, x: Tensor, phases: tuple[Tensor, Tensor] | None, *, dim: int = -1) -> Tensor:
    """`rotate` of channels along `dim` written into `out`, `x` and phases broadcast to it; None copies.

    Saves the temporaries of `rotate`, and keeps no history for autograd.
    """
    if phases is None:
        return out.copy_(x)
    cos, sin = phases
    first, second = x.chunk(2, dim=dim)
    low, high = out.chunk(2, dim=dim)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
    torch.mul(first, sin, out=high).addcmul_(second, cos)
    return out


def rotate_memory(memory: Tensor, positions: Tensor, frequencies: Tensor | None) -> Tensor:
    """`memory` [rows, heads, state, value] with its key channels turned by frequencies * positions [rows]."""
    if frequencies is None:
        return memory
    cos, sin = phase_table(positions, frequencies, memory.dtype)
    return rotate(memory.transpose(-1, -2), cos[:, None, None], sin[:, None, None]).transpose(-1, -2)
