"""Keys that know the token before: every key plus a learned multiple, channel by channel, of the one before it.

In plain PyTorch, gradients by autograd; `triton.py` has the kernels with which `mixer_core` does the same.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resnet_bk.ops.dispatch import compute_dtype

__all__ = ["shift_keys"]


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


def _neighbours(key: Tensor, previous: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The key before every token, and the last key of every row."""
    rows = key.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    start = key.new_zeros(rows, key.shape[2]) if previous is None else previous.to(key.dtype)
    if cu_seqlens is None:
        return torch.cat((start[:, None], key[:, :-1]), dim=1), key[:, -1].clone()  # a view would keep all tokens alive
    bounds = cu_seqlens.long()
    before = torch.cat((torch.zeros_like(key[:, :1]), key[:, :-1]), dim=1)
    return before.index_copy(1, bounds[:-1], start[None]), key[0, bounds[1:] - 1]
