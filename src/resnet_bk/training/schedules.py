"""Learning rate as a function of the step."""

from __future__ import annotations

import math

from resnet_bk.training.config import TrainingConfig


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Linear warm-up reaches the peak with its last step; the last step of the run has the final rate. With
    `p` the share of the steps after warm-up that are done, 0 < p <= 1, and `r` the final over the peak rate:

        cosine    peak * (r + (1 - r) * (1 + cos(pi p)) / 2)
        wsd       peak, then linear from peak to r * peak over the last `decay_fraction` of the run
        constant  peak

    A run shorter than its warm-up ends inside it.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    final = config.minimum_learning_rate_ratio
    if config.schedule == "cosine":
        done = (step + 1 - config.warmup_steps) / (config.steps - config.warmup_steps)
        return config.learning_rate * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)
    if config.schedule == "wsd":
        decay_steps = min(round(config.decay_fraction * config.steps), config.steps - config.warmup_steps)
        decayed = step + 1 - (config.steps - decay_steps)
        if decayed > 0:
            return config.learning_rate * (1 - (1 - final) * decayed / decay_steps)
    return config.learning_rate
