"""Language models that differ from this library's in their mixers only: Mamba-2 and attention in the mixer's place.

Embedding, norms, feed-forward, loss and optimizer are this library's own for all; the feed-forward of a peer is widened
until its blocks have as many parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from peers import Attention, Mamba2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from resnet_bk.layers.mixer import Mixer
from resnet_bk.models.config import ModelConfig
from resnet_bk.models.resnet_bk import LanguageModel, ModelState
from resnet_bk.ops.semiseparable.rotation import phase_table, rotary_frequencies, rotate

KINDS = ("resnet-bk", "mamba-2 without convolution", "transformer")


class Mamba2Layer(nn.Module):
    """Mamba-2's block, without its short convolution."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.core = Mamba2(config.num_heads, config.head_dim, config.state_size, convolution=False)
        self.in_proj = nn.Linear(config.d_model, self.core.width, bias=False)
        self.out_proj = nn.Linear(config.inner_dim, config.d_model, bias=False)

    def forward(self, u: Tensor, state: Tensor | None, cu_seqlens: None) -> tuple[Tensor, Tensor]:
        """Mixed tokens, and the memory after the last."""
        y, after = self.core.carry(self.in_proj(u), state)
        return self.out_proj(y), after

    def flops_per_token(self, time: int) -> int:
        """Operations of the mixing per token, forward; scores of queries and keys are shared by the heads."""
        core, value = self.core, self.out_proj.in_features // self.core.heads
        return 2 * core.CHUNK * core.state + core.heads * (2 * core.CHUNK * value + 4 * core.state * value)


def prepare_heads(projected: Tensor, heads: int, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries, keys and values [batch, time, 3, heads, channels] with the first two normalised and turned."""
    parts = projected.unflatten(-1, (3, heads, -1))
    turned = F.rms_norm(parts[:, :, :2], (parts.shape[-1],)) * weight.to(parts.dtype)[:, None]
    return torch.cat((rotate(turned, cos, sin), parts[:, :, 2:]), dim=2)


class AttentionLayer(nn.Module):
    """Causal self-attention with rotary phases and norms of queries and keys, heads of 128 channels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.channels = min(128, config.d_model)
        self.heads = config.d_model // self.channels
        self.base = config.rotary_base
        self.in_proj = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(2, self.channels))
        self.core = Attention(self.heads, self.channels)
        self._phases: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._prepare = torch.compile(prepare_heads, dynamic=True) if torch.cuda.is_available() else prepare_heads

    def forward(self, u: Tensor, state: None, cu_seqlens: None) -> tuple[Tensor, None]:
        """Mixed tokens; there is no state."""
        projected = self.in_proj(u)
        cos, sin = self.phases(u.shape[1], projected)
        parts = self._prepare(projected, self.heads, self.norm_weight, cos, sin)
        return self.out_proj(self.core(parts.flatten(2))), None

    def phases(self, time: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [time, 1, 1, channels / 2]."""
        key = time, like.dtype, like.device
        if key not in self._phases:
            frequencies = rotary_frequencies(self.channels, self.base, device=like.device)
            table = phase_table(torch.arange(time, device=like.device), frequencies, like.dtype)
            self._phases = {key: (table[0][:, None, None], table[1][:, None, None])}
        return self._phases[key]

    def flops_per_token(self, time: int) -> int:
        """Operations of causal attention per token, forward: half of all pairs."""
        return 2 * time * self.heads * self.channels


class Transformer(LanguageModel):
    """Runs every block over the whole sequence, its activations recomputed in the backward pass."""

    def hidden_states(self, input_ids: Tensor, *, state=None, cu_seqlens=None) -> tuple[Tensor, ModelState]:
        """Residual stream after the final norm."""
        x = self.embedding(input_ids)
        for block in self.blocks:
            if torch.is_grad_enabled():
                x, _ = checkpoint(block, x, None, None, use_reentrant=False, preserve_rng_state=False)
            else:
                x, _ = block(x, None, None)
        return self.norm(x), ModelState(())


def own_flops_per_token(config: ModelConfig, chunk: int = 64) -> int:
    """Operations of this library's mixing per token, forward."""
    state, value = config.state_size, config.head_dim
    return config.num_heads * (2 * chunk * (state + value) + 4 * state * value)


def build(kind: str, preset: str) -> LanguageModel:
    """A model of this kind with the parameters of a preset, within two per cent, on the default device."""
    config = ModelConfig.preset(preset)
    if kind == "resnet-bk":
        return LanguageModel(config)
    make: Callable[[ModelConfig], nn.Module] = AttentionLayer if kind == "transformer" else Mamba2Layer
    with torch.device("meta"):
        spare = _size(Mixer(config)) - _size(make(config))
    widened = config.feed_forward_dim + spare / (3 * config.d_model)
    unit = 64 if config.d_model >= 512 else 16  # matrix units like 64, small models cannot round that far
    config = replace(config, feed_forward_dim=unit * max(1, round(widened / unit)))
    model = (Transformer if kind == "transformer" else LanguageModel)(config)
    for block in model.blocks:
        block.mixer = make(config)
    return model


def step_flops(model: LanguageModel, batch: int, time: int) -> float:
    """Operations of one training step: six a weight and token of every matrix, three forward passes of the mixing.

    Recomputed activations do not count.
    """
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    head = 0 if model.head is not None else model.output_weight.numel()
    mixing = sum(
        own_flops_per_token(model.config) if isinstance(mixer, Mixer) else mixer.flops_per_token(time)
        for mixer in (cast(Any, block).mixer for block in model.blocks)
    )
    return float(batch * time * (6 * (linear + head) + 3 * mixing))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
