"""Verification of the directory of an embedded store: of its tables, and of each tenant's records."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from tidelog._environment import DATA_FILE, Environment
from tidelog._errors import StorageError
from tidelog._finding import Finding, FindingKind
from tidelog_server._adoption import adopted_schema, has_referrers
from tidelog_server._backup_note import BACKUP_FILE, BackupNote, data_bytes, data_sha256
from tidelog_server._content_store import (
    CONTENTS_DIRECTORY,
    CONTENTS_ELSEWHERE,
    CONTENTS_NOTE,
    ContentStore,
    DirectoryContents,
)
from tidelog_server._file_verification import content_findings
from tidelog_server._lmdb_records import LmdbRecords
from tidelog_server._lmdb_store import FORMAT, TENANT_BYTES, Databases, LmdbReader, noted
from tidelog_server._verification import DAMAGE, Counts, findings

if TYPE_CHECKING:
    from tidelog._environment import LmdbTransaction
    from tidelog._schema import Schema

_NO_SCHEMA: Final = (*DAMAGE, msgspec.MsgspecError)


def verify_directory(path: Path, *, counts: Counts, contents: ContentStore | None) -> Iterator[Finding]:
    """Yield what is wrong in the directory of an embedded store, or in a backup of one. See `verify_store`."""
    if (path / BACKUP_FILE).exists():
        note, where = BackupNote.read(path), str(path / DATA_FILE)
        if (size := data_bytes(path)) != note.data_bytes:
            # Reading what is cut off would end the process.
            yield Finding(FindingKind.FILE_DAMAGED, where, f"{note.data_bytes} bytes", f"{size} bytes")
            return
        if (digest := data_sha256(path)) != note.data_sha256:
            yield Finding(FindingKind.FILE_DAMAGED, where, f"SHA-256 {note.data_sha256}", f"SHA-256 {digest}")
    with closing(Environment.open_read_only(path, format_name=FORMAT)) as environment:
        try:
            databases = Databases(environment)
            with environment.read() as transaction:
                tenants = dict(transaction.cursor(databases.tenants))
                yield from _tables(transaction, databases, tenants)
            for name, prefix in tenants.items():
                counts["tenants"] += 1
                with environment.read() as transaction:
                    records = LmdbRecords(transaction, databases, prefix)
                    schema = _schema(transaction, databases)
                    has_referrers = _has_referrers(transaction, databases)
                    found = [records.unreadable(), findings(records, schema, counts, has_referrers=has_referrers)]
                    kept = contents or _contents(transaction, databases, path)
                    for finding in chain.from_iterable(found):
                        yield replace(finding, tenant=name.decode(errors="replace"))
                tenant, read = name.decode(errors="replace"), partial(_reading, environment, databases, prefix)
                yield from content_findings(read, tenant, kept, counts) if kept else ()
        except StorageError as error:
            yield Finding(FindingKind.FILE_DAMAGED, str(path), "tables that can be read", str(error))


@contextmanager
def _reading(environment: Environment, databases: Databases, prefix: bytes) -> Iterator[LmdbReader]:
    with environment.read() as transaction:
        yield LmdbReader(transaction, databases, prefix)


def _tables(transaction: LmdbTransaction, databases: Databases, tenants: dict[bytes, bytes]) -> Iterator[Finding]:
    """Yield what is wrong with what is not of one tenant."""
    numbers = Counter(tenants.values())
    for name, number in tenants.items():
        if len(number) != TENANT_BYTES or numbers[number] > 1 or not any(number):
            where = f"tenant {name.decode(errors='replace')!r}"
            yield Finding(FindingKind.TENANT_WRONG, where, "a number of its own", number.hex())
    for table, database in databases.of_tenants.items():
        cursor = transaction.cursor(database)
        more = cursor.first()
        while more:
            number = cursor.key()[:TENANT_BYTES]
            if number not in numbers:
                found = f"entries of the tenant number {number.hex()}"
                yield Finding(FindingKind.TENANT_WRONG, f"table {table}", "entries of known tenants", found)
            following = int.from_bytes(number, "big") + 1
            more = following.bit_length() <= TENANT_BYTES * 8 and cursor.set_range(
                following.to_bytes(TENANT_BYTES, "big")
            )
    for noted_name in ("epoch", "timeline"):
        value = transaction.get(noted_name.encode(), b"", db=databases.meta)
        try:
            uuid.UUID(value.decode())
        except ValueError:
            yield Finding(FindingKind.META_WRONG, noted_name, "a UUID", f"{value!r}")
    try:
        _adopted(transaction, databases)
    except _NO_SCHEMA as error:
        yield Finding(FindingKind.META_WRONG, "schema", "the schema that the store was last served with", str(error))


def _schema(transaction: LmdbTransaction, databases: Databases) -> Schema | None:
    try:
        return _adopted(transaction, databases)
    except _NO_SCHEMA:
        return None  # named once, for all tenants


def _has_referrers(transaction: LmdbTransaction, databases: Databases) -> bool:
    try:
        return has_referrers(lambda name: noted(transaction, databases, name))
    except _NO_SCHEMA:
        return False


def _contents(transaction: LmdbTransaction, databases: Databases, path: Path) -> ContentStore | None:
    """Return where contents lie, if that is in the directory."""
    if noted(transaction, databases, CONTENTS_NOTE) == CONTENTS_ELSEWHERE:
        return None
    return DirectoryContents(path / CONTENTS_DIRECTORY)


def _adopted(transaction: LmdbTransaction, databases: Databases) -> Schema | None:
    return adopted_schema(lambda name: noted(transaction, databases, name))
