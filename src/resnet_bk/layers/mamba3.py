"""Mamba-3's block with a single input and output as its authors publish it, in the mixer's place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.layers.mamba2 import draw_step_bias_
from resnet_bk.ops.dispatch import compute_dtype
from resnet_bk.ops.state_space import ScanBackend, TrapezoidState, mamba3_scan

if TYPE_CHECKING:
    from resnet_bk.models.config import ModelConfig

RATE_FLOOR = 1e-4
"""Slowest decay per unit of time."""


class Mamba3(nn.Module):
    """Mamba-3: trapezoidal selective scan with a data-dependent rotation, a skip and a gate; no convolution.

    With z, x, B, C, d, a, trapezoid, turn = in_proj(u):

        step = softplus(d + step_bias),  log_decay = -max(softplus(a), RATE_FLOOR) step
        y = scan(x, B and C RMS-normalised, weighed and biased),  out = out_proj(y * silu(z))

    Args:
        config: `d_model`, `expand`, `head_dim`, `state_size` and `norm_epsilon` count.

    Attributes:
        backend: what runs the scan; see `resnet_bk.ops.state_space.choose_scan_backend`.
    """

    state_class = TrapezoidState

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner, heads, state = config.inner_dim, config.num_heads, config.state_size
        self.head_dim, self.epsilon = config.head_dim, config.norm_epsilon
        self.backend: ScanBackend = "auto"
        self.sizes = [inner, inner, state, state, heads, heads, heads, state // 4]
        self.in_proj = nn.Linear(config.d_model, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(inner, config.d_model, bias=False)
        self.write_norm = nn.Parameter(torch.empty(state))
        self.read_norm = nn.Parameter(torch.empty(state))
        self.write_bias = nn.Parameter(torch.empty(heads, state))
        self.read_bias = nn.Parameter(torch.empty(heads, state))
        self.step_bias = nn.Parameter(torch.empty(heads))
        self.skip = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters between the projections as the published block does; matrices are set by the model."""
        for ones in (self.write_norm, self.read_norm, self.write_bias, self.read_bias, self.skip):
            ones.fill_(1.0)
        draw_step_bias_(self.step_bias)

    def forward(
        self,
        u: Float[Tensor, "batch time d_model"],
        state: TrapezoidState | None = None,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], TrapezoidState]:
        """Mixed tokens and the state that continues them (one row a document with `cu_seqlens`)."""
        gate, value, write, read, step, rate, trapezoid, turn = self.in_proj(u).split(self.sizes, dim=-1)
        wide = compute_dtype(u)
        step = F.softplus(step.to(wide) + self.step_bias.to(wide))
        y, after = mamba3_scan(
            value.unflatten(-1, (-1, self.head_dim)),
            step,
            torch.clamp(-F.softplus(rate.to(wide)), max=-RATE_FLOOR) * step,
            trapezoid,
            F.rms_norm(write.to(wide), write.shape[-1:], self.write_norm.to(wide), self.epsilon),
            F.rms_norm(read.to(wide), read.shape[-1:], self.read_norm.to(wide), self.epsilon),
            turn,
            skip=self.skip,
            write_bias=self.write_bias,
            read_bias=self.read_bias,
            gate=gate.unflatten(-1, (-1, self.head_dim)),
            initial=state,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        return self.out_proj(y.flatten(2)), after
