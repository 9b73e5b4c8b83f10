"""Verification of a store in PostgreSQL: of its tables, and of each tenant's records."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Final, LiteralString

import msgspec

from tidelog._errors import StorageError
from tidelog._finding import Finding, FindingKind
from tidelog_server._adoption import adopted_schema, has_referrers
from tidelog_server._content_store import ContentStore
from tidelog_server._errors import StoreUnavailable
from tidelog_server._file_verification import content_findings
from tidelog_server._postgres_connection import Address
from tidelog_server._postgres_entry import TenantState
from tidelog_server._postgres_reader import PostgresReader
from tidelog_server._postgres_records import PostgresRecords
from tidelog_server._postgres_schema import check_tables
from tidelog_server._records import Head, Identity
from tidelog_server._verification import DAMAGE, Counts, findings

if TYPE_CHECKING:
    from tidelog._schema import Schema
    from tidelog_server._postgres_connection import Connection, Transaction

_BEGIN: Final[LiteralString] = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"

_STATE: Final[LiteralString] = """
    SELECT epoch, timeline, number, version, commit_id, collected FROM store, tenants WHERE name = %s
"""
_NEXT_TENANT: Final[dict[str, LiteralString]] = {
    "commits": "SELECT tenant FROM commits WHERE tenant > %s ORDER BY tenant LIMIT 1",
    "objects": "SELECT tenant FROM objects WHERE tenant > %s ORDER BY tenant LIMIT 1",
    "indexes": "SELECT tenant FROM indexes WHERE tenant > %s ORDER BY tenant LIMIT 1",
    "changes": "SELECT tenant FROM changes WHERE tenant > %s ORDER BY tenant LIMIT 1",
    "replicas": "SELECT tenant FROM replicas WHERE tenant > %s ORDER BY tenant LIMIT 1",
    "settled": "SELECT tenant FROM settled WHERE tenant > %s ORDER BY tenant LIMIT 1",
    "failures": "SELECT tenant FROM failures WHERE tenant > %s ORDER BY tenant LIMIT 1",
    "refused": "SELECT tenant FROM refused WHERE tenant > %s ORDER BY tenant LIMIT 1",
}

_NO_SCHEMA: Final = (*DAMAGE, msgspec.MsgspecError)


def check_database(conninfo: str) -> None:
    """
    Require that there is a store in a database.

    Raises:
        StoreUnavailable: It cannot be reached now.
        FormatUnsupported: It holds something else.
        StorageError: There is none in it, or it cannot be used.
    """
    address = Address(conninfo)
    with closing(address.connect()) as connection:
        check_tables(connection, str(address))


def verify_database(conninfo: str, *, counts: Counts, contents: ContentStore | None) -> Iterator[Finding]:
    """Yield what is wrong in a store in PostgreSQL. See `verify_store`."""
    address = Address(conninfo)
    with closing(address.connect()) as connection:
        check_tables(connection, str(address))
        try:
            with _reading(connection) as transaction:
                tenants = [name for (name,) in transaction.rows("SELECT name FROM tenants ORDER BY name")]
                yield from _tables(transaction)
            for tenant in tenants:
                counts["tenants"] += 1
                with _reading(connection) as transaction:
                    records = PostgresRecords(transaction, _state(transaction, tenant))
                    schema, has_all = _schema(transaction), _has_referrers(transaction)
                    found = [records.unreadable(), findings(records, schema, counts, has_referrers=has_all)]
                    for finding in chain.from_iterable(found):
                        yield replace(finding, tenant=tenant)
                if contents is not None:
                    yield from content_findings(partial(_reader, connection, tenant), tenant, contents, counts)
        except StoreUnavailable:
            raise
        except StorageError as error:
            yield Finding(FindingKind.FILE_DAMAGED, str(address), "tables that can be read", str(error))


@contextmanager
def _reading(connection: Connection) -> Iterator[Transaction]:
    """Read as of one moment."""
    transaction = connection.begin(_BEGIN)
    try:
        yield transaction
    except BaseException:
        transaction.abandon()
        raise
    transaction.end()


@contextmanager
def _reader(connection: Connection, tenant: str) -> Iterator[PostgresReader]:
    with _reading(connection) as transaction:
        yield PostgresReader(transaction, _state(transaction, tenant))


def _state(transaction: Transaction, tenant: str) -> TenantState:
    [(epoch, timeline, number, version, commit_id, collected)] = transaction.rows(_STATE, tenant)
    # In which life of the database that is, matters to those only who write.
    return TenantState(Identity(epoch, timeline), b"", number, Head(version, commit_id), collected)


def _note(transaction: Transaction, name: str) -> bytes:
    found = transaction.rows("SELECT value FROM notes WHERE name = %s", name)
    return found[0][0] if found else b""


def _schema(transaction: Transaction) -> Schema | None:
    try:
        return adopted_schema(partial(_note, transaction))
    except _NO_SCHEMA:
        return None  # named once, for all tenants


def _has_referrers(transaction: Transaction) -> bool:
    try:
        return has_referrers(partial(_note, transaction))
    except _NO_SCHEMA:
        return False


def _tables(transaction: Transaction) -> Iterator[Finding]:
    """Yield what is wrong with what is not of one tenant."""
    numbers = {number for (number,) in transaction.rows("SELECT number FROM tenants")}
    for table, next_tenant in _NEXT_TENANT.items():
        number = 0
        while found := transaction.rows(next_tenant, number):
            [(number,)] = found
            if number not in numbers:
                text = f"rows of the tenant number {number}"
                yield Finding(FindingKind.TENANT_WRONG, f"table {table}", "rows of known tenants", text)
    [(epoch, timeline)] = transaction.rows("SELECT epoch, timeline FROM store")
    for name, value in (("epoch", epoch), ("timeline", timeline)):
        try:
            uuid.UUID(value)
        except ValueError:
            yield Finding(FindingKind.META_WRONG, name, "a UUID", repr(value))
    try:
        adopted_schema(partial(_note, transaction))
    except _NO_SCHEMA as error:
        yield Finding(FindingKind.META_WRONG, "schema", "the schema that the store was last served with", str(error))
