"""Mamba-2's block as its authors publish it, in the mixer's place."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.ops.dispatch import compute_dtype
from resnet_bk.ops.short_convolution import short_convolution
from resnet_bk.ops.state_space import ScanBackend, gate_then_norm, mamba2_scan

if TYPE_CHECKING:
    from resnet_bk.models.config import ModelConfig

CONVOLUTION_WIDTH = 4
STEP_RANGE = (1e-3, 1e-1)
"""Step sizes start log-uniform in this range."""
RATE_RANGE = (1.0, 16.0)
"""Rates of decay start uniform in this range."""


class Mamba2State(NamedTuple):
    """What a Mamba-2 layer carries from one token to the next; one row a sequence, constant size."""

    memory: Float[Tensor, "rows heads state value"]
    history: Float[Tensor, "rows before channels"]
    """The last tokens before the convolution."""


class Mamba2(nn.Module):
    """Mamba-2: short convolution, selective scan with a skip, gate and then RMS norm over all channels.

    With z, xBC, d = in_proj(u) and x, B, C = silu(convolution(xBC)):

        step = softplus(d + step_bias),  S_t = exp(-step exp(log_rate)) S_{t-1} + step B x^T,  y = S_t^T C + skip x
        out = out_proj(rms_norm(y * silu(z)) * norm_weight)

    Args:
        config: `d_model`, `expand`, `head_dim`, `state_size` and `norm_epsilon` count.

    Attributes:
        backend: what runs the scan; see `resnet_bk.ops.state_space.choose_scan_backend`.
    """

    state_class = Mamba2State

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner, heads, state = config.inner_dim, config.num_heads, config.state_size
        self.head_dim, self.epsilon = config.head_dim, config.norm_epsilon
        self.backend: ScanBackend = "auto"
        mixed = inner + 2 * state
        self.sizes, self.mixed_sizes = [inner, mixed, heads], [inner, state, state]
        self.in_proj = nn.Linear(config.d_model, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(inner, config.d_model, bias=False)
        self.taps = nn.Parameter(torch.empty(mixed, CONVOLUTION_WIDTH))
        self.taps_bias = nn.Parameter(torch.empty(mixed))
        self.step_bias = nn.Parameter(torch.empty(heads))
        self.log_rate = nn.Parameter(torch.empty(heads))
        self.skip = nn.Parameter(torch.empty(heads))
        self.norm_weight = nn.Parameter(torch.empty(inner))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters between the projections as the published block does; matrices are set by the model."""
        reach = CONVOLUTION_WIDTH**-0.5
        for parameter in (self.taps, self.taps_bias):
            parameter.uniform_(-reach, reach)
        draw_step_bias_(self.step_bias)
        self.log_rate.copy_(torch.empty_like(self.log_rate).uniform_(*RATE_RANGE).log())
        self.skip.fill_(1.0)
        self.norm_weight.fill_(1.0)

    def forward(
        self,
        u: Float[Tensor, "batch time d_model"],
        state: Mamba2State | None = None,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], Mamba2State]:
        """Mixed tokens and the state that continues them (one row a document with `cu_seqlens`)."""
        memory, history = (None, None) if state is None else state
        gate, mixed, step = self.in_proj(u).split(self.sizes, dim=-1)
        mixed, history = short_convolution(mixed, self.taps, self.taps_bias, history=history, cu_seqlens=cu_seqlens)
        value, write, read = mixed.split(self.mixed_sizes, dim=-1)
        wide = compute_dtype(u)
        y, memory = mamba2_scan(
            value.unflatten(-1, (-1, self.head_dim)),
            F.softplus(step.to(wide) + self.step_bias.to(wide)),
            -self.log_rate.to(wide).exp(),
            write,
            read,
            skip=self.skip,
            initial=memory,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        y = gate_then_norm(y.flatten(2), gate, self.norm_weight, epsilon=self.epsilon, backend=self.backend)
        return self.out_proj(y), Mamba2State(memory, history)


@torch.no_grad()
def draw_step_bias_(bias: Tensor) -> None:
    """Set `bias` to values whose softplus is log-uniform in `STEP_RANGE`."""
    low, high = (math.log(bound) for bound in STEP_RANGE)
    steps = torch.empty_like(bias, dtype=torch.float32).uniform_(low, high).exp()
    bias.copy_(steps + torch.log(-torch.expm1(-steps)))
