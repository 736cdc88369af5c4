"""Backend names and the one rule about them: asked for by name, a backend runs or it raises."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from resnet_bk.errors import BackendError, ShapeError

Backend = Literal["auto", "reference", "chunked"]


def choose_backend(backend: str) -> str:
    """The backend that runs: `auto` is `chunked`, which every device has.

    Raises:
        BackendError: the name is not one of reference, chunked, auto.
    """
    if backend == "auto":
        return "chunked"
    if backend not in ("reference", "chunked"):
        raise BackendError(f"backend is {backend!r}; expected 'auto', 'reference' or 'chunked'.")
    return backend


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor has it, else float32: gates, cumulative sums and states are never narrower."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def document_boundaries(cu_seqlens: Tensor, batch: int, time: int) -> list[int]:
    """Document boundaries 0 = b_0 < b_1 < ... < b_docs = time as Python integers.

    Raises:
        ShapeError: the batch is not 1, or the boundaries do not start at 0, increase strictly and end at `time`.
    """
    if batch != 1:
        raise ShapeError(f"cu_seqlens packs documents along time and needs batch size 1; got batch size {batch}.")
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
        raise ShapeError(
            f"cu_seqlens must be a 1-D integer tensor; got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}."
        )
    bounds = cu_seqlens.tolist()
    increasing = all(left < right for left, right in pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != time or not increasing:
        raise ShapeError(
            f"cu_seqlens must increase strictly from 0 to the {time} tokens given; got {_shorten(bounds)}."
        )
    return bounds


def _shorten(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
