"""Training checkpoints: folders `step-000123` from which a run continues exactly, and which of them to trust.

A folder is written under a temporary name, forced to disk and renamed, so a folder of the final name is complete;
`checksums.json` tells whether it still is. What is in it: `resnet_bk.training.saving.state`.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from resnet_bk.errors import CheckpointError
from resnet_bk.models.adapters import holds_adapters, merge_adapters
from resnet_bk.models.checkpoint import load_description
from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.training.saving.checksums import CHECKSUMS_FILE, verify_checksums
from resnet_bk.training.saving.state import STATE_FILE, load_model, read_state
from resnet_bk.training.saving.together import on_first_rank, rank_of

PARTIAL = ".partial"

_FOLDER = re.compile(r"step-(\d{6,})")
_log = logging.getLogger(__name__)
# What may change between the parts of one run; every other field decides the result.
_FREE_FIELDS = {
    "training": {
        "asynchronous_checkpoints", "checkpoint_every", "device", "evaluate_every", "evaluation_tokens",
        "keep_best_checkpoints", "keep_checkpoints", "log_every", "output_dir", "resume", "steps", "tensorboard",
        "time_budget_seconds",
    },
    "data": {"cache_dir", "path", "tokenizer"},  # the loader compares the tokens themselves
    "model": set(),
    "adapters": {"base"},  # its checksum is compared
}  # fmt: skip


def checkpoint_name(step: int) -> str:
    """Name of the folder of a step."""
    return f"step-{step:06d}"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints in `output_dir`, by increasing step; they may have been damaged since."""
    found = {int(m.group(1)): path for path in Path(output_dir).glob("step-*") if (m := _FOLDER.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint of the highest step in `output_dir`; None if there is none."""
    checkpoints = list_checkpoints(output_dir)
    return checkpoints[-1] if checkpoints else None


def verify_checkpoint(folder: str | Path, group: ProcessGroup | None = None) -> None:
    """Raise `CheckpointError` naming the first file of `folder` that is missing, truncated or changed.

    Args:
        folder: a checkpoint.
        group: ranks that share the reading; every one of them calls this.
    """
    folder = Path(folder)
    if (folder / CHECKSUMS_FILE).is_file():
        verify_checksums(folder, group)
    else:
        raise CheckpointError(f"{folder / CHECKSUMS_FILE} is missing.")


def newest_intact_checkpoint(output_dir: str | Path, group: ProcessGroup | None = None) -> Path | None:
    """The newest checkpoint whose files are as they were written; None if there is no checkpoint at all.

    A damaged one is logged by name and the one before is used. Every rank of `group` calls this.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged; says what is wrong with the newest.
    """
    first_error = None
    for folder in reversed(on_first_rank(group, lambda: list_checkpoints(output_dir))):
        try:
            verify_checkpoint(folder, group)
        except CheckpointError as error:
            first_error = first_error or error
            if rank_of(group) == 0:
                _log.warning("Checkpoint %s is refused: %s Trying the one before.", folder, error)
            continue
        return folder
    if first_error is not None:
        raise CheckpointError(
            f"No checkpoint in {output_dir} is intact. The newest: {first_error} Start anew in another "
            "training.output_dir, or restore the folder from a copy."
        )
    return None


def export_model(checkpoint: str | Path, folder: str | Path, *, max_shard_size: int = 5 * 10**9) -> Path:
    """The model folder just written from a checkpoint, sharded or not, for generation and publishing.

    Of a run that trained adapters it is a whole model: the base with the adapters merged in.
    The way back needs no function: `load_model` reads a model folder into any model, sharded or not.

    Args:
        checkpoint: folder `step-NNNNNN`, verified first.
        folder: absent, empty or an earlier model folder, which is replaced.
        max_shard_size: bytes above which the weights are split into several files.

    Raises:
        CheckpointError: a damaged checkpoint, or a folder that cannot be written.
    """
    verify_checkpoint(checkpoint)
    if holds_adapters(checkpoint):
        model = LanguageModel.from_pretrained(checkpoint)
        merge_adapters(model)
    else:
        model = load_description(LanguageModel, checkpoint)
        load_model(checkpoint, model)
    return model.save_pretrained(folder, max_shard_size=max_shard_size)


def remove_superseded(output_dir: Path, newest: Path, *, keep: int, keep_best: int) -> None:
    """Remove checkpoints that `newest`, just completed, makes superfluous.

    Kept are the newest `keep` and, of those saved at a step that was evaluated, the `keep_best` of lowest validation
    loss. Checkpoints of later steps are of a past that was given up, by a rollback or because they were damaged.
    """
    folders = list_checkpoints(output_dir)
    past = folders[: folders.index(newest) + 1]
    kept = past[-keep:]
    if keep_best:
        losses = {folder: loss for folder in past if (loss := _validation_loss(folder)) is not None}
        kept += sorted(losses, key=lambda folder: losses[folder])[:keep_best]
    for folder in folders:
        if folder not in kept:
            # Renamed first: a kill while deleting must not leave half a checkpoint under a valid name.
            folder.rename(output_dir / f"{folder.name}{PARTIAL}")
    remove_partial(output_dir)


def remove_checkpoints_after(output_dir: Path, step: int) -> None:
    """Delete the checkpoints of steps beyond `step`."""
    for folder in list_checkpoints(output_dir):
        if int(folder.name.removeprefix("step-")) > step:
            # Renamed first: a kill while deleting must not leave half a checkpoint under a valid name.
            folder.rename(output_dir / f"{folder.name}{PARTIAL}")
    remove_partial(output_dir)


def remove_partial(output_dir: Path) -> None:
    """Delete what a killed run left unfinished."""
    for path in output_dir.glob(f"*step-*{PARTIAL}*"):
        shutil.rmtree(path)


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


def _validation_loss(folder: Path) -> float | None:
    """The validation loss at the step of a checkpoint; None where that step was not evaluated or cannot be read."""
    try:
        return read_state(folder).get("validation_loss")
    except CheckpointError as error:
        _log.warning("Checkpoint %s cannot be ranked: %s", folder / STATE_FILE, error)
        return None
