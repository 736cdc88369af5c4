"""Causal self-attention with rotary phases and normalised queries and keys: the Transformer's mixer, and hybrids'."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.ops.attention import causal_attention
from resnet_bk.ops.dispatch import document_boundaries
from resnet_bk.ops.semiseparable import rotary_frequencies, rotate
from resnet_bk.ops.semiseparable.rotation import phase_table

if TYPE_CHECKING:
    from resnet_bk.models.config import ModelConfig


class AttentionState(NamedTuple):
    """Keys and values of earlier tokens, one row a sequence, the newest in the last slot.

    Without a window the slots grow with time. A row with fewer tokens than slots has its first slots empty.
    """

    key: Float[Tensor, "rows slots heads channels"]
    """Normalised and turned."""
    value: Float[Tensor, "rows slots heads channels"]
    position: Int[Tensor, " rows"]
    """Tokens seen so far."""


class Attention(nn.Module):
    """Causal self-attention: softmax(q . k / sqrt(head)) v with q and k RMS-normalised per head, then turned by RoPE.

    Args:
        config: `attention_head_dim`, `attention_window`, `rotary_base` and `norm_epsilon` count.
    """

    state_class = AttentionState

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.window = config.attention_head_dim, config.attention_window
        self.rotary_base, self.epsilon = config.rotary_base, config.norm_epsilon
        self.in_proj = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.query_norm = nn.Parameter(torch.empty(self.head_dim))
        self.key_norm = nn.Parameter(torch.empty(self.head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the norms to one; matrices are set by the model."""
        self.query_norm.fill_(1.0)
        self.key_norm.fill_(1.0)

    def forward(
        self,
        u: Float[Tensor, "batch time d_model"],
        state: AttentionState | None = None,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], AttentionState]:
        """Mixed tokens and the state that continues them (one row a document with `cu_seqlens`)."""
        batch, time, _ = u.shape
        query, key, value = self.in_proj(u).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        place = torch.arange(time, device=u.device)[None]
        bounds = None if cu_seqlens is None else document_boundaries(cu_seqlens, batch, time)
        if bounds is None:
            place = place if state is None else place + state.position[:, None]
        else:
            edges = torch.tensor(bounds, device=u.device)
            offset = -edges[:-1] if state is None else state.position - edges[:-1]
            place = place + torch.repeat_interleave(offset, edges.diff(), output_size=time)
        frequencies = rotary_frequencies(self.head_dim, self.rotary_base, device=u.device)
        cos, sin = (part.unsqueeze(2) for part in phase_table(place, frequencies, value.dtype))
        query = rotate(self._normalised(query, self.query_norm), cos, sin)
        key = rotate(self._normalised(key, self.key_norm), cos, sin)
        if bounds is None:
            y, after = self.attend(query, key, value, state)
        else:
            outputs, states = [], []
            for row, (start, end) in enumerate(pairwise(bounds)):
                document = [x[:, start:end] for x in (query, key, value)]
                before = None if state is None else AttentionState(*(part[row : row + 1] for part in state))
                mixed, after = self.attend(document[0], document[1], document[2], before)
                outputs.append(mixed)
                states.append(after)
            y = torch.cat(outputs, dim=1)
            after = AttentionState(*(join_rows(parts) for parts in zip(*states, strict=True)))
        return self.out_proj(y.flatten(2)), after

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.head_dim,), eps=self.epsilon) * weight.to(x.dtype)

    def attend(
        self,
        query: Float[Tensor, "rows time heads channels"],
        key: Float[Tensor, "rows time heads channels"],
        value: Float[Tensor, "rows time heads channels"],
        state: AttentionState | None,
    ) -> tuple[Float[Tensor, "rows time heads channels"], AttentionState]:
        """Outputs for queries and keys that are normalised and turned, and the state after them."""
        rows, time = query.shape[:2]
        empty = None
        position = torch.zeros(rows, dtype=torch.long, device=query.device)
        if state is not None:
            position, slots = state.position, state.key.shape[1]
            empty = (slots - position).clamp(min=0)
            # One query costs the same with a mask. For more of them it is worth a word from the device to do without.
            if time > 1 and not bool(empty.any()):
                empty = None
            key = torch.cat((state.key.to(key.dtype), key), dim=1)
            value = torch.cat((state.value.to(value.dtype), value), dim=1)
        y = causal_attention(query, key, value, window=self.window, empty=empty)
        # What later tokens can see, in memory of its own: a view would keep the whole projection alive.
        first = max(0, key.shape[1] - self.window + 1) if self.window else 0
        kept = [x[:, first:].clone() if first or state is None else x for x in (key, value)]
        return y, AttentionState(kept[0], kept[1], position + time)


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all tensors of a state; where they differ in slots, the shorter get empty ones in front."""
    if all(x.shape[1:] == parts[0].shape[1:] for x in parts):
        return torch.cat(tuple(parts))
    slots = max(x.shape[1] for x in parts)
    return torch.cat([F.pad(x, (0, 0) * (x.dim() - 2) + (slots - x.shape[1], 0)) for x in parts])
