"""Hooks into a training run, and the three that every run has: metrics file, TensorBoard, progress."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from resnet_bk.errors import DataError

if TYPE_CHECKING:
    from resnet_bk.errors import InstabilityError
    from resnet_bk.evaluation.perplexity import StreamEvaluation
    from resnet_bk.training.trainer import Trainer

METRICS_FILE = "metrics.jsonl"


class Callback:
    """Does nothing at every hook; override what you need.

    Hooks run in the order in which callbacks were added and may read `trainer.step`, `trainer.tokens`,
    `trainer.config`, and call `trainer.stop()` or `trainer.save_checkpoint()`. A callback that remembers something
    between steps gives it to `state_dict`, so that a resumed run continues with it.
    """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint saves of this callback, in plain JSON types; the same on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; called before `on_train_start`, and only if it was not empty."""

    def on_train_start(self, trainer: Trainer) -> None:
        """Before the first step, after a checkpoint was resumed."""

    def on_step_start(self, trainer: Trainer) -> None:
        """Before the batches of a step are read."""

    def on_gradients(self, trainer: Trainer, loss: float, gradient_norm: float) -> None:
        """The step's loss and unclipped gradients are there and finite, and no parameter has changed yet.

        Raise `InstabilityError` to refuse the step.
        """

    def on_step_end(self, trainer: Trainer) -> None:
        """After every optimizer step and its rows of metrics."""

    def on_instability(self, trainer: Trainer, error: InstabilityError) -> bool:
        """A step was refused. True: the run can go on from the trainer's present state; else the run ends with it."""
        return False

    def on_rollback(self, trainer: Trainer) -> None:
        """The trainer went back to an earlier step; rows beyond it are of an abandoned branch."""

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """A row of metrics is due; `row["kind"]` is `train` or `validation`."""

    def on_evaluate(self, trainer: Trainer, evaluation: StreamEvaluation) -> None:
        """After an evaluation on the validation split."""

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        """After a checkpoint is complete on disk; saved in the background, that is some steps after its own."""

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last step; also when the run ends with an error."""


class MetricsFile(Callback):
    """Appends every row to `metrics.jsonl`; a resumed run drops the rows that its checkpoint had not reached."""

    def on_train_start(self, trainer: Trainer) -> None:
        """Open the file with the rows up to the current step kept."""
        self._file = open_rows(trainer.output_dir / METRICS_FILE, trainer.step)

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Write the row through to the system."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        """Force the rows to disk: a checkpoint never knows more than the file."""
        os.fsync(self._file.fileno())

    def on_rollback(self, trainer: Trainer) -> None:
        """Drop the rows beyond the current step."""
        self._file.close()
        self.on_train_start(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard(Callback):
    """Writes every number of every row as a TensorBoard scalar, against the step."""

    def on_train_start(self, trainer: Trainer) -> None:
        """Open the event file; events beyond the current step are marked as superseded."""
        # Imported here: it takes seconds, and most runs of the library never log.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(trainer.output_dir / "tensorboard"), purge_step=trainer.step + 1)

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Write `kind/name` for every number in the row."""
        for name, value in row.items():
            if name not in ("kind", "step") and isinstance(value, int | float):
                self._writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def on_rollback(self, trainer: Trainer) -> None:
        """Mark events beyond the current step as superseded."""
        self._writer.close()
        self.on_train_start(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        """Close the event file."""
        self._writer.close()


class Progress(Callback):
    """A progress bar on a terminal; one plain line a row elsewhere."""

    def on_train_start(self, trainer: Trainer) -> None:
        """Start the bar at the current step."""
        self._bar = None
        if trainer.step:
            print(f"Resumed at step {trainer.step}.")
        elif trainer.config.resume:
            print(f"No checkpoint in {trainer.output_dir} to resume; starting at step 0.")
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=trainer.config.steps, completed=trainer.step)

    def on_step_end(self, trainer: Trainer) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.step)

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Show the row: training beside the bar, validation above it, or both as lines."""
        text = _describe(row)
        if self._bar is None:
            print(f"step {row['step']}/{trainer.config.steps}  {text}", flush=True)
        elif row["kind"] == "train":
            self._bar.update(self._task, description=text)
        else:
            self._bar.console.print(f"step {row['step']}  {text}", highlight=False)

    def on_train_end(self, trainer: Trainer) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _describe(row: dict[str, Any]) -> str:
    """One line of text for a row."""
    if row["kind"] == "train":
        return f"loss {row['loss']:.4f}  rate {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} tokens/s"
    bits = "" if row["bits_per_byte"] is None else f"  {row['bits_per_byte']:.4f} bits per byte"
    perplexity = "beyond float64" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
    return f"validation loss {row['loss']:.4f}  perplexity {perplexity}{bits}"


def open_rows_of(trainer: Trainer, name: str) -> TextIO:
    """`open_rows` for the file `name` of a run on rank 0; on the other ranks, a file that keeps nothing."""
    if not trainer.ranks.is_main:
        return open(os.devnull, "w", encoding="utf-8")
    return open_rows(trainer.output_dir / name, trainer.step)


def open_rows(path: Path, step: int) -> TextIO:
    """A file of rows, open for more; of the rows in it, those up to `step` are kept.

    A run that starts at step 0 in this folder left no checkpoint to continue: its rows go.
    """
    rows = complete_rows(path) if step and path.exists() else []
    kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= step]
    temporary = path.with_name(f".partial-{path.name}")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
    return path.open("a", encoding="utf-8")


def complete_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line cut off by a kill is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DataError(f"{path}, line {number} is not a row of metrics; repair or move the file.")
        rows.append(row)
    return rows
