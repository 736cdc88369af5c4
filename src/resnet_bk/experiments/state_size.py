"""Bytes that a model carries from token to token, and models that carry equally many."""

from __future__ import annotations

import dataclasses

import torch

from resnet_bk.errors import ConfigError
from resnet_bk.models.config import ModelConfig
from resnet_bk.models.resnet_bk import LanguageModel

TOLERANCE = 0.05
"""Largest relative difference in state bytes at which two models count as equal."""

# Sizes that kernels and matrix units like come first.
_MULTIPLES = (64, 32, 16, 8, 4, 2)


@torch.no_grad()
def decode_state_bytes(config: ModelConfig, *, context: int = 1) -> int:
    """Bytes of the state of one sequence after `context` tokens, of a model with float32 parameters.

    Measured on a state, not computed from a formula. Only attention depends on `context`.
    """
    model = LanguageModel(dataclasses.replace(config, vocab_size=1, feed_forward_dim=1))
    tokens = context if "attention" in config.mixers else 1
    _, state = model.hidden_states(torch.zeros(1, tokens, dtype=torch.int64))
    return state.num_bytes


def config_with_state_bytes(config: ModelConfig, state_bytes: int, *, context: int = 1) -> ModelConfig:
    """`config` with as large a state as `state_bytes`, within 5 %.

    `state_size` is changed, or `attention_window` where attention is the only mixer: a multiple of 64 if that fits
    within half of the tolerance, else of 32, 16, 8, 4 or (not for Mamba-3) 2. Parameters change with it; make them
    equal afterwards.

    Args:
        config: the model to change.
        state_bytes: of one sequence, as `decode_state_bytes` counts them.
        context: tokens after which the states are compared; counts for attention only.

    Raises:
        ConfigError: no size fits.
    """
    field = "attention_window" if set(config.mixers) == {"attention"} else "state_size"

    def size(value: int) -> int:
        return decode_state_bytes(dataclasses.replace(config, **{field: value}), context=context)

    # The state is linear in either size.
    small, large = (size(value) for value in (16, 32))
    wanted = 16 + 16 * (state_bytes - small) / max(large - small, 1)
    # Half of Mamba-3's channels are turned, in pairs.
    multiples = _MULTIPLES[:-1] if "mamba3" in config.mixers else _MULTIPLES
    for multiple in multiples:
        value = max(1, round(wanted / multiple)) * multiple
        error = abs(size(value) - state_bytes) / state_bytes
        if error <= TOLERANCE / 2 or (multiple == multiples[-1] and error <= TOLERANCE):
            return dataclasses.replace(config, **{field: value})
    raise ConfigError(
        f"No model.{field} gives mixer {config.mixer!r} a state of {state_bytes:,} bytes within {TOLERANCE:.0%} (it "
        f"would have to be {wanted:.0f}); change head_dim, expand or num_layers."
    )
