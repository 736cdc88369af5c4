"""Adapters on a frozen base model: built, saved as a model folder of their own, loaded, and merged into the base.

A folder of adapters is a model folder whose `config.json` names the base in `adapters`, and whose `model.safetensors`
holds the adapters alone. The base is known by a checksum of its tensors, so that it may lie anywhere, in any number of
files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from resnet_bk.errors import CheckpointError, ConfigError
from resnet_bk.layers.lora import AdaptedLinear, adapt
from resnet_bk.models import checkpoint
from resnet_bk.models.config import AdapterConfig, ModelConfig
from resnet_bk.models.weights import aliases, assign, check_weights, find_weights, read_tensors

if TYPE_CHECKING:
    from resnet_bk.models.resnet_bk import LanguageModel

Model = TypeVar("Model", bound="LanguageModel")


@dataclass(frozen=True)
class Adapters:
    """What the adapters of a model are, and the base that they were made for."""

    config: AdapterConfig
    base_sha256: str
    """Of the base's tensors; see `checksum`."""

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, in plain JSON types."""
        return {**dataclasses.asdict(self.config), "base_sha256": self.base_sha256}

    @classmethod
    def from_dict(cls, values: Any, file: Path) -> Adapters:
        """What `to_dict` returned; raises `CheckpointError` naming `file`."""
        try:
            fields = dict(values)
            return cls(base_sha256=str(fields.pop("base_sha256")), config=AdapterConfig(**fields))
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: the section adapters is damaged ({error}); save them anew.") from error


def add_adapters(model: LanguageModel, config: AdapterConfig) -> int:
    """Number of trainable parameters of `model` after its matrices were packed and frozen and adapters added, in place.

    From then on its state dict, and what is saved of it, is that of the adapters. See `layers.lora.adapt`.

    Args:
        model: the base, whose values are given up for their packed ones.
        config: `base` is where the adapters' folder will say that the base is.

    Raises:
        ConfigError: `model` has adapters already. ShapeError: `config.group` does not divide some row.
    """
    if model.adapters is not None:
        raise ConfigError("The model has adapters already; merge them first (merge_adapters).")
    state = model.state_dict()
    found = Adapters(config, checksum({name: tensor_checksum(state[name]) for name in aliases(model)}))
    trainable = adapt(model, rank=config.rank, alpha=config.alpha, group=config.group)
    model.adapters = found
    return trainable


@torch.no_grad()
def merge_adapters(model: LanguageModel) -> None:
    """Make `model` an ordinary one in place: every packed matrix and its adapter become one float32 matrix.

    The rounding of the base stays in it, so it computes what the adapted model computed beyond float32 rounding.
    Nothing is frozen afterwards. Cost: 4 bytes a number of the base, where the model is.
    """
    if model.adapters is None:
        raise ConfigError("The model has no adapters to merge.")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, AdaptedLinear):
                merged = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                merged.weight = nn.Parameter(child.merged())
                setattr(parent, name, merged)
    model.adapters = None
    model.requires_grad_(True)


def load_base(
    cls: type[Model],
    adapters: AdapterConfig,
    *,
    config: ModelConfig | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """The model in `adapters.base`, packed and frozen, with new adapters drawn from the global generator.

    One tensor at a time is read and packed, so the peak is that of the packed model and one float32 matrix.

    Args:
        cls: the model's class.
        adapters: the base and the size of its adapters.
        config: the architecture that the base must have (but for `dropout`); the model then has this one.
        device: where it goes.
        dtype: of everything that is frozen but not packed.

    Raises:
        ConfigError: the base has another architecture than `config`; names the first field.
        CheckpointError: as `checkpoint.load_pretrained`, or the base has adapters itself.
    """
    folder = checkpoint.locate(adapters.base)
    values, architecture = checkpoint.read_config(folder)
    if "adapters" in values:
        raise CheckpointError(f"{folder} holds adapters itself; merge them (merge_adapters) and name the merged model.")
    for name, value in architecture.to_dict().items():
        wanted = value if config is None else getattr(config, name)
        if name != "dropout" and wanted != value:
            raise ConfigError(f"model.{name} is {wanted!r}, but the base model in {folder} has {value!r}; repeat that.")
    stored = find_weights(folder)
    with torch.device("meta"):
        model = cls(config or architecture)
    check_weights(model, stored, folder, checkpoint.stored_dtype(values))
    names = aliases(model)
    adapt(model, rank=adapters.rank, alpha=adapters.alpha, group=adapters.group)
    checksums = {}
    for name, tensor in read_tensors(stored):
        checksums[name] = tensor_checksum(tensor)
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, AdaptedLinear):
            layer.to_empty(device=device)
            layer.pack(tensor.to(device))
        else:
            assign(model, names[name], tensor.to(device=device, dtype=dtype, copy=True))
    for layer in model.modules():
        if isinstance(layer, AdaptedLinear):
            layer.reset_adapter()
    model.adapters = Adapters(adapters, checksum(checksums))
    checkpoint.load_companions(model, folder)
    return model


def load_adapters(
    cls: type[Model],
    source: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Model:
    """The base model with the adapters stored in `source`, in evaluation mode.

    Args:
        cls: the model's class.
        source: a model folder of adapters, a checkpoint of a run that trained them, or a hub name.
        base: where the base model is; None takes the place that it had when the adapters were trained.
        device: where the model goes.
        dtype: of everything that is frozen but not packed; None is float32, as in training.

    Raises:
        CheckpointError: the base is not there, or not the one that the adapters were trained on, or a tensor is
            missing, superfluous or misshapen.
    """
    folder = checkpoint.locate(source)
    values, config = checkpoint.read_config(folder)
    saved = Adapters.from_dict(values.get("adapters"), folder / checkpoint.CONFIG_FILE)
    where = str(saved.config.base if base is None else base)
    try:
        found = dataclasses.replace(saved.config, base=where)
        model = load_base(cls, found, config=config, device=device, dtype=dtype or torch.float32)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(
            f"{folder} holds adapters of the base model {saved.config.base!r}, which {where!r} is to be: {error} Say "
            "where it is with base=FOLDER, or --base on the command line."
        ) from error
    assert model.adapters is not None
    if model.adapters.base_sha256 != saved.base_sha256:
        raise CheckpointError(
            f"{folder} holds adapters of the base model {saved.config.base!r} with checksum {saved.base_sha256[:12]}; "
            f"{where} has checksum {model.adapters.base_sha256[:12]}. Say where the right one is with base=FOLDER, or "
            "--base on the command line."
        )
    checkpoint.load_weights(model, folder)
    checkpoint.load_companions(model, folder)
    return model.eval()


def holds_adapters(folder: str | os.PathLike[str]) -> bool:
    """Whether a model folder holds adapters, and not a whole model."""
    return "adapters" in checkpoint.read_config(Path(folder))[0]


def tensor_checksum(tensor: Tensor) -> str:
    """SHA-256, in hexadecimal, of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checksum(tensors: Mapping[str, str]) -> str:
    """SHA-256 of a model, from the names of its tensors and their checksums: the same in any order and file."""
    lines = "".join(f"{name} {tensors[name]}\n" for name in sorted(tensors))
    return hashlib.sha256(lines.encode()).hexdigest()
