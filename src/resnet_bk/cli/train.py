"""`resnet-bk train`: a run from a YAML configuration."""

from __future__ import annotations

from collections.abc import Sequence

from resnet_bk.cli.arguments import parse_run_config

ENDED_EARLY = 75
"""EX_TEMPFAIL of sysexits.h: a checkpoint was saved; the same command with training.resume continues."""
DESCRIPTION = "Train a model. The run's folder receives metrics.jsonl, TensorBoard events and checkpoints."


def run(arguments: Sequence[str]) -> int:
    """Exit status of `resnet-bk train` with these arguments; 75 if the run was told to end before its last step."""
    config = parse_run_config("train", DESCRIPTION, arguments)

    from resnet_bk.training.run import train_run

    result = train_run(config)
    done = result.training
    if result.is_main:
        print(f"Step {done.step}, {done.tokens:,} tokens read.")
        print(f"Loss curve: {result.loss_curve}\nModel: {done.checkpoint}")
    return 0 if done.step == config.training.steps else ENDED_EARLY
