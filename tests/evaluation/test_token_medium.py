"""A text as a medium: words by surprisal, and what a model's head computes of it."""

from __future__ import annotations

import pytest
import torch

from resnet_bk.errors import DataError, DomainError
from resnet_bk.evaluation.token_medium import SENTENCE, medium_of_model, medium_of_words
from resnet_bk.layers.mixer_state import MixerState
from resnet_bk.models.config import ModelConfig
from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.ops.resolvent import GreenState, causal_resolvent, scattering_phase
from resnet_bk.theory.scattering import spectral_shift
from resnet_bk.tokenizer import Tokenizer

SIZES = {"vocab_size": 300, "d_model": 32, "feed_forward_dim": 32, "head_dim": 16, "state_size": 8}


def model(**options) -> LanguageModel:
    torch.manual_seed(0)
    made = LanguageModel(ModelConfig(**{**SIZES, "num_layers": 2, **options}))
    made.tokenizer = Tokenizer.train([SENTENCE] * 3, 300)
    for name, parameter in made.named_parameters():
        if name.endswith("potential_scale"):
            torch.nn.init.normal_(parameter)
    return made


def test_words_are_a_medium_of_their_surprisal() -> None:
    medium = medium_of_words(SENTENCE)
    assert medium.tokens[:2] == ["When", "a"] and medium.tokens[-1] == "."
    potential = medium.potential[:, 0]
    assert float(potential.mean()) == pytest.approx(0, abs=1e-12)
    assert float(potential.std()) == pytest.approx(1, abs=1e-12)
    assert potential[medium.tokens.index("generator")] > potential[medium.tokens.index("a")]
    shift = medium.spectral_shift()
    expected = spectral_shift(potential, 0.0, medium.absorption[:, 1], complex(medium.lead[1]))
    torch.testing.assert_close(shift[:, 1], expected, rtol=0, atol=0)


def test_the_shift_of_a_text_does_not_depend_on_what_follows() -> None:
    made = model()
    whole, part = medium_of_model(made, SENTENCE), medium_of_model(made, SENTENCE[:40])
    shared = len(part.tokens) - 1  # the cut may fall into a token
    torch.testing.assert_close(whole.spectral_shift()[:shared], part.spectral_shift()[:shared], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("boundary", ["lead", "wall"])
def test_the_medium_is_the_one_of_the_models_gates(layer: int, boundary: str) -> None:
    made = model(boundary=boundary).double()
    medium = medium_of_model(made, SENTENCE, layer=layer)
    assert "".join(medium.tokens).strip() == SENTENCE
    # The mixer's own gates see the same medium: its state after the text is the theory's Green function.
    assert made.tokenizer is not None
    _, state = made.hidden_states(torch.tensor([made.tokenizer.encode(SENTENCE)]))
    inside = state.layers[layer]
    assert isinstance(inside, MixerState) and inside.green is not None
    lead = GreenState(medium.lead.real.contiguous(), medium.lead.imag.contiguous())
    detuning, absorption = (medium.potential - medium.energy)[None], medium.absorption[None].contiguous()
    m, last = causal_resolvent(detuning, absorption, initial=lead)
    for ours, theirs in zip(last, inside.green, strict=True):
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-7)
    free, _ = causal_resolvent((-medium.energy).expand_as(detuning), absorption, initial=lead)
    phases = scattering_phase(m, free)[0].cumsum(0) / torch.pi
    torch.testing.assert_close(medium.spectral_shift(), phases, rtol=0, atol=1e-9)


def test_bad_texts_and_models_are_named() -> None:
    made = model()
    with pytest.raises(DomainError, match="different frequency"):
        medium_of_words("word")
    with pytest.raises(DataError, match="no token"):
        medium_of_model(made, "")
    with pytest.raises(DomainError, match="layer is 2"):
        medium_of_model(made, SENTENCE, layer=2)
    with pytest.raises(DomainError, match="no potential"):
        medium_of_model(model(dynamics="decay_only"), SENTENCE)
    made.tokenizer = None
    with pytest.raises(DataError, match="tokenizer"):
        medium_of_model(made, SENTENCE)
