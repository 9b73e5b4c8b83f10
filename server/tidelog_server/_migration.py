"""
A store and a new schema: does what is stored fit it, and what makes it fit.

Runs before the server answers anybody. A store that was last served with the same
schema is not looked at. Otherwise every object is checked. What does not fit is named,
and the store stays as it is, unless the server was told to migrate: then names that
were given up, new defaults and the application's own migrations are applied, as
changes like any other, so that replicas get them. Nothing is written before all of it
is known to fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from tidelog._errors import InvalidValue
from tidelog._keys import ObjectKey
from tidelog._limits import PAGE_BYTES_MAX, PAGE_OBJECTS_MAX
from tidelog._logging import get_logger
from tidelog._operation import OperationKind
from tidelog._patch import Patch, patch_setting
from tidelog._schema import Schema
from tidelog._values import Attributes, copied, decode_trusted, encode, equal
from tidelog_server._application import Application
from tidelog_server._errors import SchemaContradicted
from tidelog_server._indexes import TABLES, Written, index_writes, unique_key
from tidelog_server._overlay import Overlay
from tidelog_server._principal import SYSTEM_USER
from tidelog_server._records import NO_REPLICA, Change, ObjectState, Writes
from tidelog_server._store import Reader, Store

CONTRADICTIONS_NAMED_MAX: Final = 20

_NOTE: Final = "schema"

_log = get_logger("tidelog.migration")


def adopt_schema(application: Application, store: Store, *, migrate: bool, time_us: int) -> None:
    """
    Make a store ready to be served by the application's schema.

    Args:
        application: The rules.
        store: The store; nobody else uses it yet.
        migrate: Change what does not fit, as far as renames, defaults and migrations can.
        time_us: The server's clock.

    Raises:
        SchemaContradicted: Something does not fit. Nothing was changed.
    """
    wanted = application.schema.fingerprint
    if store.note(_NOTE) == wanted:
        return
    contradictions = _Contradictions()
    for tenant in store.tenants():
        _check_tenant(application, store, tenant, contradictions, migrate=migrate)
    contradictions.check(can_migrate=not migrate)
    for tenant in store.tenants():
        if migrate:
            _each_page(store, tenant, lambda reader, page: _migrated(application, reader, page, time_us))
        _each_entry_gone(store, tenant)
        _each_page(store, tenant, lambda reader, page: _indexed(application.schema, reader, page))
    store.set_note(_NOTE, wanted)
    _log.info("schema adopted", version=application.schema.version)


class _Contradictions:
    def __init__(self) -> None:
        self._named: list[str] = []
        self._count = 0

    def add(self, tenant: str, message: object) -> None:
        self._count += 1
        if len(self._named) < CONTRADICTIONS_NAMED_MAX:
            self._named.append(f"tenant {tenant!r}: {message}")

    def check(self, *, can_migrate: bool) -> None:
        if self._count:
            raise SchemaContradicted(self._named, count=self._count, can_migrate=can_migrate)


def _check_tenant(
    application: Application, store: Store, tenant: str, contradictions: _Contradictions, *, migrate: bool
) -> None:
    """Find what would not fit: values, unique values, references."""
    schema = application.schema
    unique: set[bytes] = set()
    present: set[ObjectKey] | None = set() if schema.has_references else None
    referenced: dict[ObjectKey, str] = {}
    for key, attributes in _objects(store, tenant):
        try:
            found = _future(application, key, attributes) if migrate else (key, attributes)
            if found is None:
                continue
            key, attributes = found  # noqa: PLW2901 - what the object becomes
            schema.check_object(key[0], attributes, key[1])
        except InvalidValue as error:
            contradictions.add(tenant, error)
            continue
        entity = schema.entity(key[0])
        for names in entity.unique if entity is not None else ():
            digest = unique_key(key[0], names, attributes)
            if digest in unique:
                contradictions.add(tenant, f"{key[0]} {key[1]!r}: {', '.join(names)} is taken by another {key[0]}")
            elif digest is not None:
                unique.add(digest)
        if present is not None:
            present.add(key)
            for attribute, target in schema.referenced(key[0], attributes):
                if target not in present:
                    referenced.setdefault(target, f"{key[0]} {key[1]!r}: attribute {attribute!r} refers to")
    for target, what in referenced.items():
        if present is not None and target not in present and _must_exist(schema, target[0]):
            contradictions.add(tenant, f"{what} {target[0]} {target[1]!r}, which does not exist")


def _must_exist(schema: Schema, target: str) -> bool:
    return any(reference.on_delete != "keep" for _, reference in schema.referrers(target))


def _future(application: Application, key: ObjectKey, attributes: Attributes) -> tuple[ObjectKey, Attributes] | None:
    """Return what an object becomes by renames, the application's migration and defaults; None: it is deleted."""
    schema = application.schema
    entity, patch = schema.upcast(key[0], Patch(attributes), 0, key[1])
    migration = application.migration_of(entity)
    if migration is None:
        return (entity, key[1]), schema.with_defaults(entity, patch.set)
    migrated = migration(copied(patch.set))
    return None if migrated is None else ((entity, key[1]), schema.with_defaults(entity, migrated))


def _objects(store: Store, tenant: str) -> Iterator[tuple[ObjectKey, Attributes]]:
    with store.read(tenant) as reader:
        entities = reader.entities()
    for entity in entities:
        after = ""
        more = True
        while more:
            with store.read(tenant) as reader:
                page, more = reader.entity_objects(entity, after, PAGE_OBJECTS_MAX, PAGE_BYTES_MAX)
            for key, state in page:
                after = key[1]
                if not state.deleted:
                    yield key, decode_trusted(state.attributes)


_Page = list[tuple[ObjectKey, ObjectState]]


def _each_page(store: Store, tenant: str, work: Callable[[Reader, _Page], Writes]) -> None:
    """Let *work* say what is written for each page of the tenant's objects, tombstones left out."""
    with store.read(tenant) as reader:
        entities = reader.entities()
    for entity in entities:
        after = ""
        more = True
        while more:

            def job(reader: Reader, entity: str = entity, after: str = after) -> tuple[Writes, tuple[str, bool]]:
                page, more = reader.entity_objects(entity, after, PAGE_OBJECTS_MAX, PAGE_BYTES_MAX)
                last = page[-1][0][1] if page else after
                return work(reader, [one for one in page if not one[1].deleted]), (last, more)

            after, more = store.submit(tenant, job).result()


def _each_entry_gone(store: Store, tenant: str) -> None:
    """Empty the tables that a schema asks for."""

    def job(reader: Reader) -> tuple[Writes, bool]:
        entries = [entry for table in TABLES for entry in reader.index_range(table, b"", PAGE_OBJECTS_MAX)]
        removed = dict.fromkeys(key for key, _ in entries)
        return Writes({}, [], None, [], [], reader.head().version, removed), bool(entries)

    while store.submit(tenant, job).result():
        pass


def _indexed(schema: Schema, reader: Reader, page: _Page) -> Writes:
    written = [Written(key, None, decode_trusted(state.attributes), state.version) for key, state in page]
    index = index_writes(schema, written, reader.index)
    return Writes({}, [], None, [], [], reader.head().version, index)


def _migrated(application: Application, reader: Reader, page: _Page, time_us: int) -> Writes:
    overlay = Overlay(reader)
    for key, state in page:
        attributes = decode_trusted(state.attributes)
        found = _future(application, key, attributes)
        if found == (key, attributes) and equal(found[1], attributes):
            continue
        if found is None or found[0] != key:
            _delete(overlay, key, state, time_us)
        if found is not None:
            _put(overlay, found[0], found[1], time_us)
    return Writes(overlay.written_objects(), overlay.changes, None, [], [], overlay.version)


def _delete(overlay: Overlay, key: ObjectKey, state: ObjectState, time_us: int) -> None:
    version = overlay.version + 1
    overlay.prefetch((key,))
    change = _change(version, key, OperationKind.DELETE, b"", state.attributes, state.version, time_us)
    overlay.write(change, ObjectState(version, state.created, state.creator, True, False, b""), None)


def _put(overlay: Overlay, key: ObjectKey, attributes: Attributes, time_us: int) -> None:
    state = overlay.state(key)
    version = overlay.version + 1
    encoded = encode(attributes)
    if state is None or state.deleted:
        previous = state.version if state is not None else 0
        change = _change(version, key, OperationKind.CREATE, patch_setting(encoded), b"", previous, time_us)
        new_state = ObjectState(version, version, NO_REPLICA, False, False, encoded)
    else:
        before = overlay.attributes(key)
        patch = Patch(
            {name: value for name, value in attributes.items() if not equal(before.get(name), value)},
            tuple(name for name in before if name not in attributes),
        )
        images = encode(
            [
                {name: before[name] for name in patch.written if name in before},
                [name for name in patch.written if name not in before],
            ]
        )
        change = _change(version, key, OperationKind.UPDATE, patch.encode(), images, state.version, time_us)
        new_state = ObjectState(version, state.created, state.creator, False, False, encoded)
    overlay.write(change, new_state, attributes)


def _change(  # noqa: PLR0917 - the parts of one change
    version: int, key: ObjectKey, kind: OperationKind, patch: bytes, before: bytes, previous: int, time_us: int
) -> Change:
    return Change(version, key, kind, patch, before, previous, NO_REPLICA, 0, False, SYSTEM_USER, time_us)
