"""Backend names and the one rule about them: asked for by name, a backend runs or it raises."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from resnet_bk.errors import BackendError, ShapeError

Backend = Literal["auto", "reference", "chunked", "triton"]

# Looked up here, because a graph that contains the look-up does not compile.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def choose_backend(backend: str, operand: Tensor, *, kernels: bool = True) -> str:
    """The backend that runs: `auto` is `triton` where the kernels run on `operand`, else `chunked`.

    Args:
        backend: a name of `Backend`.
        operand: stands for the operands' device and dtype.
        kernels: whether the operator has Triton kernels at all.

    Raises:
        BackendError: an unknown name, or "triton" where the kernels cannot run; the message says why.
    """
    names = ("auto", "reference", "chunked", "triton") if kernels else ("auto", "reference", "chunked")
    if backend not in names:
        raise BackendError(f"backend is {backend!r}; expected one of {', '.join(map(repr, names))}.")
    if backend in ("reference", "chunked"):
        return backend
    if _planned is not None and operand.dtype != torch.float64:
        return "triton" if kernels and _planned.kernels else "chunked"
    obstacle = _obstacle(operand) if kernels else "this operator has no Triton kernels"
    if backend == "triton":
        if obstacle:
            raise BackendError(f"backend 'triton' cannot run: {obstacle}. Use 'auto' or 'chunked'.")
        return "triton"
    return "triton" if operand.is_cuda and not obstacle else "chunked"


@dataclass(frozen=True)
class PlannedGPU:
    """A GPU that may not be here, for which tensors without elements stand in."""

    kernels: bool
    """Whether it runs the Triton kernels."""


_planned: PlannedGPU | None = None


def planned_gpu() -> PlannedGPU | None:
    """The GPU that `planning_for` names; None outside of it."""
    return _planned


@contextmanager
def planning_for(gpu: PlannedGPU | None) -> Iterator[None]:
    """Inside, "auto" chooses what it would on `gpu`; only for fake tensors, on which no kernel is ever launched."""
    global _planned
    before, _planned = _planned, gpu
    try:
        yield
    finally:
        _planned = before


def _obstacle(operand: Tensor) -> str | None:
    """Why the Triton kernels cannot run on `operand`; None if they can."""
    if operand.dtype == torch.float64:
        return "the kernels compute in float32 and the operands are float64"
    if not _TRITON_INSTALLED:
        return "the package triton is not installed"
    if operand.device.type == "cpu":
        # Triton's interpreter runs kernels on the CPU, for tests.
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "the operands are on the CPU"
    if operand.device.type != "cuda":
        return f"the operands are on {operand.device.type!r}"
    if torch.version.cuda and _capability(operand.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


_verified: set[tuple[str, Hashable]] = set()


def verify_once(kernel: str, shape_class: Hashable, measure: Callable[[], dict[str, tuple[float, float]]]) -> None:
    """Check a kernel against its reference the first time it meets a shape class.

    Args:
        kernel: name of the operator.
        shape_class: whatever selects a compiled form: sizes, dtypes, options.
        measure: runs a small random case; relative error and its bound by quantity. Not called a second time.

    Raises:
        BackendError: some error exceeds its bound (the message lists all), or the first use is inside the capture
            of a CUDA graph, where nothing can be checked.
    """
    if (kernel, shape_class) in _verified:
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise BackendError(f"{kernel} was not checked yet for {shape_class}; run it once before capturing a graph.")
    # Operators run below autograd, which the reference's gradients need; a thread of its own starts above it.
    with ThreadPoolExecutor(max_workers=1) as pool:
        figures = pool.submit(_on_device, measure, torch.cuda.current_device() if torch.cuda.is_available() else None)
    figures = figures.result()
    # NaN fails every comparison.
    if not all(error <= bound for error, bound in figures.values()):
        table = ", ".join(f"{name} {error:.2e} (bound {bound:.0e})" for name, (error, bound) in figures.items())
        raise BackendError(
            f"the Triton kernel {kernel} disagrees with its reference for {shape_class}: relative errors {table}. "
            "This is a compiler or hardware fault; use backend='chunked' and report it with your versions."
        )
    _verified.add((kernel, shape_class))


def _on_device(measure: Callable[[], dict[str, tuple[float, float]]], device: int | None):
    with nullcontext() if device is None else torch.cuda.device(device):
        return measure()


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
    bounds = _values(cu_seqlens)
    increasing = all(left < right for left, right in pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != time or not increasing:
        raise ShapeError(
            f"cu_seqlens must increase strictly from 0 to the {time} tokens given; got {_shorten(bounds)}."
        )
    return bounds


# What boundaries were read from the device, for as long as the tensor lives: every layer of a step asks again.
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _values(x: Tensor) -> list[int]:
    """The elements of `x`, read from its device once unless it is written to."""
    if torch.compiler.is_compiling() or x.is_inference():  # such tensors do not count their writes
        return x.tolist()
    known: tuple[int, list[int]] | None = _read.get(x)
    if known is None or known[0] != x._version:
        known = (x._version, x.tolist())
        _read[x] = known
    return known[1]


def _shorten(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
