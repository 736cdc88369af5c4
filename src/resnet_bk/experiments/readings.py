"""What a run leaves in its row: loss curves as text, and which way of reading a split counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def choose_reading(metrics: Mapping[str, Any]) -> dict[str, float | str | None]:
    """Loss, perplexity and bits per byte of each split by the reading that suits the model on validation.

    Some models profit from everything before a token, others do not go beyond the length they were trained at; each is
    shown as it is best used, and the other reading stays in the row.
    """
    readings = [name for name in ("windows", "stream") if metrics.get(f"validation_loss_{name}") is not None]
    best = min(readings, key=lambda name: metrics[f"validation_loss_{name}"])
    chosen: dict[str, float | str | None] = {"reading": best}
    for split in ("validation", "test"):
        loss = metrics.get(f"{split}_loss_{best}")
        if loss is not None:
            chosen[f"{split}_loss"] = loss
            chosen[f"{split}_perplexity"] = math.exp(loss) if loss < 709 else None
            chosen[f"{split}_bits_per_byte"] = metrics[f"{split}_bits_per_byte_{best}"]
    return chosen


def curve_steps(steps: int, points: int) -> list[int]:
    """Steps at which a run of `steps` is evaluated: the last, its half, its quarter, ..., in order."""
    return sorted({round(steps / 2**k) for k in range(points)} - {0})


def format_curve(curve: Sequence[Sequence[float]]) -> str:
    """A curve as one word a point, `tokens:training loss:validation loss`, for the ledger."""
    return " ".join(f"{int(tokens)}:{train:.4f}:{validation:.4f}" for tokens, train, validation in curve)


def parse_curve(text: str) -> list[tuple[int, float, float]]:
    """The points of `format_curve`."""
    points = (word.split(":") for word in text.split())
    return [(int(tokens), float(train), float(validation)) for tokens, train, validation in points]


def tokens_to_reach(curve: Sequence[tuple[int, float, float]], loss: float) -> float | None:
    """Tokens after which the validation loss is first `loss`, between points by the logarithm; None if never."""
    before: tuple[float, float] | None = None
    for tokens, _, validation in curve:
        if validation <= loss:
            if before is None:
                return float(tokens)
            share = (before[1] - loss) / (before[1] - validation)
            return before[0] * (tokens / before[0]) ** share
        before = float(tokens), validation
    return None
