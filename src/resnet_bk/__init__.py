"""ResNet-BK: linear-time causal language models built on the resolvent of a tridiagonal operator.

Public names load on first use; importing this package touches no device and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnet_bk.models.config import ModelConfig
    from resnet_bk.models.resnet_bk import LanguageModel
    from resnet_bk.tokenizer import Tokenizer
    from resnet_bk.training.config import RunConfig, TrainingConfig
    from resnet_bk.training.trainer import Trainer

__version__ = "0.1.0"

_HOMES = {
    "LanguageModel": "resnet_bk.models.resnet_bk",
    "ModelConfig": "resnet_bk.models.config",
    "RunConfig": "resnet_bk.training.config",
    "Tokenizer": "resnet_bk.tokenizer",
    "Trainer": "resnet_bk.training.trainer",
    "TrainingConfig": "resnet_bk.training.config",
}

__all__ = ["LanguageModel", "ModelConfig", "RunConfig", "Tokenizer", "Trainer", "TrainingConfig", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'resnet_bk' has no attribute {name!r}; it has {', '.join(__all__)}.")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
