"""The small training loop: it learns what can be learned, stays at the floor where nothing can, and repeats itself."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from resnet_bk.errors import ConfigError
from resnet_bk.experiments.synthetic import (
    TaskBudget,
    best_rate,
    evaluate_on_task,
    scored_logits,
    sweep_learning_rates,
    train_on_task,
)
from resnet_bk.experiments.tasks.base import Batch
from resnet_bk.experiments.tasks.modular import ModularExpressions
from resnet_bk.experiments.tasks.parity import Parity
from resnet_bk.experiments.tasks.passkey import Passkey
from resnet_bk.experiments.tasks.recall import AssociativeRecall
from resnet_bk.experiments.tasks.uniform import UniformTokens
from resnet_bk.models.config import ModelConfig
from resnet_bk.models.resnet_bk import MIXERS, LanguageModel

TINY = ModelConfig(
    vocab_size=1, d_model=32, num_layers=1, feed_forward_dim=64, head_dim=16, state_size=16, attention_head_dim=16
)
KEY = Passkey(length=32, evaluation_lengths=(32, 256), digits=1, filler=4, evaluation_depths=(0.0,))


def budget(**changes) -> TaskBudget:
    options = dict(
        steps=150, tokens_per_step=1024, learning_rate=1e-2, warmup_steps=20, stop_at_accuracy=0.99,
        evaluation_tokens=8192,
    )  # fmt: skip
    return TaskBudget(**{**options, **changes})


def test_a_passkey_is_learned_and_found_eight_times_further():
    result = train_on_task(TINY, KEY, budget(), seed=0)
    assert result.stopped == "solved" and result.steps in (50, 100, 150)
    assert result.tokens == result.steps * 1024
    assert result.accuracy[32] > 0.99 and result.accuracy[256] > 0.99  # measured: 1, 1
    assert set(result.evaluations) == {"", "depth_0"}
    assert result.metrics["accuracy_depth_0_256"] == result.evaluations["depth_0"][256].accuracy
    assert result.metrics["stopped"] == "solved"


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_passkey_is_learned_on_a_gpu(mixer):
    config = dataclasses.replace(TINY, state_size=32, mixer=mixer)
    result = train_on_task(config, KEY, budget(steps=300), seed=0, device="cuda")
    assert result.accuracy[32] > 0.99
    again = train_on_task(config, KEY, budget(steps=300), seed=0, device="cuda")
    assert again.tokens == result.tokens and again.loss == pytest.approx(result.loss, rel=0.2)


def test_expressions_are_learned():
    task = ModularExpressions(length=4, evaluation_lengths=(4,), modulus=3)
    assert train_on_task(TINY, task, budget(), seed=0).accuracy[4] > 0.99  # measured: 1


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_mixer_falls_through_the_floor(mixer):
    task = UniformTokens(length=64, evaluation_lengths=(64,), vocabulary=8)
    config = dataclasses.replace(TINY, d_model=16, feed_forward_dim=32, mixer=mixer)
    result = train_on_task(config, task, budget(stop_at_accuracy=0.0, evaluation_tokens=25600), seed=0)
    found = result.evaluations[""][64]
    assert found.rows == 400 and result.stopped == "steps"
    # Not below by more than four standard errors, and not far above: 150 steps learn that nothing can be known.
    assert found.loss > math.log(8) - 4 * found.loss_standard_error
    assert found.loss < math.log(8) + 0.02
    assert found.loss_standard_error < 1e-2


def test_a_leak_is_noticed(monkeypatch):
    """The floor test's own test: a model that sees the next token a little falls far below."""
    honest = LanguageModel.hidden_states

    def leaky(self, input_ids, **options):
        hidden, state = honest(self, input_ids, **options)
        return hidden + 0.05 * self.norm(self.embedding(input_ids.roll(-1, 1))), state

    monkeypatch.setattr(LanguageModel, "hidden_states", leaky)
    task = UniformTokens(length=64, evaluation_lengths=(64,), vocabulary=8)
    config = dataclasses.replace(TINY, d_model=16, feed_forward_dim=32)
    found = train_on_task(config, task, budget(stop_at_accuracy=0.0, evaluation_tokens=25600), seed=0).evaluations[""][
        64
    ]
    assert found.loss < math.log(8) - 20 * found.loss_standard_error


def test_a_seed_repeats_and_another_differs():
    task = Parity(length=8, evaluation_lengths=(8,))
    short = budget(steps=12)
    first, again, other = (train_on_task(TINY, task, short, seed) for seed in (0, 0, 1))
    assert first.loss == again.loss and first.evaluations == again.evaluations
    assert other.loss != first.loss


def test_precision():
    task = Parity(length=8, evaluation_lengths=(8,))
    narrow, wide = (train_on_task(TINY, task, budget(steps=5, precision=p), 0) for p in ("bfloat16", "float32"))
    assert narrow.loss == pytest.approx(wide.loss, rel=0.02) and narrow.loss != wide.loss


def test_limits():
    task = Parity(length=8, evaluation_lengths=(8,))
    hurried = train_on_task(TINY, task, budget(steps=200, seconds=1e-9, tokens_per_step=64), seed=0)
    assert hurried.stopped == "seconds" and hurried.steps == 50
    assert hurried.accuracy.keys() == {8}
    wild = train_on_task(TINY, task, budget(learning_rate=1e30, warmup_steps=0, gradient_clip_norm=0.0), seed=0)
    assert wild.stopped == "diverged" and wild.accuracy == {} and wild.loss == math.inf
    assert wild.metrics == {"stopped": "diverged", "steps": wild.steps}


class Recorded:
    """Stands in for a model: its hidden states are logits, chosen by the test."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits, self.output_weight, self.segment_tokens = logits, torch.eye(logits.shape[-1]), 0

    def hidden_states(self, input_ids):
        return self.logits[: len(input_ids)], None

    def eval(self):
        return self


def test_scores_by_hand():
    """Two rows with three and one scored labels; the model is right on all but the last of the first row."""
    labels = torch.tensor([[-100, 1, -100, 2, 0, -100], [-100, -100, -100, -100, -100, 1]])
    logits = torch.zeros(2, 6, 3)
    for row, place, token in ((0, 0, 1), (0, 2, 2), (0, 3, 1), (1, 4, 1)):
        logits[row, place, token] = 5.0
    model = Recorded(logits)
    found, targets = scored_logits(model, Batch(torch.zeros(2, 6, dtype=torch.long), labels), 3)
    assert targets[0].tolist() == [1, 2, 0] and (targets[1] != -100).sum() == 1
    assert found.shape == (2, 3, 3)

    class Fixed(Parity):
        def draw(self, batch, length, generator):
            return Batch(torch.zeros_like(labels), labels)

        def scored(self, length):
            return 3

    found = evaluate_on_task(model, Fixed(), 6, TaskBudget(evaluation_tokens=12))
    assert (found.rows, found.length) == (2, 6)
    assert found.accuracy == 0.75 and found.exact == 0.5
    assert found.tail_accuracy == 0.5  # the last of three labels was wrong, the only one of the other row right
    right, wrong = (math.log(math.exp(5) + 2) - top for top in (5, 0))
    rows = (2 * right + wrong) / 3, right
    assert found.loss == pytest.approx(sum(rows) / 2, rel=1e-6)
    assert found.loss_standard_error == pytest.approx(abs(rows[0] - rows[1]) / 2, rel=1e-6)


def test_sweep_prefers_the_rate_that_learns():
    task = AssociativeRecall(length=16, evaluation_lengths=(16,), pairs=2, vocabulary=8, random_filler=False)
    results = sweep_learning_rates(TINY, task, budget(steps=40), (1e-6, 1e-2), 0)
    assert list(results) == [1e-6, 1e-2] and best_rate(results) == 1e-2
    diverged = dataclasses.replace(results[1e-6], loss=math.inf)
    assert best_rate({1.0: diverged, 1e-6: results[1e-6]}) == 1e-6
    with pytest.raises(ConfigError, match="every learning rate"):
        best_rate({1.0: diverged})


def test_evaluation_rows_do_not_depend_on_how_they_are_batched():
    torch.manual_seed(0)
    model = LanguageModel(dataclasses.replace(TINY, vocab_size=KEY.vocab_size))
    whole, parts = (evaluate_on_task(model, KEY, 32, budget(tokens_per_step=tokens)) for tokens in (8192, 8192 // 4))
    assert whole.rows == parts.rows == 256
    # Draws of a smaller batch are other draws; what they estimate is the same.
    assert abs(whole.loss - parts.loss) < 4 * math.hypot(whole.loss_standard_error, parts.loss_standard_error)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(tokens_per_step=0), "budget.tokens_per_step is 0"),
        (dict(stop_at_accuracy=2.0), "budget.stop_at_accuracy is 2.0"),
        (dict(seconds=-1.0), "budget.seconds is -1.0"),
        (dict(steps=0), "steps is 0"),
        (dict(precision="half"), "precision is 'half'"),
    ],
)
def test_bad_budgets(changes, message):
    with pytest.raises(ConfigError, match=message):
        TaskBudget(**changes)
