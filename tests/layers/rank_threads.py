"""Ranks that are threads of one process: what context parallelism computes, without processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError, Lock
from typing import Any

import torch


class _Table:
    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = Barrier(size, timeout=60)
        self.parts: list[Any] = [None] * size
        # One rank at a time: neither Triton's interpreter nor its compiler expects several threads.
        self.turn = Lock()

    def wait(self) -> None:
        """Let the others run until all of them wait."""
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


class ThreadRank:
    def __init__(self, table: _Table, rank: int) -> None:
        self._table = table
        self.rank, self.size = rank, table.size
        self.gathered: list[torch.Tensor] = []
        """What this rank sent, call by call."""

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        table = self._table
        self.gathered.append(part.detach().clone())
        table.parts[self.rank] = self.gathered[-1]
        table.wait()
        gathered = torch.stack(table.parts)
        table.wait()
        return gathered


def on_threads(size: int, work: Callable[[ThreadRank], Any]) -> list[Any]:
    """What `work` returns on every rank; the error of the first that failed."""
    table = _Table(size)

    def run(rank: int) -> Any:
        try:
            # Backward passes stay on their rank's thread on a GPU too, where one thread would wait for itself.
            with table.turn, torch.autograd.set_multithreading_enabled(False):
                return work(ThreadRank(table, rank))
        except BaseException:
            table.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception())]
    for error in errors:
        if not isinstance(error, BrokenBarrierError):
            raise error
    return [future.result() for future in futures]
