"""
The file exchange: what a synchronization does with contents, around its sessions.

Before a session the server is asked which contents it lacks that operations refer to. The
small ones go up at once; operations that need another one stay behind. After the session
the others go up, and what objects lack comes down. Meanwhile there are further sessions, for
what stayed behind and need not any more, and for what was committed since. So no object and
no small file waits for a large one, and no operation ever refers to a content that the
server does not have.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby, islice, takewhile
from typing import TYPE_CHECKING, Final, Self

from tidelog._errors import StorageError, SynchronizationError, Unauthenticated
from tidelog._limits import FILES_STAT_MAX
from tidelog._logging import get_logger
from tidelog_client._call_errors import Transient
from tidelog_client._file_calls import FileRefused, Presence
from tidelog_client._file_wishes import FileMode
from tidelog_client._files import Failed, Missing, Needed
from tidelog_client._plans import Plans
from tidelog_client._report import Phase, Progress, Skipped, SkipReason
from tidelog_client._set_aside import SET_ASIDE_FOLDER
from tidelog_client._transfer import (
    ASKED_OBJECTS_MAX,
    ContentLost,
    Downloading,
    Patience,
    Result,
    Transfers,
    Uploading,
)
from tidelog_client._upload import NO_FILES, Cause, FilePlan, Sieve, sifted

if TYPE_CHECKING:
    from tidelog._keys import ObjectKey
    from tidelog_client._file_wishes import FileWishes
    from tidelog_client._report import OnProgress, Report
    from tidelog_client._storage import Storage
    from tidelog_client._transfer import Caller, Job

# How much is uploaded before the session, in all, and how long that may take.
SMALL_UPLOADS_BYTES: Final = 4 * 1024 * 1024
SMALL_UPLOADS_SECONDS: Final = 10.0
# How much of the caller's time, and how long they may stand still.
SMALL_UPLOADS_SHARE: Final = 0.25
SMALL_SILENCE_SECONDS: Final = 3.0
# How many objects whose contents could not be had are tried again where not all are.
FAILED_OBJECTS_MAX: Final = 1_000
# How many results of downloads are written down together.
NOTED_AT_ONCE: Final = 500
SWEEP_SECONDS: Final = 24 * 3600.0
# How long a session has to wait at the least that comes while contents travel.
SESSION_SECONDS: Final = 2.0
# What others changed comes in a session so long after the last one, while contents get ahead.
REFRESH_SECONDS: Final = 30.0

_log = get_logger("tidelog.files")


class FileExchange:
    """
    The contents of one synchronization.

    A context manager, which ends what is under way. In memory is what the pending
    operations with files refer to, not what is downloaded.

    Args:
        storage: The replica's data.
        caller: The connection.
        wishes: Which contents the replica wants.
        report: Filled in as the work goes on.
        on_progress: Called with each step's `Progress`.
        end: The caller's deadline, by the monotonic clock. None: there is none.
    """

    def __init__(
        self,
        storage: Storage,
        caller: Caller,
        *,
        wishes: FileWishes,
        report: Report,
        on_progress: OnProgress,
        end: float | None,
    ) -> None:
        self._storage = storage
        self._files = storage.files
        self._caller = caller
        self._wishes = wishes
        self._report = report
        self._on_progress = on_progress
        self._end = end
        # Contents by what is known of them: whether operations that refer to them can go as they are, whether
        # nobody has them any more, and, of those to be uploaded, how far the server has them.
        self._ready: set[Needed] = set()
        self._lost: set[Needed] = set()
        self._waiting: dict[Needed, Uploading] = {}
        # Of these, what is not here, and comes down before it goes up; what did once; and what came damaged once.
        self._fetching: dict[Needed, Downloading] = {}
        self._fetched: set[Needed] = set()
        self._damaged: set[Needed] = set()
        # Why they are not there, of those that were tried.
        self._reasons: dict[Needed, str] = {}
        # What could not be downloaded, and is not tried twice.
        self._tried: set[Needed] = set()
        # What came damaged, and is not asked for this time, with the reasons.
        self._put_off = self._files.put_off()
        self._is_given_up = False
        self._plan = NO_FILES
        self._seqs: Sequence[int] | None = None
        self._needed: dict[int, list[Needed]] = {}
        self._done_bytes = 0
        self._total_bytes = 0
        # The objects that the sessions brought, if only these matter.
        self._lacking: dict[ObjectKey, None] = {}
        # What is under way, from one session to the next.
        self._jobs = _Jobs()
        self._transfers: Transfers | None = None
        self._patience = Patience(end)
        self._results: Iterator[Result | None] = iter(())
        # What the newest session knew of: how many contents were ready, and where the log ended.
        self._ready_count = 0
        self._until = 0
        self._look_at = 0.0
        self._refresh_at = math.inf
        self._has_moved = False
        self._heard_at = 0.0
        self._is_last = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._transfers is not None:
            self._transfers.__exit__(kind, *rest)

    # --- before a session -----------------------------------------------------

    def prepare(self, seqs: Sequence[int] | None) -> FilePlan:
        """
        Ask which contents the server lacks, upload the small ones, and return what the session has to know.

        Args:
            seqs: The operations to be uploaded. None: all that are pending.

        A session is worth more than all files: whatever fails here is done after it.

        Raises:
            Unauthenticated: The server does not accept the token.
        """
        with self._storage.environment.read() as transaction:
            until = self._until = self._storage.last_seq(transaction)
            any_uploads = self._files.any_uploads(transaction)
        self._seqs = seqs
        if not any_uploads:
            self._plan, self._needed = NO_FILES, {}
            return self._plan
        self._needed = self._needed_contents(until, seqs)
        if unknown := self._unknown():
            with Transfers(
                self._files, self._caller, Patience(self._end, SMALL_SILENCE_SECONDS), _tell_nobody
            ) as calls:
                self._ask(calls, unknown)
        if small := self._small_uploads():
            self._upload_small(small)
        self._plan = self._planned(until)
        self._ready_count = len(self._ready) + len(self._lost)
        return self._plan

    def _upload_small(self, small: list[Uploading]) -> None:
        """Upload what is small, for a while; what is under way then goes on beside the session."""
        if self._transfers is None:
            self._begin_transfers()
        self._patience.resume()
        self._heard_at = now = time.monotonic()
        end = now + min(SMALL_UPLOADS_SECONDS, self._patience.time_left() * SMALL_UPLOADS_SHARE)
        self._jobs.fill(small, ())
        self._expect(sum(map(_size, small)) + self._jobs.left_bytes)
        arrived: list[Needed] = []
        failed: dict[bytes, Failed] = {}
        try:
            for result in self._results:
                if result is not None:
                    self._take_out(result)
                    self._count(result, arrived, failed)
                now = time.monotonic()
                is_over = now >= end or now >= self._heard_at + SMALL_SILENCE_SECONDS
                if self._jobs.under_way and (is_over or not any(one.content in self._waiting for one in small)):
                    self._patience.suspend()
                    return
        finally:
            self._files.note_arrived(arrived, failed)
        self._end_transfers()

    def _needed_contents(self, until: int, seqs: Sequence[int] | None) -> dict[int, list[Needed]]:
        chosen = None if seqs is None else set(seqs)
        excluded = Plans.decode(self._storage.meta("plans")).upload_excluded if seqs is None else ()
        return {
            seq: contents
            for seq, contents in self._files.uploads(until=until)
            if (chosen is None or seq in chosen) and not (excluded and self._entity(seq) in excluded)
        }

    def _entity(self, seq: int) -> str:
        with self._storage.environment.read() as transaction:
            pending = self._storage.pending_at(transaction, seq)
        return "" if pending is None else pending.key[0]

    def _unknown(self) -> list[Needed]:
        known = (self._ready, self._lost, self._waiting)
        contents = dict.fromkeys(one for needed in self._needed.values() for one in needed)
        return [one for one in contents if not any(one in where for where in known)]

    def _ask(self, transfers: Transfers, contents: Sequence[Needed]) -> None:
        """Find out how contents stand. Those of which the server says nothing wait."""
        for first in range(0, len(contents), FILES_STAT_MAX):
            asked = contents[first : first + FILES_STAT_MAX]
            try:
                statuses = transfers.ask(asked)
            except Unauthenticated:
                raise
            except Transient:
                # Each is asked about again before it is sent.
                self._waiting |= {one: Uploading(one) for one in contents[first:]}
                return
            except SynchronizationError as error:
                self._waiting |= {one: Uploading(one) for one in asked}
                self._reasons |= dict.fromkeys(asked, str(error))
                continue
            for one, status in zip(asked, statuses, strict=True):
                if status.presence is not Presence.MISSING:
                    self._ready.add(one)
                else:
                    self._find(one, status.received_bytes)

    def _find(self, content: Needed, received_bytes: int) -> None:
        """Find out whether a content that the server lacks can be uploaded."""
        try:
            if self._files.has(*content):
                self._waiting[content] = Uploading(content, received_bytes)
            elif self._files.has_other_size(*content):
                self._lost.add(content)  # there is no such content
            else:
                self._miss(content, "it is not here any more")
        except StorageError as error:
            self._let_wait(content, str(error))

    def _miss(self, content: Needed, why: str) -> None:
        """
        Have a content that is not here come from the server, by what the replica shows; else it is lost.

        The server knows it, perhaps, and does not say so to whom it finds no object that he may read. What is only
        away, or was put here anew meanwhile, is not missed.
        """
        try:
            if self._files.is_sound(*content):
                self._let_wait(content, f"{why}; by now it is here again")
                return
            self._files.check_place()
            self._files.note_gone(content.sha256, self._storage.environment.path / SET_ASIDE_FOLDER)
            self._lacking |= dict.fromkeys(self._files.look_again())
        except StorageError as error:
            self._let_wait(content, str(error))
            return
        holders = () if content in self._fetched else self._files.holders(content.sha256, ASKED_OBJECTS_MAX)
        if holders:
            self._fetched.add(content)
            self._fetching[content] = Downloading(content, holders)
            self._waiting[content] = Uploading(content)
        else:
            self._lose(content, why)

    def _lose(self, content: Needed, why: str) -> None:
        _log.warning("the content of a file cannot be uploaded", sha256=content.sha256.hex(), detail=why)
        self._lost.add(content)
        self._waiting.pop(content, None)

    def _let_wait(self, content: Needed, why: str) -> None:
        """Let a content wait for another synchronization."""
        self._waiting[content] = Uploading(content)
        self._reasons[content] = why

    def _small_uploads(self) -> list[Uploading]:
        """Return what is uploaded before the session: the smallest contents, as far as there is room."""
        room_bytes = SMALL_UPLOADS_BYTES
        small = []
        for one in self._uploads():
            if one.content in self._jobs.under_way:
                continue
            room_bytes -= one.content.size
            if room_bytes < 0:
                break
            small.append(one)
        return small

    def _uploads(self) -> list[Uploading]:
        """Return what is to be uploaded, is here, and was not tried in vain, the smallest first."""
        passed_over = self._reasons.keys() | self._fetching.keys()
        return sorted((one for content, one in self._waiting.items() if content not in passed_over), key=_size)

    def _moves_up(self) -> list[Job]:
        """Return what is to be uploaded or comes down before, and was not tried in vain, the smallest first."""
        fetches = (one for content, one in self._fetching.items() if content not in self._reasons)
        return sorted((*self._uploads(), *fetches), key=_size)

    def _planned(self, until: int) -> FilePlan:
        held = {seq for seq, needed in self._needed.items() if any(one in self._waiting for one in needed)}
        lost = {
            seq: found
            for seq, needed in self._needed.items()
            if (found := [one.sha256 for one in needed if one in self._lost])
        }
        return FilePlan(until, held, lost)

    # --- after a session ------------------------------------------------------

    def exchange(self, selected: Collection[ObjectKey] | None, *, is_all: bool, is_last: bool = False) -> bool:
        """
        Upload what operations wait for, and download what objects lack; tell whether there is cause for a session.

        It may be called again after that: what is under way goes on meanwhile.

        Args:
            selected: The objects that were selected. None: none were.
            is_all: Whether the contents of all objects are downloaded; else of those that the session brought.
            is_last: Whether no further session comes, whatever cause there is.

        Raises:
            SynchronizationError: There is no token to be had.
        """
        self._is_last = is_last
        if self._files.is_idle() and self._transfers is None:
            return False
        if self._needed_contents(self._until, self._seqs).keys() - self._needed.keys():
            return True  # the session found out that further operations refer to contents
        failed = () if is_all or selected is not None else self._files.failed_objects(FAILED_OBJECTS_MAX)
        for key in (*(selected or ()), *failed, *self._looked_again()):
            if not is_all:
                self._lacking[key] = None
        if self._transfers is None:
            self._make_room()
        self._look_at = time.monotonic() + SESSION_SECONDS
        self._refresh_at = time.monotonic() + REFRESH_SECONDS if is_all else math.inf
        self._patience.resume()
        while self._begin(None if is_all else self._lacking):
            if self._go_on():
                self._patience.suspend()
                return True
        return False

    def _looked_again(self) -> Iterator[ObjectKey]:
        """Yield the objects that have changed and lack a content, as far as that can be seen."""
        try:
            yield from self._files.look_again()
        except StorageError as error:
            _log.warning("the contents of files cannot be looked at", detail=str(error))

    def _make_room(self) -> None:
        """Delete what nobody refers to any more: what comes may need the room."""
        try:
            self._files.collect()
        except StorageError as error:
            _log.warning("contents could not be deleted", detail=str(error))

    def _begin(self, keys: Collection[ObjectKey] | None) -> bool:
        """Find out what is to be transferred, and begin unless that was done; tell whether there is anything."""
        uploads = self._moves_up()
        self._jobs.fill(uploads, self._wanted(keys))
        if self._transfers is None:
            if self._is_given_up or (not uploads and next(self._wanted(keys), None) is None):
                return False
            self._begin_transfers()
        left_bytes = sum(map(_size, uploads)) + sum(map(_size, self._wanted(keys)))
        self._expect(left_bytes - sum(self._jobs.under_way.values()))
        return True

    def _go_on(self) -> bool:
        """Take in how transfers ended, until all have, or there is cause for a session; tell whether there is."""
        arrived: list[Needed] = []
        failed: dict[bytes, Failed] = {}
        try:
            for result in self._results:
                if result is not None:
                    self._take_out(result)
                    self._count(result, arrived, failed)
                if len(arrived) + len(failed) >= NOTED_AT_ONCE:
                    self._files.note_arrived(arrived, failed)
                    arrived, failed = [], {}
                if self._is_session_due():
                    return True
        finally:
            self._files.note_arrived(arrived, failed)
        self._end_transfers()
        return self._is_more_ready()

    def _begin_transfers(self) -> None:
        self._patience = Patience(self._end)
        self._transfers = Transfers(self._files, self._caller, self._patience, self._moved)
        self._results = self._transfers.run(self._jobs, self._jobs.next_size)

    def _end_transfers(self) -> None:
        transfers, self._transfers = self._transfers, None
        if transfers is not None:
            transfers.__exit__(None)
            if transfers.is_given_up:
                self._give_up()

    def _give_up(self) -> None:
        """Report what was not even begun."""
        self._is_given_up = True
        left: Counter[str] = Counter()
        for job in self._jobs:
            if isinstance(job, Downloading) and job.content not in self._fetching:
                left.update(entity for entity, _ in job.keys)
                left.update(job.other_counts)
        self._jobs.under_way.clear()
        self._report.skipped += [
            Skipped(
                entity, "", SkipReason.FILE_NOT_DOWNLOADED, f"files for which no time was left: {count}", count=count
            )
            for entity, count in left.items()
        ]

    def _is_session_due(self) -> bool:
        now = time.monotonic()
        if self._is_last or now < self._look_at:
            return False
        self._look_at = now + SESSION_SECONDS
        if self._end is not None and self._look_at > self._end:
            return False  # it would hardly come to its end
        has_moved, self._has_moved = self._has_moved, False
        if has_moved and now >= self._refresh_at:
            return True
        if self._is_more_ready():
            return True
        with self._storage.environment.read() as transaction:
            return self._seqs is None and self._storage.last_seq(transaction) > self._until

    def _is_more_ready(self) -> bool:
        return not self._is_last and len(self._ready) + len(self._lost) > self._ready_count

    def _wanted(self, keys: Iterable[ObjectKey] | None) -> Iterator[Downloading]:
        """Yield what is to be downloaded, the smallest first; of some objects, or, None, of all."""
        wanted: Iterator[Missing]
        if keys is None:
            wanted = heapq.merge(*map(self._wanted_of, self._files.missing_entities()))
        else:
            missing = sorted(one for key in keys for one in self._files.missing_of(key))
            wanted = (one for one in missing if self._wishes.of(one.key[0]).wants(one.size))
        for (size, sha256), same in groupby(wanted, key=lambda one: one[:2]):
            if (content := Needed(sha256, size)) in self._tried or content in self._fetching:
                continue
            asked = [one.key for one in islice(same, ASKED_OBJECTS_MAX)]
            job = Downloading(content, asked, Counter(one.key[0] for one in same))
            if sha256 in self._put_off:
                self._pass_over(job, f"{self._put_off[sha256]}; it is asked for again later")
            else:
                yield job

    def _wanted_of(self, entity: str) -> Iterator[Missing]:
        wish = self._wishes.of(entity)
        if wish.mode is FileMode.EAGER:  # else there may be many to look at for nothing
            yield from takewhile(lambda one: wish.wants(one.size), self._files.missing(entity))

    def _count(self, result: Result, arrived: list[Needed], failed: dict[bytes, Failed]) -> None:
        """Take in how a transfer ended; what is to be noted of a download is put to the rest."""
        if isinstance(result.job, Uploading):
            self._count_up(result)
            return
        content = result.job.content
        if content in self._fetching:
            self._count_fetched(content, result.error)
            if result.error is not None:
                return
        if result.error is None:
            self._report.files_downloaded += not result.was_there
            arrived.append(content)
            return
        if result.failed is not None:
            failed[content.sha256] = result.failed
        self._pass_over(result.job, str(result.error))

    def _pass_over(self, job: Downloading, why: str) -> None:
        """Report what is not downloaded, and do not try it any more."""
        self._tried.add(job.content)
        self._report.skipped += [Skipped(*key, SkipReason.FILE_NOT_DOWNLOADED, why) for key in job.keys]
        self._report.skipped += [
            Skipped(entity, "", SkipReason.FILE_NOT_DOWNLOADED, why, count=count)
            for entity, count in job.other_counts.items()
        ]

    def _count_fetched(self, content: Needed, error: Exception | None) -> None:
        """Take in how the download of a content ended that is to be uploaded."""
        if error is None:
            del self._fetching[content]
            self._jobs.add(self._waiting[content])
            self._total_bytes += content.size
        elif isinstance(error, FileRefused) and error.is_damaged and content not in self._damaged:
            # What came of it may have begun long ago. Now it comes from the start.
            self._damaged.add(content)
            self._jobs.add(self._fetching[content])
            self._total_bytes += content.size
        elif isinstance(error, FileRefused):
            del self._fetching[content]
            self._lose(content, f"it is not here any more, and the server does not give it: {error}")
        else:
            self._reasons[content] = f"it is not here any more, and could not be downloaded: {error}"

    def _count_up(self, result: Result) -> None:
        (content, *_), error, was_there = result
        if error is None:
            self._report.files_uploaded += not was_there
        elif isinstance(error, ContentLost):
            self._miss(content, str(error))
            return
        elif not (isinstance(error, FileRefused) and error.is_too_large):
            self._reasons[content] = str(error)
            self._waiting[content] = Uploading(content)
            return
        self._waiting.pop(content, None)
        self._ready.add(content)

    # --- at the end -----------------------------------------------------------

    def finish(self, why_not_sent: str = "") -> None:
        """
        Report which operations had to stay behind, and delete contents that nobody refers to any more.

        Args:
            why_not_sent: Why no session took those whose contents are on the server by now. Empty: one did.
        """
        self._report_held(why_not_sent)
        try:
            self._clean_up()
        except StorageError as error:
            # Housekeeping does not undo what was done.
            _log.warning("the contents of files cannot be cleaned up", detail=str(error))
            self._report.skipped.append(Skipped("", "", SkipReason.FILE_NOT_DOWNLOADED, str(error)))

    def _clean_up(self) -> None:
        if self._files.any_contents():
            self._files.check_place()
            now = self._storage.clock() / 1e6
            swept = float(self._storage.meta("files_swept") or 0)
            if not swept <= now <= swept + SWEEP_SECONDS:
                self._files.sweep()
                self._storage.set_meta(files_swept=str(now).encode())
        if self._files.is_idle():
            return
        for _ in self._files.look_again():
            pass
        self._files.collect()

    def _report_held(self, why_not_sent: str) -> None:
        # Of those that a session was to take, only what is still pending counts.
        behind = self._needed if why_not_sent else self._plan.held
        if not behind:
            return
        held = {seq: self._why_held(seq, why_not_sent) for seq in behind}
        excluded = Plans.decode(self._storage.meta("plans")).upload_excluded if self._seqs is None else ()
        until = self._plan.until or 0
        for unit, cause in sifted(self._storage, Sieve(excluded, held), until=until, seqs=self._seqs):
            if cause is Cause.FILE:
                self._report.skipped += [
                    Skipped(
                        *one.key,
                        SkipReason.FILE_NOT_UPLOADED,
                        held.get(one.seq, "an operation that comes before it waits for the content of a file"),
                        seq=one.seq,
                    )
                    for one in unit
                ]

    def _why_held(self, seq: int, why_not_sent: str) -> str:
        waiting = [one for one in self._needed[seq] if one in self._waiting]
        if not waiting:
            return f"the content of its file came to the server too late for it: {why_not_sent}"
        reason = next((self._reasons[one] for one in waiting if one in self._reasons), "there was no time left")
        return f"the content of its file is not on the server: {reason}"

    # --- transfers ------------------------------------------------------------

    def _expect(self, left_bytes: int) -> None:
        """Tell that so many bytes are to come, at the least. What is done stays so, and there was never less to do."""
        if left_bytes:
            self._total_bytes = max(self._total_bytes, self._done_bytes + left_bytes)
            self._on_progress(Progress(Phase.FILES, self._done_bytes, self._total_bytes))

    def _take_out(self, result: Result) -> None:
        """Take a transfer from what is under way. Of one that is refused nothing is to come any more."""
        there_bytes = self._jobs.under_way.pop(result.job.content, 0)
        if result.error is not None and not isinstance(result.error, Transient):
            self._done_bytes += result.job.content.size - there_bytes
            self._on_progress(Progress(Phase.FILES, self._done_bytes, self._total_bytes))

    def _moved(self, job: Job, more_bytes: int, sent_bytes: int) -> None:
        if isinstance(job, Uploading):
            self._report.file_bytes_sent += sent_bytes
        else:
            self._report.file_bytes_received += sent_bytes
        if more_bytes >= 0:
            self._done_bytes += more_bytes
        else:
            self._total_bytes -= more_bytes  # they go once more
        self._has_moved = True
        self._heard_at = time.monotonic()
        if job.content in self._jobs.under_way:
            self._jobs.under_way[job.content] += more_bytes
        self._on_progress(Progress(Phase.FILES, self._done_bytes, self._total_bytes))


def _tell_nobody(*_progress: object) -> None:
    pass


class _Jobs:
    """
    What is to be transferred next: the smallest content that is not under way.

    Attributes:
        under_way: The contents that were given out and have not ended, with how many bytes of each are there.
    """

    def __init__(self) -> None:
        self.under_way: dict[Needed, int] = {}
        self._left: Iterator[Job] = iter(())
        # The first of them, once it was looked at.
        self._next: Job | None = None

    @property
    def left_bytes(self) -> int:
        """How many bytes of what is under way are not there yet."""
        return sum(content.size - there for content, there in self.under_way.items())

    def fill(self, uploads: Iterable[Job], downloads: Iterable[Job]) -> None:
        """Replace what is left. Both are given with the smallest first; some may be under way."""
        self._left = heapq.merge(uploads, downloads, key=_size)
        self._next = None

    def next_size(self) -> int | None:
        """Return how many bytes the next one has, or None if there is none."""
        while self._next is None or self._next.content in self.under_way:
            self._next = next(self._left, None)
            if self._next is None:
                return None
        return _size(self._next)

    def add(self, job: Job) -> None:
        """Put one more to what is left."""
        self._left = heapq.merge((job,), self._left, key=_size)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Job:
        if self.next_size() is None or self._next is None:
            raise StopIteration
        job, self._next = self._next, None
        self.under_way[job.content] = 0
        return job


def _size(job: Job) -> int:
    return job.content.size
