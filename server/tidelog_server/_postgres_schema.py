"""
The tables of a store in PostgreSQL, in a schema of their own that is called `tidelog`.

Each table of a tenant's data starts its key with the tenant's number, so that a tenant's
data are neighbours and can be moved together. Text is compared by bytes, as everywhere
in tidelog. Nonces, which have no sign, are kept as the signed number of the same bits.

The index by version has the entity under another name of the same order: so whoever
looks up an object by its key cannot be led there by a planner that takes the table for
an empty one, to read all of an entity for each.

Two tables are about the servers rather than the data. `writers` names the last
transaction of each thread that writes: a commit whose answer got lost is looked up
there. `under_way` says which attempts are; it is not logged, for it has to outlive a
server's process, not the database's.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final, LiteralString

from tidelog._errors import FormatUnsupported, StorageError

if TYPE_CHECKING:
    from tidelog_server._postgres_connection import Connection

FORMAT: Final = "tidelog-server-store-postgres-1"

# Names of advisory locks. Whoever else uses a database takes others by accident only.
LOCK_CLASS: Final = 0x71DE106  # with a server's number: the server runs
TABLES_LOCK: Final = 0x71DE106_00000000  # the tables are being made
PREPARING_LOCK: Final = 0x71DE106_00000001  # shared: the store is in use; alone: it is being made ready
TIMELINE_LOCK: Final = 0x71DE106_00000002  # shared: the timeline holds; alone: another one begins

_TABLES: Final[LiteralString] = """
    CREATE SCHEMA IF NOT EXISTS tidelog;

    CREATE TABLE tidelog.store (
        one boolean PRIMARY KEY DEFAULT true CHECK (one),
        format text NOT NULL,
        epoch text NOT NULL,
        timeline text NOT NULL
    );
    CREATE TABLE tidelog.notes (
        name text COLLATE "C" PRIMARY KEY,
        value bytea NOT NULL,
        digest bytea NOT NULL
    );
    CREATE TABLE tidelog.tenants (
        number bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
        name text COLLATE "C" PRIMARY KEY,
        version bigint NOT NULL DEFAULT 0,
        commit_id bytea NOT NULL DEFAULT '',
        collected bigint NOT NULL DEFAULT 0
    );
    CREATE TABLE tidelog.commits (
        tenant bigint,
        version bigint,
        commit_id bytea NOT NULL,
        PRIMARY KEY (tenant, version)
    );
    CREATE TABLE tidelog.objects (
        tenant bigint,
        entity text COLLATE "C",
        id text COLLATE "C",
        version bigint NOT NULL,
        created bigint NOT NULL,
        creator bytea NOT NULL,
        deleted boolean NOT NULL,
        sole_writer boolean NOT NULL,
        attributes bytea NOT NULL,
        PRIMARY KEY (tenant, entity, id)
    );
    CREATE INDEX objects_by_version ON tidelog.objects (tenant, entity COLLATE "POSIX", version);
    CREATE TABLE tidelog.indexes (
        tenant bigint,
        key bytea,
        value bytea NOT NULL,
        PRIMARY KEY (tenant, key)
    );
    CREATE TABLE tidelog.changes (
        tenant bigint,
        version bigint,
        entity text COLLATE "C" NOT NULL,
        id text COLLATE "C" NOT NULL,
        kind smallint NOT NULL,
        patch bytea NOT NULL,
        before bytea NOT NULL,
        previous bigint NOT NULL,
        replica bytea NOT NULL,
        seq bigint NOT NULL,
        by_hook boolean NOT NULL,
        user_id text COLLATE "C" NOT NULL,
        time_us bigint NOT NULL,
        failure bytea NOT NULL,
        new_names text NOT NULL,
        moved_from bigint NOT NULL,
        former_version bigint NOT NULL,
        former_timeline text COLLATE "C" NOT NULL,
        PRIMARY KEY (tenant, version)
    );
    CREATE TABLE tidelog.replicas (
        tenant bigint,
        replica bytea,
        session_number bigint NOT NULL,
        user_id text COLLATE "C" NOT NULL,
        newest_seq bigint NOT NULL,
        newest_nonce bigint NOT NULL,
        settled_ranges bigint[] NOT NULL,
        heard_us bigint NOT NULL,
        retired boolean NOT NULL,
        common_replicas bytea[] NOT NULL,
        common_seqs bigint[] NOT NULL,
        PRIMARY KEY (tenant, replica)
    );
    CREATE TABLE tidelog.settled (
        tenant bigint,
        replica bytea,
        seq bigint,
        nonce bigint NOT NULL,
        version bigint NOT NULL,
        changed_by_server boolean NOT NULL,
        failure_id bytea NOT NULL,
        culprit boolean NOT NULL,
        PRIMARY KEY (tenant, replica, seq)
    );
    CREATE TABLE tidelog.failures (
        tenant bigint,
        id bytea,
        data bytea NOT NULL,
        PRIMARY KEY (tenant, id)
    );
    CREATE TABLE tidelog.refused (
        tenant bigint,
        replica bytea,
        entity text COLLATE "C",
        id text COLLATE "C",
        failure bytea NOT NULL,
        PRIMARY KEY (tenant, replica, entity, id)
    );

    CREATE TABLE tidelog.writers (
        server integer,
        writer integer,
        transaction bytea NOT NULL,
        PRIMARY KEY (server, writer)
    );
    CREATE UNLOGGED TABLE tidelog.under_way (
        server integer,
        writer integer,
        attempts bytea NOT NULL,
        PRIMARY KEY (server, writer)
    );
"""


def prepare_tables(connection: Connection, name: str) -> None:
    """
    Make the tables, unless they are there.

    Raises:
        FormatUnsupported: The database holds another format, or something else under the same name.
    """
    transaction = connection.begin("BEGIN")
    # One after the other, when several servers start at once. What the first has made the others find.
    transaction.rows("SELECT pg_advisory_xact_lock(%s)", TABLES_LOCK)
    found = transaction.rows("SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('tidelog')")
    if not found:
        for statement in _TABLES.split(";\n"):
            if statement.strip():
                transaction.send(statement)
        transaction.send(
            "INSERT INTO store (format, epoch, timeline) VALUES (%s, %s, %s)",
            FORMAT,
            str(uuid.uuid4()),
            str(uuid.uuid4()),
        )
    elif ("store",) not in found:
        transaction.abandon()
        raise FormatUnsupported(name, found="something else in its schema tidelog", supported=FORMAT)
    else:
        [(format_name,)] = transaction.rows("SELECT format FROM store")
        if format_name != FORMAT:
            transaction.abandon()
            raise FormatUnsupported(name, found=format_name, supported=FORMAT)
    transaction.end()


def check_tables(connection: Connection, name: str) -> None:
    """
    Require that the tables are there, and make nothing.

    Raises:
        FormatUnsupported: The database holds another format, or something else under the same name.
        StorageError: There is no store in it.
    """
    found = connection.rows("SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('tidelog')")
    if not found:
        raise StorageError(f"{name} holds no store")
    if ("store",) not in found:
        raise FormatUnsupported(name, found="something else in its schema tidelog", supported=FORMAT)
    [(format_name,)] = connection.rows("SELECT format FROM store")
    if format_name != FORMAT:
        raise FormatUnsupported(name, found=format_name, supported=FORMAT)
