"""Several servers over one store and one place of contents: whatever each does, and whenever, nothing is lost."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Final, TypeAlias

import pytest
from tests.builders import TENANT, TIME_US, Lab, wanted
from tests.simulation.fiber import Fiber

from tidelog_server import ContentStore, ObjectStoreContents, Principal, _files, _sightings
from tidelog_server._errors import UploadSuperseded
from tidelog_server._file_records import CONTENTS, content_of, grant_key, unpack_content
from tidelog_server._files import Files
from tidelog_server._records import Writes
from tidelog_server._store import Store

PHOTO: Final = b"a photo, say"
SHA256: Final = wanted(PHOTO).sha256
DAY_US: Final = timedelta(days=1) // timedelta(microseconds=1)
FOREVER_US: Final = 2**62

# What takes a step: what others can notice, or depends on what they did.
STORE_STEPS: Final = frozenset(("read", "submit"))
CONTENT_STEPS: Final = frozenset(("size", "read", "complete", "delete", "contents"))

Act: TypeAlias = Callable[[Files], object]


class Died(BaseException):
    """A server ends where it is."""


class Stepping:
    """A store, or a place of contents, that lets others go on before each step of whoever uses it."""

    def __init__(self, inner: object, steps: frozenset[str], world: Shared) -> None:
        self._inner = inner
        self._steps = steps
        self._world = world

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in self._steps:
            return found

        def step(*arguments: Any, **options: Any) -> Any:
            self._world.pause()
            return found(*arguments, **options)

        return step


class Shared:
    """One store and one place of contents, and servers that take turns step by step."""

    def __init__(self) -> None:
        self.lab = Lab()
        self.time_us = TIME_US
        self.contents = ObjectStoreContents("memory:///")
        self.files = self._files(self.lab.store, self.contents)
        self.files.note_timeline()
        self._running: Fiber | None = None

    def server(self) -> Files:
        """Return the files of one more server."""
        contents = copy.copy(self.contents)
        contents._tails = {}
        store: Any = Stepping(self.lab.store, STORE_STEPS, self)
        place: Any = Stepping(contents, CONTENT_STEPS, self)
        return self._files(store, place)

    def _files(self, store: Store, contents: ContentStore) -> Files:
        return Files(self.lab.application, store, contents, lambda: self.time_us)

    def pause(self) -> None:
        """Let the others go on."""
        if self._running is not None:
            self._running.pause()

    def run(self, acts: Sequence[Act], choices: Iterator[int], *, may_die: bool) -> tuple[list[Fiber], list[int]]:
        """Let servers act, each as far as *choices* say; return them, and among how many each choice was made."""
        fibers = [Fiber(lambda act=act: act(self.server()) and None) for act in acts]  # type: ignore[misc]
        counts = []
        mortal = may_die
        while left := [one for one in fibers if not one.is_done]:
            # The last choice: the first server dies.
            count = len(left) + (mortal and not fibers[0].is_done)
            choice = next(choices, 0)
            counts.append(count)
            chosen = left[choice] if choice < len(left) else fibers[0]
            died = Died() if choice == len(left) else None
            mortal = mortal and died is None
            self._running = chosen
            chosen.resume(died)
            self._running = None
        return fibers, counts

    def check(self) -> None:
        """Check that what is on record is there, and that whatever else is there goes in the end."""
        self.check_on_record()
        for _ in self.files.collect_uploads(TENANT, FOREVER_US):
            pass
        for _ in range(2):  # what the first puts back, it makes a copy of
            sweep(self.files)
        self.check_on_record()
        there = {(one.sha256, one.copy) for one in self.contents.contents(TENANT)}
        assert there == {(sha256, copy_) for sha256, copy_, _ in self.on_record()}

    def check_on_record(self) -> None:
        """Check that what is on record is there."""
        for sha256, copy_, size in self.on_record():
            assert self.contents.size(TENANT, sha256, copy_) == size

    def on_record(self) -> list[tuple[bytes, str, int]]:
        """Return content, copy and size of what is on record."""
        with self.lab.store.read(TENANT) as reader:
            entries = reader.index_range(CONTENTS, b"", 100)
        records = [(content_of(key), unpack_content(value)) for key, value in entries]
        return [(sha256, record.copy, record.size) for sha256, record in records if not record.is_broken]


def upload(user_id: str = "ann") -> Act:
    """Return an upload of the photo."""
    return lambda files: files.add(TENANT, io.BytesIO(PHOTO), user_id)


def collect(files: Files) -> None:
    """Delete the photo, if nothing refers to it."""
    files.collect(TENANT, SHA256, TIME_US - DAY_US)


def give_up(files: Files) -> None:
    """Give up whatever is on its way, as a server does for which ages have passed."""
    list(files.collect_uploads(TENANT, FOREVER_US))


def sweep(files: Files) -> None:
    """Delete what nobody knows."""
    list(files.collect_unknown(TENANT, FOREVER_US))


def mend(files: Files) -> None:
    """Look at the photo, should it be broken."""
    files.mend(TENANT, SHA256)


def nothing(_: Shared) -> None:
    """Begin with an empty store."""


def unneeded(shared: Shared) -> None:
    """Begin with the photo, which nothing refers to."""
    shared.time_us -= 3 * DAY_US
    upload()(shared.files)
    shared.time_us += 3 * DAY_US
    revoke(shared)


def lost(shared: Shared) -> None:
    """Begin with the photo on record, and lost."""
    upload()(shared.files)
    ((sha256, copy_, _),) = shared.on_record()
    shared.contents.delete(TENANT, sha256, copy_)


def broken(shared: Shared) -> None:
    """Begin with the photo noted as lost."""
    lost(shared)
    assert not shared.files.stat(Principal("ann"), [wanted(PHOTO)])[0].is_present


def revoke(shared: Shared) -> None:
    """Take all rights to contents away."""
    rights = {grant_key(SHA256, "ann"): None}
    shared.lab.store.submit(
        TENANT, lambda reader: (Writes({}, [], None, [], [], reader.head().version, {**rights}), None)
    ).result()


OTHERS: Final[Sequence[Act]] = (collect, give_up, sweep, mend)

SCENES: Final[dict[str, tuple[Callable[[Shared], None], list[Act]]]] = {
    "an upload and a collection": (unneeded, [upload(), collect]),
    "uploads of two users": (nothing, [upload("ann"), upload("bob")]),
    "one upload ends twice": (nothing, [upload(), upload()]),
    "an upload that is given up": (nothing, [upload(), give_up]),
    "an upload and a sweep": (nothing, [upload(), sweep]),
    "an upload of what is lost, and a look at it": (broken, [upload("bob"), mend]),
    "a collection and a sweep": (unneeded, [collect, sweep]),
}


@pytest.mark.parametrize("may_die", [False, True], ids=["", "dying"])
@pytest.mark.parametrize("name", SCENES)
def test_whatever_the_order(monkeypatch: pytest.MonkeyPatch, name: str, *, may_die: bool) -> None:
    """In each order of the steps of several servers: what is on record is there, and what is told to a user holds."""
    monkeypatch.setattr(_files, "PART_US_MIN", -FOREVER_US)
    for module in (_files, _sightings):
        monkeypatch.setattr(module, "UNKNOWN_KEPT", -timedelta(days=100_000))
    begin, acts = SCENES[name]
    choices: list[int] = []
    run_count = 0
    while True:
        shared = Shared()
        begin(shared)
        fibers, counts = shared.run(acts, iter(choices), may_die=may_die)
        run_count += 1
        for fiber in fibers:
            if fiber.error is not None and not isinstance(fiber.error, Died | UploadSuperseded):
                raise fiber.error
        if any(act not in OTHERS and one.error is None for act, one in zip(acts, fibers, strict=True)):
            assert [sha256 for sha256, _, _ in shared.on_record()] == [SHA256]
        shared.check()
        choices += [0] * (len(counts) - len(choices))
        while choices and choices[-1] + 1 >= counts[len(choices) - 1]:
            choices.pop()
        if not choices:
            break
        choices[-1] += 1
    assert run_count >= 15  # there was a choice
