"""Bytes a computation would allocate, counted on tensors without memory.

PyTorch's fake tensors have shapes, dtypes and devices but no elements. A step on them runs every operation in its
order, and this module follows the storages that come and go. What custom operators allocate inside, which fake tensors
do not see, is told by `WORKSPACES`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_bk.training.workspace import KEPT_MEMORIES, OTHER, WORKSPACES

HOST = "host"
"""Part of storages that lie in host memory: they do not count for the device."""
NOWHERE = "nowhere"
"""Part of storages that give shapes and do not exist: they do not count at all."""
_ROUND = 512
"""PyTorch's allocator for GPUs hands out multiples of this."""


class Allocation(TorchDispatchMode):
    """Follows the storages of all tensors made inside, by part; the moment of the largest sum is remembered.

    Attributes:
        peak: bytes at that moment.
        parts: bytes by part at that moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.parts: Counter[str] = Counter()
        self._now: Counter[str] = Counter()
        self._owner: dict[int, tuple[str, int]] = {}
        self._total = 0

    def claim(self, tensors: Iterable[Tensor | None], part: str) -> None:
        """Count the storages of these tensors as `part` from now on, unless another part has claimed them."""
        for tensor in tensors:
            if tensor is None:
                continue
            key = self._follow(tensor)
            owner, size = self._owner[key]
            if owner == OTHER:
                self._now[owner] -= size
                self._now[part] += size
                self._owner[key] = part, size
                if part in (HOST, NOWHERE):
                    self._total -= size
        self._look()

    def reset_peak(self) -> None:
        """Forget the largest sum so far."""
        self.peak, self.parts = 0, Counter()
        self._look()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            # A value that is looked at, to be checked: one that passes.
            return {torch.bool: False}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 0)
        name = func.name().removesuffix(".default")
        out = func(*args, **kwargs)
        if name in KEPT_MEMORIES:
            out = KEPT_MEMORIES[name](out, *args)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        if name in WORKSPACES:
            part, inside = WORKSPACES[name]
            self._look(inside(*args), part)
        else:
            self._look()
        return out

    def _look(self, extra: int = 0, part: str = OTHER) -> None:
        if self._total + extra > self.peak:
            self.peak = self._total + extra
            self.parts = Counter(self._now)
            self.parts[part] += extra

    def _follow(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._owner:
            size = -(-int(storage.nbytes()) // _ROUND) * _ROUND
            self._owner[key] = OTHER, size
            self._now[OTHER] += size
            self._total += size
            weakref.finalize(storage, self._release, key).atexit = False
        return key

    def _release(self, key: int) -> None:
        part, size = self._owner.pop(key)
        self._now[part] -= size
        if part not in (HOST, NOWHERE):
            self._total -= size


class FusedNorm(torch.autograd.Function):
    """Allocates what an RMS norm on a GPU does: it keeps its input, where a CPU composes several operations."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None) -> Tensor:
        """A tensor like `x`."""
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.new_empty(x.shape)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tensors like both inputs."""
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


@contextmanager
def fused_norms() -> Iterator[None]:
    """`torch.nn.functional.rms_norm`, which `nn.RMSNorm` calls too, allocates as on a GPU."""

    def norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return FusedNorm.apply(x, weight)  # type: ignore[no-any-return]

    functional = torch.nn.functional
    before, functional.rms_norm = functional.rms_norm, norm
    try:
        yield
    finally:
        functional.rms_norm = before


@contextmanager
def without_memory() -> Iterator[Allocation]:
    """Inside, tensors have no elements, and the `Allocation` follows them."""
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), Allocation() as allocation:
        yield allocation


@contextmanager
def autocast_as_on(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """`torch.autocast(device, dtype)`, also where the device is not there; None for `dtype` does nothing."""
    if dtype is None:
        yield
        return
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.set_autocast_cache_enabled(before[2])
