"""`Ranks`: the processes that train one model together, and the few things they have to agree on."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from resnet_bk.errors import ConfigError, ResNetBKError
from resnet_bk.training.device import resolve_device

Result = TypeVar("Result")


class Ranks:
    """The process group of a run: this process's place in it, and collective calls that every rank makes together.

    One process without a group is a group of one, for which every call costs nothing.

    Attributes:
        rank: number of this process, from 0; rank 0 alone writes files and prints.
        size: number of processes.
        device: where this process computes.
        restarted: whether `torchrun --max-restarts` started this process anew after another one failed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """`value` added up over the ranks."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def gather(self, value: Any) -> list[Any]:
        """`value`, in plain Python types, of every rank in order."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def on_main(self, function: Callable[[], Result]) -> Result:
        """What `function` returned on rank 0, which alone calls it; an error that users can mend is raised on all."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except (ResNetBKError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def main_first(self, function: Callable[[], Result]) -> Result:
        """What `function` returns on this rank; rank 0 calls it before the others, which find what it left on disk."""
        if self.size == 1:
            return function()
        found: list[Result] = []
        self.on_main(lambda: found.append(function()))
        return found[0] if self.is_main else function()


def join_ranks(device: str, *, timeout_seconds: int = 1800, alone: bool = False) -> Ranks:
    """The ranks that `torchrun` started with this process, or this process alone; joined once and left at exit.

    Under `torchrun` each process of a host takes the GPU of its local rank. GPUs talk through NCCL, processors through
    Gloo. A process group that exists already is used as it is.

    Args:
        device: `training.device`.
        timeout_seconds: after which a collective call that not every rank makes is an error.
        alone: make a group of one process too, which FSDP needs.

    Raises:
        ConfigError: a GPU by number for several processes of one host.
        BackendError: more processes than GPUs.
    """
    launched = dist.is_available() and dist.is_torchelastic_launched()
    if launched and int(os.environ["LOCAL_WORLD_SIZE"]) > 1 and device.startswith("cuda:"):
        raise ConfigError(f"training.device is {device!r} for several processes; write cuda, and each takes its own.")
    found = resolve_device(device)
    if found.type == "cuda" and found.index is None:
        found = resolve_device(f"cuda:{os.environ['LOCAL_RANK'] if launched else torch.cuda.current_device()}")
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if (launched or alone) and not dist.is_initialized():
        # Both backends: what stays on the processor (offloaded parameters) is summed there.
        options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_seconds)}
        if found.type == "cuda":
            options |= {"backend": "cpu:gloo,cuda:nccl", "device_id": found}
        else:
            options |= {"backend": "gloo"}
        if launched:
            # torchrun keeps one store over its restarts, where the addresses of the processes before would be found.
            store, rank, size = next(rendezvous("env://", timeout=options["timeout"]))
            prefix = f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
            options |= {"store": dist.PrefixStore(prefix, store), "rank": rank, "world_size": size}  # pyright: ignore[reportPrivateImportUsage]
        else:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            options |= {"store": store, "rank": 0, "world_size": 1}
        dist.init_process_group(**options)
        atexit.register(_leave)
    return Ranks(found)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
