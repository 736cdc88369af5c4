"""`CheckpointSaver`: writes the checkpoints of a run beside its training, one at a time."""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from resnet_bk.errors import CheckpointError
from resnet_bk.models.checkpoint import force_to_disk
from resnet_bk.training.checkpoint import PARTIAL, checkpoint_name, remove_partial, remove_superseded
from resnet_bk.training.saving.state import Snapshot, Snapshots, view_of_run, write_snapshot
from resnet_bk.training.saving.together import on_first_rank


class CheckpointSaver:
    """Saves checkpoints as folders `step-NNNNNN`, atomically, in the background or at once.

    Background saving copies the run into CPU memory and writes the copy in a thread. At most one is in flight: the
    next waits for it. What goes wrong there is raised by the next call of `completed`.

    Args:
        output_dir: folder of the run.
        keep: newest checkpoints to leave on disk, >= 1.
        keep_best: checkpoints of lowest validation loss to leave beside them.
        asynchronous: write in the background, at the cost of a copy of weights and optimizer in CPU memory.
        group: from `checkpoint_group`; every rank has a saver and calls it at the same steps.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        keep: int,
        keep_best: int = 0,
        asynchronous: bool = True,
        group: ProcessGroup | None = None,
    ) -> None:
        self._output_dir = Path(output_dir)
        self._keep, self._keep_best = keep, keep_best
        self._group = group
        self._snapshots = Snapshots()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if asynchronous else None
        self._pending: Future[Path] | None = None

    def begin(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        *,
        carried: dict[str, Tensor] | None = None,
    ) -> None:
        """Start to save a checkpoint; `completed` tells when it is on disk.

        Args:
            model: as `save_state` takes it.
            optimizer: built by `build_optimizer` for `model`.
            state: `step` and whatever else continues the run, the same on every rank, in plain JSON types.
            carried: what batches leave to the next, on the CPU and not written to again; as `Carry.tensors` returns it.

        Raises:
            CheckpointError: the previous save failed.
        """
        if self._pending is not None:
            raise CheckpointError("The previous checkpoint is still being saved; call completed(wait=True) first.")
        if self._thread is not None:
            self._pending = self._thread.submit(self._write, self._snapshots.take(model, optimizer, state, carried))
            return
        written: Future[Path] = Future()
        written.set_result(self._write(view_of_run(model, optimizer, state, carried)))
        self._pending = written

    def completed(self, *, wait: bool) -> Path | None:
        """The checkpoint that was completed since the last call; None if there is none.

        Args:
            wait: for a save in flight. Without, several ranks learn of it only when they wait, so that all learn of it
                at the same step.

        Raises:
            CheckpointError: the save failed; no folder of the final name was left by it.
        """
        pending = self._pending
        if pending is None or not (wait or (self._group is None and pending.done())):
            return None
        self._pending = None
        return pending.result()

    def close(self) -> None:
        """Finish what is in flight and free the buffers; the saver can be used again."""
        if self._pending is not None:
            self._pending.exception()
        self._snapshots.close()

    def _write(self, snapshot: Snapshot) -> Path:
        """The folder just completed."""
        final = self._output_dir / checkpoint_name(snapshot.state["step"])
        temporary = self._output_dir / f"{final.name}{PARTIAL}"
        try:
            on_first_rank(self._group, lambda: self._clear(temporary))
            write_snapshot(snapshot, temporary, self._group)
            on_first_rank(self._group, lambda: self._publish(temporary, final))
        except CheckpointError as error:
            # A full disk is not to stay full.
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"Checkpoint {final} could not be written ({error}); free the disk and resume."
            ) from error
        return final

    def _clear(self, temporary: Path) -> None:
        remove_partial(self._output_dir)
        temporary.mkdir(parents=True)

    def _publish(self, temporary: Path, final: Path) -> None:
        """Give a complete folder its name, and remove what it supersedes."""
        if final.exists():  # a step reached again, after a rollback or past a damaged checkpoint
            final.rename(final.with_name(f"{final.name}{PARTIAL}-replaced"))
        temporary.rename(final)
        force_to_disk(self._output_dir)
        remove_superseded(self._output_dir, final, keep=self._keep, keep_best=self._keep_best)


def save_checkpoint(
    output_dir: str | Path, model: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any], *, keep: int
) -> Path:
    """The checkpoint folder just written by one process; older ones beyond the newest `keep` are removed.

    Args:
        output_dir: folder of the run.
        model: as `save_state` takes it.
        optimizer: built by `build_optimizer` for `model`.
        state: `step` and whatever else continues the run, in plain JSON types.
        keep: checkpoints to leave on disk, >= 1.

    Raises:
        CheckpointError: the disk refused; no folder of the final name exists.
    """
    saver = CheckpointSaver(output_dir, keep=keep, asynchronous=False)
    saver.begin(model, optimizer, state)
    folder = saver.completed(wait=True)
    assert folder is not None
    return folder
