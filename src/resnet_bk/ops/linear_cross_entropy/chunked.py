"""Linear cross entropy over chunks of tokens, gradients included, as one custom operator; see DERIVATION.md."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_bk.errors import BackendError
from resnet_bk.ops.linear_cross_entropy.reference import counted_rows

# Logits alive at one time. On CPU a chunk should stay in the cache; a GPU needs large matrix products instead.
_CPU_LOGITS = 2**20
_GPU_LOGITS = 2**26
# Below this many rows the matrix products slow down, however large the vocabulary.
_FEWEST_TOKENS = 64


def default_chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens per chunk that make about 2^20 logits on CPU and 2^26 elsewhere, and at least 64."""
    logits = _CPU_LOGITS if device.type == "cpu" else _GPU_LOGITS
    return max(_FEWEST_TOKENS, logits // vocabulary)


@torch.library.custom_op("resnet_bk::linear_cross_entropy", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    reduction: str,
    chunk_tokens: int,
    matmul_dtype: torch.dtype,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and the gradients of sum_i token_weights_i loss_i (weights 1 if None): empty unless asked for.

    The gradients of "mean" are those of "sum": dividing late keeps them in the range of half precision.
    `chunk_tokens` 0 means the default.
    """
    vocabulary = weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = counted_rows(targets, vocabulary, ignore_index, reduction)
    counted = targets[rows].long()
    losses = torch.empty(rows.shape, dtype=wide, device=hidden.device)
    grad_hidden, grad_weight = _gradient_buffers(hidden, weight, hidden_gradient, weight_gradient)
    length = min(chunk_tokens or default_chunk_tokens(vocabulary, hidden.device), max(rows.numel(), 1))
    matrix = weight.to(matmul_dtype)
    # A GPU multiplies narrow numbers and stores the product wide in one go; elsewhere it is stored narrow.
    widens = hidden.is_cuda and matmul_dtype != wide
    narrow = torch.empty(length, vocabulary, dtype=matmul_dtype, device=hidden.device)
    scores = torch.empty_like(narrow, dtype=wide) if widens else narrow
    log_probabilities = torch.empty_like(narrow, dtype=wide)
    for chunk, target, loss in zip(rows.split(length), counted.split(length), losses.split(length), strict=True):
        tokens = hidden[chunk].to(matmul_dtype)
        logits, logp, grad_logits = (buffer[: len(chunk)] for buffer in (scores, log_probabilities, narrow))
        if widens:
            torch.mm(tokens, matrix.T, out_dtype=wide, out=logits)
        else:
            torch.mm(tokens, matrix.T, out=logits)
        torch.log_softmax(logits, dim=1, dtype=wide, out=logp)
        picked = logp.gather(1, target[:, None])
        torch.neg(picked[:, 0], out=loss)
        if not (hidden_gradient or weight_gradient):
            continue
        # d loss / d logits = probabilities - one_hot(target); p - 1 is taken before narrowing.
        torch.exp(logp, out=grad_logits).scatter_(1, target[:, None], picked.expm1().to(matmul_dtype))
        share = None if token_weights is None else token_weights[chunk, None]
        if hidden_gradient:
            product = grad_logits @ matrix
            grad_hidden[chunk] = (product if share is None else product * share).to(hidden.dtype)
        if weight_gradient:
            tokens = tokens if share is None else (tokens * share).to(matmul_dtype)
            if matmul_dtype == wide:
                grad_weight.addmm_(grad_logits.T, tokens)
            elif widens:
                torch.addmm(grad_weight, grad_logits.T, tokens, out_dtype=wide, out=grad_weight)
            else:
                grad_weight.add_(grad_logits.T @ tokens)
    if reduction == "none":
        result = losses.new_zeros(targets.shape).index_copy_(0, rows, losses)
    else:
        result = losses.sum() if reduction == "sum" else losses.mean()
    return result, grad_hidden, grad_weight


def _gradient_buffers(hidden: Tensor, weight: Tensor, for_hidden: bool, for_weight: bool) -> tuple[Tensor, Tensor]:
    """Zeros for the gradients that are asked for, empty tensors for the others; the weight's adds up in float32."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        torch.zeros(hidden.shape if for_hidden else (0,), dtype=hidden.dtype, device=hidden.device),
        torch.zeros(weight.shape if for_weight else (0,), dtype=wide, device=hidden.device),
    )


@linear_cross_entropy_op.register_fake
def _fake(
    hidden, weight, targets, token_weights, ignore_index, reduction, chunk_tokens, matmul_dtype, hidden_gradient,
    weight_gradient,
):  # fmt: skip
    wide = torch.promote_types(hidden.dtype, torch.float32)
    shape = targets.shape if reduction == "none" else ()
    loss = torch.empty(shape, dtype=wide, device=hidden.device)
    return loss, *_gradient_buffers(hidden, weight, hidden_gradient, weight_gradient)


def _save(ctx, inputs, output) -> None:
    hidden, weight, targets, _, *ctx.options = inputs
    ctx.dtypes = hidden.dtype, weight.dtype
    # Gradients that nobody uses stay None; as zeros they would be as large as the weight.
    ctx.set_materialize_grads(False)
    recompute = ctx.options[1] == "none"
    ctx.save_for_backward(*((hidden, weight) if recompute else output[1:]), targets)


def _backward(ctx, grad_loss: Tensor | None, *second_order: Tensor | None):
    if any(grad is not None for grad in second_order):
        raise BackendError("the chunked linear_cross_entropy has no second derivative; use backend='reference'.")
    if grad_loss is None:
        return (None,) * 10
    hidden_needed, weight_needed, *_ = ctx.needs_input_grad
    ignore_index, reduction, chunk_tokens, matmul_dtype, _, _ = ctx.options
    *saved, targets = ctx.saved_tensors
    if reduction == "none":
        _, grad_hidden, grad_weight = linear_cross_entropy_op(
            *saved,
            targets,
            grad_loss,
            ignore_index,
            reduction,
            chunk_tokens,
            matmul_dtype,
            hidden_needed,
            weight_needed,
        )
    else:
        scale = grad_loss if reduction == "sum" else grad_loss / (targets != ignore_index).sum()
        grad_hidden, grad_weight = (gradient * scale for gradient in saved)
    return (
        grad_hidden.to(ctx.dtypes[0]) if hidden_needed else None,
        grad_weight.to(ctx.dtypes[1]) if weight_needed else None,
        *(None,) * 8,
    )


linear_cross_entropy_op.register_autograd(_backward, setup_context=_save)
