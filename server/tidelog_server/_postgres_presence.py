"""
Presence: that a server runs, and what is under way in it, as the others can see it.

A connection of its own holds a lock for as long as the server's process lives. What is
under way is written on it and not in the transaction that it is about, of which nothing
would be left if the process died. It has to outlive the process, not the database: so it
is not waited for until it is on disk.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, LiteralString

from tidelog_server._attempts import UnderWay, decode_under_way, encode_under_way
from tidelog_server._errors import StoreUnavailable
from tidelog_server._postgres_schema import LOCK_CLASS

if TYPE_CHECKING:
    from tidelog_server._postgres_connection import Address, Connection

# By which a server is known: any that no other one has, in whatever copy of the database.
_NUMBERS: Final = 1 << 31

# A server of whose row nobody holds the lock is dead. One that lost its connection may be taken for dead before it
# has another: then operations are tried one by one for nothing.
_FIND_LEFT: Final[LiteralString] = """
    SELECT server, array_agg(attempts) FROM under_way
    WHERE server <> %s AND octet_length(attempts) > 0 GROUP BY server ORDER BY server
"""
_PUT: Final[LiteralString] = """
    INSERT INTO under_way (server, writer, attempts) VALUES (%s, %s, %s)
    ON CONFLICT (server, writer) DO UPDATE SET attempts = excluded.attempts
"""
_FORGET_DEAD: Final[LiteralString] = """
    WITH dead AS MATERIALIZED (
        SELECT server FROM (SELECT server FROM under_way UNION SELECT server FROM writers) AS known
        WHERE NOT EXISTS (
            SELECT FROM pg_locks
            WHERE locktype = 'advisory' AND classid = %s::bigint::oid AND objid = known.server::oid AND objsubid = 2
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        )
    ), _ AS (DELETE FROM under_way USING dead WHERE under_way.server = dead.server AND attempts = '')
    DELETE FROM writers USING dead WHERE writers.server = dead.server
"""


class Presence:
    """
    One running server. Safe to use from any thread.

    Args:
        address: Where the database is.

    Attributes:
        server: The number that it is known by: another one once somebody has found the former one left.

    Raises:
        StoreUnavailable: It cannot be reached now.
    """

    def __init__(self, address: Address) -> None:
        self.server = secrets.randbelow(_NUMBERS)
        self._address = address
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._closed = False
        # Of servers that are dead; their locks are held here, so that only one server finds them.
        self._left: dict[int, UnderWay] = {}
        connection = address.connect()
        try:
            self._hold(connection)
            for server, found in connection.rows(_FIND_LEFT, self.server):
                if _try_lock(connection, server):
                    self._left[server] = [one for data in found for one in decode_under_way(data)]
            connection.rows(_FORGET_DEAD, LOCK_CLASS)
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def put(self, writer: int, under_way: UnderWay) -> None:
        """Say what is under way in one of the threads that write; nothing: nothing is."""
        attempts = encode_under_way(under_way) if under_way else b""
        self._run(lambda connection: connection.rows(_PUT, self.server, writer, attempts))

    def left(self) -> UnderWay:
        """Return what was under way in servers that are dead."""
        return [one for found in self._left.values() for one in found]

    def forget(self) -> None:
        """Forget that."""
        for server in list(self._left):
            self._run(partial(_forget, server=server))
            del self._left[server]

    def close(self) -> None:
        """Leave nothing of this server, and close the connection."""
        with self._lock:
            connection, self._connection, self._closed = self._connection, None, True
        if connection is None:
            return
        try:
            connection.rows("DELETE FROM under_way WHERE server = %s AND attempts = ''", self.server)
            connection.rows("DELETE FROM writers WHERE server = %s", self.server)
        except StoreUnavailable:
            pass  # the next server that starts does it
        finally:
            connection.close()

    def _run(self, work: Callable[[Connection], object]) -> None:
        with self._lock:
            if self._closed:
                raise StoreUnavailable("the server is stopping")
            for is_last in (False, True):
                try:
                    if self._connection is None:
                        self._connection = self._address.connect()
                        self._hold(self._connection)
                    work(self._connection)
                except StoreUnavailable:
                    if self._connection is not None:
                        self._connection.close()
                    was_kept, self._connection = self._connection is not None, None
                    if is_last or not was_kept:
                        raise
                else:
                    return

    def _hold(self, connection: Connection) -> None:
        # Durable enough once the database's process has it.
        connection.rows("SET synchronous_commit = off")
        # Nobody is waited for: who found what was left here may have it for long, and so may a session that has
        # ended without the database's notice.
        while not _try_lock(connection, self.server):
            self.server = secrets.randbelow(_NUMBERS)


def _try_lock(connection: Connection, server: int) -> bool:
    [(taken,)] = connection.rows("SELECT pg_try_advisory_lock(%s::integer, %s::integer)", LOCK_CLASS, server)
    return bool(taken)


def _forget(connection: Connection, server: int) -> None:
    connection.rows("DELETE FROM under_way WHERE server = %s", server)
    connection.rows("SELECT pg_advisory_unlock(%s::integer, %s::integer)", LOCK_CLASS, server)
