"""Where the first number that is not finite comes from, once a loss or gradient is known not to be."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from resnet_bk.errors import DomainError
from resnet_bk.training.distributed import whole
from resnet_bk.training.random_state import random_state, restore_random_state


def first_nonfinite(model: Any, batches: list[dict[str, Tensor]], device: torch.device) -> str | None:
    """What is not finite first, in words: a parameter, else a module's output, else a parameter's gradient; or None.

    The batches are run forward once more, without gradients and with hooks on every module, so a healthy step pays
    nothing. Backward passes through the modules from last to first, so of several gradients the last is named.

    Args:
        model: in the state in which the step failed, its gradients not yet cleared. Where its parameters are spread
            over ranks every rank must call.
        batches: arguments of the model, those of the failed step.
        device: of the model.

    Cost: one forward pass a batch.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"the first parameter whose value is not finite is {name}"
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    module = _first_output(model, batches, device)
    if module is not None:
        return f"every parameter is finite, and the first module whose output is not finite is {module}"
    if bad:
        return f"the forward pass is finite, and the last parameter whose gradient is not finite is {bad[-1]}"
    return None


def _first_output(model: Any, batches: list[dict[str, Tensor]], device: torch.device) -> str | None:
    """The innermost module that first returns something that is not finite, by name."""
    found: list[str] = []

    def watch(name: str):
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and not all(_finite(tensor) for tensor in _tensors(output)):
                found.append(name or "the whole model")

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    before = random_state(device)
    try:
        for batch in batches:
            # An operator further on may refuse what the first module returned; that module is known by then.
            with torch.no_grad(), suppress(DomainError):
                model(**{name: tensor.to(device) for name, tensor in batch.items()})
            if found:
                break
    finally:
        restore_random_state(before, device)
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors inside a module's output."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() or value.is_complex() else []
    if isinstance(value, dict):
        value = list(value.values())
    elif hasattr(value, "__dataclass_fields__"):
        value = list(vars(value).values())
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(whole(tensor)).all())
