"""
Account: what a tenant's store says of its own completeness.

That something is missing cannot tell whether it was forgotten or lost. So the store says
what it forgets: of the change log by the highest version collected, of replicas by their
being retired, and of outcomes and failures by what is written here. What else is missing
is lost, and verification says so.

The entries in the table of indexes:

    a         -> how many failures are on record; empty: nobody knows, there were some before they were counted
    a replica -> seq up to which outcomes of its operations may be forgotten
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from tidelog._keys import POSITION_BYTES, pack_position, unpack_position
from tidelog_server._indexes import IndexWrites
from tidelog_server._records import REPLICA_ID_BYTES, FailureRecord
from tidelog_server._store import Reader

_ACCOUNT: Final = b"a"
# The key of the entry that says how many failures there are.
FAILURES: Final = _ACCOUNT

Lookup = Callable[[bytes], bytes | None]


def with_failures(reader: Reader, lookup: Lookup, failures: Sequence[FailureRecord]) -> IndexWrites:
    """
    Return what is written with a commit of a replica's, and with those *failures* that are new in it.

    *lookup* finds what is at `FAILURES`.
    """
    known = lookup(FAILURES)
    if known is None:
        # An account from the beginning: nothing went that was not told of, because nothing could go yet.
        is_first = not reader.collected() and not reader.failures(b"", 1, 1)
        return {FAILURES: pack_position(len(failures)) if is_first else b""}
    if not known or not failures:
        return {}
    return {FAILURES: pack_position(unpack_position(known) + len(failures))}


def without_outcomes(reader: Reader, replica: bytes, seqs: Sequence[int]) -> IndexWrites:
    """Return what is written when it is forgotten what became of operations of a replica."""
    return {_key(replica): pack_position(max(*seqs, forgotten_through(reader.index, replica), 0))}


def failure_count(lookup: Lookup) -> int | None:
    """Return how many failures there are; None: nobody knows, and outcomes may have gone that nobody told of."""
    known = lookup(FAILURES)
    return unpack_position(known) if known else None


def forgotten_through(lookup: Lookup, replica: bytes) -> int:
    """Return the seq up to which it may be forgotten what became of a replica's operations."""
    return unpack_position(lookup(_key(replica)) or b"")


def is_entry(key: bytes) -> bool:
    """Tell whether an entry of the table of indexes is part of the account."""
    return key.startswith(_ACCOUNT)


def is_in_order(key: bytes, value: bytes, ranges: Callable[[bytes], Sequence[tuple[int, int]]]) -> bool:
    """Tell whether such an entry says what it can, given which operations of a replica are settled."""
    if key == FAILURES:
        return len(value) in (0, POSITION_BYTES)
    replica = key[len(_ACCOUNT) :]
    if len(replica) != REPLICA_ID_BYTES or len(value) != POSITION_BYTES:
        return False
    seq = unpack_position(value)
    return any(first <= seq <= last for first, last in ranges(replica))


def _key(replica: bytes) -> bytes:
    return _ACCOUNT + replica
