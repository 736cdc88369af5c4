"""A model's tensors in safetensors files: written in shards, checked against the model before any byte is read."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from resnet_bk.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
_FLOATING = {"F64", "F32", "F16", "BF16"}


class StoredTensor(NamedTuple):
    """Where a tensor lies on disk, and what its file's header says of it."""

    file: Path
    code: str
    """Data type in the safetensors notation."""
    shape: list[int]


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """Name a tensor is stored under -> all its names in the state dict; several where parameters are tied."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(first.setdefault(id(tensor), name), []).append(name)
    return names


def write_weights(model: nn.Module, folder: Path, max_shard_size: int) -> None:
    """Write the tensors of `model` to `folder` by `write_shards`; tied ones once, under their first name."""
    state = model.state_dict()
    write_shards({name: state[name].detach() for name in aliases(model)}, folder, max_shard_size)


def write_shards(tensors: dict[str, Tensor], folder: Path, max_shard_size: int) -> None:
    """Write `tensors` to `folder`: one file, or shards of at most `max_shard_size` bytes and an index.

    A tensor larger than that gets a shard of its own. Other threads of Python go on meanwhile.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        _write_file(shards[0], folder / WEIGHTS_FILE)
        return
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        _write_file(shard, folder / file)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_file(tensors: dict[str, Tensor], path: Path) -> None:
    # A view of a larger tensor would be refused, or bring all of it along.
    whole = {
        name: tensor.contiguous() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for name, tensor in tensors.items()
    }
    save_file(whole, path, metadata={"format": "pt"})


def find_weights(folder: Path) -> dict[str, StoredTensor]:
    """The tensors stored in `folder`, by name, from the files' headers alone.

    Raises:
        CheckpointError: no weights, only pickles, a missing or damaged file; names file and tensor.
    """
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file() and index.is_file():
        raise CheckpointError(
            f"{folder} holds both {WEIGHTS_FILE} and {INDEX_FILE}; delete the one that is out of date."
        )
    if single.is_file():
        return _read_header(single)
    if not index.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise CheckpointError(refusal_of_pickle(folder / pickles[0]))
        if any(folder.glob("model/shard-*.safetensors")):
            raise CheckpointError(
                f"{folder} holds the weights in one file a rank; make a model folder of it with "
                "resnet_bk.training.checkpoint.export_model."
            )
        raise CheckpointError(f"{folder} holds no weights; expected {WEIGHTS_FILE}, or shards with {INDEX_FILE}.")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(
            f"{index} has no 'weight_map' from tensor names to file names; write the checkpoint anew."
        )
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not (folder / file).is_file():
            raise CheckpointError(f"{index} names the shard {file!r}, which is not in {folder}; copy all of its files.")
        stored.update(_read_header(folder / file))
    for name, file in weight_map.items():
        if name not in stored or stored[name].file.name != file:
            raise CheckpointError(f"{folder / file} lacks the tensor {name!r} that {INDEX_FILE} says it holds.")
    return stored


def refusal_of_pickle(path: Path) -> str:
    """Why `path` is not loaded, and what to do instead."""
    return (
        f"{path} is a pickle, which can run any code when it is loaded, so it is refused. Convert it where you trust "
        f"it, with safetensors.torch.save_file, to {WEIGHTS_FILE}."
    )


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Names, types and shapes in one file; raises `CheckpointError` where it is not whole."""
    size = path.stat().st_size
    damaged = f"{path} is truncated or damaged"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{damaged}: its {size} bytes end inside the header. Copy or save it again.")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            ends = {name: entry["data_offsets"][1] + 8 + length for name, entry in entries.items()}
            stored = {name: StoredTensor(path, entry["dtype"], entry["shape"]) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise CheckpointError(f"{damaged}: its header is not that of a safetensors file. Save it again.") from None
    for name in sorted(ends, key=lambda name: ends[name]):
        if ends[name] > size:
            raise CheckpointError(
                f"{damaged}: tensor {name!r} should end at byte {ends[name]}, the file at {max(ends.values())}, but it "
                f"has {size} bytes. Copy or save it again."
            )
    return stored


def check_weights(model: nn.Module, stored: dict[str, StoredTensor], folder: Path, dtype: torch.dtype | None) -> None:
    """Raise `CheckpointError` naming the first tensor of `stored` that does not fit `model`.

    Args:
        model: its parameters may be on the meta device.
        stored: what `find_weights` returned.
        folder: for messages about tensors that are in no file.
        dtype: data type the checkpoint says it has; float32 is allowed beside it. None allows any floating type.
    """
    state, names = model.state_dict(), aliases(model)
    unknown = [name for name in stored if name not in names]
    for name in names:
        if name in stored:
            continue
        alike = [other for other in unknown if stored[other].shape == list(state[name].shape)]
        nearest = difflib.get_close_matches(name, alike, n=1, cutoff=0.4)
        if nearest:
            raise CheckpointError(
                f"{stored[nearest[0]].file}: tensor {name!r} is missing, and {nearest[0]!r}, of the same shape, is "
                "unknown to the model. If it was renamed, rename it back."
            )
        where = folder / (INDEX_FILE if (folder / INDEX_FILE).is_file() else WEIGHTS_FILE)
        raise CheckpointError(f"{where}: tensor {name!r} of shape {list(state[name].shape)} is missing.")
    for name in unknown:
        raise CheckpointError(
            f"{stored[name].file}: tensor {name!r} of shape {stored[name].shape} is unknown to the model that "
            "config.json describes; the files come from different models."
        )
    for name in names:
        file, code, shape = stored[name]
        if shape != list(state[name].shape):
            raise CheckpointError(
                f"{file}: tensor {name!r} has shape {shape}; the model that config.json describes expects "
                f"{list(state[name].shape)}."
            )
        allowed = {_CODES[state[name].dtype]}
        if state[name].is_floating_point():
            allowed = _FLOATING if dtype is None else {_CODES[dtype], "F32"}
        if code not in allowed:
            raise CheckpointError(
                f"{file}: tensor {name!r} is stored as {code}; expected {' or '.join(sorted(allowed))}."
            )


def read_tensors(stored: dict[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Name and CPU tensor of everything stored, file by file; tensors are memory-mapped, so copy what is kept.

    Raises:
        CheckpointError: safetensors refuses a file although its header is whole.
    """
    for path in sorted({entry.file for entry in stored.values()}):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); copy or save it again.") from error


def assign(model: nn.Module, names: list[str], tensor: Tensor) -> None:
    """Make `tensor` the one parameter or buffer behind all of `names`."""
    shared: nn.Parameter | None = None
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        old = module._parameters.get(attribute)
        if old is None:
            module._buffers[attribute] = tensor
        else:
            shared = nn.Parameter(tensor, requires_grad=old.requires_grad) if shared is None else shared
            module._parameters[attribute] = shared


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises `CheckpointError` saying where it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); write the checkpoint anew.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}; expected an object with named fields.")
    return content
