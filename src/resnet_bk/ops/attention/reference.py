"""Causal attention with all scores written out, in the input's precision; gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(query_place: Tensor, key_place: Tensor, window: int, empty: Tensor | None) -> Tensor:
    """Whether a query sees a key, bool [queries, keys], or [rows, 1, queries, keys] if rows have `empty` keys."""
    distance = query_place[:, None] - key_place
    seen = distance >= 0
    if window:
        seen = seen & (distance < window)
    return seen if empty is None else seen & (key_place >= empty[:, None, None, None])


def attention_reference(query: Tensor, key: Tensor, value: Tensor, window: int, empty: Tensor | None) -> Tensor:
    """Output [rows, time, heads, channels]; arguments are those of `causal_attention`."""
    total = key.shape[1]
    place = torch.arange(total, device=query.device)
    seen = visible(place[total - query.shape[1] :], place, window, empty)
    scores = torch.einsum("bihc,bjhc->bhij", query, key) * query.shape[-1] ** -0.5
    weights = torch.where(seen, scores, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhc->bihc", weights, value)
