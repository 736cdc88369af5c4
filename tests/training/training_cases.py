"""A model and a loader small enough that a training step takes milliseconds."""

from __future__ import annotations

import torch

from resnet_bk import LanguageModel, ModelConfig

VOCABULARY = 13


class RandomLoader:
    """Endless batches of a noisy counting language, drawn from a generator whose state is the position."""

    def __init__(self, *, batch: int = 2, time: int = 16, seed: int = 0) -> None:
        self.shape = (batch, time)
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        start = torch.randint(VOCABULARY, (self.shape[0], 1), generator=self.generator)
        noise = torch.randint(2, self.shape, generator=self.generator).cumsum(1)
        return {"input_ids": (start + noise) % VOCABULARY}

    def state_dict(self):
        return {"generator": self.generator.get_state().tolist()}

    def load_state_dict(self, state) -> None:
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))


def tiny_model(**overrides) -> LanguageModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, d_model=16, num_layers=2, feed_forward_dim=24, head_dim=8, state_size=4)
    return LanguageModel(ModelConfig(**{**sizes, **overrides}))
