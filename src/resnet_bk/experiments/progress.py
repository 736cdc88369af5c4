"""How far a run is, kept on disk so that it continues exactly."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from resnet_bk.errors import CheckpointError
from resnet_bk.experiments.batches import TrainingBatches
from resnet_bk.models.resnet_bk import LanguageModel, ModelState
from resnet_bk.training.checkpoint import newest_intact_checkpoint
from resnet_bk.training.random_state import random_state, restore_random_state
from resnet_bk.training.saving.saver import save_checkpoint
from resnet_bk.training.saving.state import load_state

_CARRIED = "carried-{step:06d}.safetensors"


@dataclass
class RunProgress:
    """Everything about a run that is neither a tensor nor its batches, in plain JSON types."""

    step: int = 0
    """Optimizer steps done."""
    nats: float = 0.0
    """Sum of the losses of the steps since the last point of the curve."""
    summed_steps: int = 0
    """Those steps."""
    curve: list[list[float]] = field(default_factory=list)
    """Points (predictions trained on, training loss since the point before, validation loss)."""
    speeds: list[float] = field(default_factory=list)
    """Predictions a second, interval by interval."""
    wall_seconds: float = 0.0
    """Before this process continued the run."""
    peak_bytes: int = 0
    """Most memory of a GPU allocated at once."""


def save_run(
    folder: Path,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    batches: TrainingBatches,
    progress: RunProgress,
    carried: ModelState | None,
) -> None:
    """Write the run into `folder`; what was there before goes once the new part is complete.

    Raises:
        CheckpointError: the disk refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = model.output_weight.device
    if carried is not None:
        tensors = {str(place): tensor.cpu().contiguous() for place, tensor in enumerate(carried.tensors)}
        save_file(tensors, folder / _CARRIED.format(step=progress.step))
    state = {
        "step": progress.step,
        "progress": dataclasses.asdict(progress),
        "batches": batches.state_dict(),
        "random": random_state(device),
        "carried": carried is not None,
    }
    save_checkpoint(folder, model, optimizer, state, keep=1)
    for old in folder.glob("carried-*.safetensors"):
        if old.name != _CARRIED.format(step=progress.step):
            old.unlink()


def load_run(
    folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, batches: TrainingBatches
) -> tuple[RunProgress, ModelState | None]:
    """The progress in `folder` and the carried state, the rest put into the arguments; at step 0 if there is none.

    Raises:
        CheckpointError: damaged, or of another run.
    """
    checkpoint = newest_intact_checkpoint(folder)
    if checkpoint is None:
        return RunProgress(), None
    device = model.output_weight.device
    state = load_state(checkpoint, model, optimizer)
    batches.load_state_dict(state["batches"])
    carried = None
    if state["carried"]:
        carried = _load_carried(folder / _CARRIED.format(step=state["step"]), model)
    # Last: building the state above may draw random numbers.
    restore_random_state(state["random"], device)
    return RunProgress(**state["progress"]), carried


def remove_run(folder: Path) -> None:
    """Forget the run in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)


def _load_carried(file: Path, model: LanguageModel) -> ModelState:
    """The state in `file`, in the form that `model` returns."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged ({error}); remove its folder and run again.") from None
    device = model.output_weight.device
    with torch.no_grad():
        _, form = model.hidden_states(torch.zeros(1, 1, dtype=torch.int64, device=device))
    if len(form.tensors) != len(tensors):
        raise CheckpointError(f"{file} holds {len(tensors)} tensors; the model's state has {len(form.tensors)}.")
    places = iter(range(len(tensors)))

    def saved(_: Tensor) -> Tensor:
        return tensors[str(next(places))].to(device)

    return form.map(saved)
