"""What the GPU benchmarks compare with: Mamba-2 and Mamba-3 by their published Triton kernels, and fused attention.

Every core maps the output of its input projection to the input of its output projection. The `mamba-ssm` package is
no dependency: where it can be imported (its `mamba_ssm` folder on PYTHONPATH will do) its kernels run, else the
benchmarks say that the peer is absent.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.util
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

LARGEST_OFFSET = 2**31 - 1
"""Their kernels compute offsets in 32 bits, so no tensor of one call may have more elements than this."""


def absence() -> str | None:
    """Why the Mamba peers cannot run; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("mamba_ssm") is None:
        return "mamba_ssm cannot be imported"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "torch.cuda.is_available() is False"
    return None


class Core(nn.Module):
    """From the output of an input projection [batch, time, width] to the input of an output projection."""

    width: int
    elements_per_token: int | None = None
    """Elements a token takes in the largest tensor that kernels address in 32 bits; None if they use 64."""

    def rows_per_call(self, time: int) -> int | None:
        """Rows of a batch that one call can take without overflowing offsets; None is any number."""
        return None if self.elements_per_token is None else LARGEST_OFFSET // (self.elements_per_token * time)


class Mamba2(Core):
    """Mamba-2's core: softplus of the step size, chunked state-space scan, skip, gated RMS norm.

    Args:
        heads: number of heads.
        value: channels of a head.
        state: state size, shared by all heads (one group).
        convolution: the short convolution of the published block. Its fused kernel is a compiled extension; here it
            is compiled by Inductor. Without it the peer does less than its authors' block.
    """

    CHUNK = 256

    def __init__(self, heads: int, value: int, state: int, *, convolution: bool) -> None:
        super().__init__()
        inner = heads * value
        self.heads, self.state = heads, state
        self.sizes = [inner, inner, state, state, heads]
        self.width = self.elements_per_token = sum(self.sizes)
        steps = torch.logspace(-3, -1, heads)
        self.step_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))
        self.log_rate = nn.Parameter(torch.linspace(1, 16, heads).log())
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.convolution = convolution
        if convolution:
            self.taps = nn.Parameter(torch.randn(inner + 2 * state, 4) / 2)
            self.taps_bias = nn.Parameter(torch.zeros(inner + 2 * state))
            self._convolve = torch.compile(short_convolution, dynamic=True)

    def forward(self, projected: Tensor) -> Tensor:
        """Output [batch, time, inner]."""
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        gate, operands, options = self._operands(projected)
        return self._gated(mamba_chunk_scan_combined(*operands, **options), gate)

    def carry(self, projected: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output, and the memory [batch, heads, value, state] after the last token, starting from `memory`."""
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        gate, operands, options = self._operands(projected)
        y, after = mamba_chunk_scan_combined(*operands, **options, initial_states=memory, return_final_states=True)
        return self._gated(y, gate), after

    def _operands(self, projected: Tensor) -> tuple[Tensor, tuple, dict]:
        """The gate, and the arguments of the scan."""
        if self.convolution:
            inner, _, state, _, heads = self.sizes
            gate, mixed, step = projected.split([inner, inner + 2 * state, heads], dim=-1)
            x, write, read = self._convolve(mixed, self.taps, self.taps_bias).split([inner, state, state], dim=-1)
        else:
            gate, x, write, read, step = projected.split(self.sizes, dim=-1)
        x = x.unflatten(-1, (self.heads, -1))
        operands = x, step, -self.log_rate.exp(), write.unsqueeze(2), read.unsqueeze(2), self.CHUNK
        return gate, operands, {"D": self.skip, "dt_bias": self.step_bias, "dt_softplus": True}

    def _gated(self, y: Tensor, gate: Tensor) -> Tensor:
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

        return rmsnorm_fn(y.flatten(-2), self.norm_weight, None, z=gate, eps=1e-5, norm_before_gate=False)

    def step(self, projected: Tensor, memory: Tensor) -> Tensor:
        """Output [batch, inner] of one more token, projected to [batch, width]; changes `memory` in place."""
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        gate, x, write, read, step = projected.split(self.sizes, dim=-1)
        value = x.shape[-1] // self.heads
        # Stride 0 along channels tells the kernel that a head has one step size and one rate.
        y = selective_state_update(
            memory,
            x.unflatten(-1, (self.heads, value)),
            step[..., None].expand(-1, -1, value),
            (-self.log_rate.float().exp())[:, None, None].expand(-1, value, self.state),
            write.unsqueeze(1),
            read.unsqueeze(1),
            self.skip[:, None].expand(-1, value),
            dt_bias=self.step_bias[:, None].expand(-1, value),
            dt_softplus=True,
        )
        return self._gated(y, gate)


def short_convolution(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """Silu of the causal depthwise convolution of x [batch, time, channels] with taps [channels, 4]."""
    padded = F.pad(x, (0, 0, 3, 0))
    total = bias.float()
    for place in range(4):
        total = total + taps[:, place] * padded[:, place : place + x.shape[1]]
    return F.silu(total).to(x.dtype)


class Mamba3(Core):
    """Mamba-3's core, single input and output, as its published block runs it: trapezoid, data-dependent rotation."""

    CHUNK = 64
    RATE_FLOOR = 1e-4

    def __init__(self, heads: int, value: int, state: int) -> None:
        super().__init__()
        inner, self.heads = heads * value, heads
        self.sizes = [inner, inner, state, state, heads, heads, heads, state // 4]
        self.width = sum(self.sizes)
        # Rotated queries and keys are stored per head.
        self.elements_per_token = max(self.width, heads * state)
        steps = torch.logspace(-3, -1, heads)
        self.step_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))
        self.write_bias = nn.Parameter(torch.ones(heads, state))
        self.read_bias = nn.Parameter(torch.ones(heads, state))
        self.write_norm = nn.Parameter(torch.ones(state))
        self.read_norm = nn.Parameter(torch.ones(state))
        self.skip = nn.Parameter(torch.ones(heads))

    def forward(self, projected: Tensor) -> Tensor:
        """Output [batch, time, inner]."""
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
        from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined

        gate, x, write, read, step, rate, trapezoid, angles = projected.split(self.sizes, dim=-1)
        decay = torch.clamp(-F.softplus(rate.float()), max=-self.RATE_FLOOR)
        step = F.softplus(step + self.step_bias)
        y = mamba3_siso_combined(
            Q=rmsnorm_fn(read, self.read_norm, None, eps=1e-5).unsqueeze(2),
            K=rmsnorm_fn(write, self.write_norm, None, eps=1e-5).unsqueeze(2),
            V=x.unflatten(-1, (self.heads, -1)),
            ADT=(decay * step).transpose(1, 2),
            DT=step.transpose(1, 2),
            Trap=trapezoid.transpose(1, 2),
            Q_bias=self.read_bias,
            K_bias=self.write_bias,
            Angles=angles.unsqueeze(-2).expand(-1, -1, self.heads, -1).float(),
            D=self.skip,
            Z=gate.unflatten(-1, (self.heads, -1)),
            chunk_size=self.CHUNK,
        )
        return y.flatten(-2)


class Attention(Core):
    """Causal attention by one of PyTorch's fused kernels, without rotary phases or norms.

    Args:
        heads: number of heads.
        channels: channels of a head.
        kernel: "flash", "cudnn", or None for what PyTorch chooses.
    """

    def __init__(self, heads: int, channels: int, kernel: str | None = None) -> None:
        super().__init__()
        self.heads, self.width = heads, 3 * heads * channels
        named = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        self.kernel = None if kernel is None else named[kernel]

    def forward(self, projected: Tensor) -> Tensor:
        """Output [batch, time, heads * channels]."""
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected.chunk(3, -1))
        with nullcontext() if self.kernel is None else sdpa_kernel(self.kernel):
            y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return y.transpose(1, 2).flatten(-2)


def compile_candidates_together(threads: int) -> None:
    """From now on Triton's autotuner compiles all candidates of a kernel at once instead of one after the other.

    The peers try several hundred; which of them wins is measured as before.
    """
    import triton
    from triton.runtime.autotuner import Autotuner

    pool = ThreadPoolExecutor(threads)
    prune, bench = Autotuner.prune_configs, Autotuner._bench

    def prune_and_remember(self, kwargs):
        self._uncompiled = prune(self, kwargs)
        return self._uncompiled

    def compile_then_bench(self, *args, config, **meta):
        candidates, self._uncompiled = getattr(self, "_uncompiled", []), []
        if candidates:
            # What fails here fails again, and is handled, when it is timed.
            with triton.AsyncCompileMode(pool, ignore_errors=True):
                for candidate in candidates:
                    self.fn.run(*args, **{**meta, "warmup": True}, **candidate.all_kwargs())
        return bench(self, *args, config=config, **meta)

    Autotuner.prune_configs, Autotuner._bench = prune_and_remember, compile_then_bench


def feed_forward_dim(block: int, mixer: int, d_model: int) -> int:
    """Hidden width, a multiple of 64, at which a SwiGLU fills a block of `block` parameters beside a mixer's."""
    return 64 * max(1, math.floor((block - mixer) / (3 * d_model) / 64 + 0.5))
