"""Causal softmax attention, over everything before a token or a window of it, with keys of earlier calls in front."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from resnet_bk.errors import BackendError, DomainError, ShapeError
from resnet_bk.ops.attention.reference import attention_reference, visible

__all__ = ["AttentionBackend", "causal_attention"]

AttentionBackend = Literal["auto", "reference", "fused"]

# Queries that share one mask where all earlier keys count; with a window they are as many as the window has tokens.
_BLOCK = 512


def causal_attention(
    query: Float[Tensor, "rows time heads channels"],
    key: Float[Tensor, "rows past_and_time heads channels"],
    value: Float[Tensor, "rows past_and_time heads channels"],
    *,
    window: int = 0,
    empty: Int[Tensor, " rows"] | None = None,
    backend: AttentionBackend = "auto",
) -> Float[Tensor, "rows time heads channels"]:
    r"""Outputs of causal attention, head by head.

        y_i = sum_j softmax_j(q_i . k_j / sqrt(channels)) v_j    over the j that i sees

    The last `time` keys are those of the queries, those before them are of earlier tokens. The query at place i among
    all keys sees the keys j with i - window < j <= i (all j <= i if `window` is 0) and j >= empty of its row.

    Args:
        query: one for each of the last `time` keys.
        key: of earlier tokens, then of the queries' own.
        value: one a key.
        window: tokens a query sees, itself included; 0 is all before it.
        empty: leading keys of every row that hold no token; at most those before the queries. None is none.
        backend: "reference" forms all scores, "fused", and so "auto", calls PyTorch's `scaled_dot_product_attention`.

    Returns:
        y in the dtype of `value`.

    Raises:
        ShapeError: shapes that do not fit. DomainError: window < 0. BackendError: an unknown backend.

    Cost: per head 4 channels operations a query and key that it sees; with a window, up to twice as many. One kernel
    without window and earlier keys, else a mask of a block of queries by the keys they see at a time.
    """
    if backend not in ("auto", "reference", "fused"):
        raise BackendError(f"backend is {backend!r}; expected one of 'auto', 'reference', 'fused'.")
    if query.dim() != 4 or key.dim() != 4 or query.shape[1] > key.shape[1] or 0 in query.shape:
        raise ShapeError(
            "query and key must be [rows, time, heads, channels], with at least as many keys as queries; got "
            f"{list(query.shape)} and {list(key.shape)}."
        )
    if value.shape != key.shape or (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:]):
        raise ShapeError(
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} must have the same rows, "
            "heads and channels, and value as many tokens as key."
        )
    if empty is not None and tuple(empty.shape) != (query.shape[0],):
        raise ShapeError(f"empty must be [{query.shape[0]}]; got {list(empty.shape)}.")
    if window < 0:
        raise DomainError(f"window is {window}; expected the number of tokens a query sees, or 0 for all before it.")
    if backend == "reference":
        return attention_reference(query, key, value, window, empty)
    return _fused(query, key, value, window, empty)


def _fused(query: Tensor, key: Tensor, value: Tensor, window: int, empty: Tensor | None) -> Tensor:
    time, total = query.shape[1], key.shape[1]
    past = total - time
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if empty is None and (window == 0 or window >= total):
        if past == 0:
            y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            mask = None if time == 1 else causal_lower_right(time, total)
            y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return y.transpose(1, 2)
    outputs = []
    block = max(window, 64) if window else _BLOCK
    for start in range(0, time, block):
        end = min(time, start + block)
        first = max(0, past + start - window + 1) if window else 0
        seen = slice(first, past + end)
        place = torch.arange(past + start, past + end, device=query.device)
        mask = visible(place, torch.arange(first, past + end, device=query.device), window, empty)
        outputs.append(
            F.scaled_dot_product_attention(query[:, :, start:end], key[:, :, seen], value[:, :, seen], attn_mask=mask)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)
