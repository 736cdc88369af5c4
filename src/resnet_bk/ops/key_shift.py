"""Keys that know the token before: every key plus a learned multiple, channel by channel, of the one before it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resnet_bk.ops.dispatch import compute_dtype

__all__ = ["shift_keys", "shift_keys_adjoint"]


def shift_keys(
    key: Float[Tensor, "batch time state"],
    shift: Float[Tensor, " state"],
    previous: Float[Tensor, "rows state"] | None = None,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
) -> tuple[Float[Tensor, "batch time state"], Float[Tensor, "rows state"]]:
    r"""Every key plus `shift` times the one before it, and the last key of every row as it was given.

        k_t + shift k_{t-1}

    A value is then stored under its own token and the one before, so that one layer answers "what came after this".

    Args:
        key: one a token, all heads'.
        shift: factor of each channel.
        previous: key before the first token of every row (document with `cu_seqlens`); None is zero.
        cu_seqlens: boundaries of documents packed along time (batch 1); no document sees another.

    Returns:
        Keys in the dtype of `key`, computed in float32 or wider, and the last ones in that.

    Cost: one product a token and channel.
    Source: the token shift of Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", 2023, for keys alone.
    """
    wide = compute_dtype(key)
    before, last = _neighbours(key, previous, cu_seqlens)
    return torch.addcmul(key.to(wide), shift.to(wide), before.to(wide)).to(key.dtype), last.to(wide)


def shift_keys_adjoint(
    gradient: Float[Tensor, "batch time state"],
    grad_last: Float[Tensor, "rows state"] | None,
    key: Float[Tensor, "batch time state"],
    shift: Float[Tensor, " state"],
    previous: Float[Tensor, "rows state"] | None,
    cu_seqlens: Int[Tensor, " boundaries"] | None,
) -> tuple[Float[Tensor, " state"], Float[Tensor, "rows state"]]:
    """Gradients of `shift` and `previous`; `gradient`, that of the result, is overwritten by that of `key`.

    `grad_last` is that of the last keys; the other arguments are those of `shift_keys`.
    """
    wide = compute_dtype(key)
    factor, given = shift.to(wide), gradient.to(wide)
    before, _ = _neighbours(key, previous, cu_seqlens)
    d_shift = (given * before.to(wide)).sum((0, 1))
    first, last = (slice(None), 0), (slice(None), -1)
    if cu_seqlens is not None:
        bounds = cu_seqlens.long()
        first, last = (0, bounds[:-1]), (0, bounds[1:] - 1)
    d_previous = factor * given[first]
    after = torch.zeros_like(given)
    after[:, :-1] = given[:, 1:]
    after[last] = 0
    found = torch.addcmul(given, factor, after)
    if grad_last is not None:
        found[last] += grad_last.to(wide)
    gradient.copy_(found)
    return d_shift, d_previous


def _neighbours(key: Tensor, previous: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The key before every token, and the last key of every row."""
    rows = key.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    start = key.new_zeros(rows, key.shape[2]) if previous is None else previous.to(key.dtype)
    if cu_seqlens is None:
        return torch.cat((start[:, None], key[:, :-1]), dim=1), key[:, -1].clone()  # a view would keep all tokens alive
    bounds = cu_seqlens.long()
    before = torch.cat((torch.zeros_like(key[:, :1]), key[:, :-1]), dim=1)
    return before.index_copy(1, bounds[:-1], start[None]), key[0, bounds[1:] - 1]
