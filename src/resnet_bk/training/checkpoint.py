"""Training checkpoints: folders `step-000123` from which a run continues exactly.

A folder is a model folder (`config.json`, `model.safetensors`, `tokenizer.json`) with two files more:
`optimizer.safetensors` and `trainer_state.json`. It is written under a temporary name, forced to disk and renamed, so a
folder of the final name is complete. Nothing is pickled.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from resnet_bk.errors import CheckpointError
from resnet_bk.models.checkpoint import force_to_disk, load_weights
from resnet_bk.training.distributed import spread_like
from resnet_bk.training.optimizer import load_optimizer_tensors, optimizer_tensors

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"
FORMAT = 1

_FOLDER = re.compile(r"step-(\d{6,})")
_PARTIAL = ".partial"
# What may change between the parts of one run; every other field decides the result.
_FREE_FIELDS = {
    "training": {
        "checkpoint_every", "device", "evaluate_every", "evaluation_tokens", "keep_checkpoints", "log_every",
        "output_dir", "resume", "steps", "tensorboard",
    },
    "data": {"cache_dir", "path", "tokenizer"},  # the loader compares the tokens themselves
    "model": set(),
}  # fmt: skip


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints in `output_dir`, by increasing step."""
    found = {int(m.group(1)): path for path in Path(output_dir).glob("step-*") if (m := _FOLDER.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint of the highest step in `output_dir`; None if there is none."""
    checkpoints = list_checkpoints(output_dir)
    return checkpoints[-1] if checkpoints else None


def save_training_checkpoint(
    output_dir: str | Path, model: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any], *, keep: int
) -> Path:
    """The checkpoint folder just written; older ones beyond the newest `keep` are removed.

    Args:
        output_dir: folder of the run.
        model: saved through its `save_pretrained`.
        optimizer: built by `build_optimizer` for `model`.
        state: `step` and whatever else continues the run, in plain JSON types.
        keep: checkpoints to leave on disk, >= 1.

    Raises:
        CheckpointError: the disk refused; no folder of the final name exists.
    """
    return write_training_checkpoint(output_dir, model, optimizer_tensors(model, optimizer), state, keep=keep)


def write_training_checkpoint(
    output_dir: str | Path, model: Any, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: int
) -> Path:
    """As `save_training_checkpoint`, of the optimizer's state as `optimizer_tensors` returned it, for one rank."""
    output_dir = Path(output_dir)
    final = output_dir / f"step-{state['step']:06d}"
    temporary = output_dir / f"{final.name}{_PARTIAL}"
    try:
        _remove_partial(output_dir)
        model.save_pretrained(temporary)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / OPTIMIZER_FILE)
        with_format = {"format": FORMAT, **state}
        (temporary / STATE_FILE).write_text(json.dumps(with_format, allow_nan=False), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            force_to_disk(path)
        temporary.rename(final)
        force_to_disk(output_dir)
        for old in list_checkpoints(output_dir)[:-keep]:
            # Renamed first: a kill while deleting must not leave half a checkpoint under a valid name.
            old.rename(output_dir / f"{old.name}{_PARTIAL}")
        _remove_partial(output_dir)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Checkpoint {final} could not be written ({error}); free the disk and resume."
        ) from error
    return final


def remove_checkpoints_after(output_dir: Path, step: int) -> None:
    """Delete the checkpoints of steps beyond `step`."""
    for folder in list_checkpoints(output_dir):
        if int(folder.name.removeprefix("step-")) > step:
            # Renamed first: a kill while deleting must not leave half a checkpoint under a valid name.
            folder.rename(output_dir / f"{folder.name}{_PARTIAL}")
    _remove_partial(output_dir)


def read_trainer_state(folder: str | Path) -> dict[str, Any]:
    """The JSON state of a training checkpoint.

    Raises:
        CheckpointError: not a training checkpoint, or damaged; names the file.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a training checkpoint: it has no {STATE_FILE}.")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); use an older checkpoint.") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path} has format {found!r}; this version reads format {FORMAT}.")
    return state


def load_training_tensors(
    folder: str | Path, model: Any, optimizer: torch.optim.Optimizer, *, without_state: list[str]
) -> None:
    """Load the weights and the optimizer's state of a training checkpoint in place.

    Args:
        folder: the checkpoint.
        model: of the checkpoint's configuration, on any device.
        optimizer: built by `build_optimizer` for `model`.
        without_state: parameters for which the optimizer has no state, by name.

    Raises:
        CheckpointError: a missing, truncated, renamed or extra tensor; names file and tensor.
    """
    folder = Path(folder)
    path = folder / OPTIMIZER_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a training checkpoint: it has no {OPTIMIZER_FILE}.")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); use an older checkpoint.") from None
    load_optimizer_tensors(model, optimizer, tensors, without_state=without_state, file=str(path))
    load_weights(model, folder, place=spread_like)


def check_same_config(saved: dict[str, Any], current: dict[str, Any], folder: str | Path) -> None:
    """Raise `CheckpointError` naming the first field in which a run would not continue as it was started.

    Args:
        saved: section -> field -> value at the time of the checkpoint; a section may be None.
        current: the same of this run.
        folder: the checkpoint, for the message.
    """
    for section, free in _FREE_FIELDS.items():
        before, now = saved.get(section) or {}, current.get(section) or {}
        for field in dict.fromkeys([*before, *now]):
            if field not in free and before.get(field) != now.get(field):
                raise CheckpointError(
                    f"{section}.{field} is {now.get(field)!r}, but {folder} was trained with {before.get(field)!r}; "
                    "set it back to resume, or start anew in another training.output_dir."
                )


def _remove_partial(output_dir: Path) -> None:
    """Delete what a killed run left unfinished."""
    for path in output_dir.glob(f"*step-*{_PARTIAL}*"):
        shutil.rmtree(path)
