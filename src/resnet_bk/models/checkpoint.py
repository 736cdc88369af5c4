"""The model folder: `config.json`, `model.safetensors`, `tokenizer.json`, `generation_config.json`. No pickle.

A folder is written beside its final place, forced to disk and renamed, so a folder of the final name is complete.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn

from resnet_bk import __version__
from resnet_bk.errors import CheckpointError, ConfigError, MissingDependencyError
from resnet_bk.models.config import ModelConfig
from resnet_bk.models.generate import GenerationConfig
from resnet_bk.models.weights import (
    INDEX_FILE,
    PICKLES,
    SHARDS,
    WEIGHTS_FILE,
    aliases,
    assign,
    check_weights,
    find_weights,
    read_json,
    read_tensors,
    refusal_of_pickle,
    write_weights,
)
from resnet_bk.tokenizer import Tokenizer

if TYPE_CHECKING:
    from resnet_bk.models.resnet_bk import LanguageModel

Model = TypeVar("Model", bound="LanguageModel")

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
GENERATION_FILE = "generation_config.json"
MODEL_TYPE = "resnet_bk"
FORMAT = 1

_OWN_FILES = (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, SHARDS, TOKENIZER_FILE, GENERATION_FILE)
# What people add to a model folder and want to keep when the model is saved again.
_KEPT_FILES = ("*.md", "LICENSE*", ".gitattributes")
# Fields of config.json that describe the file or belong to other libraries; all others are fields of `ModelConfig`.
_FOREIGN_FIELDS = {
    "adapters", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "format", "library_version",
    "model_type", "pad_token_id", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def save_pretrained(model: LanguageModel, folder: str | os.PathLike[str], *, max_shard_size: int = 5 * 10**9) -> Path:
    """The folder just written, which `load_pretrained` reads.

    Args:
        model: has `config`; its `tokenizer` and `generation_config`, if any, are saved with it.
        folder: absent, empty, or an earlier model folder, which is replaced (its *.md, LICENSE* and .gitattributes
            are kept).
        max_shard_size: bytes above which the weights are split into several files.

    Raises:
        CheckpointError: `folder` holds anything else, or the disk refused; nothing of the old folder was changed.
    """
    target = Path(folder).resolve()
    kept = _check_target(target)
    temporary = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        write_weights(model, temporary, max_shard_size)
        write_description(model, temporary)
        for path in kept:
            shutil.copy2(path, temporary / path.name)
        for path in [*temporary.iterdir(), temporary]:
            force_to_disk(path)
        _replace_folder(target, temporary)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} could not be written ({error}); free the disk or choose another.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def write_description(model: LanguageModel, folder: Path) -> None:
    """Write everything of a model folder but the weights.

    Raises:
        CheckpointError: the tokenizer has more tokens than the model.
        OSError: the disk refused.
    """
    if model.tokenizer is not None:
        _check_vocabulary(model.tokenizer, model.config, TOKENIZER_FILE)
    _write_json(folder / CONFIG_FILE, _config_json(model))
    generation = model.generation_config or GenerationConfig()
    _write_json(folder / GENERATION_FILE, generation.to_dict())
    if model.tokenizer is not None:
        model.tokenizer.save(folder / TOKENIZER_FILE)


def load_pretrained(
    cls: type[Model],
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Model:
    """The model stored in a folder, or in the Hugging Face repository of that name, in evaluation mode.

    Everything is checked against `config.json` before the weights are read, and they are read into a model without
    storage, so the peak is one copy of the model and one tensor.

    Args:
        cls: the model's class, built as `cls(config)`.
        source: a folder written by `save_pretrained`, or `organisation/name` on the hub.
        device: where the parameters go.
        dtype: their floating type; None keeps that of the files.

    Raises:
        CheckpointError: not a model folder; a missing, truncated, renamed, extra or misshapen tensor; a pickle; a hub
            name that cannot be fetched. Names file and tensor.
        MissingDependencyError: a hub name without `huggingface_hub` installed.
    """
    folder = locate(source)
    values, config = read_config(folder)
    if "adapters" in values:
        raise CheckpointError(f"{folder} holds adapters; load them with LanguageModel.from_pretrained.")
    stored = find_weights(folder)
    with torch.device("meta"):
        model = cls(config)
    check_weights(model, stored, folder, stored_dtype(values))
    if any(module._non_persistent_buffers_set for module in model.modules()):
        model = cls(config)  # only the constructor knows the values of buffers that are not stored
    names = aliases(model)
    for name, tensor in read_tensors(stored):
        narrow = dtype if tensor.is_floating_point() else None
        assign(model, names[name], tensor.to(device=device, dtype=narrow, copy=True))
    model.to(device=device, dtype=dtype)
    load_companions(model, folder)
    return model.eval()


def load_description(cls: type[Model], folder: str | os.PathLike[str]) -> Model:
    """A model that is all that a model folder says of it but the weights, which are new.

    Raises:
        CheckpointError: as `load_pretrained`, about the other files.
    """
    folder = locate(folder)
    model = cls(read_config(folder)[1])
    load_companions(model, folder)
    return model


@torch.no_grad()
def load_weights(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    place: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Copy the weights stored in a model folder into `model`, in place, keeping its device and data type.

    Args:
        model: of the folder's configuration.
        folder: a model folder or hub name.
        place: what to copy, for a stored tensor and the one it goes to; for a model spread over ranks.

    Raises:
        CheckpointError: as `load_pretrained`; nothing is changed unless every tensor fits.
    """
    folder = locate(folder)
    stored = find_weights(folder)
    check_weights(model, stored, folder, stored_dtype(read_json(folder / CONFIG_FILE)))
    state = model.state_dict()
    for name, tensor in read_tensors(stored):
        state[name].copy_(tensor if place is None else place(tensor, state[name]))


def locate(source: str | os.PathLike[str]) -> Path:
    """The local folder of `source`, fetched from the hub if it is a name there; it has a config.json."""
    folder = Path(source).expanduser()
    if folder.is_file():
        if folder.suffix in PICKLES:
            raise CheckpointError(refusal_of_pickle(folder))
        raise CheckpointError(f"{folder} is a file; expected the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}.")
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(str(source)):
            raise CheckpointError(
                f"{folder} does not exist; expected a model folder or a hub name 'organisation/name'."
            )
        folder = _fetch(str(source))
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} is not a model folder: it has no {CONFIG_FILE}.")
    return folder


def _fetch(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise MissingDependencyError(
            f"There is no folder {name!r}, and fetching it needs the hub client: pip install huggingface_hub."
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"There is no folder {name!r} here, and it could not be fetched from the hub ({reason}). Check the name "
            "and the connection, or download it elsewhere and give its folder."
        ) from error


def read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """All of config.json, and the architecture in it."""
    path = folder / CONFIG_FILE
    values = read_json(path)
    if values.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{path}: model_type is {values.get('model_type')!r}; expected {MODEL_TYPE!r}.")
    if values.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"{path}: format is {values['format']!r}, written by version {values.get('library_version')}; this version "
            f"reads format {FORMAT}. Update the library."
        )
    fields = {name: value for name, value in values.items() if name not in _FOREIGN_FIELDS and not name.startswith("_")}
    try:
        return values, ModelConfig.from_dict(fields)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_companions(model: LanguageModel, folder: Path) -> None:
    """Give `model` the tokenizer and the defaults for generation in `folder`, if any."""
    if (folder / TOKENIZER_FILE).is_file():
        model.tokenizer = Tokenizer.from_file(folder / TOKENIZER_FILE)
        _check_vocabulary(model.tokenizer, model.config, str(folder / TOKENIZER_FILE))
    if (folder / GENERATION_FILE).is_file():
        try:
            model.generation_config = GenerationConfig.from_dict(read_json(folder / GENERATION_FILE))
        except ConfigError as error:
            raise CheckpointError(f"{folder / GENERATION_FILE}: {error}") from error


def _config_json(model: LanguageModel) -> dict[str, Any]:
    dtype = max((p for p in model.parameters()), key=lambda p: p.numel()).dtype
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["ResNetBKForCausalLM"],
        "format": FORMAT,
        "library_version": __version__,
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": model.config.tie_embeddings,
        **({} if model.adapters is None else {"adapters": model.adapters.to_dict()}),
        **model.config.to_dict(),
    }


def stored_dtype(values: dict[str, Any]) -> torch.dtype | None:
    """The data type that config.json names; None where it names none."""
    name = values.get("dtype", values.get("torch_dtype"))
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def _check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, file: str) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{file} has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}; they do not fit."
        )


def _check_target(target: Path) -> list[Path]:
    """Files in `target` to carry over; raises `CheckpointError` if saving there would destroy something else."""
    if not target.exists():
        return []
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a folder to save the model in.")
    entries = sorted(target.iterdir())
    others = [path for path in entries if not any(fnmatch(path.name, own) for own in _OWN_FILES)]
    kept = [path for path in others if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _KEPT_FILES)]
    foreign = [path.name for path in others if path not in kept]
    own = len(entries) - len(others)
    if not foreign and own and (not (target / CONFIG_FILE).is_file() or not _is_model_config(target / CONFIG_FILE)):
        foreign = [path.name for path in entries if path not in kept]
    if foreign:
        raise CheckpointError(
            f"{target} is not empty and not just a model folder (it holds {foreign[0]!r}); nothing was written. Give "
            "another folder, or move that away."
        )
    return kept


def _is_model_config(path: Path) -> bool:
    try:
        return read_json(path).get("model_type") == MODEL_TYPE
    except CheckpointError:
        return False


def _replace_folder(target: Path, temporary: Path) -> None:
    """Give `temporary` the name `target`; an old folder there is removed only after that succeeded."""
    old = None
    if target.exists():
        old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if old is not None:
            old.rename(target)
        raise
    force_to_disk(target.parent)
    if old is not None:
        shutil.rmtree(old)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def force_to_disk(path: Path) -> None:
    """Flush a file, or a folder's entries, to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
