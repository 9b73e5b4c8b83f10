"""Runs seeds, and tells of those that fail what is needed to see it again."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from tests.simulation.faults import Coverage
from tests.simulation.promises import PromiseBroken
from tests.simulation.world import STEPS_DEFAULT, World

# A directory in memory, where there is one: the simulated disk need not be a slow one.
MEMORY_DIRECTORY = Path("/dev/shm")
EVENTS_SHOWN_MAX = 60


@dataclass(frozen=True)
class Outcome:
    """
    What came of a seed.

    Attributes:
        seed: The seed.
        error: What went wrong, in a line. Empty: nothing.
        report: The error with what happened before, where it arose, and how to replay it.
        broken: The promise that was broken, or the error that came instead, by name.
        events: All that happened.
        coverage: The count of it.
        fingerprint: What stands for all that happened, down to the bytes in the server's change log.
    """

    seed: int
    error: str
    report: str
    broken: str
    events: list[str]
    coverage: Coverage
    fingerprint: str


def run_seed(seed: int, *, steps: int = STEPS_DEFAULT, focus: Mapping[str, float] | None = None) -> Outcome:
    """Run one seed in a directory of its own. See `World` for *focus*."""
    directory = Path(tempfile.mkdtemp(prefix="tidelog-", dir=MEMORY_DIRECTORY if MEMORY_DIRECTORY.is_dir() else None))
    logging.disable(logging.CRITICAL)  # refusals and crashes are what this is about
    try:
        world = World(seed, directory, steps=steps, focus=focus)
        try:
            world.run()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            error_of, report = _summary(error), _report(world, error, steps)
            broken = error.promise.partition(":")[0] if isinstance(error, PromiseBroken) else type(error).__name__
        else:
            error_of = report = broken = ""
        return Outcome(seed, error_of, report, broken, world.events, world.coverage, world.fingerprint)
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(directory)


def run_many(seeds: Iterable[int], *, steps: int = STEPS_DEFAULT, jobs: int | None = None) -> Iterator[Outcome]:
    """Run seeds in processes, as many as there are processors unless *jobs* says otherwise."""
    with ProcessPoolExecutor(jobs or os.cpu_count() or 1, mp_context=get_context("spawn")) as pool:
        try:
            running = [pool.submit(run_seed, seed, steps=steps) for seed in seeds]
            for done in as_completed(running):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _report(world: World, error: Exception, steps: int) -> str:
    return "\n".join(
        [
            "".join(traceback.format_exception(error)),
            f"{world.settings}",
            f"seed {world.seed} failed after {len(world.events)} events; the last ones:",
            *(f"    {event}" for event in world.events[-EVENTS_SHOWN_MAX:]),
            f"{type(error).__name__}: {error}",
            f"replay: python -m tests.simulation --seeds {world.seed} --steps {steps} --trace",
        ]
    )
