from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from resnet_bk.errors import DomainError
from resnet_bk.evaluation.perplexity import evaluate_stream
from resnet_bk.experiments.windows import evaluate_windows
from resnet_bk.models.resnet_bk import LanguageModel


@pytest.fixture(scope="module")
def model(toy_model) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(toy_model)
    with torch.no_grad():  # far from uniform, so that context matters
        model.embedding.weight.mul_(30)
    return model.double()


def by_hand(model: LanguageModel, tokens: np.ndarray, length: int) -> float:
    """Each prediction from its own forward pass."""
    total, step = 0.0, max(1, length // 2)
    for target in range(1, len(tokens)):
        # The window that first reaches this prediction ends at a multiple of the step beyond the first window.
        end = length if target <= length else length + -(-(target - length) // step) * step
        end = min(end, len(tokens) - 1)
        start = max(0, end - length)
        with torch.no_grad():
            logits = model(torch.tensor(tokens[None, start:target].astype(np.int64))).logits[0, -1]
        total += float(F.cross_entropy(logits[None], torch.tensor([int(tokens[target])])))
    return total


@pytest.mark.parametrize("length", [2, 7, 16])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_token_counts_once_from_its_window(model, length, batch_size):
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 41).astype(np.uint16)
    found = evaluate_windows(model, tokens, length=length, batch_size=batch_size, text_bytes=100)
    assert found.tokens == 40 and found.text_bytes == 100
    assert found.nats == pytest.approx(by_hand(model, tokens, length), rel=1e-10)


def test_one_window_over_everything_is_the_stream(model):
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, 30)
    window = evaluate_windows(model, tokens, length=64, batch_size=4)
    stream = evaluate_stream(model, tokens, segment_length=64)
    assert window.loss == pytest.approx(stream.loss, rel=1e-12)
    assert evaluate_windows(model, tokens, length=8, batch_size=4).loss != pytest.approx(stream.loss, rel=1e-6)


def test_bad_windows_are_refused(model):
    tokens = np.zeros(10, dtype=np.int64)
    with pytest.raises(DomainError, match="at least 2 tokens"):
        evaluate_windows(model, tokens, length=1, batch_size=1)
    with pytest.raises(DomainError, match="expected at least 2"):
        evaluate_windows(model, tokens[:1], length=4, batch_size=1)
