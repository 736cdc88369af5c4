"""Where a training step keeps what it needs: recomputation policy of the model, and optimizers with lighter states."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw

from resnet_bk.errors import MissingDependencyError
from resnet_bk.training.config import MemoryConfig


def apply_memory(model: Any, memory: MemoryConfig) -> None:
    """Set the model's policy of recomputation and offloading."""
    model.recompute, model.segment_tokens = memory.recompute, memory.segment_tokens
    model.offload = memory.offload_activations


def has_eight_bit() -> bool:
    """Whether 8-bit moments can be had: the package of the extra `memory` is installed."""
    return importlib.util.find_spec("torchao") is not None


def eight_bit_adamw(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """AdamW whose moments are 8-bit codes with one scale for every 256; tensors below 4,096 numbers stay float32.

    Raises:
        MissingDependencyError: torchao is not installed.

    Source: Dettmers et al., 8-bit optimizers via block-wise quantization (2021), as torchao implements it.
    """
    if not has_eight_bit():
        raise MissingDependencyError(
            "memory.optimizer is '8bit', which needs torchao; pip install 'resnet-bk[memory]', or choose 'offload'."
        )
    from torchao.optim import AdamW8bit

    return AdamW8bit(groups, **options)


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW whose moments, and therefore the update, are on the CPU, wherever the parameters are.

    Gradients are read after clipping and unscaling, as any optimizer reads them. Arguments are those of
    `torch.optim.AdamW`; the result is that of its fused CPU form, bit for bit.

    Cost: a step moves 12 bytes a parameter between device and host; 8 bytes a parameter of host memory.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, one after the other."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                pinned = parameter.is_cuda
                state[name] = torch.zeros(parameter.shape, dtype=parameter.dtype, device="cpu", pin_memory=pinned)
        values, gradient = parameter.detach().cpu(), parameter.grad.cpu()  # type: ignore[union-attr]
        adamw(
            [values],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if parameter.device.type != "cpu":
            parameter.copy_(values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as any optimizer does, and take the state back to the CPU, where PyTorch does not expect it."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for name, tensor in state.items():
                moved = tensor.cpu()
                state[name] = moved.pin_memory() if parameter.is_cuda and moved.dim() else moved
