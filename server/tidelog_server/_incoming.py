"""
Incoming contents: whose turn it is to append to a part.

A client whose connection broke begins its upload anew, and the server may not know yet
that the former one is dead. So the newest upload of a content by a user has the part, once
the former one has been silent for a while, which finds that out with the next bytes. While
it is not silent, as when two devices upload the same content, who comes later waits: each
byte comes once.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Final, Generic, TypeVar

from tidelog._contents import ContentCorrupt
from tidelog._limits import FILE_CHUNK_BYTES
from tidelog_server._content_store import ContentStore, PartMismatch
from tidelog_server._errors import RequestInvalid, ServerBusy, UploadSuperseded

K = TypeVar("K", bound=Hashable)

# When to come again whose content is being stored, or uploaded by somebody else.
STORING_SECONDS: Final = 1.0
UPLOADING_SECONDS: Final = 2.0
# How long nothing came of an upload that another one may take over.
SILENCE_US: Final = 5_000_000

_PART_CHARS: Final = 40


def part_name(user_id: str, sha256: bytes) -> str:
    """Return the name of a user's part of a content: nobody disturbs another one's upload, or learns of it."""
    return hashlib.sha256(sha256 + user_id.encode()).hexdigest()[:_PART_CHARS]


class KeyedLocks(Generic[K]):
    """A lock for each key that anybody holds or waits for."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[K, threading.Lock] = {}
        self._users: Counter[K] = Counter()

    @contextmanager
    def held(self, key: K) -> Iterator[None]:
        """Hold the lock of a key."""
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
            self._users[key] += 1
        try:
            with lock:
                yield
        finally:
            with self._guard:
                self._users[key] -= 1
                if not self._users[key]:
                    del self._users[key], self._locks[key]


class Parts:
    """
    The parts that are on their way, in one process.

    Args:
        contents: Where they are kept.
        clock: Returns the time in microseconds.
    """

    def __init__(self, contents: ContentStore, clock: Callable[[], int]) -> None:
        self.contents = contents
        self.clock = clock
        self.locks: KeyedLocks[tuple[str, str]] = KeyedLocks()
        self.turns: dict[tuple[str, str], Incoming] = {}
        self.added: set[tuple[str, str]] = set()
        self.completing: set[tuple[str, str]] = set()
        self.guard = threading.Lock()

    def is_any_on_its_way(self, tenant: str) -> bool:
        """Tell whether anybody uploads to a tenant."""
        return any(owner == tenant for owner, _ in [*list(self.turns), *self.added.copy()])

    @contextmanager
    def being_added(self, tenant: str, part: str) -> Iterator[None]:
        """Add to a part, which nobody else knows, till the end of the block."""
        self.added.add((tenant, part))
        try:
            yield
        finally:
            self.added.discard((tenant, part))

    def begin(  # noqa: PLR0917 - what makes a part
        self,
        tenant: str,
        part: str,
        offset: int,
        size: int,
        complete: Callable[[], Callable[[], None]],
        uploader: str = "",
    ) -> Incoming:
        """
        Begin to append to a part, or go on with it. Whoever had it before may append nothing more.

        Args:
            tenant: Whose part it is.
            part: Its name.
            offset: How many bytes it has.
            size: How many it is to have.
            complete: Makes a content of it, and returns what is to be done once the uploader was told.
            uploader: Who appends. Empty: somebody who waits for nobody.

        Raises:
            PartMismatch: It has not so many bytes.
            ServerBusy: Another uploader is appending to it; or all of it has come, and a content is being made of it.
        """
        incoming = Incoming(self, tenant, part, offset, size, complete, uploader)
        with self.guard:
            if (tenant, part) in self.completing:
                raise ServerBusy(
                    "all of the file has come, and is being stored: come again", retry_after_seconds=STORING_SECONDS
                )
            former = self.turns.get((tenant, part))
            if former is not None and incoming.waits_for(former):
                raise ServerBusy(
                    "the same file is being uploaded already: come again", retry_after_seconds=UPLOADING_SECONDS
                )
            self.turns[tenant, part] = incoming  # from now on the former one stops
        try:
            with self.locks.held((tenant, part)):
                self.contents.pause(tenant, part)
                found = self.contents.part_size(tenant, part)
            if found != offset:
                raise PartMismatch(f"{found} bytes of the file have come, not {offset}", size=found)
        except BaseException:
            incoming.leave()
            raise
        return incoming


class Incoming:
    """
    A content that comes in chunks. Made by `Parts.begin`; one thread at a time uses it.

    Attributes:
        received: How many bytes have come.
        heard_us: When the last of them came.
    """

    def __init__(  # noqa: PLR0917 - what makes a part
        self,
        parts: Parts,
        tenant: str,
        part: str,
        offset: int,
        size: int,
        complete: Callable[[], Callable[[], None]],
        uploader: str,
    ) -> None:
        self.received = offset
        self.heard_us = parts.clock()
        self._parts = parts
        self._tenant = tenant
        self._part = part
        self._size = size
        self._complete = complete
        self._do_rest: Callable[[], None] | None = None
        self._uploader = uploader

    def waits_for(self, former: Incoming) -> bool:
        """Tell whether another uploader gets ahead with the same: a former call of one's own may be dead by now."""
        is_another = self._uploader not in {"", former._uploader}
        return is_another and 0 <= self.heard_us - former.heard_us < SILENCE_US

    @property
    def is_whole(self) -> bool:
        """Whether all bytes have come."""
        return self.received >= self._size

    def append(self, data: bytes) -> None:
        """
        Append a chunk.

        Raises:
            RequestInvalid: It is empty, or larger than a message may bring.
            ContentCorrupt: It is more than the content has. Nothing of it is kept.
            UploadSuperseded: Another upload of it has begun.
        """
        if not 0 < len(data) <= FILE_CHUNK_BYTES:
            raise RequestInvalid(f"a chunk of {len(data)} bytes: it has 1 to {FILE_CHUNK_BYTES}")
        with self._turn():
            if self.received + len(data) > self._size:
                self._parts.contents.discard(self._tenant, self._part)
                raise ContentCorrupt(f"more than the {self._size} bytes that the file was said to have")
            self._parts.contents.append(self._tenant, self._part, self.received, data)
            self.received += len(data)
            self.heard_us = self._parts.clock()

    def complete(self) -> None:
        """
        Make a content of what came. What is to be done besides is left to `leave`.

        Raises:
            ContentCorrupt: It has another hash. Nothing of it is kept.
            UploadSuperseded: Another upload of it has begun.
        """
        with self._turn():
            key = (self._tenant, self._part)
            with self._parts.guard:
                self._check_current()
                self._parts.completing.add(key)
            try:
                self._do_rest = self._complete()
            finally:
                self._parts.completing.discard(key)

    def leave(self) -> None:
        """Append nothing more for now. What came stays."""
        with self._parts.locks.held((self._tenant, self._part)):
            if self._is_current:
                del self._parts.turns[self._tenant, self._part]
                self._parts.contents.pause(self._tenant, self._part)
        if (do_rest := self._do_rest) is not None:
            self._do_rest = None
            do_rest()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._parts.locks.held((self._tenant, self._part)):
            self._check_current()
            yield

    def _check_current(self) -> None:
        if not self._is_current:
            raise UploadSuperseded("another upload of the same file has begun")

    @property
    def _is_current(self) -> bool:
        return self._parts.turns.get((self._tenant, self._part)) is self
