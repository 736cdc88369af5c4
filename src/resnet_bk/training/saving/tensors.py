"""Named tensors in a folder of safetensors files, whole or sharded, by `torch.distributed.checkpoint`.

PyTorch's engine writes them through its Hugging Face storage: its own default format pickles its metadata. Tensors of
one process become `model-00001-of-00003.safetensors` with an index, as in a model folder. `DTensor`s are written by
the ranks that hold them, as `shard-<rank>-...`, and are read back onto any number of ranks.
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

MAX_FILE_BYTES = 5 * 10**9


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether some tensor lives on several ranks."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def write_tensors(
    tensors: dict[str, Tensor], folder: Path, group: ProcessGroup | None, *, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write `tensors` into `folder`; all ranks of `group` call it if they are sharded, else one process does.

    Args:
        tensors: name -> tensor on the CPU, or `DTensor` over CPU or GPU ranks.
        folder: created if absent.
        group: ranks that hold the shards; None where nothing is sharded.
        max_file_bytes: bytes above which one process's tensors are split into several files. A file is put together
            in memory before it is written.

    Raises:
        CheckpointException: the disk refused; PyTorch's error, which `on_every_rank` translates.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not tensors:
        return
    if group is None:
        writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_file_numbers(tensors, max_file_bytes))
    else:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    _expect_no_process_group()
    save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)


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
        folder: as `write_tensors` left it, or the safetensors files of a model folder.
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


def _file_numbers(tensors: dict[str, Tensor], max_file_bytes: int) -> dict[str, int]:
    """Name -> number of its file, from 1, so that no file exceeds the limit unless a single tensor does."""
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > max_file_bytes:
            number, size = number + 1, 0
        numbers[name], size = number, size + tensor.nbytes
    return numbers


def _expect_no_process_group() -> None:
    """Silence the remark that a single process is one: it is meant."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
