"""Which device and which compute dtype a run uses."""

from __future__ import annotations

import torch

from resnet_bk.errors import BackendError, ConfigError


def resolve_device(name: str) -> torch.device:
    """The device called `name`: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        ConfigError: no such name.
        BackendError: a GPU was asked for by name and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"training.device is {name!r}; expected auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f"training.device is {name!r}, but this machine shows {torch.cuda.device_count()} CUDA devices. "
            "Use cpu, or install a CUDA build of torch with a working driver."
        )
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Compute dtype for `training.precision`; `auto` is float32 on CPU, bfloat16 where the GPU has it, else float16."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cpu":
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16
