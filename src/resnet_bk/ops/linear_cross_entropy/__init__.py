"""Cross entropy of a linear layer's output, without ever holding that output."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.ops.dispatch import Backend, choose_backend
from resnet_bk.ops.linear_cross_entropy.chunked import linear_cross_entropy_op
from resnet_bk.ops.linear_cross_entropy.reference import linear_cross_entropy_reference

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens channels"],
    weight: Float[Tensor, "vocabulary channels"],
    targets: Int[Tensor, " tokens"],
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk_tokens: int | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, ""] | Float[Tensor, " tokens"]:
    r"""Negative log-likelihood of every target under softmax(weight @ hidden), reduced over the counted targets.

        loss_i = log sum_v exp(w_v . h_i) - w_{targets_i} . h_i      for targets_i != ignore_index, else 0

    Under autocast the matrix products run in the autocast dtype. Log-sum-exp, losses and the weight's gradient, which
    is summed over chunks, are float32 (float64 for float64 inputs).

    Args:
        hidden: one row a token.
        weight: one row a token id of the vocabulary; same dtype as `hidden`, except under autocast.
        targets: token ids in [0, vocabulary), or `ignore_index`. Nothing is computed for an ignored token.
        ignore_index: the target that does not count.
        reduction: "mean" over counted targets, "sum", or "none" for one loss a token.
        chunk_tokens: tokens whose logits exist at one time; the default makes about 2^20 logits on CPU, 2^26 on a GPU.
        backend: "reference" forms all logits at once, "chunked" those of one chunk.

    Returns:
        A scalar, or [tokens] with 0 where ignored for "none"; float32, or float64 for float64 inputs. NaN or infinite
        inputs give a NaN loss, which a gradient scaler needs to see.

    Raises:
        ShapeError: shapes or dtypes that do not fit together.
        DomainError: a target outside the vocabulary (names the first), a mean over no target, chunk_tokens < 1.
        BackendError: an unknown backend, or a second derivative through "chunked".

    Cost: with gradients 6 tokens * vocabulary * channels operations, all of them in the forward pass; 8 for "none",
    whose backward pass forms the logits again. Memory: one chunk of logits, and the gradients.
    Source: DERIVATION.md.
    """
    chosen = choose_backend(backend, hidden, kernels=False)
    _check_arguments(hidden, weight, targets, reduction, chunk_tokens)
    device = hidden.device.type
    matmul_dtype = hidden.dtype
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        matmul_dtype = torch.get_autocast_dtype(device)
    elif weight.dtype != hidden.dtype:
        raise ShapeError(f"hidden is {hidden.dtype}, weight {weight.dtype}; cast one of them or use torch.autocast.")
    if chosen == "reference":
        return linear_cross_entropy_reference(
            hidden.to(matmul_dtype), weight.to(matmul_dtype), targets, ignore_index, reduction
        )
    # Reductions compute their gradients in the forward pass, while the logits exist.
    record = torch.is_grad_enabled() and reduction != "none"
    loss, _, _ = linear_cross_entropy_op(
        hidden,
        weight,
        targets,
        None,
        ignore_index,
        reduction,
        0 if chunk_tokens is None else chunk_tokens,
        matmul_dtype,
        record and hidden.requires_grad,
        record and weight.requires_grad,
    )
    return loss


def _check_arguments(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, chunk_tokens: int | None) -> None:
    """Raise `ShapeError` or `DomainError` for arguments that need no look at the targets' values."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ShapeError(
            "hidden and weight must be [tokens, channels] and [vocabulary, channels]; got "
            f"{list(hidden.shape)} and {list(weight.shape)}."
        )
    if weight.shape[0] == 0:
        raise ShapeError("weight has no rows; expected one for every token id of the vocabulary.")
    if targets.shape != hidden.shape[:1]:
        raise ShapeError(
            f"targets must be [{hidden.shape[0]}], one for every row of hidden; got {list(targets.shape)}. "
            "Flatten batch and time on both sides."
        )
    if not hidden.is_floating_point() or targets.dtype not in (torch.int64, torch.int32):
        raise ShapeError(f"hidden must be floating point and targets int64; got {hidden.dtype} and {targets.dtype}.")
    if reduction not in ("mean", "sum", "none"):
        raise DomainError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'.")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise DomainError(f"chunk_tokens is {chunk_tokens}; expected at least 1, or None for the default.")
