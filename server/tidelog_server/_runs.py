"""
Runs: in which lives of the store operations were settled.

Whoever was told that an operation is settled must not be left alone with that when an
older copy of the store is put in its place, however late he comes, and however much of
the history is collected by then. So commits that settle operations are counted, and it
is noted up to which count each *run* of the store came, from one opening to the next.
Within a run nothing that was durable goes away, and a copy goes on in another run: a
count and the run that it was reached in are there for good, or were lost with a restore.

The entries in the table of indexes:

    n        -> count, run in which it was reached
    n count  -> the run that came as far as this count; nothing: that is forgotten
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from tidelog._keys import POSITION_BYTES, pack_position, unpack_position
from tidelog_server._indexes import IndexWrites
from tidelog_server._records import RUN_BYTES
from tidelog_server._store import Reader

# How many runs are remembered: years of daily starts.
RUNS_MAX: Final = 2_000

_RUNS: Final = b"n"
# The key of the entry that says how far settling has come.
PRESENT: Final = _RUNS


class Moment(NamedTuple):
    """
    How far a tenant's settling had come.

    Attributes:
        number: How many commits had settled operations. 0: none yet.
        run: The run of the store that made it.
    """

    number: int
    run: bytes


def present(lookup: Callable[[bytes], bytes | None]) -> Moment:
    """Return how far settling has come."""
    value = lookup(PRESENT) or b""
    return Moment(unpack_position(value[:POSITION_BYTES]), value[POSITION_BYTES:])


def next_commit(reader: Reader, lookup: Callable[[bytes], bytes | None]) -> IndexWrites:
    """Return what is written with a commit that settles operations. *lookup* finds what is at `PRESENT`."""
    count, run = present(lookup)
    writes: IndexWrites = {PRESENT: pack_position(count + 1) + reader.run()}
    if count and run != reader.run():
        writes |= {**_forgotten(reader), _runs_key(count): run}
    return writes


def lacks(reader: Reader, moment: Moment) -> bool:
    """Tell whether the store surely never came to a moment."""
    count, run = present(reader.index)
    if moment.number > count:
        return True
    if not moment.number:
        return False
    later = reader.index_range(_RUNS, _runs_key(moment.number - 1), 1)
    made_in = later[0][1] if later else run
    return made_in not in (b"", moment.run)


def is_entry(key: bytes) -> bool:
    """Tell whether an entry of the table of indexes is about runs."""
    return key.startswith(_RUNS)


def is_in_order(key: bytes, value: bytes, newest: Moment) -> bool:
    """Tell whether such an entry says what it can, given how far settling has come."""
    if key == PRESENT:
        return newest.number > 0 and len(newest.run) == RUN_BYTES
    count = unpack_position(key[len(_RUNS) :]) if len(key) == len(_RUNS) + POSITION_BYTES else 0
    return 0 < count <= newest.number and len(value) in (0, RUN_BYTES)


def _runs_key(count: int) -> bytes:
    return _RUNS + pack_position(count)


def _forgotten(reader: Reader) -> IndexWrites:
    """Forget the oldest run if there are too many: of what is as old, nobody can tell any more whether it was lost."""
    oldest = reader.index_range(_RUNS, _RUNS, RUNS_MAX)
    if len(oldest) < RUNS_MAX:
        return {}
    (first, _), (second, _), *_ = oldest
    return {first: None, second: b""}
