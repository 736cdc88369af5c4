"""Loss of every token of a text, read in overlapping windows that each start from an empty state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch

from resnet_bk.errors import DomainError
from resnet_bk.evaluation.perplexity import StreamEvaluation, StreamModel
from resnet_bk.ops.linear_cross_entropy import linear_cross_entropy


def evaluate_windows(
    model: StreamModel, tokens: np.ndarray, *, length: int, batch_size: int, text_bytes: int | None = None
) -> StreamEvaluation:
    """`StreamEvaluation` of `tokens` with each predicted from between `length / 2` and `length` tokens before it.

    Windows of `length` tokens advance by half of that, and only the predictions that no earlier window made count; the
    first window's all do. So every token but the first is predicted once, never from more context than `length`:
    the way to read a text for a model that does not go beyond the lengths it was trained at.

    Args:
        model: put in evaluation mode for the duration.
        tokens: token ids [N], N >= 2.
        length: tokens of a window, >= 2.
        batch_size: windows per forward pass.
        text_bytes: UTF-8 bytes that `tokens[1:]` stand for, for bits per byte.

    Raises:
        DomainError: a length below 2, fewer than two tokens, or a loss that is not finite.
    """
    if length < 2:
        raise DomainError(f"length is {length}; expected a window of at least 2 tokens.")
    if len(tokens) < 2:
        raise DomainError(f"There are {len(tokens)} tokens to evaluate; expected at least 2.")
    device = model.output_weight.device
    was_training = model.training
    model.train(False)
    nats = []
    try:
        for places in _batched(_windows(len(tokens) - 1, min(length, len(tokens) - 1)), batch_size):
            ids = np.stack([tokens[start : start + size + 1] for start, size, _ in places]).astype(np.int64)
            rows = torch.from_numpy(ids).to(device)
            first = torch.tensor([scored for _, _, scored in places], device=device)
            with torch.no_grad():
                hidden, _ = model.hidden_states(rows[:, :-1])
                targets = rows[:, 1:].flatten()
                losses = linear_cross_entropy(hidden.flatten(0, 1), model.output_weight, targets, reduction="none")
                counted = torch.arange(rows.shape[1] - 1, device=device) >= first[:, None]
                nats.append(losses.double().view(counted.shape)[counted].sum())
    finally:
        model.train(was_training)
    total = math.fsum(float(part) for part in nats)
    if not math.isfinite(total):
        raise DomainError(
            f"The loss over {len(tokens)} tokens is {total}; the model's weights or activations overflowed."
        )
    return StreamEvaluation(tokens=len(tokens) - 1, unpredicted_tokens=1, nats=total, text_bytes=text_bytes)


def _windows(predictions: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Start of each window, its length, and its first prediction that counts."""
    yield 0, length, 0
    done, step = length, max(1, length // 2)
    while done < predictions:
        until = min(done + step, predictions)
        yield until - length, length, length - (until - done)
        done = until


def _batched(places: Iterator[tuple[int, int, int]], size: int) -> Iterator[tuple[tuple[int, int, int], ...]]:
    while batch := tuple(itertools.islice(places, size)):
        yield batch
