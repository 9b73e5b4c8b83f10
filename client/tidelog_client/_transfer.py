"""
Transfers: contents on their way, several at a time, each taken up again where it was cut.

What blocks is done by workers; here is decided what they do next. Small contents come
before large ones, so that a large one holds up nothing. Patience is shared: as long as
one transfer gets ahead none is given up. So it is with the questions how contents stand,
which the server is asked beside them, and again until it answers.
"""

from __future__ import annotations

import hashlib
import math
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple, Protocol, Self, TypeAlias

from filelock import FileLock, Timeout

from tidelog._channel import SLOWEST_BYTES_PER_SECOND, WINDOW_BYTES
from tidelog._contents import ContentCorrupt
from tidelog._environment import typed_errors
from tidelog._errors import DiskFull, StorageError, TidelogError, Unauthenticated
from tidelog._limits import FILE_CHUNK_BYTES, FILES_STAT_MAX
from tidelog._logging import get_logger
from tidelog_client._call_errors import Transient
from tidelog_client._file_calls import FileRefused, Presence
from tidelog_client._files import Failed, turn_path
from tidelog_client._report import ignore

if TYPE_CHECKING:
    from tidelog._channel import Metadata
    from tidelog._contents import Part
    from tidelog._keys import ObjectKey
    from tidelog_client._file_calls import FileCalls, Standings
    from tidelog_client._files import Files, Needed
    from tidelog_client._workers import Event, Work, WorkRunner

TRANSFERS_AT_ONCE: Final = 4
# So many more are begun if they are that many times smaller than each that is under way, which may last for hours.
OVERTAKING_MAX: Final = 2
OVERTAKING_SHARE: Final = 4
# Another one is begun beside the others when one got ahead after so little time. On a slow path many at once would
# each take so long for a chunk that all pass for dead.
QUICK_SECONDS: Final = 1.0
# Of how many contents the server is asked first how they stand.
ASKED_FIRST: Final = 64
# By how many of the objects that refer to a content it is asked for.
ASKED_OBJECTS_MAX: Final = 32
# What an upload sends at a time. What a cut in the middle takes with it is sent again.
UPLOAD_CHUNK_BYTES: Final = FILE_CHUNK_BYTES // 4
# How much of a content goes twice in one synchronization, as often as the content and in bytes, whichever is more: a
# server that lets go of what it got, again and again, gets no more of it this time.
RESENT_SHARE_MAX: Final = 2.0
RESENT_BYTES_MAX: Final = 16 * 1024 * 1024
# How many contents wait at the most to be tried again; meanwhile no others are begun.
RETRIES_MAX: Final = 1_000
# Without progress of any transfer for so long, the rest is given up for now; but what was handed to the network goes
# unseen, a window of each upload at the most, and is waited for. A connection that is dead pings find out.
SILENCE_SECONDS_MAX: Final = 30.0
# How fast a server puts away a content of which it has every byte, at the least: it says nothing meanwhile.
COMPLETED_BYTES_PER_SECOND: Final = 20_000_000
# How often to ask how far another device of the user is that uploads the same content.
OTHERS_SECONDS: Final = 2.0
# How often who waits for results may look after something else.
TICK_SECONDS: Final = 0.1
# The same where a server is there, and tells when to come again.
BUSY_SECONDS_MAX: Final = 600.0
# A call may take this long; gRPC cannot count much further.
CALL_SECONDS_MAX: Final = 24 * 3600.0

# How long a token is used for one call after the other.
TOKEN_SECONDS_MAX: Final = 60.0

_log = get_logger("tidelog.transfers")

_BACKOFF_SECONDS_FIRST: Final = 0.1
_BACKOFF_SECONDS_MAX: Final = 5.0
_LOCK_POLL_SECONDS: Final = 0.05
# How long to wait for workers whose calls were ended. It is a matter of milliseconds.
_END_SECONDS_MAX: Final = 5.0


class ContentLost(Exception):
    """A content that was to be uploaded is not here, or is not what it was."""


class Uploading(NamedTuple):
    """
    A content to be uploaded.

    Attributes:
        content: Which.
        offset: How much of it the server has. None: it must be asked.
    """

    content: Needed
    offset: int | None = None


class Downloading(NamedTuple):
    """
    A content to be downloaded.

    Attributes:
        content: Which.
        keys: Objects that refer to it, by which it is asked for one after the other. At most `ASKED_OBJECTS_MAX`.
        other_counts: How many more do, by entity.
    """

    content: Needed
    keys: Sequence[ObjectKey]
    other_counts: Mapping[str, int] = MappingProxyType({})


Job: TypeAlias = Uploading | Downloading
OnAnswer: TypeAlias = Callable[["Sequence[Needed]", "Standings | Exception"], None]


def job_size(job: Job) -> int:
    """Return how many bytes the content of a job has."""
    return job.content.size


class Result(NamedTuple):
    """
    How a transfer ended.

    Attributes:
        job: Which.
        error: Why not well: FileRefused, ContentLost, an error of the disk, or Transient, if it was given up
            for now. None: the content is there.
        was_there: Whether it had been there before.
    """

    job: Job
    error: Exception | None = None
    was_there: bool = False

    @property
    def failed(self) -> Failed | None:
        """What is to be noted of a content that could not be had; None if it is here, or was given up for now."""
        if self.error is None or isinstance(self.error, Transient):
            return None
        return Failed(str(self.error), isinstance(self.error, FileRefused) and self.error.is_damaged)


class Moved(NamedTuple):
    """How far a transfer is, and how many bytes went since it said so the last time."""

    position: int
    byte_count: int


class Patience:
    """
    How long to go on: to the caller's deadline, and while something gets ahead.

    Args:
        end: The caller's deadline, by the monotonic clock. None: there is none.
        silence_seconds: How long nothing may get ahead. None: `SILENCE_SECONDS_MAX`.
    """

    def __init__(self, end: float | None, silence_seconds: float | None = None) -> None:
        self._end = end
        self._silence_seconds = SILENCE_SECONDS_MAX if silence_seconds is None else silence_seconds
        self._heard = time.monotonic()
        self._busy_since: float | None = None
        self._suspended_at = self._heard

    def time_left(self) -> float:
        """Return the seconds to the deadline; infinite if there is none."""
        return math.inf if self._end is None else max(0.0, self._end - time.monotonic())

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return self._end is not None and time.monotonic() >= self._end

    def suspend(self) -> None:
        """Do not count as silence what passes until `resume`: nobody looks what gets ahead."""
        self._suspended_at = time.monotonic()

    def resume(self) -> None:
        """Go on where `suspend` was called."""
        now = time.monotonic()
        self._heard = max(self._heard, min(now, self._heard + now - self._suspended_at))

    def note_progress(self) -> None:
        """Note that something got ahead."""
        self._heard = max(self._heard, time.monotonic())
        self._busy_since = None

    def note_busy(self, pause: float) -> None:
        """Note that the server is there, and wants nothing to be tried for so many seconds."""
        now = time.monotonic()
        self._busy_since = now if self._busy_since is None else self._busy_since
        self._heard = max(self._heard, min(now + pause, self._busy_since + BUSY_SECONDS_MAX))

    def remaining(self, pause: float = 0.0) -> float:
        """Return the seconds left, if nothing need get ahead for so many seconds more than otherwise."""
        now = time.monotonic()
        left = self._heard + self._silence_seconds + pause - now
        return left if self._end is None else min(left, self._end - now)

    def call_timeout(self) -> float | None:
        """Return the seconds that a call may take, None if it may take as long as it likes."""
        return None if self._end is None else min(max(0.0, self._end - time.monotonic()), CALL_SECONDS_MAX)


class Caller(Protocol):
    """What makes file calls: a connection."""

    def authorization(self) -> Metadata:
        """Return what tells the server who is calling."""
        ...

    def files(self, timeout: float | None) -> FileCalls:
        """Return calls, to be closed in the end."""
        ...

    def workers(self, count_max: int) -> WorkRunner:
        """Return what makes them."""
        ...


@dataclass(slots=True, eq=False, kw_only=True)
class _Tries:
    """When to try again what failed."""

    backoff: float = _BACKOFF_SECONDS_FIRST
    retry_at: float = 0.0
    error: Exception = field(default_factory=lambda: Transient("there was no time left"))


@dataclass(slots=True, eq=False)
class _Attempts(_Tries):
    """What is known of a job under way, or to be tried again. *handed* are the bytes that its call gave to gRPC."""

    job: Job
    position: int = 0
    farthest: int = -1
    handed: int = 0
    resent: int = 0


@dataclass(slots=True, eq=False)
class _Questions(_Tries):
    """
    The contents of which the server has not said yet how they stand, and of which of them it is being asked.

    It is asked for few at first, for more with each answer, and for fewer where none comes: it may be slow, or not be
    able to say how one of them stands.
    """

    left: dict[Needed, None] = field(default_factory=dict)
    count_max: int = ASKED_FIRST
    asked: Sequence[Needed] = ()
    work: Work | None = None

    @property
    def is_due(self) -> bool:
        return bool(self.left) and self.retry_at <= time.monotonic()


class Transfers:
    """
    Transfers over one channel. A context manager, which ends what is under way.

    Args:
        files: The replica's contents.
        caller: The connection.
        patience: How long to go on.
        on_moved: Called with a job, how many more bytes of it are there than before (less, if some were lost),
            and how many went over the network.
        on_answer: Called with some of the contents that were to be asked about, and how they stand, or why the
            server refuses to say that.
    """

    def __init__(
        self,
        files: Files,
        caller: Caller,
        patience: Patience,
        on_moved: Callable[[Job, int, int], None],
        on_answer: OnAnswer = ignore,
    ) -> None:
        self._files = files
        self._caller = caller
        self._patience = patience
        self._on_moved = on_moved
        self._on_answer = on_answer
        # What says who is calling, and when it was got.
        self._metadata: tuple[Metadata, float] | None = None
        self._calls = caller.files(patience.call_timeout())
        self._workers = caller.workers(TRANSFERS_AT_ONCE + OVERTAKING_MAX + 1)
        self._questions = _Questions()
        self._at_once = 1
        self._moved_at = 0.0
        # The contents of which what had come was no good.
        self._begun_anew: set[bytes] = set()
        # Read by workers, who end then.
        self._is_over = False
        self.is_given_up = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._is_over = True
        try:
            self._calls.close()
        finally:
            self._workers.stop()
        if kind is None or issubclass(kind, Exception):  # after an interrupt nothing is waited for
            self._workers.join(_END_SECONDS_MAX)

    @property
    def is_asking(self) -> bool:
        """Whether the server is being asked how contents stand; not if that is to be tried again later."""
        return self._questions.work is not None or self._questions.is_due

    def ask(self, contents: Iterable[Needed]) -> None:
        """Have the server asked how contents stand, some at a time, by `run`."""
        self._questions.left |= dict.fromkeys(contents)

    def run(self, jobs: Iterator[Job], next_size: Callable[[], int | None] = lambda: None) -> Iterator[Result | None]:
        """
        Do *jobs*, several at a time, and yield how each of them ended, and None now and then meanwhile.

        What is to be asked is asked beside them.

        Args:
            jobs: What is to be done.
            next_size: Tells how many bytes the next one has. None: it is not to overtake what is under way.

        Where patience ends, what was begun is given up for now, and `is_given_up`. What is under way goes on while
        nobody asks for more; *jobs* may have become more when somebody does.

        Raises:
            SynchronizationError: There is no token to be had.
        """
        retries: list[_Attempts] = []
        under_way: dict[Work, _Attempts] = {}
        while True:
            self._ask_next(under_way)
            while (room := self._room(under_way)) and self._remaining(under_way) > 0:
                attempts = _next(jobs, next_size, retries, room)
                if attempts is None:
                    break
                attempts.handed = 0
                work = self._work(attempts, self._authorization())
                under_way[work] = attempts
                self._moved_at = time.monotonic()
                self._workers.submit(work)
            if not under_way and not retries and not self._questions.left:
                # Either all is done, or nothing more is begun.
                self.is_given_up = self._patience.remaining() <= 0
                return
            timeout = min(self._remaining(under_way), TICK_SECONDS)
            if next_try := [one.retry_at for one in retries if one.job.content.size < room]:
                timeout = min(timeout, min(next_try) - time.monotonic())
            if self._questions.left and self._questions.work is None:
                timeout = min(timeout, self._questions.retry_at - time.monotonic())
            event = self._workers.next_event(max(0.0, timeout))
            # What was said while nobody asked counts as well.
            if self._patience.is_over or (event is None and self._remaining(under_way) <= 0):
                yield from _given_up(*under_way.values(), *retries)
                under_way, retries = {}, []
                self._questions = _Questions()
                continue
            if event is None or event.work not in under_way:
                if event is not None and event.work is self._questions.work:
                    self._take_answer(event)
                yield None
                continue
            if not event.is_over:
                self._moved(under_way[event.work], event.value)
                yield None
                continue
            attempts = under_way.pop(event.work)
            result = self._ended(attempts, event)
            if result is None:
                attempts.retry_at = self._retry_at(attempts)
                retries.append(attempts)
            else:
                yield result

    def _ask_next(self, under_way: Mapping[Work, _Attempts]) -> None:
        """Ask how some contents stand, if that is due."""
        questions = self._questions
        if questions.work is not None or not questions.is_due or self._remaining(under_way) <= 0:
            return
        asked = questions.asked = list(islice(questions.left, min(questions.count_max, FILES_STAT_MAX)))
        metadata = self._authorization()
        questions.work = lambda _tell: self._calls.stat(metadata, asked)
        self._workers.submit(questions.work)

    def _take_answer(self, event: Event) -> None:
        questions, error = self._questions, event.error
        questions.work = None
        if isinstance(error, Transient | Unauthenticated):
            questions.error = error
            questions.retry_at = self._retry_at(questions)
            self._metadata = None
            if len(questions.asked) > 1 and isinstance(error, Transient) and error.retry_after_seconds is None:
                questions.count_max = len(questions.asked) // 2
            for one in questions.asked:  # the others have their turn before
                questions.left[one] = questions.left.pop(one)
            return
        if error is not None and not isinstance(error, Exception):
            raise error
        self._patience.note_progress()
        questions.backoff = _BACKOFF_SECONDS_FIRST
        questions.count_max = min(2 * questions.count_max, FILES_STAT_MAX)
        for one in questions.asked:
            del questions.left[one]
        self._on_answer(questions.asked, event.value if error is None else error)

    def _room(self, under_way: Mapping[Work, _Attempts]) -> float:
        """Return than how many bytes the next transfer to be begun must have fewer; 0: none is begun."""
        if len(under_way) < self._at_once:
            return math.inf
        if len(under_way) < self._at_once + OVERTAKING_MAX:
            return min(one.job.content.size for one in under_way.values()) / OVERTAKING_SHARE
        return 0

    def _remaining(self, under_way: Mapping[Work, _Attempts]) -> float:
        """Return the seconds left: nobody hears of what is on its way to the server, or is being put away there."""
        uploads = [one for one in under_way.values() if isinstance(one.job, Uploading)]
        unseen = sum(min(one.handed, WINDOW_BYTES) for one in uploads)
        whole = sum(one.position for one in uploads if one.handed and one.position == one.job.content.size)
        return self._patience.remaining(unseen / SLOWEST_BYTES_PER_SECOND + whole / COMPLETED_BYTES_PER_SECOND)

    def _authorization(self) -> Metadata:
        """Return what says who is calling. A token provider is asked now and then, and after each failure."""
        now = time.monotonic()
        if self._metadata is None or now > self._metadata[1] + TOKEN_SECONDS_MAX:
            self._metadata = (self._caller.authorization(), now)
        return self._metadata[0]

    def _moved(self, attempts: _Attempts, moved: Moved) -> None:
        self._on_moved(attempts.job, moved.position - attempts.position, moved.byte_count)
        attempts.resent += max(0, attempts.position - moved.position)
        attempts.position = moved.position
        attempts.handed += moved.byte_count
        if moved.position > attempts.farthest:
            if attempts.farthest >= 0:
                self._note_progress()
                attempts.backoff = _BACKOFF_SECONDS_FIRST
            attempts.farthest = moved.position

    def _note_progress(self) -> None:
        self._patience.note_progress()
        now = time.monotonic()
        if now - self._moved_at < QUICK_SECONDS:
            self._at_once = min(self._at_once + 1, TRANSFERS_AT_ONCE)
        self._moved_at = now

    def _ended(self, attempts: _Attempts, event: Event) -> Result | None:
        """Return how a transfer ended; None if it is to be tried again."""
        error = event.error
        if error is None:
            self._note_progress()
            self._on_moved(attempts.job, attempts.job.content.size - attempts.position, 0)
            return Result(attempts.job, was_there=bool(event.value))
        # A token may have expired meanwhile; the next attempt asks for another one.
        if isinstance(error, Transient | Unauthenticated):
            attempts.error = error
            self._metadata = None
            if attempts.resent > max(RESENT_BYTES_MAX, RESENT_SHARE_MAX * attempts.job.content.size):
                why = f"what had come of it was lost again and again, {attempts.resent} bytes: {error}"
                return Result(attempts.job, Transient(why))
            return None
        if not isinstance(error, Exception):
            raise error
        if isinstance(error, FileRefused):
            self._note_progress()  # the server answered, and there is one less to do
        if not isinstance(error, FileRefused | ContentLost | TidelogError):
            _log.error("a transfer failed", sha256=attempts.job.content.sha256.hex(), exc_info=error)
        return Result(attempts.job, error)

    def _retry_at(self, tries: _Tries) -> float:
        pause = tries.backoff * random.uniform(0.5, 1.0)
        tries.backoff = min(tries.backoff * 2, _BACKOFF_SECONDS_MAX)
        retry_after = getattr(tries.error, "retry_after_seconds", None)
        if retry_after is not None:
            pause = max(pause, retry_after)
            self._patience.note_busy(pause)
        return time.monotonic() + pause

    # --- what workers do ------------------------------------------------------

    def _work(self, attempts: _Attempts, metadata: Metadata) -> Work:
        job = attempts.job
        if isinstance(job, Downloading):
            return lambda tell: self._download(job, metadata, tell)
        offset = job.offset if attempts.farthest < 0 else None
        is_told_to_wait = getattr(attempts.error, "retry_after_seconds", None) is not None
        seen = attempts.position if is_told_to_wait else None
        return lambda tell: self._upload(job.content, offset, metadata, tell, seen)

    def _upload(
        self, content: Needed, offset: int | None, metadata: Metadata, tell: Callable[[Any], None], seen: int | None
    ) -> bool:
        if offset is None:
            (status,) = self._calls.stat(metadata, [content]).statuses
            if status.presence is Presence.PRESENT:
                return True
            if status.presence is Presence.TOO_LARGE:
                raise FileRefused("the server takes no content of that size", is_too_large=True)
            offset = status.received_bytes
            if seen is not None and offset > seen:
                tell(Moved(offset, 0))
                raise Transient("another device uploads it", retry_after_seconds=OTHERS_SECONDS)
        file = self._files.contents.open(content.sha256)
        if file is None:
            raise ContentLost("its content is not here any more")
        with file:
            tell(Moved(offset, 0))
            chunks = self._chunks(file, content, offset, tell)
            first = list(islice(chunks, 1))  # what cannot be read begins nothing, which would take room on the server
            self._calls.upload(metadata, content, offset, chain(first, chunks))
        return False

    def _chunks(self, file: BinaryIO, content: Needed, offset: int, tell: Callable[[Any], None]) -> Iterator[bytes]:
        """Yield what follows on *offset*; the last bytes only once all have proved to be what they should be."""
        digest = hashlib.sha256()
        position = 0
        while not self._is_over:
            try:
                chunk = file.read(UPLOAD_CHUNK_BYTES)
            except OSError as error:
                raise StorageError(f"its content cannot be read: {error}") from error
            digest.update(chunk)
            position += len(chunk)
            is_last = position >= content.size or not chunk
            if is_last and (position != content.size or file.read(1) or digest.digest() != content.sha256):
                raise ContentLost("its content is not what it was: it was damaged outside tidelog")
            rest = chunk[max(0, offset - (position - len(chunk))) :] if position > offset else b""
            if rest:
                yield rest
                tell(Moved(position, len(rest)))
            if is_last:
                return
        raise Transient("given up for now")

    def _download(self, job: Downloading, metadata: Metadata, tell: Callable[[Any], None]) -> bool:
        content, files = job.content, self._files
        if files.has(*content):
            return True
        files.check_place()
        part = files.contents.part(content.sha256.hex())
        with _Turn(part, lambda: self._is_over, tell):
            if files.has(*content):  # by somebody else meanwhile
                return True
            if part.size > content.size:
                part.discard()
            came_before = part.size
            _require_room(part, content.size)
            tell(Moved(part.size, 0))
            try:
                if part.size < content.size:
                    self._fill(part, job, metadata, tell)
                files.adopt(part, *content)
            except DiskFull:
                part.discard()
                raise
            except ContentCorrupt as error:
                if came_before and content.sha256 not in self._begun_anew:
                    # What came before may have been damaged here, by a loss of power say.
                    self._begun_anew.add(content.sha256)
                    raise Transient(f"what had come before is damaged: {error}") from error
                raise FileRefused(f"the server sent another content: {error}", is_damaged=True) from error
            finally:
                part.close()
        return False

    def _fill(self, part: Part, job: Downloading, metadata: Metadata, tell: Callable[[Any], None]) -> None:
        sha256, size = job.content
        for place, key in enumerate(job.keys, start=1):
            begun = part.size
            try:
                for chunk in self._calls.download(metadata, sha256, key, part.size):
                    if self._is_over:
                        raise Transient("given up for now")
                    if part.size + len(chunk) > size:
                        raise FileRefused(f"the server sent more than the {size} bytes that it should have")
                    part.append(chunk)
                    tell(Moved(part.size, len(chunk)))
                break
            except FileRefused as error:
                if part.size > begun:  # what came is to be trusted as little as what did not
                    part.discard()
                    raise FileRefused(str(error), is_damaged=True) from error
                if not error.is_denied or place == len(job.keys) or self._is_over:
                    raise
        if part.size < size:
            raise Transient(f"the server ended the download after {part.size} of {size} bytes")


def _require_room(part: Part, size: int) -> None:
    """Raise DiskFull if there is no room for what a part lacks: it would come in vain, again and again."""
    try:
        free_bytes = shutil.disk_usage(part.path.parent).free
    except OSError:
        return  # whoever writes is told
    if free_bytes < size - part.size:
        raise DiskFull(f"{size - part.size} bytes are to come, and there is room for {free_bytes}: make room")


class _Turn:
    """
    The right to write a part: of one thread of one process at a time.

    The lock's file goes with the part. Who waited for it looks whether the content is there, and so nothing is lost
    if somebody waited for a file that is gone.
    """

    def __init__(self, part: Part, is_over: Callable[[], bool], tell: Callable[[Any], None]) -> None:
        self._part = part
        self._path = turn_path(part)
        self._is_over = is_over
        self._tell = tell
        self._lock = FileLock(self._path, is_singleton=False)

    def __enter__(self) -> None:
        with typed_errors(self._path):
            self._acquire()

    def _acquire(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                self._lock.acquire(timeout=_LOCK_POLL_SECONDS)
                return
            except Timeout:
                if self._is_over():
                    raise Transient("somebody else is about to download it") from None
                self._tell(Moved(self._part.size, 0))  # by somebody else, but it gets ahead

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._path.unlink(missing_ok=True)
        self._lock.release()


def _next(
    source: Iterator[Job], next_size: Callable[[], int | None], retries: list[_Attempts], room: float
) -> _Attempts | None:
    """Return what is to be done next, if anything, of fewer than so many bytes."""
    now = time.monotonic()
    due = [one for one in retries if one.retry_at <= now and one.job.content.size < room]
    if due:
        smallest = min(due, key=lambda one: one.job.content.size)
        retries.remove(smallest)
        return smallest
    if len(retries) >= RETRIES_MAX:
        return None
    if room < math.inf and ((size := next_size()) is None or size >= room):
        return None
    job = next(source, None)
    return None if job is None else _Attempts(job)


def _given_up(*left: _Attempts) -> Iterator[Result]:
    for one in left:
        error = one.error
        yield Result(one.job, error if isinstance(error, Transient) else Transient(str(error)))
