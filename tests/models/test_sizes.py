"""Equal sizes: every mixer in the place of every preset's, within the tolerance; what cannot be equal is refused."""

from __future__ import annotations

import pytest

from resnet_bk.errors import ConfigError
from resnet_bk.models.config import PRESETS, ModelConfig
from resnet_bk.models.sizes import num_parameters, with_mixer

CHANGES = [
    dict(mixer="attention"),
    dict(mixer="mamba2"),
    dict(mixer="mamba3"),
    dict(mixer="resolvent", attention_every=2),
    dict(mixer="mamba3", attention_every=3),
    dict(mixer="attention", attention_window=64),
]


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "10b"])
@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(map(str, changes.values())))
def test_parameters_agree_and_other_fields_stay(preset, changes):
    config = ModelConfig.preset(preset)
    other = with_mixer(config, **changes)
    assert abs(num_parameters(other) / num_parameters(config) - 1) <= 0.01
    assert other.to_dict() == config.to_dict() | changes | dict(feed_forward_dim=other.feed_forward_dim)
    assert other.feed_forward_dim % {"tiny": 4, "small": 16}.get(preset, 64) == 0


def test_there_and_back_again():
    config = ModelConfig.preset("small")
    back = with_mixer(with_mixer(config, "attention"), "resolvent")
    assert abs(num_parameters(back) / num_parameters(config) - 1) <= 0.02


def test_the_same_mixer_changes_nothing():
    config = ModelConfig.preset("base")
    assert with_mixer(config, "resolvent") == config


def test_what_cannot_be_made_up_for_is_refused():
    config = ModelConfig.preset("tiny", mixer="attention")
    with pytest.raises(ConfigError, match=r"No feed_forward_dim gives mixer 'resolvent' .* have to be -\d+\)"):
        with_mixer(config, "resolvent", expand=16)


def test_the_width_cannot_be_chosen():
    with pytest.raises(ConfigError, match="feed_forward_dim cannot be changed"):
        with_mixer(ModelConfig.preset("tiny"), "attention", feed_forward_dim=7)


def test_an_unknown_change_is_refused():
    with pytest.raises(ConfigError, match=r"Unknown configuration key 'model.attention_evry'; did you mean"):
        with_mixer(ModelConfig.preset("tiny"), "attention", attention_evry=2)
