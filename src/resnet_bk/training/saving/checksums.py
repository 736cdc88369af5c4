"""`checksums.json`: size and SHA-256 of every file of a checkpoint, written last, verified before anything is read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from resnet_bk.errors import CheckpointError
from resnet_bk.models.weights import read_json
from resnet_bk.training.saving.together import on_every_rank, rank_of, world_size_of

CHECKSUMS_FILE = "checksums.json"
FORMAT = 1


def checksum_files(folder: Path, group: ProcessGroup | None) -> dict[str, dict[str, Any]]:
    """Path relative to `folder` -> bytes and SHA-256, of every file in it; the ranks share the work.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    parts = on_every_rank(group, lambda: {name: _checksum(folder / name) for name in _own_share(names, group)})
    return {name: entry for part in parts for name, entry in part.items()}


def write_checksums(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write what `checksum_files` returned."""
    text = json.dumps({"format": FORMAT, "files": files}, indent=1)
    (folder / CHECKSUMS_FILE).write_text(text, encoding="utf-8")


def verify_checksums(folder: Path, group: ProcessGroup | None = None) -> None:
    """Raise `CheckpointError` naming the first file that is not as it was written; the ranks share the work.

    Cost: reads every byte once.
    """
    path = folder / CHECKSUMS_FILE
    values = read_json(path)
    files = values.get("files")
    if values.get("format") != FORMAT or not isinstance(files, dict):
        raise CheckpointError(f"{path} has format {values.get('format')!r}; this version reads format {FORMAT}.")
    for found in sorted(folder.rglob("*.safetensors")):
        if found.relative_to(folder).as_posix() not in files:
            raise CheckpointError(f"{found} is not listed in {CHECKSUMS_FILE}; it was not part of the checkpoint.")
    on_every_rank(group, lambda: _verify(folder, {name: files[name] for name in _own_share(sorted(files), group)}))


def _own_share(names: list[str], group: ProcessGroup | None) -> list[str]:
    return names[rank_of(group) :: world_size_of(group)]


def _verify(folder: Path, files: dict[str, Any]) -> None:
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing.")
        size, wanted = path.stat().st_size, expected["bytes"]
        if size != wanted:
            raise CheckpointError(f"{path} is truncated or damaged: it has {size} bytes, {wanted} were written.")
        if _checksum(path) != expected:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one recorded when it was written.")


def _checksum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
