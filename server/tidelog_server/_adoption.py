"""
Adopting a schema: a store becomes one that the application's schema can be served with.

It happens before the server answers anybody. A store that was last served with the
same schema is not looked at. Otherwise every object is checked. What does not fit is
named, and the store stays as it is, unless the server was told to migrate: then what
objects become (see `_migration`) is checked, and written as changes like any others, so
that replicas get them. Nothing is written before all of it is known to fit.

The work is done page by page, and a server may be killed after each of them. So a note
says beforehand what is about to be done: whoever starts next goes on with it, and what
was migrated is not migrated again, since it stands above the version where it began.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import Final

import msgspec

from tidelog._errors import InvalidValue, StorageError, quoted
from tidelog._keys import ObjectKey
from tidelog._limits import PAGE_BYTES_MAX, PAGE_OBJECTS_MAX
from tidelog._logging import get_logger
from tidelog._operation import OperationKind
from tidelog._patch import Patch, patch_setting
from tidelog._schema import Schema
from tidelog._values import Attributes, decode_trusted, encode, equal
from tidelog_server._application import Application
from tidelog_server._errors import MigrationUnfinished, SchemaContradicted
from tidelog_server._file_records import (
    REFERRERS,
    contents_of_failure,
    contents_of_object,
    entries_of,
    failure_referrer,
    file_writes,
    object_referrer,
)
from tidelog_server._history import attributes_before, kept_changes
from tidelog_server._indexes import TABLES, Written, index_shape, index_writes, rebuilt_entries, unique_key
from tidelog_server._migration import Migration
from tidelog_server._overlay import Overlay
from tidelog_server._principal import SYSTEM_USER
from tidelog_server._records import NO_REPLICA, Change, ObjectState, Writes
from tidelog_server._store import Reader, Store

CONTRADICTIONS_NAMED_MAX: Final = 20

_NOTE: Final = "adoption"

_log = get_logger("tidelog.adoption")

_Page = list[tuple[ObjectKey, ObjectState]]


class _Unfinished(msgspec.Struct, frozen=True):
    """
    What is being done to a store.

    Attributes:
        version: The version of the schema that it is to be served with.
        fingerprint: What that schema says, in hexadecimal digits.
        heads: Each tenant's version when its migration began; None: objects are left alone.
    """

    version: int
    fingerprint: str
    heads: dict[str, int] | None


class _Adopted(msgspec.Struct, frozen=True):
    """
    What a store was last made ready for.

    Attributes:
        schema: The schema, as JSON; empty if it was none.
        migrated: The newest version of a schema whose migrations have run.
        unfinished: What has begun since; None: nothing has.
        files: Whether it is on record who refers to which file. Stores older than that are without.
    """

    schema: str = ""
    migrated: int = 0
    unfinished: _Unfinished | None = None
    files: bool = False


def adopt_schema(application: Application, store: Store, *, migrate: bool, time_us: int) -> None:
    """
    Make a store ready to be served by the application's schema.

    From then on the store is read and written only as long as nobody makes it ready for another schema.

    Args:
        application: The rules.
        store: The store.
        migrate: Change what does not fit, as far as renames, defaults and migrations can.
        time_us: The server's clock.

    Raises:
        SchemaContradicted: Something does not fit. Nothing was changed.
        MigrationUnfinished: A migration was broken off, and this would not finish it. Nothing was changed.
    """
    text = application.schema.to_json() if application.has_schema else ""
    # Most servers find everything as it should be: then those that are running go on.
    note = store.note(_NOTE)
    if not _is_ready(_decoded(note), text):
        with store.preparing():
            note = store.note(_NOTE)
            if not _is_ready(known := _decoded(note), text):
                note = _adopt(application, store, known, text, migrate=migrate, time_us=time_us)
    # That one and not what is noted by now: somebody else may have made the store ready for another schema.
    store.require_note(_NOTE, note)


def _decoded(note: bytes) -> _Adopted:
    return msgspec.json.decode(note, type=_Adopted) if note else _Adopted()


def _is_ready(known: _Adopted, text: str) -> bool:
    return known == _Adopted(text, known.migrated, files=True)


def _adopt(
    application: Application, store: Store, known: _Adopted, text: str, *, migrate: bool, time_us: int
) -> bytes:
    """Make a store ready, and return what is noted then."""
    schema = application.schema
    if schema.version < known.migrated:
        raise SchemaContradicted(
            f"the store was migrated to version {known.migrated} of the schema: "
            f"what version {schema.version} says of it is no longer true; serve that version or a newer one",
            [],
            count=0,
        )
    former = Schema.from_json(known.schema) if known.schema else Schema(open=True)
    since = former.version if known.schema else 0
    if store.is_shared and schema.version < since and not migrate:
        # Or a server that is only started again would take the store from all those that were brought up to date.
        raise SchemaContradicted(
            f"version {since} of the schema is served, and version {schema.version} is older: "
            "serve that version or a newer one; or, to go back, tell the server to migrate",
            [],
            count=0,
        )
    fingerprint = schema.fingerprint.hex()
    heads = known.unfinished.heads if known.unfinished is not None else None
    if known.unfinished is not None and heads is not None:
        if not migrate or known.unfinished.fingerprint != fingerprint:
            raise MigrationUnfinished(
                f"a migration of this store to version {known.unfinished.version} of the schema was broken off: "
                "start with the same schema once more, and tell the server to migrate"
            )
    elif migrate:
        heads = {tenant: _head(store, tenant) for tenant in store.tenants()}

    migrations = {}
    contradictions: list[str] = []
    count = 0
    has_migrated = False
    not_run: list[str] = []
    for tenant in store.tenants():
        with store.read(tenant) as reader:
            entities = reader.entities()
        done_after = heads[tenant] if heads is not None else None
        migrations[tenant] = Migration(application, since=since, entities=entities, done_after=done_after)
        for entity in schema.entities if known.schema else ():
            if due := application.migrations(entity, after=since):
                has_migrated = True
                if not migrate and entity in entities:
                    not_run.append(f"tenant {tenant!r}: {entity}: the migration to version {due[0][0]} has not run")
        for found in _contradictions(schema, store, tenant, migrations[tenant]):
            count += 1
            if len(contradictions) < CONTRADICTIONS_NAMED_MAX:
                contradictions.append(f"tenant {tenant!r}: {found}")
    if not_run and not count:
        contradictions, count = not_run[:CONTRADICTIONS_NAMED_MAX], len(not_run)
    if count:
        raise SchemaContradicted(_summary(count, schema, since, migrate=migrate), contradictions, count=count)

    rebuilds = known.unfinished is not None or index_shape(former) != index_shape(schema)
    if migrate or rebuilds:
        unfinished = _Unfinished(schema.version, fingerprint, heads)
        _set_note(store, _Adopted(known.schema, known.migrated, unfinished, known.files))
    for tenant, migration in migrations.items():
        if migrate:
            _migrate(application, store, tenant, migration, time_us)
        if rebuilds:
            _rebuild_indexes(application, store, tenant)
        if rebuilds or not known.files:
            _note_referrers(store, tenant)
    migrated = schema.version if migrate and has_migrated else known.migrated
    note = _set_note(store, _Adopted(text, migrated, files=True))
    if text != known.schema and schema.version <= since:
        _log.warning("the schema is another one, but its version has not risen", version=schema.version, former=since)
    if known != _Adopted(text, known.migrated, files=known.files):
        _log.info("schema adopted", version=schema.version, former=since, migrated=migrate)
    return note


def adopted_schema(note: Callable[[str], bytes]) -> Schema | None:
    """
    Return the schema that a store was last made ready for.

    Args:
        note: Returns what is noted about the store under a name.

    Returns:
        None if it never was, or is being made ready for another one.
    """
    noted = note(_NOTE)
    known = msgspec.json.decode(noted, type=_Adopted) if noted else None
    if known is None or known.unfinished is not None:
        return None
    return Schema.from_json(known.schema) if known.schema else Schema(open=True)


def has_referrers(note: Callable[[str], bytes]) -> bool:
    """Tell whether it is on record in a store who refers to which file."""
    noted = note(_NOTE)
    return bool(noted) and msgspec.json.decode(noted, type=_Adopted).files


def _summary(count: int, schema: Schema, since: int, *, migrate: bool) -> str:
    what = "1 contradiction" if count == 1 else f"{count} contradictions"
    if schema.version < since:
        hint = f"the store was served with version {since} already: serve that or a newer one"
    elif schema.version == since:
        hint = "the store was served with another schema of this version: raise it with each change"
    elif migrate:
        hint = "renames, defaults and migrations do not mend it: declare what is missing"
    else:
        hint = "correct the schema; or declare renames, defaults and migrations, and tell the server to migrate"
    return f"version {schema.version} of the schema does not fit the store, {what} ({hint})"


def _set_note(store: Store, adopted: _Adopted) -> bytes:
    note = msgspec.json.encode(adopted)
    store.set_note(_NOTE, note)
    return note


def _head(store: Store, tenant: str) -> int:
    with store.read(tenant) as reader:
        return reader.head().version


# --- checking -----------------------------------------------------------------


class _Owners:
    """Who has each unique value. In a temporary file, because there may be more of them than fit into memory."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")
        self._database.execute("CREATE TABLE owners (value BLOB PRIMARY KEY, id TEXT) WITHOUT ROWID")

    def take(self, value: bytes, id_: str) -> str | None:
        """Give a value to an object, or return the id of the one that has it."""
        try:
            found = self._database.execute("SELECT id FROM owners WHERE value = ?", (value,)).fetchone()
            if found is None:
                self._database.execute("INSERT INTO owners VALUES (?, ?)", (value, id_))
                return None
        except sqlite3.Error as error:
            raise StorageError(f"unique values cannot be compared in a temporary file: {error}") from error
        return str(found[0])

    def close(self) -> None:
        self._database.close()


def _contradictions(schema: Schema, store: Store, tenant: str, migration: Migration) -> Iterator[str]:
    """Yield what would not fit: values, unique values, references, two objects of one key."""
    with closing(_Owners()) as owners:
        for reader, page in _pages(store, tenant):
            for key, state in page:
                try:
                    outcome = migration.outcome(key, state)
                    if outcome is None:
                        continue
                    migration.check_names(key, outcome[1])
                    schema.check_object(outcome[0][0], outcome[1], key[1])
                except InvalidValue as error:
                    yield str(error)
                    continue
                yield from _clashes(reader, migration, key, outcome[0])
                yield from _shared_values(schema, owners, *outcome)
                yield from _dangling_references(schema, reader, migration, *outcome)


def _clashes(reader: Reader, migration: Migration, origin: ObjectKey, key: ObjectKey) -> Iterator[str]:
    if key != origin and any(other != origin for other in _becoming(reader, migration, key)):
        yield f"{origin[0]} {origin[1]!r} becomes {key[0]} {key[1]!r}, which exists already"


def _shared_values(schema: Schema, owners: _Owners, key: ObjectKey, attributes: Attributes) -> Iterator[str]:
    entity = schema.entity(key[0])
    for names in entity.unique if entity is not None else ():
        value = unique_key(key[0], names, attributes)
        other = owners.take(value, key[1]) if value is not None else None
        if other is not None:
            values = ", ".join(f"{name!r} is {quoted(attributes[name])}" for name in names)
            what = "attribute" if len(names) == 1 else "attributes"
            yield f"{key[0]} {key[1]!r}: {what} {values}, but must be unique: {key[0]} {other!r} has the same"


def _dangling_references(
    schema: Schema, reader: Reader, migration: Migration, key: ObjectKey, attributes: Attributes
) -> Iterator[str]:
    # What a reference names that is kept in any case may have been deleted.
    binding = {one.attribute for one in schema.references(key[0]) if one.on_delete != "keep"}
    for attribute, target in schema.referenced(key[0], attributes):
        if attribute in binding and not any(_becoming(reader, migration, target)):
            yield (
                f"{key[0]} {key[1]!r}: attribute {attribute!r} is {quoted(target[1])}, "
                f"but there is no such {target[0]}"
            )


def _becoming(reader: Reader, migration: Migration, key: ObjectKey) -> Iterator[ObjectKey]:
    """Yield the keys of the stored objects that become the object of a key."""
    for origin, state in reader.objects(migration.origins(key)).items():
        try:
            outcome = migration.outcome(origin, state)
        except InvalidValue:
            continue  # a contradiction of its own
        if outcome is not None and outcome[0] == key:
            yield origin


def _pages(store: Store, tenant: str) -> Iterator[tuple[Reader, _Page]]:
    with store.read(tenant) as reader:
        entities = reader.entities()
    for entity in entities:
        after = ""
        more = True
        while more:
            with store.read(tenant) as reader:
                page, more = reader.entity_objects(entity, after, PAGE_OBJECTS_MAX, PAGE_BYTES_MAX)
                after = page[-1][0][1] if page else after
                yield reader, page


# --- writing ------------------------------------------------------------------


def _migrate(application: Application, store: Store, tenant: str, migration: Migration, time_us: int) -> None:
    """Write what objects become."""
    by_migration = Change(0, ("", ""), OperationKind.UPDATE, b"", b"", 0, NO_REPLICA, 0, False, SYSTEM_USER, time_us)

    def work(reader: Reader, page: _Page) -> Writes:
        overlay = Overlay(reader)
        for key, state in page:
            outcome = migration.outcome(key, state)
            if state.deleted or (
                outcome is not None and outcome[0] == key and equal(outcome[1], decode_trusted(state.attributes))
            ):
                continue
            made = by_migration._replace(key=key, new_names=migration.new_names(key[0]))
            if outcome is None or outcome[0] != key:
                _delete(overlay, state, made)
            if outcome is not None:
                _put(overlay, *outcome, state, made)
        index = {
            **index_writes(application.schema, overlay.written(application.indexed_entities), overlay.index),
            **file_writes(overlay, (), time_us),
        }
        return Writes(overlay.written_objects(), overlay.changes, None, [], [], overlay.version, index)

    with store.read(tenant) as reader:
        entities = reader.entities()
    _each_page(store, tenant, entities, work)


def _rebuild_indexes(application: Application, store: Store, tenant: str) -> None:
    """Make the table of indexes anew, from the objects and their histories."""

    def clear(reader: Reader) -> tuple[Writes, bool]:
        entries = [entry for table in TABLES for entry in reader.index_range(table, b"", PAGE_OBJECTS_MAX)]
        return _index_only(reader, dict.fromkeys(key for key, _ in entries)), bool(entries)

    def work(reader: Reader, page: _Page) -> Writes:
        index: dict[bytes, bytes | None] = {}
        for key, state in page:
            attributes = None if state.deleted else decode_trusted(state.attributes)
            index.update(rebuilt_entries(application.schema, key, attributes, _history(reader, key, state)))
        return _index_only(reader, index)

    while store.submit(tenant, clear).result():
        pass
    _each_page(store, tenant, sorted(application.indexed_entities), work)


def _note_referrers(store: Store, tenant: str) -> None:
    """Note anew who refers to which file: objects, and failures."""

    def clear(reader: Reader) -> tuple[Writes, bool]:
        entries = reader.index_range(REFERRERS, b"", PAGE_OBJECTS_MAX)
        return _index_only(reader, dict.fromkeys(key for key, _ in entries)), bool(entries)

    def objects(reader: Reader, page: _Page) -> Writes:
        index: dict[bytes, bytes | None] = {}
        for key, state in page:
            index.update(entries_of(object_referrer(key), contents_of_object(state.attributes)))
        return _index_only(reader, index)

    while store.submit(tenant, clear).result():
        pass
    with store.read(tenant) as reader:
        entities = reader.entities()
    _each_page(store, tenant, entities, objects)
    after = b""
    while True:
        with store.read(tenant) as reader:
            page = reader.failures(after, PAGE_OBJECTS_MAX, PAGE_BYTES_MAX)
        if not page:
            return
        after = page[-1][0]
        index: dict[bytes, bytes | None] = {}
        for failure_id, data in page:
            index.update(entries_of(failure_referrer(failure_id, data), contents_of_failure(data)))
        if index:
            store.submit(tenant, partial(_indexed, index=index)).result()


def _indexed(reader: Reader, index: dict[bytes, bytes | None]) -> tuple[Writes, None]:
    return _index_only(reader, index), None


def _index_only(reader: Reader, index: dict[bytes, bytes | None]) -> Writes:
    return Writes({}, [], None, [], [], reader.head().version, index)


def _history(reader: Reader, key: ObjectKey, state: ObjectState) -> Iterator[Written]:
    """Yield what was written to an object, the newest first, as far back as the change log reaches."""
    after = None if state.deleted else decode_trusted(state.attributes)
    yield Written(key, None, after, state.version)
    for change in kept_changes(state.version, reader.change):
        before = attributes_before(change, after)
        yield Written(key, before, after, change.version)
        after = before


def _each_page(store: Store, tenant: str, entities: Iterable[str], work: Callable[[Reader, _Page], Writes]) -> None:
    """Let *work* say what is written for each page of objects, tombstones too."""
    for entity in entities:
        after = ""
        more = True
        while more:

            def job(reader: Reader, entity: str = entity, after: str = after) -> tuple[Writes, tuple[str, bool]]:
                page, more = reader.entity_objects(entity, after, PAGE_OBJECTS_MAX, PAGE_BYTES_MAX)
                return work(reader, page), (page[-1][0][1] if page else after, more)

            after, more = store.submit(tenant, job).result()


def _delete(overlay: Overlay, state: ObjectState, made: Change) -> None:
    """Write that an object is gone; *made* says of which key, and by what."""
    overlay.prefetch((made.key,))
    change = made._replace(
        version=overlay.version + 1, kind=OperationKind.DELETE, before=state.attributes, previous=state.version
    )
    overlay.write(change, ObjectState(change.version, state.created, state.creator, True, False, b""), None)


def _put(overlay: Overlay, key: ObjectKey, attributes: Attributes, origin: ObjectState, made: Change) -> None:
    """Write what an object becomes; *origin* is its state until now, under the key of *made*."""
    state = overlay.state(key)
    version = overlay.version + 1
    encoded = encode(attributes)
    if state is None or state.deleted:
        # It goes on under another name: who has seen it has seen this one.
        change = made._replace(
            version=version,
            key=key,
            kind=OperationKind.CREATE,
            patch=patch_setting(encoded),
            previous=state.version if state is not None else 0,
            moved_from=overlay.version,
        )
        new_state = ObjectState(version, origin.created, origin.creator, False, False, encoded)
        if state is not None:
            # But who has seen the one that was there before knows nothing of it.
            created = max(origin.created, state.version + 1)
            new_state = ObjectState(version, created, NO_REPLICA, False, False, encoded)
    else:
        before = overlay.attributes(key)
        patch = Patch(
            {
                name: value
                for name, value in attributes.items()
                if name not in before or not equal(before[name], value)
            },
            tuple(name for name in before if name not in attributes),
        )
        images = encode(
            [
                {name: before[name] for name in patch.written if name in before},
                [name for name in patch.written if name not in before],
            ]
        )
        change = made._replace(
            version=version, kind=OperationKind.UPDATE, patch=patch.encode(), before=images, previous=state.version
        )
        new_state = ObjectState(version, state.created, state.creator, False, False, encoded)
    overlay.write(change, new_state, attributes)
