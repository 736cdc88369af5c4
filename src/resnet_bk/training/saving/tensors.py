"""Named tensors in a folder of safetensors files, whole or sharded, by `torch.distributed.checkpoint`.

PyTorch's engine reads and writes them through its Hugging Face storage: its own default format pickles its metadata.
`DTensor`s are written by the ranks that hold them, as `shard-<rank>-...`, and are read back onto any number of ranks.
Tensors of one process are written as in a model folder, by `write_shards`: the engine would put a file together in
memory first, and hold up every other thread of Python meanwhile, training too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from resnet_bk.errors import CheckpointError
from resnet_bk.training.saving.together import reason_of


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether some tensor lives on several ranks."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def write_sharded(tensors: dict[str, Tensor], folder: Path, group: ProcessGroup | None) -> None:
    """Write `tensors`, some of them `DTensor`s, into `folder`; all ranks of `group` call it.

    Raises:
        CheckpointException: the disk refused; PyTorch's error, which `on_every_rank` translates.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tensors:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(dict(tensors), storage_writer=writer, process_group=group)


def stored_shapes(folder: Path) -> dict[str, torch.Size]:
    """Name -> whole shape of every tensor in `folder`, from the files' headers.

    Raises:
        CheckpointError: a header that cannot be read; names the folder.
    """
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}); use an older checkpoint.") from error
    return {name: torch.Size(entry.size) for name, entry in metadata.state_dict_metadata.items()}  # pyright: ignore


@torch.no_grad()
def read_tensors_into(tensors: dict[str, Tensor], folder: Path, group: ProcessGroup | None) -> None:
    """Fill `tensors` in place with those stored in `folder` under the same names.

    Every rank reads the parts that it holds, whatever the ranks were that wrote them.

    Args:
        tensors: name -> tensor or `DTensor` of the stored shape.
        folder: as `write_sharded` left it, or the safetensors files of a model folder.
        group: ranks among which `tensors` are sharded; None where nothing is.

    Raises:
        CheckpointError: a tensor is missing or does not fit; names the folder.
    """
    if not tensors:
        return
    _expect_no_process_group()
    reader = HuggingFaceStorageReader(str(folder))
    try:
        load(dict(tensors), storage_reader=reader, process_group=group, no_dist=group is None)
    except (OSError, SafetensorError, CheckpointException) as error:
        raise CheckpointError(f"{folder} cannot be read ({reason_of(error)}); use an older checkpoint.") from error


def _expect_no_process_group() -> None:
    """Silence the remark that a single process is one: it is meant."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
