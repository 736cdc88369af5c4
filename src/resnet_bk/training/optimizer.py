"""AdamW over the groups that a model ships, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from resnet_bk.errors import CheckpointError, ConfigError
from resnet_bk.training.config import MemoryConfig, TrainingConfig
from resnet_bk.training.distributed import spread_like
from resnet_bk.training.memory import OffloadedAdamW, eight_bit_adamw

_STATE_NAMES = ("step", "exp_avg", "exp_avg_sq")


def build_optimizer(
    model: Any, config: TrainingConfig, device: torch.device, memory: MemoryConfig | None = None
) -> torch.optim.Optimizer:
    """AdamW over `model.parameter_groups(config.weight_decay)`; one fused kernel where parameters are on a GPU.

    Frozen parameters (without `requires_grad`) are in no group.

    Raises:
        ConfigError: a parameter narrower than float32, in which small updates would be lost, or in no group or two.
        MissingDependencyError: 8-bit moments without the extra `memory`.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"Parameter {name} is {parameter.dtype}; training keeps float32 parameters. Call model.float() and "
                "choose the compute dtype with training.precision."
            )
    groups = model.parameter_groups(config.weight_decay)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    if sorted(grouped) != sorted(id(parameter) for parameter in trained.values()):
        raise ConfigError("model.parameter_groups must hold every parameter exactly once, frozen ones excepted.")
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    kind = "fused" if memory is None else memory.optimizer
    if kind != "fused" and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ConfigError(
            f"memory.optimizer is {kind!r}, which knows no parameters split over ranks; use distributed.cpu_offload."
        )
    if kind == "8bit":
        return eight_bit_adamw(groups, **options)
    if kind == "offload":
        return OffloadedAdamW(groups, **options)
    return torch.optim.AdamW(groups, fused=device.type == "cuda", **options)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group; in place where it is a tensor, whose identity compiled steps rely on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def optimizer_tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of the optimizer as `<what>/<parameter name>`; parameters that never had a gradient have none.

    The tensors are the optimizer's own, on its device and spread over ranks as the parameters are; moments kept in
    8 bits are widened to float32.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{what}/{names[id(parameter)]}": _widened(tensor)
        for parameter, state in optimizer.state.items()
        for what, tensor in state.items()
    }


def parameters_without_state(model: Any, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the parameters that never had a gradient."""
    return [name for name, parameter in model.named_parameters() if parameter not in optimizer.state]


def empty_optimizer_tensors(model: Any, without_state: list[str]) -> dict[str, Tensor]:
    """Zeros of the shapes, and shards, that `optimizer_tensors` would have after a step, to load a checkpoint into.

    Args:
        model: its parameters may be `DTensor`s.
        without_state: parameters that have none, by name.
    """
    return {
        f"{what}/{name}": torch.zeros(()) if what == "step" else torch.zeros_like(parameter, requires_grad=False)
        for name, parameter in model.named_parameters()
        if name not in without_state
        for what in _STATE_NAMES
    }


def load_optimizer_tensors(
    model: Any,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    *,
    without_state: list[str],
    file: str,
) -> None:
    """Put `tensors`, as `optimizer_tensors` returned them, into the optimizer.

    Args:
        model: the model whose parameters `optimizer` holds.
        optimizer: built by `build_optimizer`.
        tensors: name -> tensor, whole or spread over ranks as its parameter is.
        without_state: parameters that have none, by name.
        file: where the tensors come from, for messages.

    Raises:
        CheckpointError: a missing, superfluous or misshapen tensor; nothing was loaded.
    """
    parameters = dict(model.named_parameters())
    expected = {
        f"{what}/{name}": torch.Size([]) if what == "step" else parameter.shape
        for name, parameter in parameters.items()
        if name not in without_state
        for what in _STATE_NAMES
    }
    check_tensors({name: tensor.shape for name, tensor in tensors.items()}, expected, file)
    numbers = {id(p): k for k, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        what, name = key.split("/", 1)
        there = what == "step" or isinstance(tensor, DTensor)
        mine = tensor if there else spread_like(tensor, parameters[name])
        state.setdefault(numbers[id(parameters[name])], {})[what] = mine
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    narrow = getattr(optimizer, "_new_buffer", None)  # of torchao's 8-bit optimizers: an empty moment in their codes
    if narrow is None:
        return
    for parameter, moments in optimizer.state.items():
        for what in ("exp_avg", "exp_avg_sq"):
            buffer = narrow(parameter, what == "exp_avg")
            buffer.copy_(moments[what])
            moments[what] = buffer


def _widened(tensor: Tensor) -> Tensor:
    """A moment as numbers: 8-bit codes become float32, anything else stays."""
    return tensor.dequantize() if hasattr(tensor, "codes") else tensor.detach()


def check_tensors(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], file: str) -> None:
    """Raise `CheckpointError` naming `file` and the first tensor that is missing, superfluous or misshapen."""
    for name in expected:
        if name not in found:
            raise CheckpointError(f"{file} lacks the tensor {name!r}; the file is damaged or of another model.")
    for name, shape in found.items():
        if name not in expected:
            raise CheckpointError(f"{file} holds an unknown tensor {name!r}; the file is damaged or of another model.")
        if shape != expected[name]:
            raise CheckpointError(f"{file}: tensor {name!r} has shape {list(shape)}; expected {list(expected[name])}.")
