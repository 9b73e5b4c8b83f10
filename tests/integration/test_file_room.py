"""One device whose files do not all fit in the room that its user has, with everything that can be cut being cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from random import Random
from typing import Any, Final

import pytest
from tests.builders import World, quick_folder

from tidelog import Entity, File, Reference, Schema, SynchronizationError
from tidelog._limits import FILE_COST_BYTES
from tidelog_client import Replica, SkipReason, _synchronizer, _transfer
from tidelog_client._call_errors import Transient
from tidelog_client._file_channel import FileChannel
from tidelog_client._synchronizer import Synchronizer
from tidelog_server import Application, ServerLimits

pytestmark = pytest.mark.slow

ROOM_BYTES: Final = 60_000
SIZES: Final = (500, 7_000, 15_000, 25_000, 40_000, 70_000)
SCHEMA: Final = Schema([Entity("Task", {"photo": File(), "parent": Reference("Task")})])


class Faults:
    """Cuts calls as a seed says, whichever thread comes first."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._seed = seed
        self._counts: Counter[str] = Counter()
        self.shares: dict[str, float] = {}
        stat, upload, attempt = FileChannel.stat, FileChannel.upload, Synchronizer._attempt

        def asked(channel: FileChannel, metadata: Any, contents: Any) -> Any:
            self._pass("stat")
            return stat(channel, metadata, contents)

        def uploaded(channel: FileChannel, metadata: Any, content: Any, offset: int, chunks: Iterator[bytes]) -> None:
            self._pass("upload", content.sha256.hex())
            upload(channel, metadata, content, offset, chunks)

        def attempted(synchronizer: Synchronizer, *arguments: Any) -> None:
            self._pass("session")
            attempt(synchronizer, *arguments)

        monkeypatch.setattr(FileChannel, "stat", asked)
        monkeypatch.setattr(FileChannel, "upload", uploaded)
        monkeypatch.setattr(Synchronizer, "_attempt", attempted)

    def _pass(self, kind: str, which: str = "") -> None:
        self._counts[kind + which] += 1
        if Random(f"{self._seed} {kind} {which} {self._counts[kind + which]}").random() < self.shares.get(kind, 0):
            raise Transient(f"{kind} cut")


def commit(replica: Replica, random: Random, photos: list[bytes], number: int) -> tuple[int, list[str]]:
    """Commit operations with files, perhaps together; return how much room they need at once, and their objects."""
    chosen = [random.choice(photos) for _ in range(random.choice((1, 1, 2, 3)))]
    # What may have to wait for good is nobody's parent.
    parents = [one.id for one in replica.query("Task") if one.id.startswith("alone")]
    ids = [f"t{number}-{place}" for place in range(len(chosen))] if len(chosen) > 1 else [f"alone{number}"]
    values = [replica.add_file(photo) for photo in chosen]
    with replica.transaction(atomic=len(chosen) > 1) as transaction:
        for id_, value in zip(ids, values, strict=True):
            parent = {"parent": random.choice(parents)} if parents and random.random() < 0.3 else {}
            transaction.create("Task", {"photo": value, **parent}, id_)
    cost = sum(len(photo) + FILE_COST_BYTES for photo in set(chosen))
    return (cost if len(set(chosen)) > 1 else 0), ids


@pytest.mark.parametrize("seed", range(8))
def test_everything_that_fits_is_settled_once_nothing_is_cut(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was cut before, one synchronization settles all that fits, and tells of the rest that it never does."""
    random = Random(seed)
    monkeypatch.setattr(_transfer, "FILES_STAT_MAX", random.choice((2, 1_000)))
    monkeypatch.setattr(_transfer, "_BACKOFF_SECONDS_FIRST", 0.001)
    monkeypatch.setattr(_synchronizer, "BACKOFF_SECONDS_FIRST", 0.001)
    monkeypatch.setattr(_synchronizer, "BACKOFF_SECONDS_MAX", 0.01)
    faults = Faults(seed, monkeypatch)
    limits = ServerLimits(file_room_per_user=ROOM_BYTES)
    with quick_folder() as folder, World(folder, Application(schema=SCHEMA), limits=limits) as world:
        replica = world.replica()
        photos = [random.randbytes(random.choice(SIZES)) for _ in range(random.choice((8, 40)))]
        too_large: set[str] = set()
        for number in range(12):
            cost, ids = commit(replica, random, photos, number)
            too_large.update(ids if cost > ROOM_BYTES else ())
            if random.random() < 0.5:
                continue
            faults.shares = {kind: random.choice((0, 0.4, 0.9)) for kind in ("stat", "upload", "session")}
            with monkeypatch.context() as impatient, suppress(SynchronizationError):
                impatient.setattr(_transfer, "SILENCE_SECONDS_MAX", 0.1)
                if random.random() < 0.3:
                    replica.synchronize_selected([("Task", ids[0])], timeout=1.0)
                else:
                    replica.synchronize_all(timeout=1.0)
        faults.shares = {}

        report = replica.synchronize_all()

        left = {one.operation.id for one in replica.pending()}
        assert list(replica.failures()) == []
        assert left <= too_large
        assert left == {one.id for one in report.skipped if one.reason is SkipReason.FILES_EXCEED_ROOM}
