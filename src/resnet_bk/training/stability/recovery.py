"""`AutoRecovery`: back to a good state, past the batches that led astray, at a lower rate, so many times."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_bk.errors import ConfigError, InstabilityError, RecoveryError
from resnet_bk.training.callbacks import Callback
from resnet_bk.training.checkpoint import list_checkpoints
from resnet_bk.training.stability.snapshot import Snapshot

if TYPE_CHECKING:
    from resnet_bk.training.trainer import Trainer

RECOVERY_FILE = "recovery.jsonl"


class AutoRecovery(Callback):
    """Rolls a run back when a step is refused (`InstabilityError`), and lets it go on differently.

    The k-th rollback in a row goes back to the k-th newest good state (snapshots in memory, then checkpoints on disk),
    leaves out the batches of the last 2^(k-1) steps up to the failed one when the run comes by them again, and
    multiplies the learning rate by `learning_rate_factor`^k. The rate returns geometrically over the `calm_steps` steps
    after the failed one; then the next failure is the first again. Everything else of the run, the order of the data
    and the random numbers included, is as it was.

    Snapshots never reach behind the newest checkpoint on disk, so that what is on disk is always on the branch that the
    run is on; checkpoints newer than one that the run went back to are removed. Every action is a row of
    `recovery.jsonl`, forced to disk, which is only ever appended to.

    Args:
        tries: rollbacks in a row before giving up, >= 1.
        learning_rate_factor: in (0, 1].
        calm_steps: >= 1.
        snapshot_every: steps between snapshots in the machine's memory; 0 takes none but uses checkpoints.
        snapshots: newest snapshots kept, >= 1.

    Raises:
        ConfigError: a number outside its domain.
        RecoveryError: from the run, when the tries are used up or there is nothing to go back to.

    Cost: a snapshot copies parameters and optimizer state to the machine's memory and holds them there.
    """

    def __init__(
        self,
        *,
        tries: int = 3,
        learning_rate_factor: float = 0.5,
        calm_steps: int = 200,
        snapshot_every: int = 50,
        snapshots: int = 2,
    ) -> None:
        for name, value, least in (
            ("tries", tries, 1),
            ("calm_steps", calm_steps, 1),
            ("snapshot_every", snapshot_every, 0),
            ("snapshots", snapshots, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} is {value}; expected a whole number >= {least}.")
        if not 0 < learning_rate_factor <= 1:
            raise ConfigError(f"learning_rate_factor is {learning_rate_factor}; expected a number in (0, 1].")
        self.tries, self.learning_rate_factor, self.calm_steps = tries, learning_rate_factor, calm_steps
        self.snapshot_every, self.snapshots = snapshot_every, snapshots
        self._snapshots: list[Snapshot] = []
        self._failures = 0
        self._failed_step = 0
        self._draw = 0
        self._skipped: set[int] = set()

    def on_train_start(self, trainer: Trainer) -> None:
        """Open the log; the state that the run starts from is good."""
        path = trainer.output_dir / RECOVERY_FILE if trainer.ranks.is_main else Path(os.devnull)
        self._file = path.open("a", encoding="utf-8")
        self._snapshots.clear()
        if self.snapshot_every:
            self._take(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        """Close the log."""
        self._file.close()

    def on_step_start(self, trainer: Trainer) -> None:
        """Set the rate, and pass over the batches that are to be left out."""
        if self._failures:
            # Counted from the failed step on; the steps that are repeated before it run at the lowest rate.
            done = max(0, trainer.step - self._failed_step) / self.calm_steps
            trainer.learning_rate_factor = self.learning_rate_factor ** (self._failures * max(0.0, 1 - done))
        while self._draw in self._skipped:
            for _ in range(trainer.config.gradient_accumulation_steps):
                next(trainer.train_loader)
            trainer.carry.reset()  # what follows a gap does not continue it
            self._draw += 1
        self._draw += 1

    def on_step_end(self, trainer: Trainer) -> None:
        """Count a calm step; take a snapshot when one is due."""
        if self._failures and trainer.step >= self._failed_step + self.calm_steps:
            self._log(trainer, "calm", rollbacks=self._failures)
            self._failures = 0
            trainer.learning_rate_factor = 1.0
        if self.snapshot_every and trainer.step % self.snapshot_every == 0:
            self._take(trainer)

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        """From here on the run never goes back behind this checkpoint but to an older checkpoint."""
        self._snapshots = [snapshot for snapshot in self._snapshots if snapshot.step >= checkpoint_step(folder)]

    def on_instability(self, trainer: Trainer, error: InstabilityError) -> bool:
        """Go back, unless the tries are used up."""
        failed, draw = trainer.step + 1, self._draw - 1
        if self._failures >= self.tries:
            self._log(trainer, "give up", failed_step=failed, rollbacks=self._failures, error=str(error))
            raise RecoveryError(
                f"Training step {failed} failed after {self._failures} rollbacks in a row (stability.tries): {error} "
                f"Every action is in {RECOVERY_FILE}; lower training.learning_rate or look at the data."
            ) from error
        places = self._places(trainer)
        if not places:
            self._log(trainer, "give up", failed_step=failed, rollbacks=self._failures, error=str(error))
            raise RecoveryError(
                f"Training step {failed} failed, and there is neither a snapshot nor a checkpoint to go back to; set "
                f"stability.snapshot_every or training.checkpoint_every. {error}"
            ) from error
        self._failures += 1
        self._failed_step = failed
        left_out = range(max(0, draw + 1 - 2 ** (self._failures - 1)), draw + 1)
        self._skipped.update(left_out)
        place = places[min(self._failures, len(places)) - 1]
        kept = self._failures, self._failed_step, self._skipped
        trainer.roll_back(place)
        # The place itself is part of that state; what was learned since is not.
        self._failures, self._failed_step, self._skipped = kept
        self._snapshots = [snapshot for snapshot in self._snapshots if snapshot.step <= trainer.step]
        self._log(
            trainer,
            "roll back",
            failed_step=failed,
            error=str(error),
            to="snapshot" if isinstance(place, Snapshot) else place.name,
            rollbacks=self._failures,
            learning_rate_factor=self.learning_rate_factor**self._failures,
            left_out=list(left_out),
        )
        return True

    def state_dict(self) -> dict[str, Any]:
        """Steps' worth of batches read, those to leave out, and the count of failures."""
        return {
            "draw": self._draw,
            "skipped": sorted(self._skipped),
            "failures": self._failures,
            "failed_step": self._failed_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        self._draw, self._skipped = state["draw"], set(state["skipped"])
        self._failures, self._failed_step = state["failures"], state["failed_step"]

    def _places(self, trainer: Trainer) -> list[Snapshot | Path]:
        """Where the run can go back to, newest first."""
        snapshots = [snapshot for snapshot in reversed(self._snapshots) if snapshot.step <= trainer.step]
        held = {snapshot.step for snapshot in snapshots}
        folders = trainer.ranks.on_main(lambda: list_checkpoints(trainer.output_dir))[::-1]
        return [*snapshots, *(folder for folder in folders if checkpoint_step(folder) not in held)]

    def _take(self, trainer: Trainer) -> None:
        # The oldest goes first: there is never memory for one more.
        del self._snapshots[: max(0, len(self._snapshots) + 1 - self.snapshots)]
        self._snapshots.append(Snapshot.take(trainer))

    def _log(self, trainer: Trainer, action: str, **details: Any) -> None:
        row = {"kind": "recovery", "action": action, "step": trainer.step, "tokens": trainer.tokens, **details}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if trainer.ranks.is_main:
            os.fsync(self._file.fileno())


def checkpoint_step(folder: Path) -> int:
    """The step of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))
