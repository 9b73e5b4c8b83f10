"""Operations that end the process, in a store whose process can die."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest
from tests.builders import (
    REPLICA_A,
    REPLICA_B,
    TENANT,
    TIME_US,
    USER,
    Lab,
    MemoryStore,
    ProcessDied,
    create,
    group,
    make_operation,
    references_schema,
    said,
)

from tidelog_server import Application, HookContext, HookObject, StoreUnavailable
from tidelog_server._attempts import ATTEMPTS_MAX, SUSPECTS_MAX, Attempt, Suspects, decode_under_way, encode_under_way
from tidelog_server._outcomes import Result, Status, Uploader
from tidelog_server._session import Upload, _joined, begin_upload
from tidelog_server._survivor import ROOM_BYTES, Survivor

Hook = Callable[[HookObject, HookContext], None]

LIVES_MAX: Final = 100


class Service:
    """A server that is started again whenever it dies, on the same disk."""

    def __init__(self, hook: Hook, *, application: Application | None = None, entity: str = "Task") -> None:
        self.application = application or Application()
        self.application.before_commit(entity)(hook)
        self.disk: dict[str, Any] = {}
        self.deaths = 0
        self.start()

    def start(self) -> None:
        """Begin a life with what the former one left."""
        self.store = MemoryStore(self.disk)
        self.suspects = Suspects(self.store)

    def upload(
        self, *batches: list[bytes], replica: bytes = REPLICA_A, leaves_earlier: bool = False
    ) -> list[Result] | None:
        """Upload in one session, and return the final results; None: the process died of it, and is there again."""
        try:
            begun = self.store.submit(TENANT, lambda reader: begin_upload(reader, replica, USER, TIME_US)).result()
            upload = Upload(
                self.application,
                self.store,
                Uploader(replica, USER, begun.session_number, leaves_earlier),
                lambda: TIME_US,
                self.suspects,
            )
            results = [result for batch in batches for result in upload.submit(batch).result()]
            held = iter(upload.settle_held().result())
            return [next(held) if result.status == Status.HELD else result for result in results]
        except ProcessDied:
            self.deaths += 1
            self.start()
            return None

    def upload_at_last(self, *batches: list[bytes], replica: bytes = REPLICA_A) -> list[Result]:
        """Upload the same again and again, as a replica does, until the process survives it."""
        for _ in range(LIVES_MAX):
            results = self.upload(*batches, replica=replica)
            if results is not None:
                return results
        raise AssertionError(f"the process died {self.deaths} times")

    @property
    def lab(self) -> Lab:
        """What the store holds."""
        return Lab(self.application, self.store)


def dies_of(*ids: str) -> Hook:
    """Return a hook that some objects make end the process."""

    def hook(thing: HookObject, context: HookContext) -> None:
        if thing.id in ids:
            raise ProcessDied

    return hook


def tasks(first: int, last: int) -> list[bytes]:
    """Return creations of tasks named like their seqs."""
    return [create(seq, str(seq)) for seq in range(first, last + 1)]


def test_what_ends_the_process_is_given_up() -> None:
    """After five deaths alone the operation becomes a failure with its payload, and all others are applied once."""
    service = Service(dies_of("7"))

    results = service.upload_at_last(tasks(1, 5), tasks(6, 10), tasks(11, 15))

    assert said(results) == ["APPLIED"] * 6 + ["HOOK_ERROR"] + ["APPLIED"] * 8
    assert service.deaths == ATTEMPTS_MAX + 1, "once in company, five times alone"
    [failure] = service.lab.failures()
    assert failure.operation == create(7, "7")
    assert "ended again and again" in failure.message
    assert service.lab.settled(*range(1, 16)) == list(range(1, 16))
    assert [change.key[1] for change in service.lab.changes()] == [str(seq) for seq in range(1, 16) if seq != 7]
    service.lab.check_history()


def test_several_that_end_the_process() -> None:
    """Each operation that ends the process is found, in one batch, in the next one and of another replica."""
    service = Service(dies_of("2", "4", "12", "b1"))

    first = service.upload_at_last(tasks(1, 5), tasks(11, 15))
    other = service.upload_at_last([create(1, "b1"), create(2, "b2")], replica=REPLICA_B)

    assert [result.seq for result in first if result.status != Status.APPLIED] == [2, 4, 12]
    assert said(other) == ["HOOK_ERROR", "APPLIED"]
    assert len(service.lab.failures()) == 4


def test_taking_turns_hides_nobody() -> None:
    """Two replicas that come in turns, each with such an operation, are both found out."""
    service = Service(dies_of("a", "b"))
    ops = {REPLICA_A: [create(1, "a"), create(2, "a2")], REPLICA_B: [create(1, "b"), create(2, "b2")]}

    outcomes: dict[bytes, list[Result]] = {}
    for turn in range(LIVES_MAX):
        replica = (REPLICA_A, REPLICA_B)[turn % 2]
        results = service.upload(ops[replica], replica=replica)
        if results is not None:
            outcomes[replica] = results

    assert {replica: said(results) for replica, results in outcomes.items()} == {
        REPLICA_A: ["HOOK_ERROR", "APPLIED"],
        REPLICA_B: ["HOOK_ERROR", "APPLIED"],
    }


def test_a_commit_group_is_given_up_whole() -> None:
    """A commit group one of whose operations ends the process is refused as a whole, with all its payloads."""
    service = Service(dies_of("g3"))
    members = group(*(make_operation(seq=seq, id=f"g{seq}") for seq in (2, 3, 4)))

    results = service.upload_at_last([create(1, "1"), *members, create(5, "5")])

    assert said(results) == ["APPLIED", "HOOK_ERROR", "GROUP_REJECTED", "GROUP_REJECTED", "APPLIED"]
    [failure] = service.lab.failures()
    assert list(failure.group_operations) == members


def test_what_is_too_much_together_is_applied_one_by_one() -> None:
    """Operations that end the process only together, of lack of memory say, are all applied, and none is refused."""

    def hook(thing: HookObject, context: HookContext) -> None:
        if len(context._action.overlay.changes) >= 3:  # type: ignore[attr-defined]
            raise ProcessDied

    service = Service(hook)

    results = service.upload_at_last(tasks(1, 10))

    assert said(results) == ["APPLIED"] * 10
    assert service.deaths == 1


def test_a_held_operation_that_ends_the_process_is_given_up() -> None:
    """Also among operations that need each other, and are settled together, the one that ends the process is found."""
    calls: dict[str, int] = {}

    def hook(thing: HookObject, context: HookContext) -> None:
        calls[thing.id] = calls.get(thing.id, 0) + 1
        if thing.id == "c" and calls["c"] == 2:  # not before it is tried with what it waited for
            calls.clear()
            raise ProcessDied

    application = Application(schema=references_schema({"Node": {"next": "Node"}}))
    service = Service(hook, application=application, entity="Node")
    names = {"a": "b", "b": "a", "c": "d", "d": "c", "e": "a"}
    nodes = [create(seq, id_, entity="Node", set={"next": names[id_]}) for seq, id_ in enumerate(names, 1)]

    results = service.upload_at_last(nodes)

    assert said(results) == ["APPLIED", "APPLIED", "HOOK_ERROR", "DEPENDENCY_FAILED", "APPLIED"]
    assert service.deaths == ATTEMPTS_MAX + 1
    service.lab.check_history()


def test_deaths_at_random_accuse_nobody() -> None:
    """A process that is killed from outside, at any operation, again and again, refuses nothing."""
    deaths = 0
    for seed in range(50):
        random = Random(seed)

        def hook(thing: HookObject, context: HookContext, random: Random = random) -> None:
            if random.random() < 0.1:
                raise ProcessDied

        service = Service(hook)
        results = service.upload_at_last(tasks(1, 20), tasks(21, 40))
        assert said(results) == ["APPLIED"] * 40, seed
        assert not service.disk["notes"].get("suspects"), "nothing is held against anybody any more"
        deaths += service.deaths
    assert deaths > 150


def test_a_death_counts_once() -> None:
    """A process that dies right after it has read what the former one left counts that death once."""
    service = Service(dies_of("1"))
    service.upload([create(1, "1")])  # in company, as far as anybody knows
    disk = copy.deepcopy(service.disk)
    service.start = lambda: None  # type: ignore[method-assign]
    service.upload([create(1, "1")])
    left = service.disk["under way"]
    assert left == [(TENANT, Attempt(REPLICA_A, 1, 1, alone=True))]

    for _ in range(3):
        disk["under way"] = left
        suspicion = Suspects(MemoryStore(disk)).suspicion(TENANT, REPLICA_A)
        assert suspicion.attempts == ((1, 1),)


def test_a_death_in_company_takes_no_count_back() -> None:
    """A death that accuses several leaves alone what was counted of one of them, and is forgotten once it is noted."""
    store = MemoryStore()
    for left in (Attempt(REPLICA_A, 5, 3, alone=True), Attempt(REPLICA_A, 5)):
        store._left = [(TENANT, left)]
        suspects = Suspects(store)
        assert list(store.left_under_way()) == []
    assert suspects.suspicion(TENANT, REPLICA_A) == (5, ((5, 3),))


def test_only_what_was_under_way_is_tried_one_by_one() -> None:
    """What came after the batch that was under way is evaluated a batch at a time, as ever."""
    service = Service(dies_of("3"))
    service.upload(tasks(1, 5))
    attempts: list[Attempt | None] = []
    submit = service.store.submit

    def watched(tenant: str, job: Any, attempt: Attempt | None = None) -> Future[Any]:
        attempts.append(attempt)
        return submit(tenant, job, attempt)

    service.application = Application()  # the hook was mended
    service.store.submit = watched  # type: ignore[method-assign]
    service.upload(tasks(1, 5), tasks(6, 10))

    assert [(one.seq, one.number) for one in attempts if one is not None] == [
        *((seq, 1) for seq in range(1, 6)),
        (10, 0),
        (10, 0),
    ]
    assert service.suspects.suspicion(TENANT, REPLICA_A).until == 0


def test_suspicion_stays_until_all_was_sent() -> None:
    """A session that leaves behind what its replica is suspected of does not clear it."""
    service = Service(dies_of("3"))
    service.upload(tasks(1, 5))
    assert service.upload(tasks(1, 2), leaves_earlier=True) is not None
    assert service.suspects.suspicion(TENANT, REPLICA_A).until == 5

    service.upload(tasks(1, 5))
    assert service.upload(tasks(4, 5)) is not None, "the one in question stayed behind"
    assert service.suspects.suspicion(TENANT, REPLICA_A).attempts == ((3, 1),), "and is remembered"


def test_a_suspicion_that_cannot_be_lifted_now(caplog: pytest.LogCaptureFixture) -> None:
    """A store that fails once all is settled fails nobody: the suspicion stays, and goes the next time."""
    service = Service(dies_of("3"))
    service.upload(tasks(1, 5))
    service.application = Application()  # the hook was mended

    def fails(*_: object, **__: object) -> bool:
        raise StoreUnavailable("just now")

    service.store.set_note = fails  # type: ignore[method-assign]
    assert service.upload(tasks(1, 5)) is not None
    assert "stays suspected" in caplog.text
    assert "exception calling callback" not in caplog.text
    service.start()
    assert service.suspects.suspicion(TENANT, REPLICA_A).until == 5

    service.upload(tasks(1, 5))
    assert service.suspects.suspicion(TENANT, REPLICA_A).until == 0


def test_suspects_are_bounded() -> None:
    """No more replicas are remembered than a bound, the newest ones."""
    store = MemoryStore()
    store._left = [(TENANT, Attempt(bytes([*divmod(n, 256)]) * 8, 1)) for n in range(SUSPECTS_MAX + 5)]
    Suspects(store)
    again = Suspects(store)
    assert len(again._suspects) == SUSPECTS_MAX
    assert again.suspicion(TENANT, bytes([0, 4]) * 8).until == 0
    assert again.suspicion(TENANT, bytes([0, 5]) * 8).until == 1


def test_servers_that_accuse_at_once() -> None:
    """What another server notes while one is about to note something is neither lost nor taken back later."""
    disk: dict[str, Any] = {}
    store, other = MemoryStore(disk), MemoryStore(disk)
    store._left = [(TENANT, Attempt(REPLICA_A, 5))]
    other._left = [(TENANT, Attempt(REPLICA_B, 7))]
    note = store.note

    def note_in_between(name: str) -> bytes:
        found = note(name)
        if other._left:
            Suspects(other)
        return found

    store.note = note_in_between  # type: ignore[method-assign]
    suspects = Suspects(store)
    for replica, until in ((REPLICA_A, 5), (REPLICA_B, 7)):
        assert Suspects(store).suspicion(TENANT, replica).until == until

    Suspects(other).clear(TENANT, REPLICA_B)
    suspects.clear(TENANT, REPLICA_A)
    for replica in (REPLICA_A, REPLICA_B):
        assert Suspects(store).suspicion(TENANT, replica).until == 0


# --- what outlives the process ----------------------------------------------------


def test_attempts_survive_in_bytes() -> None:
    """What was under way comes back as it was, for as many as one group has, with the longest tenants."""
    under_way = [("ü" * 64, Attempt(REPLICA_A, 2**63 - 1, number)) for number in range(64)]
    data = encode_under_way(under_way)
    assert decode_under_way(data) == under_way
    assert len(data) < ROOM_BYTES - 8
    assert list(decode_under_way(encode_under_way([]))) == []


def test_a_survivor_is_read_by_the_next(tmp_path: Path) -> None:
    """What was written last is read by whoever opens the file next; a shorter value leaves nothing of a longer one."""
    path = tmp_path / "file"
    with closing(Survivor(path)) as survivor:
        assert survivor.read() == b""
        for value in (b"x" * 10_000, b"short", b""):
            survivor.write(value)
            with closing(Survivor(path)) as following:
                assert following.read() == value
    assert path.stat().st_size == ROOM_BYTES


@pytest.mark.parametrize("length", [0, 3, 9, 20])
def test_a_survivor_cut_short_is_empty(tmp_path: Path, length: int) -> None:
    """A value of which only a part was written reads as none."""
    path = tmp_path / "file"
    with closing(Survivor(path)) as survivor:
        survivor.write(b"a whole value of some length")
    path.write_bytes(path.read_bytes()[:length])
    with closing(Survivor(path)) as following:
        assert following.read() == b""


def test_a_survivor_half_overwritten_is_empty(tmp_path: Path) -> None:
    """A value of which one part is older than the other reads as none."""
    path = tmp_path / "file"
    with closing(Survivor(path)) as survivor:
        survivor.write(b"a whole value of some length")
    data = path.read_bytes()
    path.write_bytes(data[:20] + b"X" + data[21:])
    with closing(Survivor(path)) as following:
        assert following.read() == b""


def test_a_survivor_on_a_full_disk_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """A disk that takes no more is logged once, and fails nobody."""
    with closing(Survivor(Path("/dev/full"))) as survivor:
        survivor.write(b"x")
        survivor.write(b"y")
    assert caplog.text.count("cannot note what is under way") == 1


def test_what_settles_in_parts_cannot_be_cancelled() -> None:
    """Whoever stops waiting for several parts does not keep their results from being told."""
    part: Future[list[Result]] = Future()
    joined = _joined([part])

    assert not joined.cancel()
    part.set_result([])
    assert joined.result(0) == []
