"""Runs carried out one after the other, or several at once in processes that share the machine."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from resnet_bk.experiments.corpora import CorpusSource, ExperimentCorpus
from resnet_bk.experiments.trial import Trial, TrialResult, run_trial

Runnable = Callable[[], Sequence[tuple[str, Trial]]]
"""Keys and runs that may be started now; what is running already may be among them."""
Finished = Callable[[str, Trial, TrialResult], None]


def run_trials(
    runnable: Runnable,
    finished: Finished,
    *,
    source: CorpusSource,
    corpus: ExperimentCorpus,
    work_dir: Path,
    parallel: int = 1,
    deadline: float = math.inf,
) -> bool:
    """Whether everything that `runnable` offered was run, and not stopped by the deadline.

    Args:
        runnable: asked again after every result, since what is worth running may depend on it.
        finished: told every result, in this process.
        source: for other processes to open the corpus from.
        corpus: the same, opened.
        work_dir: each run keeps what it needs to continue in a folder of its key.
        parallel: runs at once; with one, everything happens in this process.
        deadline: value of `time.monotonic()` at which to stop, with the runs of the moment kept for later.
    """
    if parallel == 1:
        return _one_by_one(runnable, finished, corpus, work_dir, deadline)
    # The clock may start at another zero in another process.
    until = math.inf if deadline == math.inf else time.time() + deadline - time.monotonic()
    threads = max(1, torch.get_num_threads() // parallel)
    with _pool(parallel, (source, threads, os.getpid())) as pool:
        running: dict[Future[TrialResult | None], tuple[str, Trial]] = {}
        in_time = True
        while True:
            busy = {key for key, _ in running.values()}
            for key, trial in runnable() if in_time and time.monotonic() < deadline else ():
                if key not in busy and len(running) < parallel:
                    running[pool.submit(_in_worker, trial, work_dir / key, until)] = key, trial
                    busy.add(key)
            if not running:
                return in_time and not runnable()
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                key, trial = running.pop(future)
                result = future.result()
                if result is None:
                    in_time = False
                else:
                    finished(key, trial, result)


def _one_by_one(
    runnable: Runnable, finished: Finished, corpus: ExperimentCorpus, work_dir: Path, deadline: float
) -> bool:
    while offered := runnable():
        key, trial = offered[0]
        if time.monotonic() >= deadline:
            return False
        result = run_trial(trial, corpus, folder=work_dir / key, deadline=deadline)
        if result is None:
            return False
        finished(key, trial, result)
    return True


@contextmanager
def _pool(workers: int, arguments: tuple) -> Iterator[ProcessPoolExecutor]:
    # A forked process cannot use a GPU that its parent has touched.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=arguments)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


_corpus: ExperimentCorpus
_parent: int


def _start_worker(source: CorpusSource, threads: int, parent: int) -> None:
    """Open what every run of this process reads."""
    global _corpus, _parent
    torch.set_num_threads(threads)
    _corpus, _parent = source.open(), parent


def _in_worker(trial: Trial, folder: Path, until: float) -> TrialResult | None:
    """The result of a run in this process."""
    deadline = math.inf if until == math.inf else time.monotonic() + until - time.time()
    return run_trial(trial, _corpus, folder=folder, deadline=deadline, abandoned=partial(_orphaned, _parent))


def _orphaned(parent: int) -> bool:
    """Whether the process that started this one is gone, so that nobody waits for the result."""
    return os.getppid() != parent
