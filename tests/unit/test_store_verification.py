"""Verification of a server's store: what is damaged is named, and nothing else is."""

from __future__ import annotations

import random
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import lmdb
import msgpack
import pytest
from tests.builders import (
    REPLICA_A,
    REPLICA_B,
    TENANT,
    TIME_US,
    Lab,
    create,
    damages,
    delete,
    entries,
    group,
    make_operation,
    packed,
    quick_folder,
    replace_entry,
    said,
    update,
)

from tidelog import Entity, Finding, FormatUnsupported, Integer, Reference, Rename, Schema, StorageError, String
from tidelog._environment import DATABASES_MAX
from tidelog._keys import pack_object_key, pack_position
from tidelog._operation import OperationKind
from tidelog._values import encode
from tidelog.v1 import failure_pb2
from tidelog_client import Replica
from tidelog_server import Application, HookContext, HookObject, LmdbStore, Principal, Reject, Tenant, verify_store
from tidelog_server import _failures as failures
from tidelog_server._adoption import adopt_schema
from tidelog_server._records import ReplicaState
from tidelog_server._store import Store

NUMBER: Final = b"\0\0\0\1"  # of the tenant that has most of it
STATES: Final = ("open", "done")


def application(version: int) -> Application:
    """Return an application with rules of every kind, before and after a migration."""
    title = "title" if version == 1 else "name"
    app = Application(
        schema=Schema(
            [
                Entity(
                    "Order",
                    {"number": Integer(), "state": String(), title: String(), "lines": Integer()},
                    unique=["number"],
                    indexes=["state"],
                ),
                Entity("Line", {"order": Reference("Order", on_delete="cascade"), "n": Integer()}),
                Entity("Note", {"about": Reference("Order", on_delete="clear"), "text": String()}),
            ],
            version=version,
            renames=[Rename(entity="Order", attribute="title", to="name", version=2)] if version > 1 else [],
        )
    )

    @app.before_commit("Order")
    def needs_a_title(order: HookObject, context: HookContext) -> None:
        if order[title] == "":
            raise Reject("an order needs a title")

    @app.after_commit("Line")
    def counts(line: HookObject, context: HookContext) -> None:
        context.update("Order", line["order"], {"lines": line["n"]})

    return app


def order(seq: int, id_: str, number: int, *, title: str = "Paint", **others: Any) -> bytes:
    """Return the creation of an order."""
    return create(seq, id_, {"number": number, "state": STATES[number % 2], "title": title}, entity="Order", **others)


def line(seq: int, id_: str, of: str) -> bytes:
    """Return the creation of a line."""
    return create(seq, id_, {"order": of, "n": seq}, entity="Line")


def make_history(store: Store) -> None:
    """Let everything happen in a store that can happen."""
    before, after = application(1), application(2)
    lab = Lab(before, store)
    adopt_schema(before, store, migrate=False, time_us=TIME_US)

    a, b = lab.session(REPLICA_A), lab.session(REPLICA_B)
    assert (
        said(a.batch(order(1, "o1", 1), order(2, "o2", 2), order(3, "o3", 3), line(4, "l1", "o1"))) == ["APPLIED"] * 4
    )
    assert said(b.batch(order(1, "o4", 4, title=""))) == ["HOOK_REJECTED"]
    assert said(b.batch(update(2, "o4", {"state": "done"}, entity="Order"))) == ["DEPENDENCY_FAILED"]
    assert said(b.batch(order(3, "o5", 1))) == ["UNIQUE_VIOLATED"]
    assert said(b.batch(b"\xff\xff", make_operation("update", seq=4, patch=b"\xc1").encode())) == ["MALFORMED"] * 2
    members = [
        make_operation("create", seq=seq, id=f"n{seq}", entity="Note", set={"about": target, "text": "x"})
        for seq, target in ((5, "o2"), (6, "nowhere"))
    ]
    assert said(b.settle(*group(*members))) == ["GROUP_REJECTED", "DANGLING_REFERENCE"]
    assert (
        said(
            a.batch(
                update(5, "o1", {"state": "done"}, entity="Order"),
                update(6, "o3", {"number": 33, "state": "open"}, entity="Order"),
                create(7, "n1", {"about": "o2", "text": "look"}, entity="Note"),
                line(9, "l2", "o2"),
                delete(10, "o2", entity="Order"),
                delete(11, "o2", entity="Order"),
                order(12, "o2", 22),
            )
        )
        == ["APPLIED"] * 7
    )

    data = Tenant(before, store, TENANT, None, lambda: TIME_US)
    with data.transaction() as transaction:
        transaction.update("Order", "o3", {"state": "done"})
        transaction.create("Order", {"number": 9, "title": "Ours"}, "o9")
    with Tenant(before, store, "other", None, lambda: TIME_US).transaction() as transaction:
        transaction.create("Order", {"number": 1, "title": "Theirs", "state": "open"}, "o1")
        transaction.delete("Order", "o1")

    adopt_schema(after, store, migrate=True, time_us=TIME_US)
    decision = failures.Decision(Principal("olga"), TIME_US)
    edited = decision._replace(patch=msgpack.packb({"set": {"number": 4, "state": "open", "name": "Edited"}}))
    id_ = uuid.UUID(next(one.id for one in lab.failures() if one.object_id == "o4" and not one.cause_failure_id)).bytes
    store.submit(TENANT, lambda reader: failures.retry(reader, after, id_, edited)).result()
    dismissed = uuid.UUID(next(one.id for one in lab.failures() if one.object_id == "o5")).bytes
    store.submit(TENANT, lambda reader: (failures.dismiss(reader, dismissed, decision)[0], None)).result()
    store.submit(TENANT, lambda reader: (failures.without_payloads(reader, [dismissed]), None)).result()


@pytest.fixture(scope="module")
def history() -> Iterator[Path]:
    """Give a store with a history, to be copied."""
    with quick_folder() as folder:
        with closing(LmdbStore(folder / "store")) as store:
            make_history(store)
        yield folder / "store"


@pytest.fixture
def store(history: Path, tmp_path: Path) -> Path:
    """Give a store with a history, to be damaged."""
    return Path(shutil.copytree(history, tmp_path / "store"))


class Tables:
    """The tables of a store, to be damaged: keys of the tenant's tables without its number."""

    def __init__(self, environment: Any, transaction: Any) -> None:
        self._environment = environment
        self._transaction = transaction

    def get(self, table: str, key: bytes, *, number: bytes = NUMBER) -> bytes:
        """Return an entry, which is there."""
        found: bytes = self._transaction.get(number + key, db=self._database(table))
        assert found is not None
        return found

    def put(self, table: str, key: bytes, value: bytes, *, number: bytes = NUMBER) -> None:
        """Put an entry."""
        self._transaction.put(number + key, value, db=self._database(table))

    def delete(self, table: str, key: bytes) -> None:
        """Delete an entry, which is there."""
        assert self._transaction.delete(NUMBER + key, db=self._database(table))

    def keys(self, table: str, prefix: bytes = b"") -> list[bytes]:
        """Return keys in order."""
        cursor = self._transaction.cursor(self._database(table))
        start = NUMBER + prefix
        return [key[4:] for key in cursor.iternext(values=False) if key.startswith(start)] if cursor.first() else []

    def flip(self, table: str, key: bytes, position: int) -> None:
        """Flip the bits of one byte of an entry."""
        value = bytearray(self.get(table, key))
        value[position] ^= 0xFF
        self.put(table, key, bytes(value))

    def change(self, version: int, **fields: Any) -> None:
        """Change fields of a change."""
        names = ("key", "kind", "patch", "before", "previous", "replica", "seq", "by_hook", "user", "time", "failure")
        values = msgpack.unpackb(self.get("changes", pack_position(version)), use_list=False)
        changed = [fields.get(name, value) for name, value in zip(names, values, strict=False)]
        self.put("changes", pack_position(version), packed([*changed, *values[len(names) :]]))

    def state(self, replica: bytes, **fields: Any) -> None:
        """Change fields of what is known of a replica."""
        names = ReplicaState._fields
        values = msgpack.unpackb(self.get("replicas", replica))
        changed = [fields.get(name, value) for name, value in zip(names, values, strict=True)]
        self.put("replicas", replica, packed(changed))

    def failure(self, object_id: str) -> tuple[bytes, failure_pb2.SynchronizationFailure]:
        """Return the record of a failure that was caused by none."""
        for key in self.keys("failures"):
            record = failure_pb2.SynchronizationFailure.FromString(self.get("failures", key))
            if record.object_id == object_id and not record.cause_failure_id:
                return key, record
        raise AssertionError(f"no failure of {object_id}")

    def _database(self, table: str) -> Any:
        return self._environment.open_db(table.encode(), txn=self._transaction, create=False)


def damage(path: Path, work: Callable[[Tables], object]) -> None:
    """Change a store behind its back."""
    with lmdb.open(str(path), max_dbs=DATABASES_MAX) as environment, environment.begin(write=True) as transaction:
        work(Tables(environment, transaction))


def order_key(id_: str) -> bytes:
    """Return the key of an order in the table of objects."""
    return pack_object_key("Order", id_)


def settled_key(seq: int, replica: bytes = REPLICA_A) -> bytes:
    """Return the key of an outcome."""
    return replica + pack_position(seq)


def found(path: Path) -> list[Finding]:
    """Verify a store."""
    return list(verify_store(path))


def kinds(path: Path) -> list[str]:
    """Return what kinds of findings there are, each once."""
    return sorted({one.kind.value for one in found(path)})


def with_record(
    change: Callable[[failure_pb2.SynchronizationFailure], object], of: str = "o4"
) -> Callable[[Tables], None]:
    """Change the record of a failure."""

    def work(tables: Tables) -> None:
        key, record = tables.failure(of)
        change(record)
        tables.put("failures", key, record.SerializeToString())

    return work


def lose_object(tables: Tables) -> None:
    """Lose an object with its entry by version."""
    version = tables.get("objects", order_key("o9"))[:8]
    tables.delete("objects", order_key("o9"))
    tables.delete("by_version", b"Order\0" + version)


def move_by_version(tables: Tables) -> None:
    """List an object by an older version, besides."""
    tables.put("by_version", b"Order\0" + pack_position(6), b"o1")


def with_attributes(id_: str, attributes: bytes) -> Callable[[Tables], None]:
    """Give an object other attributes."""

    def work(tables: Tables) -> None:
        tables.put("objects", order_key(id_), tables.get("objects", order_key(id_))[:33] + attributes)

    return work


def in_index(prefix: bytes, value: bytes | None) -> Callable[[Tables], None]:
    """Change the first entry of the table of indexes that starts with a prefix."""

    def work(tables: Tables) -> None:
        key = tables.keys("indexes", prefix)[0]
        if value is None:
            tables.delete("indexes", key)
        else:
            tables.put("indexes", key, value)

    return work


# What is done to the store, the findings that follow, and what one of them says.
DAMAGES: Final[dict[str, tuple[Callable[[Tables], object], list[str], str]]] = {
    "a change that is cut off": (
        lambda tables: tables.put("changes", pack_position(6), tables.get("changes", pack_position(6))[:-3]),
        ["chain_broken", "change_missing", "change_orphaned", "entry_unreadable"],
        "of the table changes",
    ),
    "a change with a field of another type": (
        lambda tables: tables.change(6, previous="five"),
        ["chain_broken", "change_missing", "change_orphaned", "entry_unreadable"],
        "'five' is no int",
    ),
    "an object that is cut off": (
        lambda tables: tables.put("objects", order_key("o1"), b"123"),
        ["by_version_wrong", "change_orphaned", "entry_unreadable", "index_wrong"],
        "of the table objects",
    ),
    "attributes that are none": (
        with_attributes("o1", b"\xc1"),
        ["entry_unreadable", "index_wrong"],
        "Order 'o1': expected attributes",
    ),
    "an outcome that is cut off": (
        lambda tables: tables.put("settled", settled_key(2), b"1"),
        ["entry_unreadable", "settled_wrong"],
        "of the table settled",
    ),
    "a replica's state that is none": (
        lambda tables: tables.put("replicas", REPLICA_A, b"\xc1"),
        ["entry_unreadable", "settled_wrong"],
        "of the table replicas",
    ),
    "a failure that is none": (
        lambda tables: tables.put("failures", tables.failure("o4")[0], b"\xff\xff\xff"),
        ["entry_unreadable", "refused_wrong"],
        "expected a record",
    ),
    "an id by version that is no text": (
        lambda tables: tables.put("by_version", tables.keys("by_version", b"Order")[0], b"\xff"),
        ["by_version_wrong", "entry_unreadable"],
        "of the table by_version",
    ),
    "two tenants of one number": (
        lambda tables: tables.put("tenants", b"third", NUMBER, number=b""),
        ["tenant_wrong"],
        "expected a number of its own",
    ),
    "data of no tenant": (
        lambda tables: tables.put("indexes", b"uTask\0x", b"t1", number=b"\0\0\0\7"),
        ["tenant_wrong"],
        "table indexes: expected entries of known tenants",
    ),
    "an epoch that is none": (
        lambda tables: tables.put("meta", b"epoch", b"?", number=b""),
        ["meta_wrong"],
        "epoch: expected a UUID",
    ),
    "a note of the schema that is none": (
        lambda tables: tables.put("meta", b"\0adoption", b"{", number=b""),
        ["meta_wrong"],
        "schema: expected the schema",
    ),
    "a head that stands behind": (
        lambda tables: tables.put("heads", b"", pack_position(21) + tables.get("heads", b"")[8:]),
        ["change_orphaned", "head_wrong", "state_differs"],
        "head: expected version 22",
    ),
    "a head with another commit id": (
        lambda tables: tables.flip("heads", b"", 9),
        ["head_wrong"],
        "head: expected version 22, commit",
    ),
    "a commit that never was": (
        lambda tables: tables.put("commits", pack_position(99), b"12345678"),
        ["head_wrong"],
        "commit 99: expected no version above 22",
    ),
    "the newest change lost": (
        lambda tables: tables.delete("changes", pack_position(22)),
        ["chain_broken", "change_orphaned", "head_wrong"],
        "head: expected version 21, that of the newest change",
    ),
    "a change lost": (
        lambda tables: tables.delete("changes", pack_position(6)),
        ["chain_broken", "change_missing", "change_orphaned"],
        "change 6: expected to be kept, found none",
    ),
    "an object lost": (lose_object, ["change_orphaned", "index_wrong"], "change 20: expected to lead to Order 'o9'"),
    "a chain that leaves changes out": (
        lambda tables: tables.change(6, previous=1),
        ["change_orphaned", "state_differs"],
        "change 5: expected to lead to Order 'o1'",
    ),
    "a chain that leads to another object": (
        lambda tables: tables.change(6, previous=2),
        ["chain_broken", "change_orphaned"],
        "expected a change of Order 'o1', found one of Order 'o2'",
    ),
    "a chain that leads forward": (
        lambda tables: tables.change(6, previous=7),
        ["chain_broken", "change_orphaned"],
        "expected a lower version before it, found 7",
    ),
    "a chain that leads in a circle": (
        lambda tables: tables.change(6, previous=6),
        ["chain_broken", "change_orphaned"],
        "expected a lower version before it, found 6",
    ),
    "a chain that begins in the middle": (
        lambda tables: tables.change(5, previous=0),
        ["chain_broken", "change_orphaned"],
        "expected a creation as its first change",
    ),
    "another patch in a change": (
        lambda tables: tables.change(6, patch=encode({"set": {"state": "open"}})),
        ["state_differs"],
        "Order 'o1', change 6: expected the object as updated with",
    ),
    "another before-image in a change": (
        lambda tables: tables.change(6, before=encode([{"state": "lost"}, []])),
        ["index_wrong", "state_differs"],
        "Order 'o1', change 1",
    ),
    "a before-image that is none": (
        lambda tables: tables.change(6, before=b"\xc1"),
        ["change_orphaned", "entry_unreadable"],
        "Order 'o1', change 6: expected what it did",
    ),
    "a deletion that became an update": (
        lambda tables: tables.change(
            11, kind=int(OperationKind.UPDATE), patch=encode({"set": {}}), before=encode([{}, []])
        ),
        ["state_differs"],
        "Order 'o2', change 11",
    ),
    "other attributes in an object": (
        with_attributes("o9", encode({"number": 9, "name": "Theirs"})),
        ["state_differs"],
        "Order 'o9', change 20: expected the object as updated with {'number': 9, 'name': 'Ours'}",
    ),
    "an object that became a tombstone": (
        lambda tables: tables.flip("objects", pack_object_key("Line", "l1"), 32),
        ["index_wrong", "state_differs"],
        "Line 'l1'",
    ),
    "another creation": (
        lambda tables: tables.flip("objects", order_key("o1"), 15),
        ["state_differs"],
        "Order 'o1': expected created at version 1 by",
    ),
    "another creator": (
        lambda tables: tables.flip("objects", order_key("o1"), 16),
        ["state_differs"],
        "Order 'o1': expected created at version 1 by",
    ),
    "a sole writer that is none": (
        lambda tables: tables.put(
            "objects",
            order_key("o1"),
            (value := tables.get("objects", order_key("o1")))[:32] + b"\2" + value[33:],
        ),
        ["state_differs"],
        "to be its sole writer, found change 17 by another one",
    ),
    "an object with a version above the head": (
        lambda tables: tables.flip("objects", order_key("o9"), 1),
        ["by_version_wrong", "change_orphaned", "state_differs"],
        "expected a version of 1 to 22",
    ),
    "an entry by version lost": (
        lambda tables: tables.delete("by_version", b"Order\0" + pack_position(17)),
        ["by_version_wrong"],
        "Order 'o1': expected an entry at version 17, found none",
    ),
    "an entry by version that is stale": (
        move_by_version,
        ["by_version_wrong"],
        "expected the object at version 6, found it at version 17",
    ),
    "an entry by version of no object": (
        lambda tables: tables.put("by_version", b"Order\0" + pack_position(3), b"nobody"),
        ["by_version_wrong"],
        "found no such object",
    ),
    "a unique value lost": (in_index(b"u", None), ["index_wrong"], "found none"),
    "a unique value of another": (in_index(b"u", b"o1"), ["index_wrong"], "expected b'o9', found b'o1'"),
    "a referrer lost": (in_index(b"r", None), ["index_wrong"], "index of Line 'l1'"),
    "a value lost": (in_index(b"v", None), ["index_wrong"], "index of Order 'o2'"),
    "what has left a value lost": (in_index(b"l", None), ["index_wrong"], "that it lost the value at version 15"),
    "a place lost": (in_index(b"p", None), ["index_wrong"], "index of Order 'o2'"),
    "a dependent lost": (in_index(b"d", None), ["index_wrong"], "expected an entry under its cause"),
    "an index entry too many": (
        lambda tables: tables.put("indexes", b"rOrder\0o9\0Line\0l1\0order", b""),
        ["index_wrong"],
        "expected what follows from Line 'l1'",
    ),
    "an index entry of no form": (
        lambda tables: tables.put("indexes", b"rOrder", b""),
        ["index_wrong"],
        "expected an entry of its table",
    ),
    "an index entry of no table": (
        lambda tables: tables.put("indexes", b"zOrder", b""),
        ["index_wrong"],
        "expected an entry of a known table",
    ),
    "an index that was made in the future": (
        lambda tables: tables.put("indexes", b"s", pack_position(99)),
        ["index_wrong"],
        "index: expected to be made by version 22, found 99",
    ),
    "a dependent of no failure": (
        lambda tables: tables.put("indexes", b"d" + bytes(32), b""),
        ["index_wrong"],
        "because of",
    ),
    "an outcome lost": (
        lambda tables: tables.delete("settled", settled_key(6)),
        ["settled_wrong"],
        "expected applied at version 7, as the change says, found no outcome",
    ),
    "an outcome too many": (
        lambda tables: tables.put("settled", settled_key(8), tables.get("settled", settled_key(7))),
        ["settled_wrong"],
        "operation 8 of replica 61616161-6161-6161-6161-616161616161: expected no outcome",
    ),
    "an outcome with another version": (
        lambda tables: tables.flip("settled", settled_key(6), 15),
        ["entry_unreadable", "settled_wrong"],
        "expected applied at version 7, as the change says, found applied at version 248",
    ),
    "a refusal that became an application": (
        lambda tables: tables.put("settled", settled_key(1, REPLICA_B), pack_position(1_000_001) + bytes(25)),
        ["failure_wrong", "settled_wrong"],
        "expected a version of 1 to 22, found applied at version 0",
    ),
    "outcomes that the replica's state lacks": (
        lambda tables: tables.state(REPLICA_A, settled_ranges=[[1, 6], [9, 12]]),
        ["settled_wrong"],
        "expected no outcome, found one that the replica's state lacks",
    ),
    "a run that nothing was settled in": (
        lambda tables: tables.put("indexes", b"n" + pack_position(10**6), bytes(16)),
        ["index_wrong"],
        "expected how far settling came in which run",
    ),
    "how far settling came, without the run": (
        lambda tables: tables.put("indexes", b"n", pack_position(7)),
        ["index_wrong"],
        "expected how far settling came in which run",
    ),
    "a refusal that was applied too": (
        lambda tables: tables.put(
            "settled",
            settled_key(5, REPLICA_B),
            (old := tables.get("settled", settled_key(5, REPLICA_B)))[:15] + b"\3" + old[16:],
        ),
        ["settled_wrong"],
        "expected to be refused, and not applied",
    ),
    "what a hook changed for an operation that is not known": (
        lambda tables: tables.change(10, seq=11_000),
        ["settled_wrong"],
        "applied at version 10, as the change says, found no outcome",
    ),
    "another newest operation": (
        lambda tables: tables.state(REPLICA_A, newest_nonce=7),
        ["settled_wrong"],
        "operation 12, nonce 7",
    ),
    "a newest operation that was never settled": (
        lambda tables: tables.state(REPLICA_A, newest_seq=40),
        ["settled_wrong"],
        "found operation 40",
    ),
    "a replica lost": (
        lambda tables: tables.delete("replicas", REPLICA_A),
        ["settled_wrong"],
        "expected the replica to be known",
    ),
    "a failure lost": (
        lambda tables: tables.delete("failures", tables.failure("o4")[0]),
        ["failure_wrong", "index_wrong", "refused_wrong", "settled_wrong"],
        "expected the failure",
    ),
    "a failure with another id": (
        with_record(lambda record: setattr(record, "id", str(uuid.UUID(int=1)))),
        ["failure_wrong"],
        "expected its own id",
    ),
    "a failure of another replica": (
        with_record(lambda record: setattr(record, "replica_id", str(uuid.UUID(bytes=REPLICA_A)))),
        ["failure_wrong", "refused_wrong"],
        "operation 1 of replica 61616161-6161-6161-6161-616161616161 to be refused with it, found applied",
    ),
    "a failure with another operation": (
        with_record(lambda record: setattr(record, "operation", create(3, "o4"))),
        ["failure_wrong", "refused_wrong"],
        "operation 3 of replica",
    ),
    "a failure whose operation cannot be read": (
        with_record(lambda record: setattr(record, "operation", b"\xff\xff")),
        ["failure_wrong", "refused_wrong"],
        "expected an operation that can be read",
    ),
    "a failure without a cause": (
        with_record(lambda record: setattr(record, "cause_failure_id", str(uuid.UUID(int=1))), of="o5"),
        ["failure_wrong"],
        "expected its cause, the failure 00000000-0000-0000-0000-000000000001",
    ),
    "a failure whose commit group is another's": (
        with_record(lambda record: setattr(record, "operation", create(1, "o4")), of="n6"),
        ["failure_wrong"],
        "expected the refused operation in its commit group",
    ),
    "a refused creation of no failure": (
        lambda tables: tables.put("refused", REPLICA_B + order_key("o4"), bytes(16)),
        ["refused_wrong"],
        "refused creation of Order 'o4'",
    ),
    "a refused creation of another failure": (
        lambda tables: tables.put("refused", REPLICA_B + order_key("o4"), tables.failure("n6")[0]),
        ["refused_wrong"],
        "found one of other operations",
    ),
}


def test_a_rich_history_is_sound(store: Path) -> None:
    """In a store that nobody damaged nothing is found, whatever has happened in it."""
    counts: Counter[str] = Counter()

    assert list(verify_store(store, counts=counts)) == []
    assert counts == {
        "tenants": 2,
        "changes": 24,
        "objects": 9,
        "index entries": 19,
        "replicas": 2,
        "outcomes": 17,
        "failures": 6,
    }


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(store: Path, name: str) -> None:
    """Each kind of damage leads to the findings that follow from it, one of which says what it is."""
    work, expected, text = DAMAGES[name]
    damage(store, work)

    assert kinds(store) == expected
    assert any(text in str(one) for one in found(store)), [str(one) for one in found(store)]


def test_findings_name_their_tenant(store: Path) -> None:
    """A finding says in whose data it is."""
    damage(store, lambda tables: tables.put("commits", pack_position(99), b"12345678", number=b"\0\0\0\2"))

    assert [one.tenant for one in found(store)] == ["other"]


def test_a_table_that_is_missing(store: Path) -> None:
    """A store without one of its tables is damaged, and that is a finding too."""
    with lmdb.open(str(store), max_dbs=DATABASES_MAX) as environment:
        table = environment.open_db(b"settled")
        with environment.begin(write=True) as transaction:
            transaction.drop(table)

    assert [one.kind for one in found(store)] == ["file_damaged"]


def test_a_log_that_was_trimmed(store: Path) -> None:
    """What is collected of the change log is not missed: objects are followed back as far as it reaches."""

    def trim(tables: Tables) -> None:
        for version in range(1, 7):
            tables.delete("changes", pack_position(version))
        tables.put("collected", b"", pack_position(6))

    damage(store, trim)
    assert found(store) == []

    damage(store, lambda tables: tables.change(7, patch=encode({"set": {"number": 34, "state": "open"}})))
    assert kinds(store) == ["state_differs"]


@pytest.mark.parametrize("count", [1, 5, 22])
def test_a_log_that_nobody_trimmed(store: Path, count: int) -> None:
    """Where nothing was collected the first changes are missing, or all, and not trimmed."""

    def lose(tables: Tables) -> None:
        for version in range(1, count + 1):
            tables.delete("changes", pack_position(version))

    damage(store, lose)
    assert {"chain_broken", "head_wrong" if count == 22 else "change_missing"} <= set(kinds(store))


def test_what_is_collected_and_kept(store: Path) -> None:
    """A highest version collected contradicts changes up to it that are kept, and a head below it."""
    damage(store, lambda tables: tables.put("collected", b"", pack_position(6)))
    assert any("change 6: expected to be gone, like all up to version 6" in str(one) for one in found(store))

    damage(store, lambda tables: tables.put("collected", b"", pack_position(1 << 60)))
    assert any(one.where == "highest version collected" for one in found(store))


def test_a_head_that_is_beyond_all(store: Path) -> None:
    """A head however high is a finding: memory goes by the changes that there are."""
    damage(store, lambda tables: tables.flip("heads", b"", 0))

    assert kinds(store) == ["head_wrong"]


def lose_outcomes(replica: bytes, *seqs: int, through: int = 0) -> Callable[[Tables], None]:
    """Delete outcomes, and say so of those up to a seq."""

    def work(tables: Tables) -> None:
        for seq in seqs:
            tables.delete("settled", settled_key(seq, replica))
        if through:
            tables.put("indexes", b"a" + replica, pack_position(through))

    return work


def test_outcomes_that_are_forgotten(store: Path) -> None:
    """Outcomes of failures that the store says it has forgotten are not missed, but behind them."""
    damage(store, lose_outcomes(REPLICA_B, 1, 2, 3, through=3))
    assert found(store) == []
    damage(store, lose_outcomes(REPLICA_B, 5))
    assert kinds(store) == ["failure_wrong", "settled_wrong"]
    damage(store, lose_outcomes(REPLICA_B, 4, 6, through=6))
    assert found(store) == []


@pytest.mark.parametrize("seqs", [[1], [1, 2, 3], [1, 2, 3, 4, 5, 6]])
def test_outcomes_that_nobody_forgot(store: Path, seqs: list[int]) -> None:
    """Where nothing was forgotten the first outcomes of a replica are missing, or all."""
    damage(store, lose_outcomes(REPLICA_B, *seqs))

    assert kinds(store) == ["failure_wrong", "settled_wrong"]


def test_outcomes_of_changes_that_are_kept(store: Path) -> None:
    """As long as a change is kept its outcome is, whatever the store says that it has forgotten."""
    damage(store, lose_outcomes(REPLICA_A, 1, through=12))

    assert kinds(store) == ["settled_wrong"]


def test_outcomes_of_a_retired_replica(store: Path) -> None:
    """Of a replica that was retired all may be gone, what it could not create too."""

    def retire(tables: Tables) -> None:
        tables.state(REPLICA_B, retired=True)
        for key in tables.keys("refused", REPLICA_B):
            tables.delete("refused", key)

    damage(store, lose_outcomes(REPLICA_B, 1, 2, 3, 4, 5, 6))
    damage(store, retire)

    assert found(store) == []


def test_outcomes_of_before(store: Path) -> None:
    """A store that forgot outcomes before it kept an account is sound, but for what a change or a gap tells."""
    damage(store, lambda tables: tables.put("indexes", b"a", b""))
    damage(store, lose_outcomes(REPLICA_B, 1, 2, 3))
    assert found(store) == []

    damage(store, lose_outcomes(REPLICA_B, 5))
    assert kinds(store) == ["failure_wrong", "settled_wrong"]
    damage(store, lose_outcomes(REPLICA_A, 1, 2))
    assert sum(one.kind.value == "settled_wrong" for one in found(store)) == 3


def test_refused_creations_that_are_lost(store: Path) -> None:
    """A creation that was refused is on record as long as the failure has its payload."""

    def lose(tables: Tables) -> None:
        for key in tables.keys("refused"):
            tables.delete("refused", key)

    damage(store, lose)

    assert kinds(store) == ["refused_wrong"]


def test_a_failure_that_nothing_points_to(store: Path) -> None:
    """The failure of an operation that could not be read at all is missed, because failures are counted."""

    def lose(tables: Tables) -> None:
        key = next(
            key
            for key in tables.keys("failures")
            if failure_pb2.SynchronizationFailure.FromString(tables.get("failures", key)).operation == b"\xff\xff"
        )
        tables.delete("failures", key)

    damage(store, lose)

    assert [str(one.where) for one in found(store)] == ["failures"]


def test_another_nonce(store: Path) -> None:
    """An outcome with another nonce is noticed, though nothing but the outcome has it."""
    damage(store, lambda tables: tables.flip("settled", settled_key(2), 7))
    assert "entry_unreadable" in kinds(store)

    # As it was written before it said so twice.
    once = pack_position(7) + pack_position(2) + bytes(17)
    damage(store, lambda tables: tables.put("settled", settled_key(2), once))
    assert found(store) == []


# What one damaged entry may stay unnoticed in: what nothing else in a store tells, or what is information only.
UNNOTICED: Final[dict[tuple[str, str], str]] = {
    ("changes", "flipped"): "times, users, what a hook was run by",
    ("commits", "deleted"): "ids are random, and a commit may have ended at any version",
    ("commits", "flipped"): "the same",
    ("failures", "flipped"): "words and times of a failure",
    ("failures", "cut"): "fields of a failure that it need not have",
    ("indexes", "deleted"): "the account of a store of before, and how far settling came there",
    ("indexes", "flipped"): "the random name of a run",
    ("meta", "deleted"): "a store that was never served has no schema",
    ("meta", "flipped"): "one UUID or another, one schema or another",
    ("replicas", "flipped"): "whose it is, when it was heard, and the number of a session",
    ("refused", "deleted"): "a creation whose failure has no payload any more",
    ("settled", "flipped"): "whether more of an object changed than an operation said",
}


def test_one_entry_of_every_table(store: Path) -> None:
    """Whatever entry is lost, cut off or flipped: verification ends in findings, or has nothing to tell it by."""
    chosen = random.Random(4)
    unnoticed: set[tuple[str, str]] = set()
    for table, key, value in entries(store):
        for what, damaged in damages(value, chosen):
            replace_entry(store, table, key, damaged)
            if not found(store):
                unnoticed.add((table, what))
        replace_entry(store, table, key, value)

    assert found(store) == []
    assert unnoticed <= UNNOTICED.keys()


def test_a_store_in_use(tmp_path: Path) -> None:
    """A store is verified while it is open, in this process too; it is read-only then, and can be opened again."""
    lab = Lab(store=LmdbStore(tmp_path / "store"))
    lab.settle(create(1))

    assert found(tmp_path / "store") == []
    lab.settle(create(2, "t2"))
    assert found(tmp_path / "store") == []

    assert isinstance(lab.store, LmdbStore)
    lab.store.close()
    assert found(tmp_path / "store") == []
    LmdbStore(tmp_path / "store").close()


def test_nothing_is_written(store: Path) -> None:
    """Verification changes no byte of the data."""
    before = (store / "data.mdb").read_bytes()

    assert found(store) == []
    assert (store / "data.mdb").read_bytes() == before


def test_what_is_no_store(tmp_path: Path) -> None:
    """A directory without a store, or with something else, is an error, and nothing is made there."""
    with pytest.raises(StorageError):
        found(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()

    Replica(tmp_path / "replica").close()
    with pytest.raises(FormatUnsupported):
        found(tmp_path / "replica")
