"""The callbacks that the section `stability` of a run asks for."""

from __future__ import annotations

import numpy as np
import torch

from resnet_bk.evaluation.perplexity import Tokens
from resnet_bk.training.callbacks import Callback
from resnet_bk.training.config import RunConfig
from resnet_bk.training.spectral import SpectralMonitor
from resnet_bk.training.stability.epsilon import EpsilonSchedule
from resnet_bk.training.stability.monitor import StabilityMonitor
from resnet_bk.training.stability.recovery import AutoRecovery


def stability_callbacks(run: RunConfig, validation: Tokens) -> list[Callback]:
    """The callbacks of a run, in the order in which they work; none by default.

    Args:
        run: what is asked for. The monitor looks at no media where there is no resolvent layer, or the model is
            sharded (fsdp).
        validation: token ids [N]; the first `probe_tokens` of them are the probe.
    """
    config = run.stability
    found: list[Callback] = []
    for field, start in (
        ("absorption_floor", config.absorption_start),
        ("position_epsilon", config.position_epsilon_start),
    ):
        if start is not None:
            found.append(EpsilonSchedule(start, field=field, share=config.epsilon_share, shape=config.epsilon_shape))
    probe = torch.from_numpy(np.asarray(validation[: config.probe_tokens]).astype(np.int64))[None]
    if config.monitor or config.recovery:
        media = "resolvent" in run.model.mixers and run.distributed.strategy != "fsdp"
        found.append(StabilityMonitor(config, probe if media else None))
    if config.spectral_every:
        found.append(SpectralMonitor(probe, every=config.spectral_every))
    if config.recovery:
        found.append(
            AutoRecovery(
                tries=config.tries,
                learning_rate_factor=config.learning_rate_factor,
                calm_steps=config.calm_steps,
                snapshot_every=config.snapshot_every,
                snapshots=config.snapshots,
            )
        )
    return found
