"""Dynamic evaluation: a model that goes on learning from the text that it is measured on, after predicting it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resnet_bk.errors import DomainError
from resnet_bk.evaluation.perplexity import StreamEvaluation, Tokens, evaluation_mode, stream_segments
from resnet_bk.ops.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from resnet_bk.models.resnet_bk import LanguageModel, ModelState

_FLOOR = 0.3
"""On words of WikiText-2 a third of this diverged at rates where this gains most; three times this gained as much."""


def evaluate_dynamic(
    model: LanguageModel,
    tokens: Tokens,
    training_tokens: Tokens,
    *,
    rate: float,
    decay: float = 0.02,
    segment_length: int = 64,
    scale_segments: int = 200,
    text_bytes: int | None = None,
) -> StreamEvaluation:
    """`StreamEvaluation` of one stream, where every segment, once predicted, is learned from before the next.

    A token is predicted with parameters that have seen earlier segments only, so the loss is that of a causal model;
    but it is the loss of another model than `evaluate_stream` measures, and to be labelled so. The update is

        theta <- theta - rate min(1, l / |g / s|) g / s + decay min(1, s / mean s) (theta_0 - theta),

    where g is the gradient of a segment's mean loss, theta_0 the trained parameters, and s the root mean square of g
    over segments of the training text plus 0.3 times the same over all parameters, which keeps words that are not in
    those segments from taking steps without measure. No step is longer than l, the root mean square of |g / s| over
    the same segments: without it losses that grow make steps that grow. The parameters are afterwards what they were
    before.

    Args:
        model: in evaluation mode for the duration; its parameters must be of a floating dtype that can take small
            updates, float32.
        tokens: token ids [N], N >= 2.
        training_tokens: text that the model was trained on, for the sizes s.
        rate: of the updates; to be chosen on a validation split.
        decay: share of the way back to the trained parameters, a segment.
        segment_length: tokens between updates.
        scale_segments: how many segments of `training_tokens`, spread over it, s is measured on.
        text_bytes: UTF-8 bytes that `tokens[1:]` stand for.

    Raises:
        ShapeError: `tokens` is not one row of at least two integers.
        DomainError: a rate or decay outside its range, an id beyond the vocabulary, or a loss that is not finite.

    Cost: one forward and backward pass, at one row of `segment_length` tokens; five copies of the parameters.
    Source: Krause, Kahembwe, Murray and Renals, "Dynamic Evaluation of Neural Sequence Models", 2018.
    """
    if not 0 <= rate < math.inf or not 0 <= decay <= 1:
        raise DomainError(f"rate is {rate} and decay {decay}; expected a number >= 0 and one in [0, 1].")
    trained = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        with evaluation_mode(model):
            sizes, longest = _gradient_sizes(model, training_tokens, segment_length, scale_segments)
            losses = _losses(model, tokens, trained, sizes, longest, rate, decay, segment_length)
            nats = math.fsum(float(part.sum()) for part in losses)
    finally:
        with torch.no_grad():
            for parameter, first in zip(model.parameters(), trained, strict=True):
                parameter.copy_(first)
        torch.clear_autocast_cache()
        model.zero_grad(set_to_none=True)
    return StreamEvaluation(tokens=len(tokens) - 1, unpredicted_tokens=1, nats=nats, text_bytes=text_bytes)


def _losses(
    model: LanguageModel,
    tokens: Tokens,
    trained: list[Tensor],
    sizes: list[Tensor],
    longest: Tensor,
    rate: float,
    decay: float,
    segment_length: int,
) -> Iterator[Tensor]:
    """Float64 losses of each segment's predicted tokens; the parameters change after each is taken."""
    parameters = list(model.parameters())
    mean = float(torch.stack([size.double().sum() for size in sizes]).sum()) / sum(size.numel() for size in sizes)
    back = [(size / mean).clamp_(max=1.0).mul_(decay) for size in sizes]
    state: ModelState | None = None
    for start, ids in stream_segments(model, tokens, segment_length):
        losses, state = _segment_losses(model, ids, state)
        if not torch.isfinite(losses).all():
            raise DomainError(
                f"A loss among tokens {start + 1} to {start + ids.numel() - 1} is not finite after updates at rate "
                f"{rate}; lower it."
            )
        _differentiate(model, losses)
        with torch.no_grad():
            given = [place for place, parameter in enumerate(parameters) if parameter.grad is not None]
            steps = [parameters[place].grad.div_(sizes[place]) for place in given]  # type: ignore[union-attr]
            length = torch.stack([step.norm().double() for step in steps]).norm()
            factor = -rate * (longest / length).clamp_(max=1.0)
            for place, step in zip(given, steps, strict=True):
                parameters[place].lerp_(trained[place], back[place]).add_(step.mul_(factor.to(step.dtype)))
        torch.clear_autocast_cache()  # holds what the parameters were before, in 16 bits
        yield losses.detach().double()


def _gradient_sizes(
    model: LanguageModel, tokens: Tokens, segment_length: int, segments: int
) -> tuple[list[Tensor], Tensor]:
    """Root mean square of every parameter's gradient over segments spread over `tokens`, kept away from zero.

    And that of the length of a gradient in these units, float64.
    """
    parameters = list(model.parameters())
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    room = max(1, len(tokens) - segment_length - 1)
    count = min(segments, room)
    for place in range(count):
        start = place * room // count
        for _, ids in stream_segments(model, tokens[start : start + segment_length + 1], segment_length):
            losses, _ = _segment_losses(model, ids, None)
            _differentiate(model, losses)
            for square, parameter in zip(squares, parameters, strict=True):
                if parameter.grad is not None:
                    square.addcmul_(parameter.grad, parameter.grad)
    sizes = [square.div_(count).sqrt_() for square in squares]
    everywhere = sum(float(size.double().square().sum()) for size in sizes) / sum(size.numel() for size in sizes)
    floor, squared = _FLOOR * math.sqrt(everywhere), []
    for size in sizes:
        squared.append((size / (size + floor)).double().square().sum())
        size.add_(floor)
    return sizes, torch.stack(squared).sum().sqrt()


def _segment_losses(model: LanguageModel, ids: Tensor, state: ModelState | None) -> tuple[Tensor, ModelState]:
    """Losses of all tokens but the first, with their history, and the state that follows, without."""
    hidden, after = model.hidden_states(ids[None, :-1], state=state)
    return linear_cross_entropy(hidden[0], model.output_weight, ids[1:], reduction="none"), after.detach()


def _differentiate(model: LanguageModel, losses: Tensor) -> None:
    """Gradients of the mean loss in `.grad`."""
    model.zero_grad(set_to_none=True)
    losses.mean().backward()
