"""
What every store promises, whatever keeps its data.

A subclass says how its store is opened; its tests are these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest
from tests.builders import REPLICA_A, REPLICA_B, TENANT, TIME_US, quick_folder

from tidelog import OperationKind, ResourceClosed, StorageError
from tidelog._keys import ObjectKey
from tidelog_server._attempts import Attempt
from tidelog_server._errors import ServerOutdated
from tidelog_server._records import (
    RUN_BYTES,
    Change,
    FailureRecord,
    Forgotten,
    Head,
    ObjectState,
    ReplicaState,
    Settled,
    Writes,
)
from tidelog_server._store import Reader, Store

UNBOUNDED: Final = 2**40
Job = Callable[[Reader], tuple[Writes | None, Any]]


def task(id: str) -> ObjectKey:  # noqa: A002 - the glossary's word
    """Return the key of a task."""
    return ("Task", id)


def make_state(version: int, **fields: Any) -> ObjectState:
    """Return a state at a version."""
    usual = ObjectState(version, version, REPLICA_A, deleted=False, sole_writer=True, attributes=b"\x80")
    return usual._replace(**fields)


def make_change(version: int, key: ObjectKey, **fields: Any) -> Change:
    """Return a change of a version."""
    usual = Change(version, key, OperationKind.CREATE, b"patch", b"before", 0, REPLICA_A, 1, False, "ann", TIME_US)
    return usual._replace(**fields)


def make_writes(**fields: Any) -> Writes:
    """Return writes of nothing but what is given."""
    return Writes(objects={}, changes=[], replica=None, settled=[], failures=[], version=0)._replace(**fields)


def writing(*keys: ObjectKey, attributes: bytes = b"\x80", deleted: bool = False, result: Any = None) -> Job:
    """Return a job that writes objects, each at the next version."""

    def job(reader: Reader) -> tuple[Writes, Any]:
        version = reader.head().version
        present = reader.objects(keys)
        objects = {}
        changes = []
        for key in keys:
            version += 1
            replaced = present[key].version if key in present else 0
            objects[key] = (make_state(version, attributes=attributes, deleted=deleted), replaced)
            changes.append(make_change(version, key, previous=replaced))
        return make_writes(objects=objects, changes=changes, version=version), result

    return job


def indexing(index: dict[bytes, bytes | None]) -> Job:
    """Return a job that changes the table of indexes."""
    return lambda reader: (make_writes(index_entries=index), None)


def recording(*settled: tuple[int, Settled], replica: bytes = REPLICA_A, state: ReplicaState | None = None) -> Job:
    """Return a job that writes a replica's state and outcomes."""
    known = state or ReplicaState(1, "ann", 1, 1, ((1, 1),))
    return lambda reader: (make_writes(replica=(replica, known), settled=list(settled)), None)


def failing(*records: FailureRecord) -> Job:
    """Return a job that writes failures."""
    return lambda reader: (make_writes(failures=list(records)), None)


def forgetting(**fields: Any) -> Job:
    """Return a job that forgets."""
    return lambda reader: (make_writes(forgotten=Forgotten(**fields), version=reader.head().version), None)


def ids_of(found: Iterable[tuple[ObjectKey, ObjectState]]) -> list[str]:
    """Return the ids of objects."""
    return [key[1] for key, _ in found]


class Refusal(Exception):
    """What a job raises that fails."""


class StoreContract:
    """The promises. Each test gets a store of its own."""

    def open(self, folder: Path) -> Store:
        """Open the store in a folder, or make one."""
        raise NotImplementedError

    @pytest.fixture
    def folder(self) -> Iterator[Path]:
        """Give a folder."""
        with quick_folder() as path:
            yield path

    @pytest.fixture
    def store(self, folder: Path) -> Iterator[Store]:
        """Give an empty store."""
        opened = self.open(folder)
        yield opened
        opened.close()

    # --- writing --------------------------------------------------------------

    def test_an_empty_store(self, store: Store) -> None:
        """A tenant of which nothing was ever written reads as empty."""
        with store.read(TENANT) as reader:
            assert reader.head() == Head(0, b"")
            assert reader.commit_id(0) is None
            assert reader.commit_id(1) is None
            assert reader.commits_until([1]) == []
            assert reader.collected() == 0
            assert reader.objects([task("t1")]) == {}
            assert reader.entity_objects("Task", "", 10, UNBOUNDED) == ([], False)
            assert reader.latest_objects("Task", 0, 10, UNBOUNDED) == ([], False)
            assert reader.entities() == []
            assert reader.index(b"a") is None
            assert reader.index_range(b"", b"", 10) == []
            assert reader.change(1) is None
            assert reader.changes(0, 10, UNBOUNDED) == []
            assert reader.replica(REPLICA_A) is None
            assert reader.replicas(b"", 10) == []
            assert reader.settled(REPLICA_A, [1]) == {}
            assert reader.first_settled(REPLICA_A, 10) == []
            assert reader.failure(bytes(16)) is None
            assert reader.failures(b"", 10, 1 << 30) == []
            assert reader.refused_creation(REPLICA_A, task("t1")) is None
            assert reader.refused_creations(REPLICA_A, 10) == []

    def test_what_a_job_returns_is_written_and_yielded(self, store: Store) -> None:
        """The future yields the job's result once all that it returned can be read back as it was."""
        state = make_state(7, created=3, creator=REPLICA_B, sole_writer=False, attributes=b"\x81\xa1a\x01")
        change = Change(
            7,
            task("t1"),
            OperationKind.UPDATE,
            b"p",
            b"b",
            3,
            REPLICA_B,
            2**62,
            by_hook=True,
            user_id="änn",
            time_us=-5,
            failure=b"f" * 16,
            new_names={"ö": "oe"},
            moved_from=6,
        )
        ranges, common = ((1, 5), (9, 2**62)), ((REPLICA_B, 2**62),)
        replica = ReplicaState(4, "änn", 2**62, 2**64 - 1, ranges, 2**62, retired=True, common_seqs=common)
        settled = Settled(2**64 - 1, 7, changed_by_server=True, failure_id=b"", culprit=False)
        failure = FailureRecord(b"f" * 16, b"\x00\xff", REPLICA_B, (task("x"), ("Note", "y")))

        def job(reader: Reader) -> tuple[Writes, str]:
            return Writes(
                {task("t1"): (state, 0)}, [change], (REPLICA_B, replica), [(9, settled)], [failure], 7
            ), "done"

        assert store.submit(TENANT, job).result(10) == "done"
        with store.read(TENANT) as reader:
            assert reader.head().version == 7
            assert reader.objects([task("t1")]) == {task("t1"): state}
            assert reader.change(7) == change
            assert reader.replica(REPLICA_B) == replica
            assert reader.settled(REPLICA_B, [9]) == {9: settled}
            assert reader.failure(b"f" * 16) == b"\x00\xff"
            assert reader.refused_creation(REPLICA_B, task("x")) == b"f" * 16
            assert reader.refused_creation(REPLICA_B, ("Note", "y")) == b"f" * 16

    def test_a_job_that_writes_nothing(self, store: Store) -> None:
        """A job may only look."""
        store.submit(TENANT, writing(task("t1"))).result(10)

        assert store.submit(TENANT, lambda reader: (None, reader.head().version)).result(10) == 1
        with store.read(TENANT) as reader:
            assert reader.head().version == 1

    @pytest.mark.parametrize("error", [Refusal("no"), SystemExit(3), KeyError("x")])
    def test_a_job_that_fails(self, store: Store, error: BaseException) -> None:
        """A job that raises writes nothing; its owner gets an error, and its neighbours are not harmed."""

        def fails(reader: Reader) -> tuple[Writes, None]:
            writing(task("bad"))(reader)
            raise error

        before = store.submit(TENANT, writing(task("t1"), result="before"))
        failed = store.submit(TENANT, fails)
        after = store.submit(TENANT, writing(task("t2"), result="after"))

        assert (before.result(10), after.result(10)) == ("before", "after")
        # What would end a program is told as an error of the store.
        with pytest.raises(type(error) if isinstance(error, Exception) else StorageError):
            failed.result(10)
        with store.read(TENANT) as reader:
            assert reader.head().version == 2
            assert ids_of(reader.latest_objects("Task", 0, 10, UNBOUNDED).objects) == ["t1", "t2"]

    def test_tells_jobs_from_others(self, store: Store) -> None:
        """Inside a job the store refuses what would wait for its end, and nowhere else."""
        store.check_outside_of_jobs()

        def waits(reader: Reader) -> tuple[None, None]:
            store.check_outside_of_jobs()
            return None, None

        with pytest.raises(StorageError):
            store.submit(TENANT, waits).result(10)
        store.check_outside_of_jobs()

    def test_jobs_run_in_order(self, store: Store) -> None:
        """Jobs run in the order they were submitted, each on top of what those before it wrote."""
        seen: list[tuple[int, int]] = []

        def job(number: int) -> Job:
            def work(reader: Reader) -> tuple[Writes | None, int]:
                writes, _ = writing(task(f"t{number}"))(reader)
                return writes, reader.head().version

            return work

        futures = [store.submit(TENANT, job(number)) for number in range(50)]
        seen = [(number, future.result(10)) for number, future in enumerate(futures)]

        assert seen == [(number, number) for number in range(50)]

    def test_jobs_of_many_threads(self, store: Store) -> None:
        """Whoever submits them, jobs run one at a time, and none is lost."""

        def work(name: int) -> None:
            for number in range(10):
                store.submit(TENANT, writing(task(f"t{name}-{number}"))).result(10)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))

        with store.read(TENANT) as reader:
            assert reader.head().version == 80
            assert [change.version for change in reader.changes(0, 100, UNBOUNDED)] == list(range(1, 81))
            assert len(reader.entity_objects("Task", "", 100, UNBOUNDED).objects) == 80

    def test_a_job_cannot_be_cancelled(self, store: Store) -> None:
        """Who stops waiting for a job does not stop the job, nor those behind it."""
        futures = [store.submit(TENANT, writing(task(f"t{number}"))) for number in range(10)]

        assert not any(future.cancel() for future in futures)
        assert store.submit(TENANT, writing(task("last"), result="done")).result(10) == "done"
        with store.read(TENANT) as reader:
            assert reader.head().version == 11

    def test_nothing_is_under_way_after_a_job(self, store: Store, folder: Path) -> None:
        """A job that has come to its end, well or not, leaves nothing under way for the next process."""
        attempt = Attempt(REPLICA_A, 7)
        store.submit(TENANT, writing(task("t1")), attempt).result(10)

        def fails(reader: Reader) -> tuple[None, None]:
            raise Refusal

        with pytest.raises(Refusal):
            store.submit(TENANT, fails, attempt).result(10)

        def announcing(reader: Reader) -> tuple[None, None]:
            store.announce(TENANT, attempt._replace(number=1))
            return None, None

        store.submit(TENANT, announcing, attempt._replace(alone=True)).result(10)
        store.close()

        again = self.open(folder)
        assert list(again.left_under_way()) == []
        again.close()

    # --- versions -------------------------------------------------------------

    def test_each_commit_has_an_id_of_its_own(self, store: Store) -> None:
        """The head names the commit that ended there; so does its version for ever; no two have the same id."""
        heads = []
        for number in range(5):
            store.submit(TENANT, writing(task("t1"), task(f"x{number}"))).result(10)
            with store.read(TENANT) as reader:
                heads.append(reader.head())

        assert [head.version for head in heads] == [2, 4, 6, 8, 10]
        assert len({head.commit_id for head in heads}) == 5
        with store.read(TENANT) as reader:
            assert [reader.commit_id(head.version) for head in heads] == [head.commit_id for head in heads]
            # Nothing ever ended in the middle of a commit.
            assert [reader.commit_id(version) for version in (1, 3, 5, 7, 9, 11)] == [None] * 6
            assert reader.commits_until([2]) == [heads[0]]
            assert reader.commits_until([0, 1]) == reader.commits_until([]) == []
            assert reader.commits_until([3, 99, 2, 9, 10, 1]) == [heads[4], heads[3], heads[0]]

    def test_commits_of_other_tenants_are_not_found(self, store: Store) -> None:
        """The newest commit below a version is one of the tenant's own."""
        for tenant in ("one", "two", "three"):
            store.submit(tenant, writing(task("t1"), task("t2"))).result(10)

        for tenant in ("one", "two", "three"):
            with store.read(tenant) as reader:
                assert reader.commits_until([9]) == [reader.head()]
                assert reader.commits_until([1]) == []

    def test_one_run(self, store: Store) -> None:
        """As long as nobody can have put older data in the place of these, the run is the same for everybody."""
        runs = set()

        def looks(reader: Reader) -> tuple[Writes | None, None]:
            runs.add(reader.run())
            return writing(task("t1"))(reader)[0], None

        for tenant in ("one", "two", "one"):
            store.submit(tenant, looks).result(10)
            with store.read(tenant) as reader:
                runs.add(reader.run())

        assert [len(run) for run in runs] == [RUN_BYTES]

    def test_a_new_timeline(self, store: Store) -> None:
        """A job may begin a new timeline of the whole store; the epoch stays, and so do all data."""
        store.submit(TENANT, writing(task("t1"))).result(10)
        before = store.identity

        seen = [store.submit(TENANT, lambda reader: (None, reader.identity()))]
        begun = store.submit(TENANT, lambda _: (make_writes(version=1, timeline="another"), None))
        seen.append(store.submit(TENANT, lambda reader: (None, reader.identity())))

        begun.result(10)
        after = before._replace(timeline="another")
        assert [one.result(10) for one in seen] == [before, after]
        assert store.identity == after
        with store.read(TENANT) as reader:
            assert reader.identity() == after
            assert reader.head().version == 1
            assert task("t1") in reader.objects([task("t1")])

    def test_a_timeline_of_a_job_that_fails(self, store: Store) -> None:
        """What fails begins no timeline."""
        before = store.identity

        def fails(reader: Reader) -> tuple[Writes, None]:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            store.submit(TENANT, fails).result(10)

        assert store.identity == before

    def test_what_writes_no_change_leaves_the_head(self, store: Store) -> None:
        """Outcomes and failures alone move neither version nor commit id."""
        store.submit(TENANT, writing(task("t1"))).result(10)
        with store.read(TENANT) as reader:
            before = reader.head()

        store.submit(TENANT, recording((1, Settled(1, 0, False, b"f" * 16, True)))).result(10)

        with store.read(TENANT) as reader:
            assert reader.head() == before

    # --- objects --------------------------------------------------------------

    def test_objects_by_key(self, store: Store) -> None:
        """Objects and tombstones are found by key; what never was there is left out."""
        store.submit(TENANT, writing(task("t1"), task("t2"))).result(10)
        store.submit(TENANT, writing(task("t2"), deleted=True, attributes=b"")).result(10)

        with store.read(TENANT) as reader:
            found = reader.objects([task("t1"), task("t2"), task("t3"), ("Note", "t1")])

        assert {key: (state.version, state.deleted) for key, state in found.items()} == {
            task("t1"): (1, False),
            task("t2"): (3, True),
        }

    @pytest.mark.parametrize("deleted", [True, False])
    @pytest.mark.parametrize("sole_writer", [True, False])
    def test_marks(self, store: Store, *, deleted: bool, sole_writer: bool) -> None:
        """The marks of an object are kept, each on its own."""
        state = make_state(1, deleted=deleted, sole_writer=sole_writer)
        writes = make_writes(objects={task("t1"): (state, 0)}, changes=[make_change(1, task("t1"))], version=1)
        store.submit(TENANT, lambda reader: (writes, None)).result(10)

        with store.read(TENANT) as reader:
            assert reader.objects([task("t1")]) == {task("t1"): state}

    def test_the_longest_and_the_largest(self, store: Store) -> None:
        """The longest names and the largest object that are allowed can be stored and found."""
        key = ("e" * 64, "é" * 64)
        store.submit(TENANT, writing(key, attributes=b"x" * (2 * 1024 * 1024))).result(10)

        with store.read(TENANT) as reader:
            assert len(reader.objects([key])[key].attributes) == 2 * 1024 * 1024
            assert ids_of(reader.entity_objects("e" * 64, "", 10, UNBOUNDED).objects) == ["é" * 64]

    def test_names_that_nothing_can_have(self, store: Store) -> None:
        """Whoever looks for a name with a NUL in it, in which nothing is ever stored, finds nothing."""
        store.submit(TENANT, writing(task("a"))).result(10)

        with store.read(TENANT) as reader:
            assert reader.objects([("Task", "a\0"), ("Task\0", "a")]) == {}
            assert ids_of(reader.objects([("Task", "a\0b"), task("a")]).items()) == ["a"]
            assert reader.refused_creation(REPLICA_A, ("Task", "a\0b")) is None
            assert reader.entity_objects("Task\0", "", 10, UNBOUNDED) == ([], False)

    def test_each_object_once_by_version(self, store: Store) -> None:
        """By version each object stands once, at its latest, tombstones too, however often it was changed."""
        for keys in (["a", "b", "c"], ["b"], ["a", "b"], ["d"]):
            store.submit(TENANT, writing(*map(task, keys))).result(10)
        store.submit(TENANT, writing(task("c"), deleted=True)).result(10)

        with store.read(TENANT) as reader:
            objects, has_more = reader.latest_objects("Task", 0, 100, UNBOUNDED)

        assert [(key[1], state.version) for key, state in objects] == [("a", 5), ("b", 6), ("d", 7), ("c", 8)]
        assert objects[-1][1].deleted
        assert not has_more

    def test_a_new_version_in_the_same_batch_as_the_creation(self, store: Store) -> None:
        """An object that was created and changed in one batch stands once, at the last version."""
        writes = make_writes(
            objects={task("t1"): (make_state(3), 0)},
            changes=[make_change(version, task("t1")) for version in (1, 2, 3)],
            version=3,
        )
        store.submit(TENANT, lambda reader: (writes, None)).result(10)

        with store.read(TENANT) as reader:
            assert [state.version for _, state in reader.latest_objects("Task", 0, 10, UNBOUNDED).objects] == [3]

    @pytest.mark.parametrize(
        ("after", "limit", "expected", "more"),
        [
            (0, 10, "abcde", False),
            (2, 10, "cde", False),
            (5, 10, "", False),
            (0, 5, "abcde", False),
            (1, 2, "bc", True),
        ],
    )
    def test_pages_by_version(self, store: Store, after: int, limit: int, expected: str, *, more: bool) -> None:
        """A page starts above a version, ends at its limit, and says whether more follows."""
        store.submit(TENANT, writing(*map(task, "abcde"))).result(10)

        with store.read(TENANT) as reader:
            objects, has_more = reader.latest_objects("Task", after, limit, UNBOUNDED)

        assert "".join(ids_of(objects)) == expected
        assert has_more is more

    def test_pages_by_size(self, store: Store) -> None:
        """A page ends once its objects reach so many bytes, and holds one at least."""
        store.submit(TENANT, writing(*map(task, "abcde"), attributes=b"x" * 1_000)).result(10)

        with store.read(TENANT) as reader:
            for size, count in ((1, 1), (999, 1), (1_500, 2), (10_000, 5)):
                for page in (
                    reader.latest_objects("Task", 0, 10, size),
                    reader.entity_objects("Task", "", 10, size),
                ):
                    assert (len(page.objects), page.has_more) == (count, count < 5)

    def test_objects_of_an_entity(self, store: Store) -> None:
        """The objects of an entity come in the order of their ids, tombstones too, and nobody else's."""
        ids = ["", "a", "a ", "ab", "b", "é", "中", "\U0001f600"][1:]
        store.submit(TENANT, writing(*map(task, reversed(ids)))).result(10)
        store.submit(TENANT, writing(("Tas", "ka"), ("Task2", "a"), ("T", "ask"), ("Note", "a"))).result(10)
        store.submit(TENANT, writing(task("b"), deleted=True)).result(10)

        with store.read(TENANT) as reader:
            objects, has_more = reader.entity_objects("Task", "", 100, UNBOUNDED)
            pages = []
            after = ""
            while True:
                page = reader.entity_objects("Task", after, 2, UNBOUNDED)
                pages += ids_of(page.objects)
                if not page.has_more:
                    break
                after = pages[-1]
            between = reader.entity_objects("Task", "aa", 2, UNBOUNDED)

        assert ids_of(objects) == ids == pages
        assert not has_more
        assert ids_of(between.objects) == ["ab", "b"]

    def test_pages_by_version_of_an_entity(self, store: Store) -> None:
        """By version an entity shows its own objects alone, whatever the entities beside it are called."""
        names = ["T", "Tas", "Task", "Task2", "Ta\x01", "ä"]
        store.submit(TENANT, writing(*((name, "x") for name in names))).result(10)
        store.submit(TENANT, writing(("Task", "y"), ("Tas", "x"))).result(10)

        with store.read(TENANT) as reader:
            found = {
                name: [state.version for _, state in reader.latest_objects(name, 0, 9, UNBOUNDED).objects]
                for name in names
            }
            later = reader.latest_objects("Tas", 7, 9, UNBOUNDED)
            none = reader.latest_objects("Ta", 0, 9, UNBOUNDED)

        assert found == {"T": [1], "Tas": [8], "Task": [3, 7], "Task2": [4], "Ta\x01": [5], "ä": [6]}
        assert [key for key, _ in later.objects] == [("Tas", "x")]
        assert none == ([], False)

    def test_entities(self, store: Store) -> None:
        """Entities are listed once each in byte order, while they have tombstones only too; of failed jobs, none."""

        def fails(reader: Reader) -> tuple[Writes, None]:
            writing(("Bad", "x"))(reader)
            raise Refusal("no")

        store.submit(TENANT, writing(("b", "1"), ("a", "1"), ("ab", "1"), ("b", "2"), ("é", "1"), ("z", "1"))).result(
            10
        )
        store.submit(TENANT, writing(("ab", "1"), deleted=True)).result(10)
        store.submit(TENANT, fails).exception(10)
        store.submit("other", writing(("Other", "1"))).result(10)

        with store.read(TENANT) as reader:
            assert reader.entities() == ["a", "ab", "b", "z", "é"]

    # --- indexes --------------------------------------------------------------

    def test_index_entries(self, store: Store) -> None:
        """Entries are found by key until they are removed; one transaction may remove some and put others."""
        store.submit(TENANT, indexing({b"a": b"1", b"b": b"", b"c": b"\x00\xff"})).result(10)
        store.submit(TENANT, indexing({b"a": None, b"b": b"2", b"d": b"4", b"never": None})).result(10)

        with store.read(TENANT) as reader:
            assert [reader.index(key) for key in (b"a", b"b", b"c", b"d", b"never")] == [
                None,
                b"2",
                b"\x00\xff",
                b"4",
                None,
            ]
            assert reader.index_range(b"", b"", 10) == [(b"b", b"2"), (b"c", b"\x00\xff"), (b"d", b"4")]
            assert reader.indexes([b"d", b"a", b"b", b"never"]) == {b"b": b"2", b"d": b"4"}
            assert reader.indexes([]) == {}

    @pytest.mark.parametrize(
        ("prefix", "after", "limit", "expected"),
        [
            (b"a", b"", 10, [b"a", b"a\x00", b"a\x00b", b"aa", b"a\xff", b"a\xff\xff"]),
            (b"a\x00", b"", 10, [b"a\x00", b"a\x00b"]),
            (b"aa", b"", 10, [b"aa"]),
            (b"a\xff", b"", 10, [b"a\xff", b"a\xff\xff"]),
            (b"a", b"a\x00", 2, [b"a\x00b", b"aa"]),
            (b"a", b"a\x00a", 2, [b"a\x00b", b"aa"]),
            (b"a", b"a\xff\xff", 2, []),
            (b"a", b"", 1, [b"a"]),
            (b"b", b"a", 10, [b"b"]),
            (b"c", b"", 10, []),
            (b"a\x00c", b"", 10, []),
        ],
    )
    def test_index_ranges(self, store: Store, prefix: bytes, after: bytes, limit: int, expected: list[bytes]) -> None:
        """A range starts above a key, ends with the prefix or at the limit, and is in key order."""
        keys = [b"b", b"a\xff\xff", b"a", b"aa", b"a\x00b", b"a\x00", b"a\xff"]
        store.submit(TENANT, indexing({key: key[::-1] for key in keys})).result(10)
        store.submit("other", indexing({b"a": b"other", b"aaa": b"other"})).result(10)

        with store.read(TENANT) as reader:
            assert reader.index_range(prefix, after, limit) == [(key, key[::-1]) for key in expected]

    def test_a_job_sees_the_index_entries_of_those_before(self, store: Store) -> None:
        """Jobs that share a commit read what the earlier ones of them wrote, and what they did not."""
        futures = [store.submit(TENANT, indexing({bytes([number]): b"x"})) for number in range(5)]
        seen = store.submit(TENANT, lambda reader: (None, reader.index_range(b"", b"", 10)))

        assert all(future.result(10) is None for future in futures)
        assert seen.result(10) == [(bytes([number]), b"x") for number in range(5)]

    # --- the change log -------------------------------------------------------

    def test_changes(self, store: Store) -> None:
        """Changes come in the order of their versions, above a version, up to a number or a size."""
        made = [make_change(version, task(f"t{version}"), patch=b"x" * 1_000) for version in range(1, 6)]
        writes = make_writes(changes=made, version=5)
        store.submit(TENANT, lambda reader: (writes, None)).result(10)

        with store.read(TENANT) as reader:
            assert reader.changes(0, 100, UNBOUNDED) == made
            assert reader.changes(2, 2, UNBOUNDED) == made[2:4]
            assert reader.changes(5, 100, UNBOUNDED) == []
            assert reader.changes(0, 100, 1) == made[:1]
            assert reader.changes(0, 100, 1_500) == made[:2]
            assert [reader.change(version) for version in (1, 5, 6)] == [made[0], made[4], None]

    @pytest.mark.parametrize("kind", list(OperationKind))
    def test_kinds_of_changes(self, store: Store, kind: OperationKind) -> None:
        """A change comes back with its kind."""
        writes = make_writes(changes=[make_change(1, task("t1"), kind=kind)], version=1)
        store.submit(TENANT, lambda reader: (writes, None)).result(10)

        with store.read(TENANT) as reader:
            change = reader.change(1)
        assert change is not None
        assert change.kind is kind

    # --- replicas, outcomes, failures -----------------------------------------

    @pytest.mark.parametrize(
        "outcome",
        [
            Settled(0, 1, changed_by_server=False, failure_id=b"", culprit=False),
            Settled(2**64 - 1, 2**62, changed_by_server=True, failure_id=b"", culprit=False),
            Settled(5, 0, changed_by_server=False, failure_id=b"f" * 16, culprit=True),
            Settled(5, 0, changed_by_server=False, failure_id=bytes(16), culprit=False),
        ],
    )
    def test_outcomes(self, store: Store, outcome: Settled) -> None:
        """An outcome is found by its replica and seq, and by no other."""
        store.submit(TENANT, recording((7, outcome))).result(10)

        with store.read(TENANT) as reader:
            assert reader.settled(REPLICA_A, [6, 7, 8]) == {7: outcome}
            assert reader.settled(REPLICA_B, [7]) == {}
            assert reader.settled(REPLICA_A, []) == {}

    def test_many_outcomes(self, store: Store) -> None:
        """Outcomes of many operations are found, in whatever order they came."""
        outcomes = {seq: Settled(seq, seq, False, b"", False) for seq in range(1, 501)}
        store.submit(TENANT, recording(*[(seq, outcomes[seq]) for seq in range(251, 501)])).result(10)
        store.submit(TENANT, recording(*[(seq, outcomes[seq]) for seq in range(1, 251)])).result(10)

        with store.read(TENANT) as reader:
            assert reader.settled(REPLICA_A, range(1, 600)) == outcomes

    def test_a_replicas_state_is_replaced(self, store: Store) -> None:
        """The newest state of a replica is the one that is found; others' are their own."""
        for number in (1, 2):
            state = ReplicaState(number, "ann", 0, 0, ())
            store.submit(TENANT, recording(state=state)).result(10)

        with store.read(TENANT) as reader:
            assert reader.replica(REPLICA_A) == ReplicaState(2, "ann", 0, 0, ())
            assert reader.replica(REPLICA_B) is None

    def test_failures_page_by_page(self, store: Store) -> None:
        """Failures come in the order of their ids, above an id, up to a number."""
        ids = [bytes([0, *([255] * 14), number]) for number in range(7)]
        records = [FailureRecord(id_, id_[-1:], REPLICA_A, ()) for id_ in reversed(ids)]
        store.submit(TENANT, failing(*records)).result(10)

        with store.read(TENANT) as reader:
            assert reader.failures(b"", 100, 1 << 30) == [(id_, id_[-1:]) for id_ in ids]
            assert [id_ for id_, _ in reader.failures(ids[2], 2, 1 << 30)] == ids[3:5]
            assert reader.failures(ids[-1], 2, 1 << 30) == []
            assert reader.failure(ids[3]) == b"\x03"

    def test_refused_creations(self, store: Store) -> None:
        """A refused creation is remembered for the replica that sent it; a later refusal takes its place."""
        store.submit(TENANT, failing(FailureRecord(b"1" * 16, b"", REPLICA_A, (task("t1"),)))).result(10)
        store.submit(TENANT, failing(FailureRecord(b"2" * 16, b"", REPLICA_A, (task("t1"), task("t2"))))).result(10)

        with store.read(TENANT) as reader:
            assert reader.refused_creation(REPLICA_A, task("t1")) == b"2" * 16
            assert reader.refused_creation(REPLICA_A, task("t2")) == b"2" * 16
            assert reader.refused_creation(REPLICA_A, task("t3")) is None
            assert reader.refused_creation(REPLICA_B, task("t1")) is None

    def test_replicas_page_by_page(self, store: Store) -> None:
        """Replicas come in the order of their ids, above an id, up to a number."""
        ids = [bytes([*([255] * 15), number]) for number in (0, 9, 255)]
        for number, replica in enumerate(reversed(ids)):
            state = ReplicaState(number, "ann", 0, 0, (), heard_us=number)
            store.submit(TENANT, recording(replica=replica, state=state)).result(10)
        store.submit("other", recording()).result(10)

        with store.read(TENANT) as reader:
            found = reader.replicas(b"", 10)
            assert [(replica, state.session_number, state.heard_us) for replica, state in found] == [
                (ids[0], 2, 2),
                (ids[1], 1, 1),
                (ids[2], 0, 0),
            ]
            assert reader.replicas(b"", 1) == found[:1]
            assert reader.replicas(ids[0], 10) == found[1:]
            assert reader.replicas(ids[2], 10) == []

    def test_first_outcomes(self, store: Store) -> None:
        """Outcomes come from the lowest seq on, up to a number, and only those of the replica."""
        outcomes = [(seq, Settled(seq, seq, False, b"", False)) for seq in (2, 3, 300, 2**40)]
        store.submit(TENANT, recording(*reversed(outcomes))).result(10)
        store.submit(TENANT, recording((1, outcomes[0][1]), replica=REPLICA_B)).result(10)

        with store.read(TENANT) as reader:
            assert reader.first_settled(REPLICA_A, 10) == outcomes
            assert reader.first_settled(REPLICA_A, 2) == outcomes[:2]

    # --- forgetting -----------------------------------------------------------

    def test_the_collected_past(self, store: Store) -> None:
        """Changes up to the collected version go, commits below it; what is above, and the head, stays."""
        for name in ("one", "two"):
            for number in range(4):
                store.submit(name, writing(task(f"a{number}"), task(f"b{number}"))).result(10)
        with store.read("one") as reader:
            before = reader.head()
            ids = {version: reader.commit_id(version) for version in (4, 6, 8)}

        store.submit("one", forgetting(version=4)).result(10)

        with store.read("one") as reader:
            assert (reader.collected(), reader.head()) == (4, before)
            assert [change.version for change in reader.changes(0, 10, UNBOUNDED)] == [5, 6, 7, 8]
            assert [reader.change(version) is None for version in (1, 4, 5)] == [True, True, False]
            assert reader.commit_id(2) is None
            assert {version: reader.commit_id(version) for version in ids} == ids
            assert len(reader.entity_objects("Task", "", 10, UNBOUNDED).objects) == 8
        with store.read("two") as reader:
            assert reader.collected() == 0
            assert len(reader.changes(0, 10, UNBOUNDED)) == 8
            assert reader.commit_id(2) is not None

        store.submit("one", forgetting(version=8)).result(10)

        with store.read("one") as reader:
            assert (reader.collected(), reader.head()) == (8, before)
            assert reader.changes(0, 10, UNBOUNDED) == []
            assert reader.commit_id(8) == before.commit_id
        store.submit("one", writing(task("c"))).result(10)
        with store.read("one") as reader:
            assert [change.version for change in reader.changes(0, 10, UNBOUNDED)] == [9]

    def test_forgotten_tombstones(self, store: Store) -> None:
        """A forgotten tombstone is found neither by key nor by version; an entity without objects is none."""
        store.submit(TENANT, writing(task("t1"), task("t2"), ("Note", "t1"))).result(10)
        store.submit(TENANT, writing(task("t1"), ("Note", "t1"), deleted=True)).result(10)

        store.submit(TENANT, forgetting(tombstones={task("t1"): 4, ("Note", "t1"): 5})).result(10)

        with store.read(TENANT) as reader:
            assert list(reader.objects([task("t1"), task("t2"), ("Note", "t1")])) == [task("t2")]
            assert ids_of(reader.latest_objects("Task", 0, 10, UNBOUNDED).objects) == ["t2"]
            assert ids_of(reader.entity_objects("Task", "", 10, UNBOUNDED).objects) == ["t2"]
            assert reader.entities() == ["Task"]
        store.submit(TENANT, writing(task("t1"))).result(10)
        with store.read(TENANT) as reader:
            assert ids_of(reader.latest_objects("Task", 0, 10, UNBOUNDED).objects) == ["t2", "t1"]

    def test_forgotten_outcomes(self, store: Store) -> None:
        """Outcomes and refused creations go one by one; what the replica's state says stays."""
        outcome = Settled(1, 1, False, b"", False)
        for replica in (REPLICA_A, REPLICA_B):
            store.submit(TENANT, recording((1, outcome), (2, outcome), replica=replica)).result(10)
            failure = FailureRecord(replica, b"x", replica, (task("t1"), task("t2")))
            store.submit(TENANT, failing(failure)).result(10)

        forgotten = forgetting(settled=[(REPLICA_A, 1)], refused_creations=[(REPLICA_A, task("t1"))])
        store.submit(TENANT, forgotten).result(10)

        with store.read(TENANT) as reader:
            assert reader.first_settled(REPLICA_A, 10) == [(2, outcome)]
            assert reader.first_settled(REPLICA_B, 10) == [(1, outcome), (2, outcome)]
            assert reader.refused_creations(REPLICA_A, 10) == [task("t2")]
            assert sorted(reader.refused_creations(REPLICA_B, 10)) == [task("t1"), task("t2")]
            assert len(reader.refused_creations(REPLICA_B, 1)) == 1
            assert reader.replica(REPLICA_A) is not None
            assert reader.failure(REPLICA_A) == b"x"

    def test_nothing_forgotten(self, store: Store) -> None:
        """Whoever forgets nothing leaves what was collected before."""
        store.submit(TENANT, writing(task("t1"))).result(10)
        store.submit(TENANT, forgetting(version=1)).result(10)
        store.submit(TENANT, writing(task("t2"))).result(10)

        with store.read(TENANT) as reader:
            assert reader.collected() == 1
            assert reader.change(2) is not None

    # --- reading --------------------------------------------------------------

    def test_a_reader_sees_one_moment(self, store: Store) -> None:
        """What is written while somebody reads is not seen by that reader, and by the next."""
        store.submit(TENANT, writing(task("t1"))).result(10)

        with store.read(TENANT) as reader:
            assert reader.head().version == 1
            store.submit(TENANT, writing(task("t1"), task("t2"))).result(10)
            assert reader.head().version == 1
            assert ids_of(reader.latest_objects("Task", 0, 10, UNBOUNDED).objects) == ["t1"]

        with store.read(TENANT) as reader:
            assert reader.head().version == 3

    def test_tenants_know_nothing_of_each_other(self, store: Store) -> None:
        """Each tenant has its own objects, versions, changes, replicas, outcomes and failures."""
        jobs: list[Job] = [
            writing(task("t1"), task("t2")),
            recording((1, Settled(1, 1, False, b"", False))),
            failing(FailureRecord(b"1" * 16, b"x", REPLICA_A, (task("t9"),))),
        ]
        for job in (*jobs, indexing({b"a": b"1"})):
            store.submit("one", job).result(10)
        store.submit("two", writing(task("t1"), attributes=b"two")).result(10)

        with store.read("one") as reader:
            assert reader.head().version == 2
            assert reader.objects([task("t1")])[task("t1")].attributes == b"\x80"
            assert len(reader.changes(0, 10, UNBOUNDED)) == 2
        with store.read("two") as reader:
            assert reader.head().version == 1
            assert ids_of(reader.latest_objects("Task", 0, 10, UNBOUNDED).objects) == ["t1"]
            assert ids_of(reader.entity_objects("Task", "", 10, UNBOUNDED).objects) == ["t1"]
            assert reader.objects([task("t1"), task("t2")])[task("t1")].attributes == b"two"
            assert len(reader.changes(0, 10, UNBOUNDED)) == 1
            assert reader.commit_id(2) is None
            assert reader.replica(REPLICA_A) is None
            assert reader.settled(REPLICA_A, [1]) == {}
            assert reader.failures(b"", 10, 1 << 30) == []
            assert reader.refused_creation(REPLICA_A, task("t9")) is None
            assert reader.index(b"a") is None
            assert reader.indexes([b"a"]) == {}
            assert reader.index_range(b"", b"", 10) == []
        with store.read("three") as reader:
            assert reader.head() == Head(0, b"")
            assert reader.latest_objects("Task", 0, 10, UNBOUNDED).objects == []

    def test_commits_of_two_tenants_never_share_an_id(self, store: Store) -> None:
        """The same version of two tenants has two commit ids, though both were written at one time."""
        futures = [store.submit(tenant, writing(task("t1"))) for _ in range(20) for tenant in ("one", "two")]
        for future in futures:
            future.result(10)

        ids = []
        for tenant in ("one", "two"):
            with store.read(tenant) as reader:
                ids.append(reader.head().commit_id)
        assert ids[0] != ids[1]

    def test_tenants(self, store: Store) -> None:
        """Tenants are listed once something was written for them, not if jobs only looked or failed."""

        def fails(reader: Reader) -> tuple[Writes, None]:
            raise Refusal("no")

        assert store.tenants() == []
        store.submit("two", writing(task("t1"))).result(10)
        store.submit("failed", fails).exception(10)
        store.submit("looked", lambda reader: (None, None)).result(10)
        store.submit("one", recording((1, Settled(1, 1, False, b"", False)))).result(10)

        assert sorted(store.tenants()) == ["one", "two"]

    def test_notes(self, store: Store) -> None:
        """A note is what was last noted under its name, whatever names the store uses for itself."""
        identity = store.identity
        assert store.note("epoch") == b""
        for value in (b"first", b"\x00second"):
            store.set_note("epoch", value)
        store.set_note("other", b"x")

        assert (store.note("epoch"), store.note("other"), store.note("")) == (b"\x00second", b"x", b"")
        assert store.identity == identity

    def test_a_note_that_is_expected(self, store: Store) -> None:
        """A note changes only if it is the one that is expected; to note nothing is as if nothing had been noted."""
        assert not store.set_note("n", b"x", expected=b"other")
        assert store.note("n") == b""
        assert store.set_note("n", b"one", expected=b"")
        assert not store.set_note("n", b"two", expected=b"")
        assert store.set_note("n", b"three", expected=b"one")
        assert store.set_note("n", b"")
        assert store.set_note("n", b"four", expected=b"")
        assert store.note("n") == b"four"

    def test_one_of_many_notes_it(self, store: Store) -> None:
        """Of several that expect the same note, one changes it."""
        with ThreadPoolExecutor(4) as pool:
            noted = pool.map(lambda number: store.set_note("n", bytes([number]), expected=b""), range(1, 9))

            assert sum(noted) == 1

    def test_a_note_that_is_required(self, store: Store) -> None:
        """While another note than the required one is there tenants are neither read nor written; nothing is lost."""
        store.set_note("schema", b"1")
        store.require_note("schema", b"1")
        store.submit(TENANT, writing(task("t1"))).result(10)
        store.set_note("schema", b"2")

        with pytest.raises(ServerOutdated), store.read(TENANT) as reader:
            reader.head()
        for _ in range(2):
            with pytest.raises(ServerOutdated):
                store.submit(TENANT, writing(task("t2"))).result(10)

        store.set_note("schema", b"1")
        store.submit(TENANT, writing(task("t3"))).result(10)
        with store.read(TENANT) as reader:
            assert ids_of(reader.latest_objects("Task", 0, 10, UNBOUNDED).objects) == ["t1", "t3"]

    def test_another_required_note(self, store: Store) -> None:
        """Whoever prepares a store needs no note, and may require another one than before."""
        store.require_note("schema", b"never noted")
        with store.preparing():
            store.submit(TENANT, writing(task("t1"))).result(10)
            store.set_note("schema", b"2")
        store.require_note("schema", b"2")

        with store.read(TENANT) as reader:
            assert reader.head().version == 1

    def test_nothing_is_noted(self, store: Store) -> None:
        """That nothing is noted can be required too."""
        store.require_note("schema", b"")
        store.submit(TENANT, writing(task("t1"))).result(10)
        store.set_note("schema", b"x")

        with pytest.raises(ServerOutdated):
            store.submit(TENANT, writing(task("t2"))).result(10)

    # --- closing and opening --------------------------------------------------

    def test_everything_is_there_when_it_is_opened_again(self, folder: Path) -> None:
        """What a future has yielded survives closing and opening, for every tenant; so does the store's identity."""
        first = self.open(folder)
        for tenant in ("one", "two", "three"):
            first.submit(tenant, writing(task(f"{tenant}-1"), task(f"{tenant}-2"))).result(10)
        first.submit("two", recording((1, Settled(1, 1, False, b"", False)))).result(10)
        first.submit("two", indexing({b"a": b"1"})).result(10)
        first.submit("two", forgetting(version=1)).result(10)
        first.set_note("schema", b"7")
        with first.read("two") as reader:
            head = reader.head()
        identity = first.identity
        first.close()

        second = self.open(folder)
        try:
            assert second.identity == identity
            assert second.note("schema") == b"7"
            assert sorted(second.tenants()) == ["one", "three", "two"]
            with second.read("two") as reader:
                assert reader.head() == head
                assert reader.commit_id(2) == head.commit_id
                assert ids_of(reader.latest_objects("Task", 0, 10, UNBOUNDED).objects) == ["two-1", "two-2"]
                assert reader.settled(REPLICA_A, [1])
                assert reader.entities() == ["Task"]
                assert reader.index(b"a") == b"1"
                assert reader.collected() == 1
            second.submit("three", writing(task("three-3"))).result(10)
            second.submit("four", writing(task("four-1"))).result(10)
            with second.read("three") as reader:
                assert reader.head().version == 3
            with second.read("four") as reader:
                assert ids_of(reader.latest_objects("Task", 0, 10, UNBOUNDED).objects) == ["four-1"]
        finally:
            second.close()

    def test_each_store_has_an_identity_of_its_own(self, folder: Path) -> None:
        """Two stores have two epochs."""
        stores = [self.open(folder / name) for name in ("one", "two")]

        assert stores[0].identity.epoch != stores[1].identity.epoch
        assert all(store.identity.epoch and store.identity.timeline for store in stores)
        for store in stores:
            store.close()

    def test_closing_finishes_what_was_submitted(self, folder: Path) -> None:
        """Jobs that were submitted before a store is closed are done, all of them."""
        store = self.open(folder)
        futures = [store.submit(TENANT, writing(task(f"t{number}"), result=number)) for number in range(200)]

        store.close()

        assert [future.result(0) for future in futures] == list(range(200))
        again = self.open(folder)
        with again.read(TENANT) as reader:
            assert reader.head().version == 200
        again.close()

    def test_a_closed_store(self, store: Store) -> None:
        """A closed store says that it is closed; closing it again does nothing."""
        store.close()
        store.close()

        with pytest.raises(ResourceClosed):
            store.submit(TENANT, writing(task("t1")))
        with pytest.raises(ResourceClosed), store.read(TENANT) as reader:
            reader.head()
