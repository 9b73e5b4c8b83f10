"""Tables: the summaries for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks.children import Usage
from benchmarks.files import Travelled
from benchmarks.load import Situation, Storm
from benchmarks.narrow import Narrow
from benchmarks.resume import Resumed
from benchmarks.steady import Held
from benchmarks.summary import Side, Spread, Summary


def show_machine(console: Console, machine: Mapping[str, str]) -> None:
    for name, value in machine.items():
        console.print(f"- {name}: {value}", highlight=False)


def show(console: Console, size: int, summaries: Sequence[Summary]) -> None:
    """Print what was measured at one size."""
    for title, table in (
        ("speed, median (least-most)", _speed(summaries)),
        ("cost, tidelog / bare pipe", _cost(summaries)),
    ):
        _print(console, f"{size:,} objects: {title}", table)


def show_narrow(console: Console, measured: Sequence[Narrow]) -> None:
    """Print what replicas took that see a few objects, and how that grows with the tenant."""
    table = _table("", "objects of the tenant", "first", "ratio", "delta", "ratio")
    for is_indexed in (True, False):
        smallest = next(one for one in measured if one.is_indexed is is_indexed)
        for one in measured:
            if one.is_indexed is is_indexed:
                table.add_row(
                    "with an index" if is_indexed else "without",
                    f"{one.objects:,}",
                    f"{one.first_seconds * 1e3:.1f} ms",
                    f"{one.first_seconds / smallest.first_seconds:.2f}",
                    f"{one.delta_seconds * 1e3:.1f} ms",
                    f"{one.delta_seconds / smallest.delta_seconds:.2f}",
                )
    _print(console, "a replica that sees 500 of them; ratios to the smallest tenant", table)


def show_situations(console: Console, measured: Sequence[Situation]) -> None:
    """Print what a server with many sessions takes; ratios to the first situation."""
    table = _table("", "own MB", "ratio", "open files", "store MB", "sync: median", "most", "ping: median", "most")
    for one in measured:
        table.add_row(
            one.name,
            f"{one.own_bytes / 1e6:,.0f}",
            f"{one.own_bytes / measured[0].own_bytes:.2f}",
            f"{one.files:,}",
            f"{one.store_bytes / 1e6:,.1f}",
            *(f"{seconds * 1e3:.1f} ms" for seconds in (*one.seconds, *one.ping_seconds)),
        )
    _print(console, "a server, and a replica that goes on with small synchronizations", table)


def show_storm(console: Console, storm: Storm) -> None:
    """Print how a crowd was served."""
    table = _table("clients at once", "places", "put off", "failed", "first", "p50", "p99", "last")
    moments = [storm.seconds[int(part * (len(storm.seconds) - 1))] for part in (0.0, 0.5, 0.99, 1.0)]
    table.add_row(
        f"{storm.clients:,}",
        str(storm.places),
        f"{storm.put_off:,}",
        str(storm.failed),
        *(f"{seconds:.2f} s" for seconds in moments),
    )
    _print(console, "a crowd after an outage", table)


def show_pings(console: Console, alone: Sequence[float], beside: Sequence[float]) -> None:
    """Print how long health checks take."""
    table = _table("health checks", "count", "p50", "p99", "most")
    for name, pings in (("of a server at rest", alone), ("beside an upload", beside)):
        moments = [pings[int(part * (len(pings) - 1))] for part in (0.5, 0.99, 1.0)]
        table.add_row(name, str(len(pings)), *(f"{seconds * 1e3:.1f} ms" for seconds in moments))
    _print(console, "who waits for the writer", table)


def show_steady(console: Console, measured: Sequence[Held]) -> None:
    """Print what processes hold as they go on; ratios to the first."""
    table = _table("rounds", "server: own MB", "ratio", "writer: own MB", "ratio", "reader: own MB", "ratio")
    for held in measured:
        sizes = zip(held[1:], measured[0][1:], strict=True)
        cells = (cell for now, first in sizes for cell in (f"{now / 1e6:.1f}", f"{now / first:.2f}"))
        table.add_row(f"{held.rounds:,}", *cells)
    _print(console, "memory of processes that synchronize small changes again and again", table)


def show_resumed(console: Console, measured: Resumed) -> None:
    """Print what a download took at one go, and with interruptions."""
    table = _table("", "interruptions", "bytes", "ratio", "lost each time", "time", "state")
    whole, resumed = (state[:12] for state in measured.states)
    table.add_row("at one go", "0", f"{measured.whole_bytes:,}", "", "", f"{measured.whole_seconds:.1f} s", whole)
    table.add_row(
        "interrupted",
        str(len(measured.interruptions)),
        f"{measured.resumed_bytes:,}",
        f"{measured.ratio:.4f}",
        f"{measured.lost_bytes:,}",
        f"{measured.resumed_seconds:.1f} s",
        resumed,
    )
    _print(console, f"an initial download of {measured.objects:,} objects", table)


def show_file(console: Console, measured: Travelled) -> None:
    """Print what a large file cost on its way."""
    table = _table(
        "way", "cuts", "bytes on the path", "ratio", "time", "own memory", "objects beside it", "their wait"
    )
    table.add_row(
        measured.way,
        str(measured.cuts),
        f"{measured.path_bytes:,}",
        f"{measured.path_bytes / measured.size:.4f}",
        f"{measured.seconds:.0f} s",
        f"{measured.own_bytes / 1e6:.1f} MB",
        str(len(measured.waits)),
        f"{median(measured.waits):.1f} s, {max(measured.waits):.1f} at the most",
    )
    _print(console, f"a file of {measured.size:,} bytes", table)


def _print(console: Console, title: str, table: Table) -> None:
    console.print(f"\n{title}\n", highlight=False)
    with console.capture() as capture:
        console.print(table)
    # The box draws empty lines above and below.
    console.out(capture.get().strip(), highlight=False)


def _speed(summaries: Sequence[Summary]) -> Table:
    table = _table("", "operations", "repeats", "time", "per second", "bare pipe: time", "per second", "ratio")
    for one in summaries:
        table.add_row(
            one.name,
            f"{one.operations:,}",
            str(one.repeats),
            _seconds(one.tidelog.seconds),
            _rate(one.tidelog),
            _seconds(one.bare.seconds),
            _rate(one.bare),
            f"{one.ratio.median:.2f} ({one.ratio.least:.2f}-{one.ratio.most:.2f})",
        )
    return table


def _cost(summaries: Sequence[Summary]) -> Table:
    table = _table(
        "", "client: peak MB", "own MB", "CPU s", "server: peak MB", "own MB", "CPU s", "sent kB", "received kB"
    )
    for one in summaries:
        ours, bare = one.tidelog, one.bare
        table.add_row(
            one.name,
            *_usage(ours.client, bare.client),
            *_usage(ours.server, bare.server),
            _both(ours.sent_bytes / 1e3, bare.sent_bytes / 1e3),
            _both(ours.received_bytes / 1e3, bare.received_bytes / 1e3),
        )
    return table


def _table(*headings: str) -> Table:
    table = Table(box=MARKDOWN)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table


def _usage(ours: Usage | None, bare: Usage | None) -> tuple[str, str, str]:
    if ours is None or bare is None:
        return "", "", ""
    return (
        _both(ours.peak_bytes / 1e6, bare.peak_bytes / 1e6),
        _both(ours.own_bytes / 1e6, bare.own_bytes / 1e6),
        f"{ours.cpu_seconds:.3f} / {bare.cpu_seconds:.3f}",
    )


def _both(ours: float, bare: float) -> str:
    return f"{ours:,.0f} / {bare:,.0f}"


def _seconds(spread: Spread) -> str:
    if spread.median < 1:
        return f"{spread.median * 1e3:.1f} ms ({spread.least * 1e3:.1f}-{spread.most * 1e3:.1f})"
    return f"{spread.median:.2f} s ({spread.least:.2f}-{spread.most:.2f})"


def _rate(side: Side) -> str:
    return f"{side.per_second.median:,.0f}" if side.per_second is not None else ""
