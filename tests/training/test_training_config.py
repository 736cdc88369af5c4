from __future__ import annotations

import pytest

from resnet_bk import TrainingConfig
from resnet_bk.errors import ConfigError


@pytest.mark.parametrize(
    "field, value",
    [("steps", 0), ("batch_size", 0), ("gradient_accumulation_steps", -1), ("log_every", 0), ("evaluation_tokens", 0),
     ("keep_checkpoints", 0), ("sequence_length", 1), ("warmup_steps", -1), ("weight_decay", -0.1),
     ("gradient_clip_norm", float("nan")), ("learning_rate", 0.0), ("learning_rate", float("nan")), ("beta1", 1.0),
     ("beta2", -0.5), ("decay_fraction", 2.0), ("schedule", "linear"), ("precision", "int8")],
)  # fmt: skip
def test_a_wrong_field_is_named_with_its_value(field, value):
    with pytest.raises(ConfigError, match=rf"training\.{field} is {value!r}|training\.{field} is {value}"):
        TrainingConfig(**{field: value})
