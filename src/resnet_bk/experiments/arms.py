"""The arms of a comparison: models that differ in what is compared and agree in their number of parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from resnet_bk.errors import ConfigError
from resnet_bk.models.config import ModelConfig, unknown_key_message
from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.models.sizes import num_parameters, with_mixer

ARMS: dict[str, dict[str, Any]] = {
    "bk": {"mixer": "resolvent"},
    "transformer": {"mixer": "attention"},
    "mamba2": {"mixer": "mamba2"},
    "mamba3": {"mixer": "mamba3"},
    "bk-hybrid": {"mixer": "resolvent", "attention_every": 4},
    "mamba2-hybrid": {"mixer": "mamba2", "attention_every": 4},
    "mamba3-hybrid": {"mixer": "mamba3", "attention_every": 4},
}
"""Arms that have a name -> fields of `ModelConfig` in which they differ from the model they are compared with."""

_FIRST_DEFAULTS = {"key_shift": False, "rotary_fraction": 1.0}
"""What defaults were before they changed, so that a description of then and one of now mean the same model."""

TOLERANCE = 0.02
"""Most by which numbers of parameters (without embeddings) may differ within a comparison, relative to the least."""


@dataclass(frozen=True)
class Arm:
    """One model of a comparison."""

    name: str
    model: ModelConfig

    @property
    def description(self) -> str:
        """The fields that differ from the defaults of the ledger's first rows, as `name=value`."""
        defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
        if self.model.mixer == "resolvent":
            defaults |= _FIRST_DEFAULTS
        values = self.model.to_dict()
        return " ".join(f"{name}={value}" for name, value in values.items() if value != defaults[name])


def named_arms(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The entries of `ARMS` with these names, in their order; `ConfigError` for another names the nearest."""
    names = list(names)
    for name in names:
        if name not in ARMS:
            raise ConfigError(unknown_key_message(name, list(ARMS), what="model"))
    return {name: ARMS[name] for name in names}


def make_arms(base: ModelConfig, changes: Mapping[str, Mapping[str, Any]]) -> tuple[Arm, ...]:
    """One arm for each entry of `changes`, its feed-forward as wide as equal parameters ask for.

    Args:
        base: the model whose parameters (without embeddings) all arms have.
        changes: name of the arm -> fields of `ModelConfig` that it changes.

    Raises:
        ConfigError: no arms, an unknown field (names the nearest), or sizes that cannot be made equal.
    """
    if not changes:
        raise ConfigError("There are no models to compare; name at least one.")
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    arms = []
    for name, fields_changed in changes.items():
        for field in fields_changed:
            if field not in fields:
                raise ConfigError(f"Arm {name!r}: {unknown_key_message(field, fields, what='field')}")
        others = {field: value for field, value in fields_changed.items() if field != "mixer"}
        arms.append(Arm(name, with_mixer(base, fields_changed.get("mixer", base.mixer), **others)))
    check_equal_parameters(arms)
    return tuple(arms)


def check_equal_parameters(arms: Iterable[Arm]) -> dict[str, int]:
    """Parameters without embeddings of each arm; raises `ConfigError` if they differ by more than `TOLERANCE`."""
    sizes = {arm.name: num_parameters(arm.model) for arm in arms}
    least, most = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if sizes[most] > (1 + TOLERANCE) * sizes[least]:
        raise ConfigError(
            f"Arm {most!r} has {sizes[most]:,} parameters without embeddings and {least!r} has {sizes[least]:,}; "
            f"expected at most {TOLERANCE:.0%} more. Change their sizes, or the base model's."
        )
    return sizes


def shape_only(config: ModelConfig) -> LanguageModel:
    """The model without memory for its parameters, for counting them."""
    with torch.device("meta"):
        return LanguageModel(config)
