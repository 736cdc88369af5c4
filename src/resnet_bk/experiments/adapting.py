"""Dynamic evaluation in a comparison: the rate is chosen on the validation split, the figure is the test split's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from resnet_bk.errors import DomainError
from resnet_bk.evaluation.dynamic import evaluate_dynamic
from resnet_bk.experiments.corpora import ExperimentCorpus
from resnet_bk.models.resnet_bk import LanguageModel

SEGMENT_TOKENS = 128
"""Tokens between two updates."""
CHOICE_TOKENS = 40_000
"""First tokens of the validation split on which the rate is chosen."""


def dynamic_readings(
    model: LanguageModel, corpus: ExperimentCorpus, rates: Sequence[float]
) -> dict[str, float | int | str | None]:
    """The rate of least loss on the start of the validation split, that loss, and the test split's at that rate.

    A rate that diverges is out; if all do, the rate is None and there are no losses. If the chosen one diverges on the
    test split, that has no figure: it chooses nothing. Call it under the autocast of the other evaluations, with a
    corpus that has a test split.
    """

    def loss(tokens: np.ndarray, rate: float) -> float:
        return evaluate_dynamic(model, tokens, corpus.train.tokens, rate=rate, segment_length=SEGMENT_TOKENS).loss

    losses: dict[float, float] = {}
    for rate in rates:
        try:
            losses[rate] = loss(corpus.validation.tokens[:CHOICE_TOKENS], rate)
        except DomainError:
            continue
    if not losses:
        return {"dynamic_rate": None}
    best = min(losses, key=losses.__getitem__)
    found: dict[str, float | int | str | None] = {
        "dynamic_rate": best,
        "dynamic_segment_tokens": SEGMENT_TOKENS,
        "validation_start_loss_dynamic": losses[best],
    }
    try:
        final = loss(corpus.splits["test"].tokens, best)
        return found | {"test_loss_dynamic": final, "test_perplexity_dynamic": math.exp(final)}
    except (DomainError, OverflowError):
        return found
