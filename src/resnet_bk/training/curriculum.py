"""Sequences that grow during a run: the stages, and a loader that goes through them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from resnet_bk.data.loader import Batch, TokenLoader
from resnet_bk.data.shards import TokenDataset
from resnet_bk.data.streams import DocumentLoader, StreamLoader
from resnet_bk.errors import CheckpointError
from resnet_bk.training.config import TrainingConfig


class Stage(NamedTuple):
    """Part of a run with one shape of batches."""

    steps: int | None
    """Optimizer steps; None lasts to the end."""
    sequence_length: int
    """Tokens per sequence."""
    batch_size: int
    """Sequences per forward pass."""


def curriculum_stages(config: TrainingConfig) -> list[Stage]:
    """The stages of a run; the last has `sequence_length` and `batch_size` and lasts to the end.

    With `curriculum_from` the stages before it double in length from there, share the first half of the run equally,
    and hold as many sequences as keep the tokens of a batch constant (rounded down, at least one).
    """
    last = Stage(None, config.sequence_length, config.batch_size)
    if config.curriculum:
        return [*(Stage(*stage) for stage in config.curriculum), last]
    if not config.curriculum_from:
        return [last]
    lengths = []
    length = config.curriculum_from
    while length < config.sequence_length:
        lengths.append(length)
        length *= 2
    tokens = config.sequence_length * config.batch_size
    steps = max(1, config.steps // 2 // max(1, len(lengths)))
    return [*(Stage(steps, length, max(1, tokens // length)) for length in lengths), last]


StageLoader = TokenLoader | StreamLoader | DocumentLoader


def training_batches(dataset: TokenDataset, config: TrainingConfig) -> StageLoader | CurriculumLoader:
    """The batches of a run over `dataset`, in the stages that `config` asks for."""
    loaders = [_stage_batches(dataset, stage, config) for stage in curriculum_stages(config)]
    if len(loaders) == 1:
        return loaders[0]
    return CurriculumLoader(curriculum_stages(config), loaders, batches_per_step=config.gradient_accumulation_steps)


def _stage_batches(dataset: TokenDataset, stage: Stage, config: TrainingConfig) -> StageLoader:
    length, batch_size = stage.sequence_length, stage.batch_size
    if config.carry == "none":
        return TokenLoader(dataset, length, batch_size, seed=config.seed)
    if config.stream == "document":
        return DocumentLoader(dataset, length, batch_size, seed=config.seed)
    return StreamLoader(dataset, length, batch_size, stream_length=config.stream_length, seed=config.seed)


class CurriculumLoader(Iterator[Batch]):
    """Endless batches whose shape follows the stages; a loader of its own for each stage, so that streams end with it.

    Args:
        stages: as `curriculum_stages` returns them.
        loaders: of the stages, in order.
        batches_per_step: `gradient_accumulation_steps`; stages change between steps only.
    """

    def __init__(self, stages: Sequence[Stage], loaders: Sequence[StageLoader], *, batches_per_step: int) -> None:
        self._stages, self._loaders, self._batches_per_step = stages, loaders, batches_per_step
        self._drawn = 0

    @property
    def stage(self) -> Stage:
        """Of the next batch."""
        return self._stages[self._place()]

    def __next__(self) -> Batch:
        batch = next(self._loaders[self._place()])
        self._drawn += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Position of the next batch, in plain JSON types."""
        return {"drawn": self._drawn, "stages": [loader.state_dict() for loader in self._loaders]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` returned; raises `CheckpointError` for other data or stages."""
        drawn, stages = state.get("drawn"), state.get("stages")
        if not isinstance(drawn, int) or not isinstance(stages, list) or len(stages) != len(self._loaders):
            raise CheckpointError(
                f"The checkpoint was not written with these {len(self._loaders)} stages of training.curriculum; set it "
                "back to resume, or start anew in another training.output_dir."
            )
        for loader, place in zip(self._loaders, stages, strict=True):
            loader.load_state_dict(place)
        self._drawn = drawn

    def _place(self) -> int:
        """Number of the stage of the next batch."""
        step = self._drawn // self._batches_per_step
        for number, stage in enumerate(self._stages):
            if stage.steps is None or step < stage.steps:
                return number
            step -= stage.steps
        raise AssertionError("the last stage lasts to the end")
