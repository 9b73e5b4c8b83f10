"""
Indexes: what a schema wants to be found without a scan, as keys and values of one ordered table.

A store keeps the table and knows nothing of its meaning. The first byte of a key
tells what it is about:

    u  entity NUL digest             -> id              who has a unique value
    r  target key NUL key NUL name   -> nothing         who refers to an object, by which attribute
    v  entity NUL name NUL digest version -> id         objects that have a value: by version
    l  entity NUL name NUL digest version -> id         objects that had it: by the version at which they lost it
    p  entity NUL name NUL digest id -> table version   where in `v` or `l` an object stands
    d  cause failure                 -> nothing         failures because of a failure
    t  replica seq nonce             -> outcome         what copies of a replica settled; see `_formers`
    t  replica                       -> seq             up to which such entries are no longer kept
    s                                -> version         since when `l` has all that left a value
    c g f                            -> contents of files, and who refers to them; see `_file_records`
    n                                -> lives of the store; see `_runs`
    a                                -> what is said to be there, and forgotten; see `_account`
    w                                -> uploads of contents; see `_upload_records`

Values are represented by a digest, because a key has a limited length: whoever looks
something up compares with the record itself. A download that follows one value sees
in `l` what has left it, and need not look at what had left before.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any, Final, NamedTuple

from tidelog._keys import POSITION_BYTES, ObjectKey, pack_object_key, pack_position, unpack_object_key, unpack_position
from tidelog._schema import Schema
from tidelog._values import Attributes, decimal_text, encode

DIGEST_BYTES: Final = 16
FAILURE_ID_BYTES: Final = 16

_UNIQUE: Final = b"u"
_REFERRER: Final = b"r"
_BY_VERSION: Final = b"v"
_LEFT: Final = b"l"
_PLACE: Final = b"p"
_DEPENDENT: Final = b"d"
_TWIN: Final = b"t"
_SINCE: Final = b"s"

# The tables that follow from a schema and the objects alone.
TABLES: Final = (_UNIQUE, _REFERRER, _BY_VERSION, _LEFT, _PLACE)

IndexWrites = dict[bytes, bytes | None]


class Entry(NamedTuple):
    """
    Whom an entry of the table is about.

    Attributes:
        key: Key of the object whose entry it is.
        left_at: The version at which the object lost the value; 0: the entry is another one.
        by_version: What the keys of the objects start with that have the value; empty likewise.
    """

    key: ObjectKey
    left_at: int = 0
    by_version: bytes = b""


class Written(NamedTuple):
    """
    What became of one object in a transaction.

    Attributes:
        key: Its key.
        before: Its attributes before, or None if it was not there.
        after: Its attributes now, or None if it is gone.
        version: Its version now.
    """

    key: ObjectKey
    before: Attributes | None
    after: Attributes | None
    version: int


def index_writes(schema: Schema, written: Iterable[Written], lookup: Callable[[bytes], bytes | None]) -> IndexWrites:
    """
    Return what changes in the table: new values by key, None to remove.

    Args:
        schema: Says what is indexed.
        written: The objects that a transaction wrote, each once.
        lookup: Reads the table as it is before the transaction.
    """
    removed: IndexWrites = {}
    added: IndexWrites = {}
    for one in written:
        entity = schema.entity(one.key[0])
        if entity is None:
            continue
        before = _plain_entries(schema, one.key, one.before)
        after = _plain_entries(schema, one.key, one.after)
        removed.update(dict.fromkeys(before.keys() - after.keys()))
        added.update(after)
        for attribute in entity.indexes:
            _follow(attribute, one, lookup, removed, added)
    return {**removed, **added}


def index_lookups(schema: Schema, written: Iterable[Written]) -> Iterator[bytes]:
    """Yield the keys that `index_writes` looks up."""
    for one in written:
        entity = schema.entity(one.key[0])
        for attribute in entity.indexes if entity is not None else ():
            for prefix, _table in _places(attribute, one):
                yield _PLACE + prefix + one.key[1].encode()


def rebuilt_entries(
    schema: Schema, key: ObjectKey, attributes: Attributes | None, history: Iterable[Written]
) -> dict[bytes, bytes]:
    """
    Return all entries of one object, as if the table had always been kept.

    Args:
        schema: Says what is indexed.
        key: The object's key.
        attributes: Its attributes, or None if it is deleted.
        history: What was written to it, the newest first.
    """
    entries = _plain_entries(schema, key, attributes)
    entity = schema.entity(key[0])
    indexes = entity.indexes if entity is not None else ()
    for written in history if indexes else ():
        for attribute in indexes:
            for prefix, table in _places(attribute, written):
                # The newest change that gave it a value, or took it, says where the object stands.
                if _PLACE + prefix + key[1].encode() not in entries:
                    entries.update(_standing(prefix, table, written))
    return entries


def index_shape(schema: Schema) -> object:
    """Return what the table of indexes depends on: another one, another table."""
    return {
        name: (
            entity.unique,
            entity.indexes,
            [(one.attribute, one.target) for one in entity.references if one.on_delete != "keep"],
        )
        for name in indexed_entities(schema)
        if (entity := schema.entity(name)) is not None
    }


def indexed_entities(schema: Schema) -> frozenset[str]:
    """Return the entities whose objects have entries in the table."""
    return frozenset(
        name
        for name, entity in schema.entities.items()
        if entity.unique or entity.indexes or any(one.on_delete != "keep" for one in entity.references)
    )


def unique_key(entity: str, attributes: Iterable[str], values: Mapping[str, Any]) -> bytes | None:
    """Return the key of a unique value, or None if one of its attributes is missing or null: then it binds nobody."""
    parts: list[Any] = []
    for name in attributes:
        value = values.get(name)
        if value is None:
            return None
        parts += (name, _canonical(value))
    return _UNIQUE + entity.encode() + b"\0" + _digest(parts)


def referrers_prefix(target: ObjectKey) -> bytes:
    """Return what the keys of all references to an object start with."""
    return _REFERRER + pack_object_key(*target) + b"\0"


def referrer_of(key: bytes, target: ObjectKey) -> tuple[ObjectKey, str]:
    """Return the object that refers to *target*, and its attribute, from a key under `referrers_prefix`."""
    rest, _, attribute = key[len(referrers_prefix(target)) :].rpartition(b"\0")
    return unpack_object_key(rest), attribute.decode()


def by_version_prefix(entity: str, attribute: str, value: Any) -> bytes:
    """Return what the keys of the objects start with that have a value; the version follows."""
    return _BY_VERSION + _value_prefix(entity, attribute, value)


def left_prefix(by_version: bytes) -> bytes:
    """Return the same for the objects that had the value, and the version at which they lost it."""
    return _LEFT + by_version[len(_BY_VERSION) :]


def rebuilt(version: int) -> IndexWrites:
    """Return what is to be noted when the table was made anew from the objects as they are at *version*."""
    return {_SINCE: pack_position(version)}


def complete_since(lookup: Callable[[bytes], bytes | None]) -> int:
    """Return the version since which the entries by version tell of all objects that left a value."""
    noted = lookup(_SINCE)
    return unpack_position(noted) if noted is not None else 0


def twins_prefix(replica: bytes) -> bytes:
    """
    Return where the keys begin under which copies of a replica note what they settled.

    It is a key itself: the one under which is noted up to which seq that was forgotten.
    """
    return _TWIN + replica


def twin_key(replica: bytes, seq: int, nonce: int) -> bytes:
    """Return the key under which a copy of a replica notes what became of an operation."""
    return twins_prefix(replica) + pack_position(seq) + pack_position(nonce)


def twins_after(
    after: bytes, index_range: Callable[[bytes, bytes, int], list[tuple[bytes, bytes]]], limit: int
) -> list[tuple[bytes, bytes]]:
    """Return up to *limit* entries under such keys, of whatever replica, that come after a key."""
    return index_range(_TWIN, after, limit)


def left_up_to(
    version: int, after: bytes, index_range: Callable[[bytes, bytes, int], list[tuple[bytes, bytes]]], limit: int
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """
    Look at *limit* entries of objects that lost a value, and return those that did so up to a version.

    Returns them with the key to go on after; empty: there are no more.
    """
    entries = index_range(_LEFT, after, limit)
    if not entries:
        return [], b""
    due = [(key, id_) for key, id_ in entries if unpack_position(key[-POSITION_BYTES:]) <= version]
    last, _ = entries[-1]
    if not due or due[-1][0] != last:
        # Whatever else has lost this value did so later.
        last = last[:-POSITION_BYTES] + b"\xff" * POSITION_BYTES
    return due, last


def without_left(entries: Iterable[tuple[bytes, bytes]], lookup: Callable[[bytes], bytes | None]) -> IndexWrites:
    """Return what takes entries of `left_up_to` out of the table, as far as they are still there."""
    removed: IndexWrites = {}
    for key, id_ in entries:
        place = _PLACE + key[len(_LEFT) : -POSITION_BYTES] + id_
        if lookup(place) == _LEFT + key[-POSITION_BYTES:]:
            removed |= {key: None, place: None}
    return removed


def is_twin(key: bytes) -> bool:
    """Tell whether a key is one of `twin_key`, or its prefix."""
    return key.startswith(_TWIN)


def dependents_prefix(failure_id: bytes) -> bytes:
    """Return what the keys of the failures start with that a failure caused; their ids follow."""
    return _DEPENDENT + failure_id


def split_dependent(key: bytes) -> tuple[bytes, bytes] | None:
    """Return (cause, failure) of a key under a `dependents_prefix`, or None if it is another key."""
    ids = key[len(_DEPENDENT) :]
    if not key.startswith(_DEPENDENT) or len(ids) != 2 * FAILURE_ID_BYTES:
        return None
    return ids[:FAILURE_ID_BYTES], ids[FAILURE_ID_BYTES:]


def split_entry(key: bytes, value: bytes) -> Entry:
    """
    Return whom an entry of `TABLES` is about.

    Raises:
        ValueError: It is none.
    """
    table, rest = key[:1], key[1:]
    if table == _UNIQUE:
        entity, _, _digest_bytes = rest.partition(b"\0")
        return Entry((entity.decode(), value.decode()))
    if table == _REFERRER:
        _target_entity, _target_id, entity, id_, _name = rest.split(b"\0")
        return Entry((entity.decode(), id_.decode()))
    entity, name, place = rest.split(b"\0", 2)
    digest, place = place[:DIGEST_BYTES], place[DIGEST_BYTES:]
    id_, standing = (place, value) if table == _PLACE else (value, table + place)
    object_key = (entity.decode(), id_.decode())
    if standing[:1] != _LEFT:
        return Entry(object_key)
    return Entry(object_key, unpack_position(standing[1:]), _BY_VERSION + b"\0".join((entity, name, digest)))


def left_at(by_version: bytes, id_: str, lookup: Callable[[bytes], bytes | None]) -> int:
    """Return the version at which an object lost a value, as the table tells; 0 if it does not."""
    prefix = by_version[len(_BY_VERSION) :]
    place = lookup(_PLACE + prefix + id_.encode())
    if place is None or place[:1] != _LEFT or lookup(_LEFT + prefix + place[1:]) != id_.encode():
        return 0
    return unpack_position(place[1:])


def _follow(
    attribute: str,
    one: Written,
    lookup: Callable[[bytes], bytes | None],
    removed: IndexWrites,
    added: IndexWrites,
) -> None:
    """Move an object to its new version under the value that it has, and under the one that it loses."""
    for prefix, table in _places(attribute, one):
        known = lookup(_PLACE + prefix + one.key[1].encode())
        if known is not None:
            removed[known[:1] + prefix + known[1:]] = None
        added.update(_standing(prefix, table, one))


def _places(attribute: str, one: Written) -> Iterable[tuple[bytes, bytes]]:
    """Return by which values of an attribute an object is found after a change, and in which table."""
    places: dict[bytes, bytes] = {}
    for attributes, table in ((one.before, _LEFT), (one.after, _BY_VERSION)):
        value = attributes.get(attribute) if attributes is not None else None
        if value is not None:
            places[_value_prefix(one.key[0], attribute, value)] = table
    return places.items()


def _standing(prefix: bytes, table: bytes, one: Written) -> dict[bytes, bytes]:
    """Return the entries of an object that stands in a table."""
    id_, position = one.key[1].encode(), pack_position(one.version)
    return {_PLACE + prefix + id_: table + position, table + prefix + position: id_}


def _plain_entries(schema: Schema, key: ObjectKey, attributes: Attributes | None) -> dict[bytes, bytes]:
    """Return the entries that follow from what an object holds now."""
    entries: dict[bytes, bytes] = {}
    if attributes is None:
        return entries
    name, id_ = key
    entity = schema.entity(name)
    for names in entity.unique if entity is not None else ():
        found = unique_key(name, names, attributes)
        if found is not None:
            entries[found] = id_.encode()
    ruled = {one.attribute for one in schema.references(name) if one.on_delete != "keep"}
    for attribute, target in schema.referenced(name, attributes):
        if attribute in ruled:
            entries[referrers_prefix(target) + pack_object_key(*key) + b"\0" + attribute.encode()] = b""
    return entries


def _value_prefix(entity: str, attribute: str, value: Any) -> bytes:
    return f"{entity}\0{attribute}\0".encode() + _digest([_canonical(value)])


def _digest(parts: list[Any]) -> bytes:
    return hashlib.sha256(encode(parts)).digest()[:DIGEST_BYTES]


def _canonical(value: Any) -> Any:
    """Return one spelling for all that are `equal`."""
    kind = type(value)
    if kind is Decimal:
        return ["decimal", decimal_text(value)]
    if kind is float:
        return value + 0.0 if value == value else math.nan  # -0.0 equals 0.0, and there is one NaN
    if kind is list:
        return [_canonical(member) for member in value]
    if kind is dict:
        return {name: _canonical(value[name]) for name in sorted(value)}
    return value


def versions_of(entries: Iterable[tuple[bytes, bytes]], prefix: bytes) -> Iterator[tuple[int, str]]:
    """Yield (version, id) from entries under a `by_version_prefix`."""
    for key, id_ in entries:
        yield unpack_position(key[len(prefix) : len(prefix) + POSITION_BYTES]), id_.decode()
