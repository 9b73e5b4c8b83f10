"""Verification of a replica: what is damaged is named, and nothing else is; what cannot be read is set aside."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import lmdb
import pytest
from tests.builders import contents, damages, entries, quick_folder, replace_entry
from tests.sessions import ServerEnd, applied, page, refused, synchronize

from tidelog import Finding, FormatUnsupported, LogCorrupt, StorageError
from tidelog._environment import DATABASES_MAX
from tidelog._keys import pack_object_key, pack_position
from tidelog._values import encode
from tidelog.v1 import failure_pb2
from tidelog_client import Replica
from tidelog_client._verification import verify_replica
from tidelog_server import LmdbStore


def make_replica(path: Path) -> None:
    """
    Make a replica in which everything has happened that can happen.

    Operations 1 to 3 are settled and downloaded; 4 was refused, 5 and 6 as a commit group; 7 is applied
    and its snapshot has not come; 8 to 13 are pending, 10 to 12 as a commit group. Pages are staged.
    """
    with Replica(path) as replica:
        for id_ in ("t1", "t2", "t3"):
            replica.create("Task", {"n": 0}, id_)
        server = ServerEnd(pages=[page(*(("Task", id_, 100, {"n": 1}) for id_ in ("t1", "t2", "t3", "t4")))])
        synchronize(replica, server)
        replica.update("Task", "t4", {"n": "refused"})
        with replica.transaction(atomic=True) as transaction:
            transaction.update("Task", "t1", {"n": "refused"})
            transaction.update("Task", "t2", {"n": "refused"})
        replica.update("Task", "t1", {"done": True})
        four, five, six, seven = (logged.operation for logged in replica.pending())
        results = [refused(four), refused(five), refused(six, culprit=five), applied(seven, 105)]
        replica._storage.settle(results, b"")
        replica.update("Task", "t1", increment={"n": 5})
        replica.delete("Task", "t2")
        with replica.transaction(atomic=True) as transaction:
            transaction.create("Task", {"n": 7}, "t2")
            transaction.update("Task", "t2", {"n": 8})
            transaction.create("Note", {}, "n1")
        replica.update("Task", "t3", {"n": 9})
        staged = page(("Task", "t5", 106, {}), removals=[("Task", "t6", 107)]).SerializeToString()
        replica._storage.publication.stage([staged], 2, b"token")


@pytest.fixture(scope="module")
def history() -> Iterator[Path]:
    """Give a replica with a history, to be copied."""
    with quick_folder() as folder:
        make_replica(folder / "replica")
        yield folder / "replica"


@pytest.fixture
def path(history: Path, tmp_path: Path) -> Path:
    """Give a replica with a history, to be damaged."""
    return Path(shutil.copytree(history, tmp_path / "replica"))


class Tables:
    """The tables of a replica, to be damaged."""

    def __init__(self, environment: Any, transaction: Any) -> None:
        self._environment = environment
        self._transaction = transaction

    def get(self, table: str, key: bytes) -> bytes:
        """Return an entry, which is there."""
        found: bytes = self._transaction.get(key, db=self._database(table))
        assert found is not None
        return found

    def put(self, table: str, key: bytes, value: bytes) -> Tables:
        """Put an entry."""
        self._transaction.put(key, value, db=self._database(table))
        return self

    def delete(self, table: str, key: bytes) -> Tables:
        """Delete an entry, which is there."""
        assert self._transaction.delete(key, db=self._database(table))
        return self

    def move(self, table: str, key: bytes, to: bytes) -> Tables:
        """Put an entry under another key."""
        return self.put(table, to, self.get(table, key)).delete(table, key)

    def flip(self, table: str, key: bytes, position: int) -> Tables:
        """Flip the bits of one byte of an entry."""
        value = bytearray(self.get(table, key))
        value[position] ^= 0xFF
        return self.put(table, key, bytes(value))

    def failure(self, seq: int, **fields: Any) -> Tables:
        """Change fields of the failure of an operation."""
        key = f"failure {seq}".encode()
        record = failure_pb2.SynchronizationFailure.FromString(self.get("failures", key))
        for name, value in fields.items():
            setattr(record, name, value)
        return self.put("failures", key, record.SerializeToString())

    def _database(self, table: str) -> Any:
        return self._environment.open_db(table.encode(), txn=self._transaction, create=False)


def damage(path: Path, work: Callable[[Tables], object]) -> None:
    """Change a replica behind its back."""
    with lmdb.open(str(path), max_dbs=DATABASES_MAX) as environment, environment.begin(write=True) as transaction:
        work(Tables(environment, transaction))


def found(path: Path) -> list[Finding]:
    """Verify a replica."""
    return list(verify_replica(path))


def kinds(path: Path) -> list[str]:
    """Return what kinds of findings there are, each once."""
    return sorted({one.kind.value for one in found(path)})


T1, T2, T3 = (pack_object_key("Task", id_) for id_ in ("t1", "t2", "t3"))
at = pack_position


def replayed(key: bytes, seq: int) -> bytes:
    """Return the key of an operation that is replayed."""
    return key + b"\0" + at(seq)


# What is done to the replica, the findings that follow, and what one of them says.
DAMAGES: Final[dict[str, tuple[Callable[[Tables], object], list[str], str]]] = {
    "a pending operation with a flipped bit": (
        lambda tables: tables.flip("log", at(8), 20),
        ["log_damaged"],
        "operation 8: expected as it was logged, found the operation at seq 8 fails its check sum",
    ),
    "a settled operation with a flipped bit": (
        lambda tables: tables.flip("log", at(2), 20),
        ["log_damaged"],
        "operation 2: expected as it was logged",
    ),
    "an operation at the place of another": (
        lambda tables: tables.put("log", at(2), tables.get("log", at(1))),
        ["log_damaged"],
        "found operation 1",
    ),
    "a gap in the log": (
        lambda tables: tables.delete("log", at(2)),
        ["log_gap"],
        "operation 2: expected to be logged",
    ),
    "a gap with its outcome": (
        lambda tables: tables.delete("log", at(2)).delete("outcomes", at(2)),
        ["log_gap"],
        "operation 2: expected to be logged, found none",
    ),
    "a pending operation lost": (
        lambda tables: tables.delete("log", at(8)),
        ["log_gap", "replay_wrong"],
        "operation 8: expected to be logged",
    ),
    "the end of the log lost": (
        lambda tables: (
            tables.delete("log", at(13))
            .delete("pending", at(13))
            .delete("unconfirmed", replayed(T3, 13))
            .move("base", T3, T3 + b"x")
            .delete("base", T3 + b"x")
            .delete("objects", T3)
        ),
        ["log_gap"],
        "end of the log: expected operation 13, found operation 12",
    ),
    "a pending operation on another object": (
        lambda tables: tables.put("pending", at(13), tables.get("pending", at(13))[:4] + T1),
        ["pending_wrong", "replay_wrong"],
        "expected place (0, 0) on Task 't3', as in the log, found place (0, 0) on Task 't1'",
    ),
    "another place in a commit group": (
        lambda tables: tables.flip("pending", at(11), 1),
        ["pending_wrong"],
        "pending operation 11: expected place (1, 3)",
    ),
    "a commit group that is not whole": (
        lambda tables: tables.delete("pending", at(10)).put("outcomes", at(10), b"\1" + at(110)),
        ["meta_wrong", "pending_wrong", "replay_wrong"],
        "commit group of the pending operation 11",
    ),
    "a pending operation that is none": (
        lambda tables: tables.put("pending", at(13), b"1"),
        ["entry_unreadable"],
        "pending operation 13: expected its place and its object",
    ),
    "an operation that is settled and pending": (
        lambda tables: tables.put("outcomes", at(8), b"\1" + at(108)),
        ["meta_wrong", "outcome_wrong"],
        "operation 8: expected either pending or settled, found both",
    ),
    "an operation without an outcome": (
        lambda tables: tables.delete("outcomes", at(2)),
        ["outcome_wrong"],
        "operation 2: expected either pending or settled, found neither",
    ),
    "an outcome without a version": (
        lambda tables: tables.put("outcomes", at(2), b"\1" + at(0)),
        ["outcome_wrong"],
        "expected a version or a failure, found neither",
    ),
    "an outcome that is none": (
        lambda tables: tables.put("outcomes", at(2), b"\2\xff"),
        ["entry_unreadable"],
        "outcome of operation 2",
    ),
    "a failure lost": (
        lambda tables: tables.delete("failures", b"failure 4"),
        ["outcome_wrong"],
        "outcome of operation 4: expected the failure failure 4, found none",
    ),
    "another object in the view": (
        lambda tables: tables.put("objects", T3, tables.get("objects", T3)[:9] + encode({"n": 10})),
        ["view_differs"],
        "Task 't3': expected version 100, dirty, {'n': 9}, found version 100, dirty, {'n': 10}",
    ),
    "an object of another version": (
        lambda tables: tables.put("objects", T3, at(99) + tables.get("objects", T3)[8:]),
        ["view_differs"],
        "found version 99, dirty",
    ),
    "an object that is gone": (
        lambda tables: tables.delete("objects", T1),
        ["view_differs"],
        "found no object",
    ),
    "an object that should be gone": (
        lambda tables: tables.put("objects", pack_object_key("Task", "t4"), at(100) + b"\1" + encode({})),
        ["view_differs"],
        "expected to be clean, for nothing is replayed, found dirty",
    ),
    "an object that cannot be read": (
        lambda tables: tables.put("objects", pack_object_key("Task", "t4"), b"1"),
        ["entry_unreadable"],
        "one that can be decoded",
    ),
    "attributes that cannot be read": (
        lambda tables: tables.put("objects", T1, tables.get("objects", T1)[:9] + b"\xc1"),
        ["entry_unreadable"],
        "one that can be decoded",
    ),
    "another base": (
        lambda tables: tables.put("base", T1, tables.get("base", T1)[:9] + encode({"n": 3})),
        ["view_differs"],
        "expected version 100, dirty, {'n': 8, 'done': True}, found version 100, dirty, {'n': 6, 'done': True}",
    ),
    "a base lost": (lambda tables: tables.delete("base", T3), ["view_differs"], "Task 't3': expected no object"),
    "a base too many": (
        lambda tables: tables.put("base", pack_object_key("Task", "t4"), at(100) + b"\0" + encode({})),
        ["base_wrong"],
        "Task 't4': expected no base",
    ),
    "a base that contains what is replayed": (
        lambda tables: tables.put("base", T1, at(105) + tables.get("base", T1)[8:]).put(
            "objects", T1, at(105) + tables.get("objects", T1)[8:]
        ),
        ["replay_wrong"],
        "expected a version above the base's, 105, found version 105",
    ),
    "a pending operation that is not shown": (
        lambda tables: tables.delete("unconfirmed", replayed(T1, 8)),
        ["replay_wrong", "view_differs"],
        "pending operation 8: expected to be replayed on Task 't1'",
    ),
    "a settled operation that is shown": (
        lambda tables: tables.put("unconfirmed", replayed(T3, 3), at(0)),
        ["replay_wrong", "view_differs"],
        "operation 3, on Task 't3': expected to be pending, found not",
    ),
    "another version of what is shown": (
        lambda tables: tables.put("unconfirmed", replayed(T1, 7), at(104)),
        ["replay_wrong"],
        "expected to be applied at version 104, found version 105",
    ),
    "an operation shown on another object": (
        lambda tables: tables.put("unconfirmed", replayed(T3, 8), at(0)),
        ["replay_wrong"],
        "operation 8: expected an operation on Task 't3', found one on Task 't1'",
    ),
    "an operation shown that is not logged": (
        lambda tables: tables.put("unconfirmed", replayed(T3, 99), at(0)),
        ["replay_wrong"],
        "operation 99, on Task 't3': expected to be logged",
    ),
    "a failure that is none": (
        lambda tables: tables.put("failures", b"failure 4", b"\xff\xff"),
        ["entry_unreadable"],
        "failure failure 4: expected a record",
    ),
    "a failure with another id": (
        lambda tables: tables.failure(4, id="failure 5"),
        ["failure_wrong"],
        "expected its own id, found failure 5",
    ),
    "a failure without its operation": (
        lambda tables: tables.failure(4, operation=b""),
        ["failure_wrong"],
        "expected the refused operation",
    ),
    "a failure of another operation": (
        lambda tables: tables.failure(4, operation=tables.get("log", at(3))[4:]),
        ["failure_wrong"],
        "expected operation 3 to be refused with it",
    ),
    "no replica id": (
        lambda tables: tables.put("meta", b"replica_id", b"?"),
        ["meta_wrong"],
        "replica id: expected a UUID",
    ),
    "another end of the log": (
        lambda tables: tables.put("meta", b"last_seq", at(14)),
        ["log_gap"],
        "end of the log: expected operation 14, found operation 13",
    ),
    "another newest settled operation": (
        lambda tables: tables.put("meta", b"newest_settled", at(3) + bytes(8)),
        ["meta_wrong"],
        "newest settled operation: expected one of 7 to 13, found operation 3",
    ),
    "another nonce of it": (
        lambda tables: tables.flip("meta", b"newest_settled", 12),
        ["meta_wrong"],
        "newest settled operation: expected nonce",
    ),
    "plans that cannot be read": (
        lambda tables: tables.put("meta", b"plans", b"\xff"),
        ["meta_wrong"],
        "plans: expected what the server does with each entity",
    ),
    "a staged page lost": (
        lambda tables: tables.delete("incoming", at(1)),
        ["staged_wrong"],
        "staged count: expected 2, found 0",
    ),
    "a staged page that cannot be read": (
        lambda tables: tables.put("incoming", at(1), b"\xff"),
        ["entry_unreadable", "staged_wrong"],
        "incoming page 1: expected a page",
    ),
    "a page that cannot be read": (
        lambda tables: tables.put("merging", at(1), b"\xff"),
        ["entry_unreadable"],
        "merging page 1: expected a page",
    ),
    "what was seen, and nothing is published": (
        lambda tables: tables.put("seen", T1, b""),
        ["staged_wrong"],
        "seen objects: expected none",
    ),
    "what hangs in front of the view, and nothing is published": (
        lambda tables: tables.put("curtain", T1, at(1)),
        ["staged_wrong"],
        "the curtain: expected open",
    ),
    "what hangs in front of an object, a part of it lost": (
        lambda tables: tables.put("curtain", T1, at(1)[:7]).put("meta", b"publishing", b"1"),
        ["entry_unreadable"],
        "what hangs in front of the object",
    ),
    "what hangs in front of an object and cannot be read": (
        lambda tables: tables.put("curtain", T1, at(1) + at(1) + b"\0\xc1").put("meta", b"publishing", b"1"),
        ["entry_unreadable"],
        "what hangs in front of the object",
    ),
    "something to be offered again that is pending": (
        lambda tables: tables.put("reoffers", at(8), b""),
        ["outcome_wrong"],
        "operation 8, to be offered again: expected to be logged and settled",
    ),
}


def test_a_rich_history_is_sound(path: Path) -> None:
    """In a replica that nobody damaged nothing is found, whatever has happened in it."""
    counts: Counter[str] = Counter()

    assert list(verify_replica(path, counts=counts)) == []
    assert counts == {"operations": 13, "pending": 6, "objects": 5, "failures": 2}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(path: Path, name: str) -> None:
    """Each kind of damage leads to the findings that follow from it, one of which says what it is."""
    work, expected, text = DAMAGES[name]
    damage(path, work)

    assert kinds(path) == expected, [str(one) for one in found(path)]
    assert any(text in str(one) for one in found(path)), [str(one) for one in found(path)]


def test_a_table_that_is_missing(path: Path) -> None:
    """A replica without one of its tables is damaged, and that is a finding too."""
    with lmdb.open(str(path), max_dbs=DATABASES_MAX) as environment:
        table = environment.open_db(b"objects")
        with environment.begin(write=True) as transaction:
            transaction.drop(table)

    assert kinds(path) == ["file_damaged"]


def test_a_replica_in_use(path: Path) -> None:
    """A replica verifies itself while it is worked on."""
    with Replica(path) as replica:
        replica.create("Task", {}, "new")
        assert list(replica.verify()) == []
        assert found(path) == []
        replica.update("Task", "new", {"n": 1})
        assert list(replica.verify()) == []

    damage(path, lambda tables: tables.flip("log", at(14), 20))
    with Replica(path) as replica:
        assert [one.kind for one in replica.verify()] == ["log_damaged"]


def test_a_log_that_was_trimmed(path: Path) -> None:
    """What has left the log is not missed, not even if nothing is left."""
    with Replica(path, log_retention_bytes=0) as replica:
        assert replica.trim_log() == 6
        assert list(replica.verify()) == []

        server = ServerEnd(version=200, pages=[page(*(("Task", one, 200, {}) for one in ("t1", "t2", "t3", "t4")))])
        synchronize(replica, server)
        assert replica.trim_log() == 7
        assert list(replica.verify()) == []


def test_what_is_no_replica(tmp_path: Path) -> None:
    """A directory without a replica, or with something else, is an error, and nothing is made there."""
    with pytest.raises(StorageError):
        found(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()

    LmdbStore(tmp_path / "store").close()
    with pytest.raises(FormatUnsupported):
        found(tmp_path / "store")


class TestSetAside:
    """What cannot be read in the log is set aside, and the rest goes on."""

    def test_a_pending_operation(self, path: Path) -> None:
        """A damaged pending operation becomes a failure, its bytes a file, and the others are uploaded."""
        damage(path, lambda tables: tables.flip("log", at(8), 20))
        with Replica(path) as replica:
            with pytest.raises(LogCorrupt):
                synchronize(replica, ServerEnd())

            done = replica.set_aside_damaged()

            assert list(done.files) == [8]
            [failure_id] = done.failure_ids
            assert failure_id in {one.id for one in replica.failures()}
            assert contents(replica)["t1"] == {"n": 1, "done": True}
            assert list(replica.verify()) == []
            server = ServerEnd(version=200)
            synchronize(replica, server)
            assert [one.seq for one in server.uploaded] == [9, 10, 11, 12, 13]
            assert replica.pending_count() == 0
            assert list(replica.verify()) == []
            assert [one.operation.seq for one in replica.log(after=6)] == [7, 9, 10, 11, 12, 13]
        with lmdb.open(str(path), max_dbs=DATABASES_MAX) as environment, environment.begin() as transaction:
            kept = Tables(environment, transaction).get("failures", failure_id.encode())
        operation = failure_pb2.SynchronizationFailure.FromString(kept).operation
        assert done.files[8].read_bytes() == operation != b""

    def test_a_member_of_a_commit_group(self, path: Path) -> None:
        """With one member its whole commit group fails, for no part of it may be applied."""
        damage(path, lambda tables: tables.flip("log", at(11), 20))
        with Replica(path) as replica:
            done = replica.set_aside_damaged()

            assert list(done.files) == [11]
            failure = next(one for one in replica.failures() if one.id in done.failure_ids)
            assert (failure.entity, failure.object_id) == ("Task", "t2")
            assert "t2" not in contents(replica)
            assert [one.operation.seq for one in replica.pending()] == [8, 9, 13]
            assert list(replica.verify()) == []

    def test_an_operation_that_is_gone(self, path: Path) -> None:
        """A pending operation of which nothing is left fails too."""
        damage(path, lambda tables: tables.delete("log", at(13)))
        with Replica(path) as replica:
            assert list(replica.set_aside_damaged().files) == [13]
            assert replica.pending_count() == 5
            assert list(replica.verify()) == []
            replica.create("Task", {}, "t9")
            assert list(replica.verify()) == []

    def test_settled_operations(self, path: Path) -> None:
        """What was settled keeps its outcome; one that was still shown is shown no more."""
        damage(path, lambda tables: tables.flip("log", at(2), 20).flip("log", at(7), 20))
        with Replica(path) as replica:
            done = replica.set_aside_damaged()

            assert (list(done.files), done.failure_ids) == ([2, 7], [])
            assert contents(replica)["t1"] == {"n": 6}
            assert replica.pending_count() == 6
            assert list(replica.verify()) == []
            assert replica.trim_log() == 0

    def test_nothing_is_damaged(self, path: Path) -> None:
        """Where nothing is damaged nothing is done."""
        with Replica(path) as replica:
            assert replica.set_aside_damaged() == ({}, [], {})
        assert not (path / "set-aside").exists()


# What one damaged entry may stay unnoticed in: what nothing else in a replica tells.
UNNOTICED: Final[dict[tuple[str, str], str]] = {
    ("base", "deleted"): "an object without a base is one that the server does not have",
    ("base", "flipped"): "what the server said of an object, and its version",
    ("failures", "flipped"): "words and times of a failure",
    ("failures", "cut"): "fields of a failure that it need not have",
    ("incoming", "flipped"): "what the server said",
    ("incoming", "cut"): "the same",
    ("meta", "deleted"): "a replica that never asked a server, or was told nothing, remembers nothing",
    ("meta", "flipped"): "names and tokens that are the server's",
    ("meta", "cut"): "the same",
    ("objects", "deleted"): "an object that the server has, and the replica never got",
    ("objects", "flipped"): "what the server said of an object, and its version",
    ("outcomes", "flipped"): "versions that only the server knows",
}


def test_one_entry_of_every_table(path: Path) -> None:
    """Whatever entry is lost, cut off or flipped: verification ends in findings, or has nothing to tell it by."""
    chosen = random.Random(4)
    unnoticed: set[tuple[str, str]] = set()
    for table, key, value in entries(path):
        for what, damaged in damages(value, chosen):
            replace_entry(path, table, key, damaged)
            if not found(path):
                unnoticed.add((table, what))
        replace_entry(path, table, key, value)

    assert found(path) == []
    assert unnoticed <= UNNOTICED.keys()
