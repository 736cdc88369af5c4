from __future__ import annotations

import dataclasses

import pytest

from resnet_bk.errors import ConfigError
from resnet_bk.experiments.state_size import config_with_state_bytes, decode_state_bytes
from resnet_bk.models.config import ModelConfig
from resnet_bk.models.resnet_bk import MIXERS

SMALL = ModelConfig(vocab_size=100, d_model=64, num_layers=2, feed_forward_dim=64, head_dim=16, state_size=32)


def test_bytes_by_hand():
    """Per layer 8 heads of 32 x 16 and one complex number, and the last key, float32, and an int64 position."""
    assert decode_state_bytes(SMALL) == 2 * (4 * 8 * 32 * 16 + 4 * 8 * 2 + 4 * 32 + 8)
    attention = dataclasses.replace(SMALL, mixer="attention")
    # Keys and values of 64 channels.
    assert decode_state_bytes(attention, context=10) == 2 * (4 * 10 * 2 * 64 + 8)
    assert decode_state_bytes(SMALL, context=10) == decode_state_bytes(SMALL)


@pytest.mark.parametrize("mixer", MIXERS)
def test_equal_state_bytes(mixer):
    wanted = decode_state_bytes(SMALL)
    found = config_with_state_bytes(dataclasses.replace(SMALL, mixer=mixer, state_size=64), wanted, context=1000)
    assert abs(decode_state_bytes(found, context=1000) / wanted - 1) <= 0.05
    assert found.mixer == mixer
    if mixer == "resolvent":
        assert found == SMALL
    if mixer == "attention":
        assert found.attention_window > 0 and found.state_size == 64


def test_no_size_fits():
    with pytest.raises(ConfigError, match=r"No model.state_size gives mixer 'resolvent' a state of 100 bytes"):
        config_with_state_bytes(SMALL, 100)
