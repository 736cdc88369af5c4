"""What one rank allocates for a sharded model during a planned step: its shards, gathered blocks, exchange buffers.

The model of the planned step has whole parameters, which give shapes and do not count. Hooks allocate and free beside
it what FSDP2 does: the gathered block and the buffer it came in, the block before it fetched ahead in the backward
pass, the whole gradients of a block until they are scattered, the shards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.ops.dispatch import planned_gpu
from resnet_bk.training.allocation import HOST, NOWHERE, Allocation
from resnet_bk.training.config import DistributedConfig

GATHERED = "gathered"
"""Part of a plan: parameters gathered from the ranks, and the buffers in which they and gradients travel."""
_BYTES = {"float32": 4, "bfloat16": 2}


def sharded_bytes(parameters: list[nn.Parameter], ranks: int, itemsize: int = 4) -> int:
    """Bytes of one rank's shards of `parameters`: rows are split evenly, the last ones padded."""
    return sum(-(-p.shape[0] // ranks) * p[0].numel() * itemsize for p in parameters)


class _Afterwards(torch.autograd.Function):
    """The identity, which calls back when the gradient of what it was applied to is known."""

    @staticmethod
    def forward(ctx, x: Tensor, callback: Callable[[], None]) -> Tensor:
        ctx.callback = callback
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.callback()
        return grads[0], None


class ShardsInFlight:
    """Hooks on a model whose step is planned; call `start_backward` and `finish` around its backward pass.

    Args:
        model: with whole parameters of the dtype in which they are gathered.
        config: how it is sharded.
        ranks: over how many processes.
        accumulating: whether an earlier pass of the same step has left its gradients, which are whole until the last.
        allocation: follows the step.
    """

    def __init__(
        self, model: LanguageModel, config: DistributedConfig, ranks: int, *, accumulating: bool, allocation: Allocation
    ) -> None:
        self._ranks, self._allocation = ranks, allocation
        self._reshards = config.reshard_after_forward
        self._gathered, self._reduced = _BYTES[config.gather_dtype], _BYTES[config.reduce_dtype]
        self._home = HOST if config.cpu_offload and planned_gpu() else None
        blocks = list(model.blocks)
        inside = {id(p) for block in blocks for p in block.parameters()}
        self._groups = {-1: [p for p in model.parameters() if id(p) not in inside]}
        self._groups |= {place: list(block.parameters()) for place, block in enumerate(blocks)}
        self._held: dict[Any, Tensor] = {}
        self._calls: list[int] = []
        self._deferred: Any = None
        self._backward = False
        allocation.claim(model.parameters(), NOWHERE)
        self._hold("shards", sharded_bytes(list(model.parameters()), ranks), self._home or "weights")
        if accumulating and not self._reshards:
            for place in self._groups:
                self._hold(("whole", place), self._whole(place), GATHERED)
        model.register_forward_pre_hook(lambda *_: self._gather(-1, defer=True))
        model.register_forward_hook(lambda *_: self._release(self._deferred))
        for place, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before_block, place))
            block.register_forward_hook(partial(self._after_block, place))

    def start_backward(self) -> None:
        """From now on, forward passes of blocks compute again what was not kept."""
        self._backward = True

    def finish(self) -> None:
        """Scatter what is left when the backward pass has ended: the gradients outside of the blocks."""
        for place in [*range(len(self._groups) - 1), -1]:
            self._scatter(place)
        self._release("travelling")

    def _before_block(self, place: int, block: nn.Module, arguments: tuple) -> tuple:
        self._gather(place, defer=not self._backward)
        x, *others = arguments
        if x.requires_grad:
            x = _Afterwards.apply(x, partial(self._scatter, place))
        return (x, *others)

    def _after_block(self, place: int, block: nn.Module, arguments: tuple, output: tuple) -> None:
        if self._backward:
            return
        if self._reshards:
            self._release(("whole", place))
        call = len(self._calls)
        self._calls.append(place)
        if output[0].requires_grad:
            output[0].register_hook(lambda _: self._before_backward(call))

    def _before_backward(self, call: int) -> None:
        self._gather(self._calls[call], defer=False)
        if call and ("whole", self._calls[call - 1]) not in self._held:
            self._hold(("arriving", self._calls[call - 1]), self._whole(self._calls[call - 1]), GATHERED)

    def _gather(self, place: int, *, defer: bool) -> None:
        """Whole parameters, copied from the buffer they arrive in, which a forward pass frees one block later."""
        if ("whole", place) in self._held:
            return
        arriving = "arriving", place
        if arriving not in self._held:
            self._hold(arriving, self._whole(place), GATHERED)
        if defer:
            self._release(self._deferred)
            self._deferred = arriving
        self._hold(("whole", place), self._whole(place), GATHERED)
        if not defer:
            self._release(arriving)

    def _scatter(self, place: int) -> None:
        """Parameters go; gradients, if they are there, travel, and the shard of their sum stays."""
        self._release(("whole", place))
        ready = [parameter for parameter in self._groups[place] if parameter.grad is not None]
        if not ready:
            return
        self._release("travelling")
        self._hold("travelling", self._ranks * sharded_bytes(ready, self._ranks, self._reduced), GATHERED)
        for parameter in ready:
            parameter.grad = None
        self._hold(("gradient", place), sharded_bytes(ready, self._ranks), self._home or "gradients")

    def _whole(self, place: int) -> int:
        return self._ranks * sharded_bytes(self._groups[place], self._ranks, self._gathered)

    def _hold(self, name: Any, size: int, part: str) -> None:
        self._held[name] = torch.empty(size, dtype=torch.uint8)
        self._allocation.claim([self._held[name]], part)

    def _release(self, name: Any) -> None:
        self._held.pop(name, None)
