"""Perplexity, bits per byte and loss by position, over contiguous text with the recurrent state carried along."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.ops.linear_cross_entropy import linear_cross_entropy

Tokens = Tensor | np.ndarray
"""Token ids [N], any integer dtype; a memory map is read one segment at a time."""


class StreamModel(Protocol):
    """What evaluation needs of a model: hidden states that continue from a state, and the head's matrix."""

    training: bool

    @property
    def output_weight(self) -> Tensor:
        """Head matrix [vocab_size, d_model]."""
        ...

    def hidden_states(self, input_ids: Tensor, *, state: Any = None) -> tuple[Tensor, Any]:
        """Hidden states [B, T, d_model] of `input_ids` [B, T], and the state that continues the stream."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Switch dropout on or off."""
        ...


@dataclass(frozen=True)
class StreamEvaluation:
    """Loss of a model over one contiguous stream of tokens."""

    tokens: int
    """Tokens predicted, each from all earlier ones."""
    unpredicted_tokens: int
    """Tokens read but not predicted: the first, which has nothing before it."""
    nats: float
    """Total negative log-likelihood of the predicted tokens."""
    text_bytes: int | None
    """UTF-8 bytes that the predicted tokens stand for; None if not given."""

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats per predicted token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """`exp(loss)`; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Total bits over `text_bytes`, comparable between tokenizers; None without `text_bytes`."""
        return None if self.text_bytes is None else self.nats / math.log(2) / self.text_bytes


@dataclass(frozen=True)
class PositionBin:
    """Loss of the tokens that have between `start` and `stop - 1` tokens before them in their document."""

    start: int
    """Fewest preceding tokens."""
    stop: int
    """One more than the most preceding tokens."""
    count: int
    """Tokens predicted."""
    documents: int
    """Documents that reach this bin."""
    mean: float
    """Mean loss, nats per token."""
    standard_error: float | None
    """Of `mean`, with documents as the independent units (tokens of one text are not); None below two documents."""


def evaluate_stream(
    model: StreamModel, tokens: Tokens, *, segment_length: int, text_bytes: int | None = None
) -> StreamEvaluation:
    """`StreamEvaluation` of one contiguous stream, every token predicted from all tokens before it.

    The stream is read in segments and the model's state is carried from each to the next, so the result does not
    depend on `segment_length` (up to rounding) and memory does not grow with the stream.

    Args:
        model: a `LanguageModel`, or any `StreamModel`; put in evaluation mode for the duration.
        tokens: token ids [N], N >= 2.
        segment_length: tokens per forward pass.
        text_bytes: UTF-8 bytes that `tokens[1:]` stand for, for bits per byte.

    Raises:
        ShapeError: `tokens` is not one row of at least two integers.
        DomainError: a token id beyond the vocabulary, or a loss that is not finite; names the position.
    """
    if text_bytes is not None and text_bytes < 1:
        raise DomainError(f"text_bytes is {text_bytes}; expected None or a number >= 1.")
    nats = math.fsum(float(losses.sum()) for _, losses in _stream_losses(model, tokens, segment_length))
    return StreamEvaluation(tokens=len(tokens) - 1, unpredicted_tokens=1, nats=nats, text_bytes=text_bytes)


def log_spaced_bins(longest: int) -> list[int]:
    """Bin edges 1, 2, 4, ... up to the first power of two above `longest`, a number of preceding tokens >= 1."""
    if longest < 1:
        raise DomainError(f"longest is {longest}; expected the number of tokens before the last one, >= 1.")
    return [2**power for power in range(longest.bit_length() + 1)]


def loss_by_position(
    model: StreamModel, documents: Iterable[Tokens], *, segment_length: int, bins: Sequence[int]
) -> list[PositionBin]:
    """Mean loss, its standard error and its count in every bin of positions, over `documents`.

    A token's position is the number of tokens before it in its document: the context it is predicted from. Each
    document starts from an empty state. Documents are read one segment at a time and only sums are kept.

    Args:
        model: as in `evaluate_stream`.
        documents: token ids [N], N >= 2 each.
        segment_length: tokens per forward pass.
        bins: increasing edges >= 1 (see `log_spaced_bins`); bin k holds positions in [bins[k], bins[k + 1]).

    Returns:
        The bins that some document reaches, in order. The standard error is that of a ratio of sums over
        documents, `sqrt(D / (D - 1) * sum_d (s_d - mean * n_d)^2) / sum_d n_d`.
    """
    edges = list(bins)
    if len(edges) < 2 or edges[0] < 1 or any(a >= b for a, b in itertools.pairwise(edges)):
        raise DomainError(f"bins is {edges}; expected at least two increasing edges, the first >= 1.")
    sums = [_BinSums() for _ in edges[1:]]
    for document in documents:
        nats, counts = np.zeros(len(sums)), np.zeros(len(sums))
        for position, losses in _stream_losses(model, document, segment_length):
            bin_of = np.searchsorted(edges, np.arange(position, position + len(losses)), side="right") - 1
            inside = (bin_of >= 0) & (bin_of < len(sums))
            nats += np.bincount(bin_of[inside], weights=losses.cpu().numpy()[inside], minlength=len(sums))
            counts += np.bincount(bin_of[inside], minlength=len(sums))
        for k in counts.nonzero()[0]:
            sums[k].add_document(float(nats[k]), int(counts[k]))
    return [s.result(edges[k], edges[k + 1]) for k, s in enumerate(sums) if s.documents]


class _BinSums:
    """Sums over documents from which one bin's mean and standard error follow.

    Losses are measured from the first document's mean, which keeps the variance free of cancellation.
    """

    def __init__(self) -> None:
        self.documents = 0
        self.origin = 0.0
        self.n = self.s = self.nn = self.sn = self.ss = 0.0

    def add_document(self, nats: float, count: int) -> None:
        """Add one document's total loss and number of tokens in this bin."""
        if not self.documents:
            self.origin = nats / count
        shifted = nats - self.origin * count
        self.documents += 1
        self.n += count
        self.s += shifted
        self.nn += count * count
        self.sn += shifted * count
        self.ss += shifted * shifted

    def result(self, start: int, stop: int) -> PositionBin:
        """The finished bin."""
        mean = self.s / self.n
        error = None
        if self.documents > 1:
            residual = self.ss - 2 * mean * self.sn + mean * mean * self.nn
            # The sum of squares is >= 0; rounding may leave it a few ulp below when all documents agree.
            error = math.sqrt(max(residual, 0.0) * self.documents / (self.documents - 1)) / self.n
        return PositionBin(start, stop, int(self.n), self.documents, self.origin + mean, error)


def _stream_losses(model: StreamModel, tokens: Tokens, segment_length: int) -> Iterator[tuple[int, Tensor]]:
    """Pairs (position of the first predicted token, float64 losses [n] of a segment's predicted tokens)."""
    weight = model.output_weight
    state = None
    with evaluation_mode(model):
        for start, ids in stream_segments(model, tokens, segment_length):
            with torch.no_grad():
                hidden, state = model.hidden_states(ids[None, :-1], state=state)
                losses = linear_cross_entropy(hidden[0], weight, ids[1:], reduction="none").double()
            finite = torch.isfinite(losses)
            if not finite.all():
                position = start + 1 + int((~finite).nonzero()[0])
                raise DomainError(
                    f"The loss of token {position} of the stream is {losses[position - start - 1].item()}; expected a "
                    "finite number. The model's weights or activations overflowed; evaluate in float32 or an earlier "
                    "checkpoint."
                )
            yield start + 1, losses


def stream_segments(model: StreamModel, tokens: Tokens, segment_length: int) -> Iterator[tuple[int, Tensor]]:
    """Pairs (position of the first token, int64 ids [n + 1] on the model's device) of segments of n tokens or fewer.

    The last id is a target only: the next segment begins with it. Errors are those of `evaluate_stream`.
    """
    if segment_length < 1:
        raise DomainError(f"segment_length is {segment_length}; expected a number of tokens >= 1.")
    if tokens.ndim != 1 or len(tokens) < 2:
        raise ShapeError(f"tokens has shape {tuple(tokens.shape)}; expected one row of at least two token ids.")
    weight = model.output_weight
    for start in range(0, len(tokens) - 1, segment_length):
        ids = _segment(tokens, start, min(start + segment_length, len(tokens) - 1) + 1).to(weight.device)
        _check_ids(ids, weight.shape[0], start)
        yield start, ids


def _segment(tokens: Tokens, start: int, stop: int) -> Tensor:
    """`tokens[start:stop]` as int64."""
    piece = tokens[start:stop]
    if isinstance(piece, Tensor):
        if piece.is_floating_point() or piece.is_complex() or piece.dtype == torch.bool:
            raise ShapeError(f"tokens has dtype {piece.dtype}; expected an integer dtype.")
        return piece.long()
    if not np.issubdtype(piece.dtype, np.integer):
        raise ShapeError(f"tokens has dtype {piece.dtype}; expected an integer dtype.")
    return torch.from_numpy(piece.astype(np.int64))


def _check_ids(ids: Tensor, vocab_size: int, start: int) -> None:
    """Raise `DomainError` if an id lies outside the vocabulary: targets reach no embedding that would notice."""
    low, high = torch.aminmax(ids)
    if low < 0 or high >= vocab_size:
        index = int(((ids < 0) | (ids >= vocab_size)).nonzero()[0])
        raise DomainError(
            f"Token {start + index} of the stream has id {int(ids[index])}; expected an id in [0, {vocab_size}). "
            "Use the tokenizer that the model was trained with."
        )


@contextmanager
def evaluation_mode(model: StreamModel) -> Iterator[None]:
    """Dropout off inside, as it was after."""
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)
