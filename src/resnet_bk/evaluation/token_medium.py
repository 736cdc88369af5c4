"""The medium that a text is to a head: potential and absorption of every token, and the spectral shift so far."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.errors import DataError, DomainError
from resnet_bk.layers.mixer import Mixer
from resnet_bk.models.resnet_bk import Block, LanguageModel
from resnet_bk.theory.jacobi import free_root
from resnet_bk.theory.scattering import spectral_shift

SENTENCE = "When a generator function is called, it returns an iterator known as a generator."
"""From the documentation of Python that the embedded corpus holds."""


class TokenMedium(NamedTuple):
    """What the heads of one layer make of a text; energies and absorptions in units of the hopping.

    Attributes:
        tokens: the text's pieces, in order.
        potential: v of every token and head, float64 [tokens, heads].
        absorption: eta of every token and head, float64 [tokens, heads].
        energy: E of every head, float64 [heads].
        lead: m_0 of every head, complex128 [heads].
        source: what the figure says about it.
    """

    tokens: list[str]
    potential: Tensor
    absorption: Tensor
    energy: Tensor
    lead: Tensor
    source: str

    def spectral_shift(self) -> Tensor:
        """Krein's spectral shift of the text up to every token, float64 [tokens, heads]."""
        heads = range(len(self.energy))
        return torch.stack(
            [
                spectral_shift(
                    self.potential[:, head],
                    float(self.energy[head]),
                    self.absorption[:, head],
                    complex(self.lead[head]),
                )
                for head in heads
            ],
            dim=1,
        )


def medium_of_words(text: str, *, absorption: float = 0.1) -> TokenMedium:
    """The words of `text` as a medium without a model: each word's potential is its standardised surprisal.

    Args:
        text: at least two words.
        absorption: eta of every word.

    Returns:
        `TokenMedium` of three heads at the energies -1, 0 and 1; the surprisal is that of word frequencies in the
        documentation of the running Python, with one added to every count.

    Raises:
        DomainError: fewer than two words, or words of one frequency only.

    Heuristic: the choice of surprisal as potential. It shows what the shift does with a text, not what a model does.
    """
    from pydoc_data.topics import topics

    words = re.findall(r"\w+|[^\w\s]", text)
    counts = Counter(re.findall(r"\w+|[^\w\s]", " ".join(topics.values()).lower()))
    total = sum(counts.values()) + len(counts)
    surprisal = torch.tensor([-math.log((counts[word.lower()] + 1) / total) for word in words], dtype=torch.float64)
    if len(words) < 2 or float(surprisal.std()) == 0:
        raise DomainError(f"the text has {len(words)} words; expected at least two of different frequency")
    potential = (surprisal - surprisal.mean()) / surprisal.std()
    energy = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    eta = torch.full_like(energy, absorption)
    return TokenMedium(
        words,
        potential[:, None].expand(-1, 3),
        eta.expand(len(words), 3),
        energy,
        free_root(-energy, eta),
        "potential: standardised surprisal of the word",
    )


@torch.no_grad()
def medium_of_model(model: LanguageModel, text: str, *, layer: int = 0) -> TokenMedium:
    """The medium that a layer of a trained model makes of `text`.

    Args:
        model: with a tokenizer, and a resolvent mixer with a potential in that layer.
        text: at least one token.
        layer: index of the block.

    Returns:
        `TokenMedium` of all heads of that layer.

    Raises:
        DataError: no tokenizer, or a text without a token.
        DomainError: a layer that does not exist, or one without a potential.
    """
    if model.tokenizer is None:
        raise DataError("the model has no tokenizer; put its tokenizer.json beside it")
    ids = model.tokenizer.encode(text)
    if not ids:
        raise DataError("the text has no token; write at least one word")
    if not 0 <= layer < len(model.blocks):
        raise DomainError(f"layer is {layer}; expected 0 to {len(model.blocks) - 1}")
    block = model.blocks[layer]
    assert isinstance(block, Block)
    mixer = block.mixer
    if not isinstance(mixer, Mixer) or mixer.config.dynamics == "decay_only":
        raise DomainError(f"layer {layer} has no potential; choose a layer with a resolvent mixer")
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen.append(output)

    handle = mixer.in_proj.register_forward_hook(keep)
    try:
        model.hidden_states(torch.tensor([ids], device=model.embedding.weight.device))
    finally:
        handle.remove()
    raw = torch.cat(seen, dim=1)[0].double().cpu().split(mixer.sizes, dim=-1)
    bias, floor = mixer.absorption_bias.detach().double().cpu(), mixer.config.absorption_floor
    energy = mixer.energy.detach().double().cpu()
    lead = free_root(-energy, F.softplus(bias) + floor)
    if mixer.config.boundary == "wall":
        lead = torch.zeros_like(lead)
    return TokenMedium(
        [model.tokenizer.decode([token]) for token in ids],
        mixer.potential_scale.double().cpu() * raw[4],
        F.softplus(raw[5] + bias) + floor,
        energy,
        lead,
        f"potential: layer {layer} of the model",
    )
