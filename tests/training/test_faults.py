"""A run that is killed, at any moment, ends as one that was not."""

from __future__ import annotations

import multiprocessing
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import run_to_kill
from test_training_checkpoint import OPTIMIZER, WEIGHTS, assert_same_checkpoint, rows

from resnet_bk.errors import CheckpointError
from resnet_bk.training.checkpoint import list_checkpoints

# The server imports the library once; every run is a fork of it, which takes milliseconds to start.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["run_to_kill"])


def start(folder: Path, **fields) -> multiprocessing.context.ForkServerProcess:
    process = PROCESSES.Process(target=run_to_kill.continue_run, args=(str(folder), fields))
    process.start()
    return process


def steps_logged(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def saving(folder: Path) -> bool:
    return any(folder.glob("step-*.partial"))


def wait_until(process, condition) -> None:
    while not condition():
        assert process.is_alive(), "the run ended before it could be killed"
        time.sleep(0.0005)


def kill_repeatedly(folder: Path, moments: list[str], chance: random.Random, **fields) -> list[str]:
    """Start the run again and again and kill it, in the moments given; returns where each kill fell."""
    told = []
    for moment in moments:
        process = start(folder, **fields)
        if moment == "saving":
            # Any number of saves into this part of the run, and any time into that save.
            begun = steps_logged(folder)
            later = begun + chance.randrange(1, 12)
            wait_until(process, lambda later=later: steps_logged(folder) >= later and saving(folder))
            time.sleep(chance.random() * 0.02)
        else:
            wait_until(process, lambda: steps_logged(folder) > 0)
            time.sleep(chance.random() * 0.4)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"{moment}: {process.exitcode}"
        left = [path.name for path in folder.glob("step-*")]
        told.append(f"{moment} at {steps_logged(folder)}: {left}")
    return told


@pytest.mark.parametrize(
    "kills, steps",
    [(2, 80), pytest.param(20, 400, marks=pytest.mark.slow)],
)
def test_a_run_killed_while_training_and_saving_is_bit_identical_to_one_never_killed(tmp_path, kills, steps):
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    # Steps are a bookkeeping field, so both runs are told the same number.
    fields = dict(steps=steps, keep_best_checkpoints=1)
    run_to_kill.build(str(tmp_path / "whole"), **fields).train()
    moments = ["training", "saving"] * (kills // 2)
    told = kill_repeatedly(tmp_path / "killed", moments, chance, **fields)
    process = start(tmp_path / "killed", **fields)
    process.join()
    assert process.exitcode == 0
    name = f"step-{steps:06d}"
    what = f"seed {seed}: {told}"
    assert_same_checkpoint(tmp_path / "whole" / name, tmp_path / "killed" / name)
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed"), what
    assert [p.name for p in list_checkpoints(tmp_path / "whole")] == [
        p.name for p in list_checkpoints(tmp_path / "killed")
    ], what
    assert not saving(tmp_path / "killed")


def _limited(folder: str, limit: int, fields: dict) -> None:
    """The run, in a process whose files may not grow beyond `limit` bytes: as on a full disk, writing fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run_to_kill.continue_run(folder, fields)
    except CheckpointError as error:
        Path(folder, "error").write_text(str(error)[:200])
        sys.exit(2)


@pytest.mark.parametrize(
    "file, asynchronous",
    [
        (OPTIMIZER, True),
        pytest.param(OPTIMIZER, False, marks=pytest.mark.slow),
        pytest.param(WEIGHTS, True, marks=pytest.mark.slow),
        pytest.param(WEIGHTS, False, marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_is_full_during_a_save_keeps_the_checkpoint_before(tmp_path, file, asynchronous):
    fields = dict(schedule="constant", steps=28, evaluate_every=14, asynchronous_checkpoints=asynchronous)
    run_to_kill.build(str(tmp_path / "whole"), **fields).train()
    folder = tmp_path / "full"
    run_to_kill.build(str(folder), **{**fields, "steps": 14}).train()
    before = {path: path.read_bytes() for path in folder.glob("step-000014/**/*") if path.is_file()}
    # Too little for this file; the weights are written before the optimizer, and are smaller.
    limit = (folder / "step-000014" / file).stat().st_size - 1
    process = PROCESSES.Process(target=_limited, args=(str(folder), limit, fields))
    process.start()
    process.join()
    assert process.exitcode == 2
    message = (folder / "error").read_text()
    assert "step-000021 could not be written" in message and "File too large" in message
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000007", "step-000014"]
    assert {path: path.read_bytes() for path in before} == before

    process = start(folder, **fields)
    process.join()
    assert process.exitcode == 0
    assert_same_checkpoint(tmp_path / "whole" / "step-000028", folder / "step-000028")
