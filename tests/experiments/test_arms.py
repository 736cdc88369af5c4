from __future__ import annotations

import dataclasses

import pytest

from resnet_bk.errors import ConfigError
from resnet_bk.experiments.arms import ARMS, Arm, check_equal_parameters, make_arms, named_arms
from resnet_bk.models.resnet_bk import LanguageModel


def test_arms_have_as_many_parameters_as_the_model_they_come_from(toy_model):
    changes = named_arms(["bk", "transformer"]) | {
        "hybrid": {"attention_every": 2},
        "decay": {"dynamics": "decay_only"},
    }
    arms = make_arms(toy_model, changes)
    assert [arm.name for arm in arms] == list(changes)
    wanted = LanguageModel(toy_model).num_parameters(embeddings=False)
    for arm in arms:
        assert LanguageModel(arm.model).num_parameters(embeddings=False) == pytest.approx(wanted, rel=0.02)
    assert [arm.model.mixers for arm in arms[:3]] == [
        ("resolvent",) * 2,
        ("attention",) * 2,
        ("resolvent", "attention"),
    ]
    assert "dynamics=decay_only" in arms[3].description and "rotary_base" not in arms[3].description
    # Rows from before these were the default leave them out, so rows from now on name them.
    assert "key_shift=True" in arms[0].description and "key_shift" not in arms[1].description


def test_unequal_arms_are_refused(toy_model):
    larger = dataclasses.replace(toy_model, feed_forward_dim=80)
    with pytest.raises(ConfigError, match=r"'b' has .* and 'a' has .* expected at most 2%"):
        check_equal_parameters([Arm("a", toy_model), Arm("b", larger)])


def test_bad_names_tell_the_nearest(toy_model):
    with pytest.raises(ConfigError, match="did you mean 'mamba2'"):
        named_arms(["mamba-2"])
    with pytest.raises(ConfigError, match="'x': Unknown field 'dynamic'; did you mean 'dynamics'"):
        make_arms(toy_model, {"x": {"dynamic": "exact"}})
    with pytest.raises(ConfigError, match="no models"):
        make_arms(toy_model, {})


def test_hybrids_belong_to_their_mixers():
    for name, changes in ARMS.items():
        assert ("attention_every" in changes) == name.endswith("-hybrid")
