"""
Run the simulation with any number of seeds.

python -m tests.simulation --seeds 0-9999
python -m tests.simulation --seeds 17 --trace
python -m tests.simulation --mutations --seeds 0-399
"""

# ruff: noqa: T201 - a program prints

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from tests.simulation.faults import Coverage
from tests.simulation.mutations import MUTATIONS, catch
from tests.simulation.run import run_many
from tests.simulation.world import STEPS_DEFAULT


def _seeds(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _find_mutations(seeds: range, steps: int, jobs: int | None) -> int:
    """Print a table of what found each mistake."""
    missed = 0
    print("| mistake | found by | in world | worlds needed |\n| --- | --- | --- | --- |")
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        found = pool.map(partial(catch, seeds=seeds, steps=steps), range(len(MUTATIONS)))
        for mutation, caught in zip(MUTATIONS, found, strict=True):
            if caught is None:
                missed += 1
                print(f"| {mutation.name} | **nothing** | | more than {len(seeds)} |", flush=True)
            else:
                print(f"| {mutation.name} | {caught.promise} | {caught.seed} | {caught.seed_count} |", flush=True)
    return 1 if missed else 0


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description="Run simulated worlds.")
    parser.add_argument("--seeds", type=_seeds, default=range(100), metavar="FIRST-LAST", help="default 0-99")
    parser.add_argument(
        "--steps", type=int, default=STEPS_DEFAULT, help=f"events in a world (default {STEPS_DEFAULT})"
    )
    parser.add_argument("--jobs", type=int, help="processes (default: as many as processors)")
    parser.add_argument("--trace", action="store_true", help="print every event")
    parser.add_argument("--keep-going", action="store_true", help="run all seeds, and name those that fail")
    parser.add_argument(
        "--mutations", action="store_true", help="put known mistakes into the product, and see that each is found"
    )
    options = parser.parse_args()
    if options.mutations:
        return _find_mutations(options.seeds, options.steps, options.jobs)
    failed = 0
    coverage = Coverage()
    for outcome in run_many(options.seeds, steps=options.steps, jobs=options.jobs):
        coverage.add(outcome.coverage)
        if options.trace:
            print("\n".join(outcome.events))
        if not outcome.error:
            continue
        failed += 1
        if not options.keep_going:
            print(outcome.report, flush=True)
            return 1
        print(f"seed {outcome.seed}: {outcome.error}", outcome.report.splitlines()[-1], sep="\n  ", flush=True)
    print(*coverage.lines(), *(f"never: {hole}" for hole in coverage.holes()), sep="\n")
    print(f"{len(options.seeds):,} seeds of {options.steps} steps, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(_main())
