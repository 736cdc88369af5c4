"""Models of equal size: the feed-forward makes up for what one mixer has less or more of than another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from resnet_bk.errors import ConfigError
from resnet_bk.models.config import MixerKind, ModelConfig
from resnet_bk.models.resnet_bk import LanguageModel

TOLERANCE = 0.02
"""Largest relative difference in parameters at which two models count as equally large."""

# Widths that matrix units like come first; the finer ones are for small models.
_MULTIPLES = (64, 16, 4, 1)


def num_parameters(config: ModelConfig) -> int:
    """Parameters of `LanguageModel(config)` without embeddings and head, counted without building it in memory."""
    with torch.device("meta"):
        return LanguageModel(config).num_parameters(embeddings=False)


def with_mixer(config: ModelConfig, mixer: MixerKind, **changes: Any) -> ModelConfig:
    """`config` with another mixer and as many parameters, embeddings and head not counted.

    The width of the feed-forward follows: a multiple of 64 if that agrees within 1 %, else of 16, 4 or 1.

    Args:
        config: the model to match.
        mixer: `ModelConfig.mixer` of the result.
        **changes: other fields of the result, such as `attention_every`.

    Raises:
        ConfigError: no width makes the parameters agree within 2 %, `feed_forward_dim` is among the changes, or a
            field that does not exist or fit.
    """
    if "feed_forward_dim" in changes:
        raise ConfigError(
            "feed_forward_dim cannot be changed here: it is what makes the parameters agree; leave it out."
        )
    wanted = num_parameters(config)
    changed = ModelConfig.from_dict({**config.to_dict(), **changes, "mixer": mixer})
    found = num_parameters(changed)
    per_channel = num_parameters(replace(changed, feed_forward_dim=changed.feed_forward_dim + 1)) - found
    width = changed.feed_forward_dim + (wanted - found) / per_channel
    for multiple in _MULTIPLES:
        result = replace(changed, feed_forward_dim=max(1, multiple * round(width / multiple)))
        error = abs(num_parameters(result) - wanted) / wanted
        if error <= TOLERANCE / 2 or (multiple == 1 and error <= TOLERANCE):
            return result
    raise ConfigError(
        f"No feed_forward_dim gives mixer {mixer!r} the {wanted:,} parameters of mixer {config.mixer!r} within "
        f"{TOLERANCE:.0%} (it would have to be {width:.0f}); change head_dim, state_size or expand too."
    )
