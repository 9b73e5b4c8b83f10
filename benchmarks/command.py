"""The command line: `python -m benchmarks` measures, `python -m benchmarks profile` explains."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from rich.console import Console
from tests.postgres import PostgresMissing, running_cluster

from benchmarks import machine, tables
from benchmarks.files import measure_file
from benchmarks.load import measure_pings, measure_situations, measure_storm
from benchmarks.measurements import Pair, measure
from benchmarks.narrow import measure_narrow
from benchmarks.profile_runs import What, profile
from benchmarks.profiling import Clock
from benchmarks.resume import INTERRUPTIONS, RESUMED_RATIO_MAX, measure_resume
from benchmarks.steady import SAMPLES, measure_steady
from benchmarks.summary import as_data, summarize

REPEAT_SMALL: Final = 5
REPEAT_LARGE: Final = 3
SMALL_MAX: Final = 10_000
SIZE_MIN: Final = 100
TABLE_WIDTH: Final = 200

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
_progress = Console(stderr=True, highlight=False)

StoreKind = Literal["lmdb", "postgres"]
Database = Callable[[], AbstractContextManager[str | None]]
Folder = Annotated[Path | None, typer.Option("--dir", help="Where to make temporary folders.")]


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    sizes: Annotated[str, typer.Option(help="How many objects, several with commas.")] = "10000,100000",
    repeat: Annotated[
        int | None, typer.Option(min=1, help="How often; 5 times up to 10,000 objects and 3 times above.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Begin no further repeat after this time.")] = 10.0,
    folder: Folder = None,
    *,
    store: Annotated[
        StoreKind, typer.Option(help="Where the server keeps its data. postgres: in one that is run for this.")
    ] = "lmdb",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything measured as JSON.")] = False,
) -> None:
    """Measure tidelog, and the bare pipe beside it."""
    if context.invoked_subcommand is not None:
        return
    with _databases(store) as database:
        _run(_sizes(sizes), repeat, minutes, database, folder, as_json=as_json)


def _run(
    chosen: list[int], repeat: int | None, minutes: float, database: Database, folder: Path | None, *, as_json: bool
) -> None:
    end = time.monotonic() + minutes * 60
    about = machine.describe(folder or Path(tempfile.gettempdir()))
    results = {}
    for size in chosen:
        pairs: list[Pair] = []
        times = repeat or (REPEAT_SMALL if size <= SMALL_MAX else REPEAT_LARGE)
        for number in range(times):
            if number and time.monotonic() > end:
                _progress.print(f"{size:,} objects: out of time after {number} of {times} repeats")
                break
            with tempfile.TemporaryDirectory(prefix="tidelog-benchmark-", dir=folder) as name, database() as store:
                for pair in measure(size, Path(name), store=store):
                    _progress.print(
                        f"{size:,} objects, {number + 1} of {times}: {pair.name} {pair.tidelog.work.seconds:.3f} s, "
                        f"bare pipe {pair.bare.work.seconds:.3f} s"
                    )
                    pairs.append(pair)
        results[size] = pairs
    if as_json:
        measured = {
            str(size): {"summary": as_data(summarize(pairs)), "samples": as_data(pairs)}
            for size, pairs in results.items()
        }
        print(json.dumps({"machine": about, "sizes": measured}, indent=1))
        return
    console = Console(width=TABLE_WIDTH)
    tables.show_machine(console, about)
    for size, pairs in results.items():
        tables.show(console, size, summarize(pairs))


@contextmanager
def _databases(store: StoreKind) -> Iterator[Database]:
    """Give what gives the place of an empty store; none: the one that the measurement itself makes."""
    if store == "lmdb":
        yield nullcontext
        return
    try:
        with running_cluster(durable=True) as cluster:
            yield cluster.database
    except PostgresMissing as error:
        raise typer.BadParameter(str(error), param_hint="--store") from error


@app.command("profile")
def run_profile(
    what: Annotated[What, typer.Argument(help="What to look at.")],
    size: Annotated[int, typer.Option(min=1, help="How many objects.")] = 100_000,
    clock: Annotated[Clock, typer.Option(help="cpu: processor time of each thread; wall: waits too.")] = "cpu",
    folder: Folder = None,
) -> None:
    """Show which functions take the time, on both sides. Needs Python 3.11."""
    if sys.version_info >= (3, 12):
        _progress.print("From Python 3.12 on cProfile runs in one thread only: profile with Python 3.11.")
        raise typer.Exit(2)
    print(profile(what, size, clock, folder), end="")


@app.command("narrow")
def run_narrow(
    sizes: Annotated[str, typer.Option(help="How many objects, several with commas.")] = "5000,50000",
    repeat: Annotated[int, typer.Option(min=1, help="How often.")] = 5,
    folder: Folder = None,
) -> None:
    """Measure a replica that sees 500 objects of tenants of different sizes, with and without an index."""
    console = Console(width=TABLE_WIDTH)
    tables.show_machine(console, machine.describe(folder or Path(tempfile.gettempdir())))
    tables.show_narrow(console, list(measure_narrow(_sizes(sizes), repeat, folder)))


@app.command("load")
def run_load(
    readers: Annotated[int, typer.Option(min=2, help="Sessions that read nothing, at once.")] = 1_000,
    reconnects: Annotated[int, typer.Option(min=1, help="Sessions that are cut, one after the other.")] = 10_000,
    clients: Annotated[int, typer.Option(min=2, help="Replicas that come at once to a server with 50 places.")] = 300,
    operations: Annotated[
        int, typer.Option(min=1_000, help="Operations of the upload beside health checks.")
    ] = 100_000,
    folder: Folder = None,
) -> None:
    """Measure a server with many sessions: its memory, and how it serves those who go on."""
    console = Console(width=TABLE_WIDTH)
    tables.show_machine(console, machine.describe(folder or Path(tempfile.gettempdir())))
    with tempfile.TemporaryDirectory(prefix="tidelog-benchmark-", dir=folder) as name:
        situations = []
        for one in measure_situations(Path(name), readers, reconnects):
            _progress.print(f"{one.name}: {one.own_bytes / 1e6:.0f} MB")
            situations.append(one)
        tables.show_situations(console, situations)
        tables.show_storm(console, measure_storm(Path(name), clients))
        tables.show_pings(console, *measure_pings(Path(name), operations))


@app.command("steady")
def run_steady(
    rounds: Annotated[int, typer.Option(min=SAMPLES, help="How often the replicas synchronize.")] = 6_000,
    folder: Folder = None,
) -> None:
    """Measure the memory of a server and replicas that synchronize small changes again and again."""
    console = Console(width=TABLE_WIDTH)
    tables.show_machine(console, machine.describe(folder or Path(tempfile.gettempdir())))
    with tempfile.TemporaryDirectory(prefix="tidelog-benchmark-", dir=folder) as name:
        tables.show_steady(console, list(measure_steady(Path(name), rounds)))


@app.command("resume")
def run_resume(
    objects: Annotated[int, typer.Option(min=SIZE_MIN, help="How many objects.")] = 1_000_000,
    interruptions: Annotated[int, typer.Option(min=1, help="How often the download is interrupted.")] = INTERRUPTIONS,
    seed: Annotated[int, typer.Option(help="When it is.")] = 1,
    folder: Folder = None,
) -> None:
    """Measure what an initial download costs that is cut, and whose processes are killed, beside one at one go."""
    console = Console(width=TABLE_WIDTH)
    tables.show_machine(console, machine.describe(folder or Path(tempfile.gettempdir())))
    measured = measure_resume(objects, folder=folder, seed=seed, interruptions=interruptions)
    tables.show_resumed(console, measured)
    if measured.states[0] != measured.states[1]:
        _progress.print("the replicas do not show the same")
        raise typer.Exit(1)
    if measured.ratio > RESUMED_RATIO_MAX:
        _progress.print(f"that is more than {RESUMED_RATIO_MAX} times the bytes")
        raise typer.Exit(1)


@app.command("file")
def run_file(
    way: Annotated[Literal["up", "down"], typer.Option(help="Which way it goes.")] = "up",
    megabytes: Annotated[int, typer.Option(min=1, help="How large it is.")] = 200,
    kbit: Annotated[int, typer.Option(min=100, help="How many kbit the path takes in a second.")] = 1_000,
    cuts: Annotated[int, typer.Option(min=0, help="How often the path is cut.")] = 5,
    folder: Folder = None,
) -> None:
    """Measure what a large file costs on a slow path that is cut, and how long small objects take beside it."""
    console = Console(width=TABLE_WIDTH)
    tables.show_machine(console, machine.describe(folder or Path(tempfile.gettempdir())))
    size = megabytes * 1_000_000
    tables.show_file(console, measure_file(way, size, bytes_per_second=kbit * 125, cuts=cuts, folder=folder))


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(one) for one in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"sizes are numbers with commas between them, got {text!r}") from None
    if min(sizes) < SIZE_MIN:
        raise typer.BadParameter(f"at least {SIZE_MIN} objects, got {min(sizes)}")
    return sizes


def main() -> None:
    # A child ends when its parent does; the temporary folders are removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app(prog_name="python -m benchmarks")
