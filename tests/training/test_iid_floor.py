"""No causal model predicts independent uniform symbols better than chance: a loss below ln V is a leak.

For a causal model the loss of every token has an expectation of at least ln V, whatever was learned, so a validation
loss more than four standard errors below it means that the model saw what it predicts. Two models that do see it are
trained the same way, as proof that this harness would notice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from resnet_bk import LanguageModel, ModelConfig, Trainer, TrainingConfig

SYMBOLS = 8
LENGTH = 64
ROWS = 400
FLOOR = math.log(SYMBOLS)


class UniformLoader:
    """Endless independent uniform symbols."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __next__(self):
        return {"input_ids": torch.randint(SYMBOLS, (16, LENGTH), generator=self.generator)}

    def state_dict(self):
        return {"generator": self.generator.get_state().tolist()}

    def load_state_dict(self, state) -> None:
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))


class MeanOfAllTokens(LanguageModel):
    """Leaks a statistic: every position also sees the mean over the whole sequence, the future included."""

    def hidden_states(self, input_ids, *, state=None, cu_seqlens=None):
        hidden, state = super().hidden_states(input_ids, state=state, cu_seqlens=cu_seqlens)
        return hidden + self.norm(self.embedding(input_ids).mean(1, keepdim=True)), state


class FaintFuture(LanguageModel):
    """Leaks faintly: a hundredth of what the next token's embedding amounts to."""

    def hidden_states(self, input_ids, *, state=None, cu_seqlens=None):
        hidden, state = super().hidden_states(input_ids, state=state, cu_seqlens=cu_seqlens)
        return hidden + 0.01 * self.norm(self.embedding(input_ids.roll(-1, 1))), state


class Loss(NamedTuple):
    mean: float
    standard_error: float


def validation_loss(model_class: type[LanguageModel], folder, *, num_layers: int = 1, **options) -> Loss:
    """Mean loss on fresh symbols after training to convergence; rows are the independent units of its error."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=SYMBOLS, d_model=16, num_layers=num_layers, feed_forward_dim=32, head_dim=8, state_size=8, **options
    )
    model = model_class(config)
    training = TrainingConfig(
        output_dir=str(folder), steps=200, sequence_length=LENGTH, batch_size=16, learning_rate=1e-2, warmup_steps=20,
        minimum_learning_rate_ratio=0.0, device="cpu", tensorboard=False, evaluate_every=0, checkpoint_every=0,
    )  # fmt: skip
    Trainer(model, UniformLoader(), training, progress=False).train()
    rows = torch.randint(SYMBOLS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        log_probabilities = model(rows).logits[:, :-1].double().log_softmax(-1)
    losses = -log_probabilities.gather(2, rows[:, 1:, None])[..., 0].mean(1)
    return Loss(losses.mean().item(), losses.std().item() / math.sqrt(ROWS))


def assert_at_the_floor(found: Loss) -> None:
    # Small enough to notice a leak of 1e-3 nats; measured at most 1.4e-4.
    assert found.standard_error < 2.5e-4
    assert abs(found.mean - FLOOR) <= 4 * found.standard_error, found


def test_language_model_stays_at_the_floor(tmp_path):
    assert_at_the_floor(validation_loss(LanguageModel, tmp_path))


@pytest.mark.parametrize("mixer", ["attention", "mamba2", "mamba3"])
def test_baselines_stay_at_the_floor(tmp_path, mixer):
    assert_at_the_floor(validation_loss(LanguageModel, tmp_path, mixer=mixer, attention_head_dim=8))


@pytest.mark.parametrize("leaky", [MeanOfAllTokens, FaintFuture])
def test_a_leak_falls_through_the_floor(tmp_path, leaky):
    found = validation_loss(leaky, tmp_path)
    # Measured: 42 standard errors below for the mean, 127 for the faint future.
    assert found.mean < FLOOR - 20 * found.standard_error, found


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(dynamics="decay_only"),
        dict(dynamics="semiclassical", kernel="transmission", source="free", boundary="wall"),
        dict(kernel="green", source="unit"),
        dict(phase_coupling=True, tie_embeddings=False),
        dict(attention_every=2, attention_window=9, attention_head_dim=8),
        dict(mixer="mamba3", attention_every=2, attention_head_dim=8),
    ],
)
def test_every_option_stays_at_the_floor(tmp_path, options):
    assert_at_the_floor(validation_loss(LanguageModel, tmp_path, num_layers=2, **options))
