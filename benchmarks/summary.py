"""Summaries: medians and spreads of what was measured several times."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks.children import Usage
from benchmarks.measurements import Pair, Sample


class Spread(NamedTuple):
    """Median, smallest and largest of several values."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


class Side(NamedTuple):
    """
    One side of a measurement: tidelog, or the bare pipe.

    Memory is the most of all repeats, everything else the median.
    """

    seconds: Spread
    per_second: Spread | None
    upload_seconds: float
    client: Usage
    server: Usage | None
    sent_bytes: int
    received_bytes: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Side:
        works = [sample.work for sample in samples]
        rates = [work.operations / work.seconds for work in works if work.operations]
        servers = [sample.server for sample in samples if sample.server is not None]
        return cls(
            Spread.of([work.seconds for work in works]),
            Spread.of(rates) if rates else None,
            median(work.upload_seconds for work in works),
            _usage([one.client._replace(cpu_seconds=one.work.cpu_seconds) for one in samples]),
            _usage(servers) if servers else None,
            int(median(work.sent_bytes for work in works)),
            int(median(work.received_bytes for work in works)),
        )


class Summary(NamedTuple):
    """
    A measurement over all its repeats.

    Attributes:
        name: What was measured.
        operations: How many operations or objects it moved.
        repeats: How often.
        tidelog: What tidelog needed.
        bare: What the bare pipe needed.
        ratio: Speed of tidelog as a part of that of the bare pipe beside it.
    """

    name: str
    operations: int
    repeats: int
    tidelog: Side
    bare: Side
    ratio: Spread


def summarize(pairs: Sequence[Pair]) -> list[Summary]:
    """Summarize the pairs of the same name, in the order in which the names came."""
    by_name: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_name.setdefault(pair.name, []).append(pair)
    return [
        Summary(
            name,
            same[0].tidelog.work.operations,
            len(same),
            Side.of([pair.tidelog for pair in same]),
            Side.of([pair.bare for pair in same]),
            Spread.of([pair.bare.work.seconds / pair.tidelog.work.seconds for pair in same]),
        )
        for name, same in by_name.items()
    ]


def as_data(value: Any) -> Any:
    """Return named tuples as dictionaries, whatever they are in."""
    if (fields := getattr(value, "_asdict", None)) is not None:
        return as_data(fields())
    if isinstance(value, list | tuple):
        return [as_data(one) for one in value]
    if isinstance(value, dict):
        return {name: as_data(one) for name, one in value.items()}
    return value


def _usage(usages: Sequence[Usage]) -> Usage:
    return Usage(
        max(usage.peak_bytes for usage in usages),
        max(usage.own_bytes for usage in usages),
        median(usage.cpu_seconds for usage in usages),
    )
