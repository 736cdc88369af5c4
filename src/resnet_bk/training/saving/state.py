"""The state of a run in one folder: weights, optimizer, JSON, checksums; whole or sharded, in one process or many.

    config.json, tokenizer.json, ...   as in a model folder
    model.safetensors                  the weights; `model/` with one file a rank if they are sharded
    optimizer/                         what the optimizer keeps, as `<what>/<parameter>`
    carried/state.safetensors          what the next batch starts from, where `training.carry` is on
    trainer_state.json                 everything else, in plain JSON types
    checksums.json                     size and SHA-256 of every file above

A snapshot is taken first, so that training can go on while it is written.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from resnet_bk.errors import CheckpointError
from resnet_bk.models.checkpoint import force_to_disk, load_weights, write_description
from resnet_bk.models.weights import aliases, write_shards
from resnet_bk.training.distributed import spread_like
from resnet_bk.training.optimizer import (
    check_tensors,
    empty_optimizer_tensors,
    load_optimizer_tensors,
    optimizer_tensors,
    parameters_without_state,
)
from resnet_bk.training.saving.checksums import checksum_files, write_checksums
from resnet_bk.training.saving.tensors import is_sharded, read_tensors_into, stored_shapes, write_sharded
from resnet_bk.training.saving.together import on_every_rank, on_first_rank

STATE_FILE = "trainer_state.json"
OPTIMIZER_FOLDER = "optimizer"
SHARDS_FOLDER = "model"
CARRIED_FILE = "carried/state.safetensors"
FORMAT = 2
MAX_FILE_BYTES = 5 * 10**9
"""A checkpoint's tensors beyond that go to another file."""

_WITHOUT_STATE = "parameters_without_optimizer_state"


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment, on the CPU; training on changes nothing in it."""

    model: Any
    """Described in the folder; its weights are not read again."""
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    carried: dict[str, Tensor]


class Snapshots:
    """Takes snapshots into buffers that it keeps, so take the next only when the last was written.

    Keeping them costs one copy of weights and optimizer in CPU memory; allocating them anew for every snapshot would
    cost the same and the page faults. The public `DefaultStager` throws them away after every use in PyTorch 2.11, and
    cannot be used again.
    """

    def __init__(self) -> None:
        self._stager: StateDictStager | None = None

    def take(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        carried: dict[str, Tensor] | None = None,
    ) -> Snapshot:
        """The run as it is now; arguments are those of `CheckpointSaver.begin`."""
        live = view_of_run(model, optimizer, state, carried)
        gpu = torch.cuda.is_available()
        if self._stager is None:
            self._stager = StateDictStager(pin_memory=gpu)
        copied = self._stager.stage({"weights": live.weights, "optimizer": live.optimizer}, non_blocking=gpu)
        if gpu:
            torch.cuda.synchronize()
        return dataclasses.replace(live, weights=copied["weights"], optimizer=copied["optimizer"])

    def close(self) -> None:
        """Free the buffers."""
        if self._stager is not None:
            self._stager.close()
            self._stager = None


def view_of_run(
    model: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any], carried: dict[str, Tensor] | None = None
) -> Snapshot:
    """A snapshot whose tensors are the run's own: to be written before training goes on."""
    # JSON at once: whoever made these values may change them.
    plain = json.loads(json.dumps({**state, _WITHOUT_STATE: parameters_without_state(model, optimizer)}))
    return Snapshot(model, _weights(model), optimizer_tensors(model, optimizer), plain, carried or {})


def save_state(
    folder: str | Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    group: ProcessGroup | None = None,
) -> None:
    """Write the state of a run into an empty folder and force it to disk; every rank calls this.

    Nothing here is atomic: `CheckpointSaver` writes to a temporary name and renames.

    Args:
        folder: absent or empty.
        model: a `LanguageModel`, its parameters plain tensors or, under FSDP2, `DTensor`s.
        optimizer: built by `build_optimizer` for `model`.
        state: the same on every rank, in plain JSON types.
        group: from `checkpoint_group`.

    Raises:
        CheckpointError: the disk refused, on whichever rank; raised on all.
    """
    write_snapshot(view_of_run(model, optimizer, state), Path(folder), group)


def write_snapshot(snapshot: Snapshot, folder: Path, group: ProcessGroup | None) -> None:
    """Write a snapshot as `save_state` does."""
    sharded = is_sharded([*snapshot.weights.values(), *snapshot.optimizer.values()])
    if sharded:
        on_first_rank(group, lambda: folder.mkdir(parents=True, exist_ok=True))
        on_every_rank(group, lambda: write_sharded(snapshot.weights, folder / SHARDS_FOLDER, group))
        on_every_rank(group, lambda: write_sharded(snapshot.optimizer, folder / OPTIMIZER_FOLDER, group))
    else:
        on_first_rank(group, lambda: _write_whole(snapshot, folder))
    if snapshot.carried:
        on_first_rank(group, lambda: _write_carried(snapshot.carried, folder / CARRIED_FILE))
    state = {"format": FORMAT, **snapshot.state}
    on_first_rank(group, lambda: _write_description(snapshot.model, state, folder))
    files = checksum_files(folder, group)
    on_first_rank(group, lambda: _seal(folder, files))


def read_state(folder: str | Path) -> dict[str, Any]:
    """The JSON state of a checkpoint.

    Raises:
        CheckpointError: not a training checkpoint, damaged, or of another format; names the file.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a training checkpoint: it has no {STATE_FILE}.")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); use an older checkpoint.") from None
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found!r}; this version reads format {FORMAT}.")
    return state


def load_state(
    folder: str | Path, model: Any, optimizer: torch.optim.Optimizer, *, group: ProcessGroup | None = None
) -> dict[str, Any]:
    """The JSON state of a checkpoint, after loading its weights and optimizer in place; every rank calls this.

    The ranks may be others than those that saved, and `model` sharded otherwise or not at all.

    Args:
        folder: a checkpoint, verified by `verify_checkpoint` if it may be damaged.
        model: of the checkpoint's configuration, on any device.
        optimizer: built by `build_optimizer` for `model`.
        group: from `checkpoint_group`.

    Raises:
        CheckpointError: a missing, extra or misshapen tensor; names file and tensor.
    """
    state = read_state(folder)
    load_optimizer(Path(folder), model, optimizer, state, group)
    load_model(folder, model, group=group)
    return state


@torch.no_grad()
def load_model(folder: str | Path, model: Any, *, group: ProcessGroup | None = None) -> None:
    """Load the weights of a model folder or checkpoint in place, into the shards of `model`; every rank calls this.

    Raises:
        CheckpointError: a missing, extra or misshapen tensor; names file and tensor. Nothing was changed.
    """
    folder, weights = Path(folder), _weights(model)
    shards = folder / SHARDS_FOLDER
    if not shards.is_dir():
        load_weights(model, folder, place=spread_like)
        return
    check_tensors(stored_shapes(shards), {name: tensor.shape for name, tensor in weights.items()}, str(shards))
    read_tensors_into(weights, shards, group if is_sharded(weights.values()) else None)


def load_optimizer(
    folder: Path, model: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any], group: ProcessGroup | None
) -> None:
    """Load the optimizer's part of a checkpoint; `state` is its JSON part. Raises as `load_state` does."""
    source, without_state = folder / OPTIMIZER_FOLDER, state[_WITHOUT_STATE]
    if not source.is_dir():
        raise CheckpointError(f"{folder} is not a training checkpoint: it has no {OPTIMIZER_FOLDER}.")
    tensors = empty_optimizer_tensors(model, without_state)
    check_tensors(stored_shapes(source), {name: tensor.shape for name, tensor in tensors.items()}, str(source))
    read_tensors_into(tensors, source, group if is_sharded(tensors.values()) else None)
    load_optimizer_tensors(model, optimizer, tensors, without_state=without_state, file=str(source))


def force_tree_to_disk(folder: Path) -> None:
    """Flush every file below `folder`, and every folder's entries, to the device."""
    for path in [*folder.rglob("*"), folder]:
        force_to_disk(path)


def _weights(model: Any) -> dict[str, Tensor]:
    """The tensors of a model folder: parameters and buffers, tied ones once. They share memory with `model`."""
    state = model.state_dict()
    return {name: state[name].detach() for name in aliases(model)}


def _write_whole(snapshot: Snapshot, folder: Path) -> None:
    """Write tensors that one process has all of."""
    for tensors, place in ((snapshot.weights, folder), (snapshot.optimizer, folder / OPTIMIZER_FOLDER)):
        place.mkdir(parents=True, exist_ok=True)
        if tensors:
            write_shards(tensors, place, MAX_FILE_BYTES)


def _write_carried(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir()
    save_file(tensors, path)


def _write_description(model: Any, state: dict[str, Any], folder: Path) -> None:
    write_description(model, folder)
    (folder / STATE_FILE).write_text(json.dumps(state, allow_nan=False), encoding="utf-8")


def _seal(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    write_checksums(folder, files)
    force_tree_to_disk(folder)
