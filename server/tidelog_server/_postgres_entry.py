"""
Entering: what every transaction does first.

It reads which store this is and where its tenant stands, and makes sure that this server
may go on: that nobody makes the store ready for another schema just now, or has done so.
All of that is one round trip.

A transaction that writes locks its tenant's row first, with a statement that does nothing
else, and reads everything after that: so the order of commits is the order of versions,
whichever server makes them.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from typing import TYPE_CHECKING, Any, Final, LiteralString, NamedTuple

from tidelog_server._errors import ServerOutdated
from tidelog_server._postgres_schema import PREPARING_LOCK, TIMELINE_LOCK
from tidelog_server._records import RUN_BYTES, Head, Identity

if TYPE_CHECKING:
    from tidelog_server._postgres_connection import Connection, Transaction

# No tenant's number: one that was never written reads as empty.
NO_TENANT: Final = 0

BEGIN_WRITING: Final[LiteralString] = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"
_BEGIN_READING: Final[LiteralString] = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"

_LOCK_TENANT: Final[LiteralString] = "SELECT number FROM tenants WHERE name = %s FOR UPDATE"
_PUT_TENANT: Final[LiteralString] = "INSERT INTO tenants (name) VALUES (%s) ON CONFLICT (name) DO NOTHING"
_LOCK_TIMELINE: Final[LiteralString] = "SELECT pg_advisory_xact_lock(%s)"
_KEEP_TIMELINE: Final[LiteralString] = "SELECT pg_advisory_xact_lock_shared(%s)"
_KEEP_READY: Final[LiteralString] = "SELECT pg_try_advisory_xact_lock_shared(%s)"
_IS_ALONE: Final[LiteralString] = """
    SELECT EXISTS (
        SELECT FROM pg_locks
        WHERE locktype = 'advisory' AND (classid::bigint << 32) + objid::bigint = %s AND objsubid = 1
            AND mode = 'ExclusiveLock' AND granted AND pid = %s
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    )
"""
# A database that was put back goes on in another process, under another number, or in other files. Time is a number
# here: as text it would depend on the time zone that a server asks for.
_STATE: Final[LiteralString] = """
    SELECT store.epoch, store.timeline, (SELECT digest FROM notes WHERE name = %s),
        concat_ws(' ', (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint,
            pg_relation_filenode('objects'), database.oid),
        tenants.number, tenants.version, tenants.commit_id, tenants.collected
    FROM pg_database AS database, store LEFT JOIN tenants ON tenants.name = %s
    WHERE database.datname = current_database()
"""


class TenantState(NamedTuple):
    """
    Where a tenant stands.

    Attributes:
        identity: Which store this is.
        run: Which life of it; see `Reader.run`.
        number: The tenant's number; `NO_TENANT`: nothing was ever written for it.
        head: Where its history stands.
        collected: The highest version collected.
        is_new: Whether the tenant was made by this very transaction.
    """

    identity: Identity
    run: bytes
    number: int
    head: Head
    collected: int
    is_new: bool = False


class _Required(NamedTuple):
    """A note that must stay as it is. Whose name is empty: none must."""

    name: str
    digest: bytes


class Entry:
    """
    How one server enters its transactions. Safe to use from any thread.

    Attributes:
        identity: Which store this is, as was last heard.
        preparer: The process of the database that keeps the others out while this server makes the store ready, if
            it does.
    """

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.preparer: int | None = None
        self._required = _NOTHING
        self._lock = threading.Lock()
        self._moments = itertools.count(1)
        self._heard_at = 0

    def require_note(self, name: str, value: bytes) -> None:
        """Go on only as long as this is noted."""
        self._required = _Required(name, note_digest(value))

    def require_no_note(self) -> None:
        """Go on whatever is noted."""
        self._required = _NOTHING

    def read(self, connection: Connection, tenant: str) -> tuple[Transaction, TenantState]:
        """
        Begin to read a tenant, as of one moment.

        Raises:
            ServerOutdated: This server may not go on.
        """
        transaction = connection.begin(_BEGIN_READING)
        try:
            return transaction, self._entered(transaction, tenant)
        except ServerOutdated:
            transaction.end()
            raise

    def write(self, connection: Connection, tenant: str, *, locks_timeline: bool) -> tuple[Transaction, TenantState]:
        """
        Begin to write a tenant, once nobody else does.

        Args:
            connection: Where.
            tenant: The tenant.
            locks_timeline: Whether another timeline is going to begin.

        Raises:
            ServerOutdated: This server may not go on.
        """
        transaction = connection.begin(BEGIN_WRITING)
        locked = transaction.send(_LOCK_TENANT, tenant)
        transaction.send(_LOCK_TIMELINE if locks_timeline else _KEEP_TIMELINE, TIMELINE_LOCK)
        try:
            state = self._entered(transaction, tenant)
            if not transaction.rows_of(locked):
                # Make it, or wait for who makes it just now. It may be there by now, but nobody has locked it here.
                lock_tenant(transaction, tenant)
                state = self._entered(transaction, tenant)._replace(is_new=True)
        except ServerOutdated:
            transaction.abandon()
            raise
        return transaction, state

    def begin_timeline(self, transaction: Transaction, timeline: str) -> None:
        """Begin a timeline, once all transactions of the present one are over."""
        transaction.send(_LOCK_TIMELINE, TIMELINE_LOCK)
        transaction.send("UPDATE store SET timeline = %s", timeline)

    def hear(self, identity: Identity, since: int = 0) -> None:
        """Take note of what was read since a moment, or is now: it may be older than what is known."""
        with self._lock:
            since = since or next(self._moments)
            if since > self._heard_at:
                self._heard_at, self.identity = since, identity

    def _entered(self, transaction: Transaction, tenant: str) -> TenantState:
        since, required = next(self._moments), self._required
        preparer = self.preparer
        if preparer is None:
            ready = transaction.send(_KEEP_READY, PREPARING_LOCK)
        else:
            ready = transaction.send(_IS_ALONE, PREPARING_LOCK, preparer)
        rows = transaction.rows(_STATE, required.name, tenant)
        if not transaction.rows_of(ready)[0][0]:
            if preparer is not None:
                raise ServerOutdated("the connection was lost that kept other servers out: make the store ready anew")
            raise ServerOutdated("another server is making the store ready for another schema")
        state, digest = _state_of(rows[0])
        if required.name and (digest or _OF_NOTHING) != required.digest:
            raise ServerOutdated("another server has made the store ready for another schema than this one has")
        self.hear(state.identity, since)
        return state


def note_digest(value: bytes) -> bytes:
    """Return what stands for the value of a note."""
    return hashlib.sha256(value).digest()


def lock_tenant(transaction: Transaction, tenant: str) -> None:
    """Wait until nobody else writes a tenant, or makes it."""
    transaction.send(_PUT_TENANT, tenant)
    transaction.send(_LOCK_TENANT, tenant)


def _state_of(row: tuple[Any, ...]) -> tuple[TenantState, bytes | None]:
    epoch, timeline, digest, life, number, version, commit_id, collected = row
    identity, run = Identity(epoch, timeline), hashlib.sha256(life.encode()).digest()[:RUN_BYTES]
    if number is None:
        return TenantState(identity, run, NO_TENANT, Head(0, b""), 0), digest
    return TenantState(identity, run, number, Head(version, commit_id), collected), digest


_OF_NOTHING: Final = note_digest(b"")
_NOTHING: Final = _Required("", _OF_NOTHING)
