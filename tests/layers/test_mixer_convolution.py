"""The convolution before the mixing: quiet at the start, continued from states, apart for packed documents."""

import dataclasses

import pytest
import torch

from resnet_bk import LanguageModel, ModelConfig
from resnet_bk.errors import ConfigError
from resnet_bk.layers.mixer import Mixer

PLAIN = ModelConfig(vocab_size=23, d_model=32, num_layers=2, feed_forward_dim=32, head_dim=16, state_size=8)
CONVOLVED = dataclasses.replace(PLAIN, convolution_width=4)


def trained(config):
    """A model whose convolution does something, float64."""
    torch.manual_seed(0)
    model = LanguageModel(config).double().eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.mixer.taps, std=0.5)
        torch.nn.init.normal_(block.mixer.taps_bias, std=0.5)
    return model


def test_a_fresh_model_is_that_without_and_learns_its_taps():
    torch.manual_seed(0)
    model, ids = LanguageModel(CONVOLVED), torch.randint(23, (2, 40))
    plain = LanguageModel(PLAIN)
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    model(ids, labels=ids).loss.backward()
    assert all(block.mixer.taps.grad.abs().max() > 0 for block in model.blocks)


def test_taps_act_on_values_keys_and_queries_of_the_last_tokens():
    mixer = trained(CONVOLVED).blocks[0].mixer
    u = torch.randn(1, 9, 32, dtype=torch.float64)
    projection = mixer.in_proj(u)
    found, history = mixer._convolved(projection, None, None, None)
    inner, channels = 64, 64 + 2 * 8
    window = torch.nn.functional.pad(projection[0, :, inner : inner + channels], (0, 0, 3, 0)).unfold(0, 4, 1)
    added = torch.nn.functional.silu((window * mixer.taps).sum(-1) + mixer.taps_bias)
    torch.testing.assert_close(found[0, :, inner : inner + channels], window[..., -1] + added)
    assert torch.equal(found[..., :inner], projection[..., :inner])
    assert torch.equal(found[..., inner + channels :], projection[..., inner + channels :])
    assert torch.equal(history[0], projection[0, -3:, inner : inner + channels])


def test_pieces_and_packed_documents_come_to_the_same():
    model, ids = trained(CONVOLVED), torch.randint(23, (1, 90))
    whole = model(ids).logits
    state, parts = None, []
    for piece in ids.split((1, 2, 40, 46, 1), dim=1):
        out = model(piece, state=state)
        state = out.state
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    packed = model(ids, cu_seqlens=torch.tensor([0, 2, 50, 90])).logits
    alone = torch.cat([model(piece).logits for piece in ids.split((2, 48, 40), dim=1)], 1)
    torch.testing.assert_close(packed, alone)


def test_absorptions_start_in_the_range_asked_for():
    mixer = Mixer(dataclasses.replace(PLAIN, d_model=512, absorption_start=1e-3, absorption_stop=4.0))
    start = torch.nn.functional.softplus(mixer.absorption_bias)
    assert start.min() >= 0.999e-3 and start.max() <= 4.01
    assert start.log().std() > 2  # log-uniform over more than eight units


@pytest.mark.parametrize("values", [{"convolution_width": 1}, {"absorption_start": 5.0}, {"absorption_stop": 0.0}])
def test_senseless_values_are_refused(values):
    with pytest.raises(ConfigError, match=r"model\.(convolution_width|absorption_start)"):
        dataclasses.replace(PLAIN, **values)
