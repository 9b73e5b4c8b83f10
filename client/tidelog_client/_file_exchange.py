"""
The file exchange: what a synchronization does with contents, around its sessions.

Before a session the server is asked which contents it lacks that operations refer to. The
small ones go up at once; operations that need another one stay behind, and where it does
not answer at once, it is asked again later. After the session the others go up, and what
objects lack comes down. Meanwhile there are further sessions, for
what stayed behind and need not any more, and for what was committed since. So no object and
no small file waits for a large one, and no operation ever refers to a content that the
server does not have.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, Self

from tidelog._errors import StorageError
from tidelog._logging import get_logger
from tidelog_client._awaited_contents import AwaitedContents
from tidelog_client._call_errors import Transient
from tidelog_client._lacking_contents import LackingContents
from tidelog_client._report import Phase, Progress, Skipped, SkipReason
from tidelog_client._transfer import Downloading, Patience, Result, Transfers, Uploading, job_size

if TYPE_CHECKING:
    from tidelog._keys import ObjectKey
    from tidelog_client._file_calls import Standings
    from tidelog_client._file_wishes import FileWishes
    from tidelog_client._files import Failed, Needed
    from tidelog_client._report import OnProgress, Report
    from tidelog_client._storage import Storage
    from tidelog_client._transfer import Caller, Job
    from tidelog_client._upload import FilePlan

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
        self._report = report
        self._on_progress = on_progress
        self._end = end
        self._awaited = AwaitedContents(storage)
        # Finds out what is to be transferred next; tells whether there is anything.
        self._fill: Callable[[], bool] = self._fill_small
        self._lacking = LackingContents(self._files, wishes, report)
        # The objects that the sessions brought, if only these matter.
        self._brought: dict[ObjectKey, None] = {}
        self._is_given_up = False
        self._done_bytes = 0
        self._total_bytes = 0
        # What is under way, from one session to the next.
        self._jobs = _Jobs()
        # What is uploaded before the session.
        self._small: set[Needed] = set()
        self._transfers: Transfers | None = None
        self._patience = Patience(end)
        self._results: Iterator[Result | None] = iter(())
        # How many contents the newest session knew of that no operation waits for.
        self._settled_count = 0
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
            SynchronizationError: There is no token to be had.
        """
        self._awaited.look(seqs)
        if self._awaited.is_any:
            self._get_ahead()
            self._settled_count = self._awaited.settled_count
        return self._awaited.plan()

    def _get_ahead(self) -> None:
        """Ask, and upload what is small, for a while; what is under way then goes on beside the session."""
        self._fill, self._small = self._fill_small, set()
        if not self._fill() and not self._awaited.unanswered:
            return
        if self._transfers is None:
            self._begin_transfers()
        else:
            self._transfers.ask(self._awaited.unanswered)
        self._patience.resume()
        self._heard_at = now = time.monotonic()
        end = now + min(SMALL_UPLOADS_SECONDS, self._patience.time_left() * SMALL_UPLOADS_SHARE)

        def is_enough() -> bool:
            now = time.monotonic()
            is_asking = self._transfers is not None and self._transfers.is_asking
            is_done = not is_asking and not any(one in self._awaited for one in self._small)
            return is_done or now >= end or now >= self._heard_at + SMALL_SILENCE_SECONDS

        self._take_in(is_enough)

    def _fill_small(self) -> bool:
        self._awaited.share_room(self._jobs.under_way.keys())
        small = self._small_uploads()
        self._small.update(one.content for one in small)
        self._jobs.fill(small, ())
        self._expect(sum(map(job_size, small)) + self._jobs.left_bytes)
        return bool(small)

    def _small_uploads(self) -> list[Uploading]:
        """Return what is uploaded before the session: the smallest contents, as far as there is room."""
        room_bytes = SMALL_UPLOADS_BYTES - sum(one.size for one in self._small & self._jobs.under_way.keys())
        small = []
        for one in self._awaited.uploads():
            if one.content in self._jobs.under_way:
                continue
            room_bytes -= one.content.size
            if room_bytes < 0:
                break
            small.append(one)
        return small

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
        if self._files.is_idle() and not self._jobs.under_way:
            return False
        if self._awaited.has_more():
            return True
        failed = () if is_all or selected is not None else self._files.failed_objects(FAILED_OBJECTS_MAX)
        for key in (*(selected or ()), *failed, *self._looked_again()):
            if not is_all:
                self._brought[key] = None
        if not self._jobs.under_way:
            self._make_room()
        self._look_at = time.monotonic() + SESSION_SECONDS
        self._refresh_at = time.monotonic() + REFRESH_SECONDS if is_all else math.inf
        self._patience.resume()
        self._fill = partial(self._fill_all, is_all=is_all)
        while self._begin():
            if self._take_in(self._is_session_due) or self._is_more_settled():
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

    def _begin(self) -> bool:
        """Find out what is to be transferred, and begin unless that was done; tell whether there is anything."""
        is_any = self._fill()
        if self._transfers is None:
            if self._is_given_up or not is_any:
                return False
            self._begin_transfers()
        return True

    def _fill_all(self, *, is_all: bool) -> bool:
        keys = None if is_all else self._brought | self._awaited.lacking

        def downloads() -> Iterator[Downloading]:
            return self._lacking.jobs(keys, self._awaited.fetching)

        self._awaited.share_room(self._jobs.under_way.keys())
        awaited = self._awaited.jobs()
        self._jobs.fill(awaited, downloads())
        left_bytes = sum(map(job_size, awaited)) + sum(map(job_size, downloads()))
        self._expect(left_bytes - sum(self._jobs.under_way.values()))
        return bool(awaited) or next(downloads(), None) is not None

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
        return self._is_more_settled() or self._awaited.is_log_longer()

    def _is_more_settled(self) -> bool:
        return not self._is_last and self._awaited.settled_count > self._settled_count

    # --- at the end -----------------------------------------------------------

    def finish(self, why_not_sent: str = "") -> None:
        """
        Report which operations had to stay behind, and delete contents that nobody refers to any more.

        Args:
            why_not_sent: Why no session took those whose contents are on the server by now. Empty: one did.
        """
        self._report.skipped += self._awaited.skipped(why_not_sent)
        try:
            self._clean_up()
            self._lacking.take_back()
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

    # --- transfers ------------------------------------------------------------

    def _begin_transfers(self) -> None:
        self._patience = Patience(self._end)
        self._transfers = Transfers(self._files, self._caller, self._patience, self._moved, self._note_answer)
        self._transfers.ask(self._awaited.unanswered)
        self._results = self._transfers.run(self._jobs, self._jobs.next_size)

    def _take_in(self, is_enough: Callable[[], bool]) -> bool:
        """
        Take in how transfers end, until all have, or it is enough; tell whether it is.

        *is_enough* is asked after each one, and now and then. What is under way then goes on.
        """
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
                if is_enough():
                    self._patience.suspend()
                    return True
        finally:
            self._files.note_arrived(arrived, failed)
        self._end_transfers()
        return False

    def _note_answer(self, asked: Sequence[Needed], answer: Standings | Exception) -> None:
        """Take in how contents stand; some may have their turn now."""
        self._awaited.note_answer(asked, answer)
        self._heard_at = time.monotonic()
        self._fill()

    def _take_out(self, result: Result) -> None:
        """Take a transfer from what is under way. Of one that is refused nothing is to come any more."""
        there_bytes = self._jobs.under_way.pop(result.job.content, 0)
        if result.error is not None and not isinstance(result.error, Transient):
            self._done_bytes += result.job.content.size - there_bytes
            self._on_progress(Progress(Phase.FILES, self._done_bytes, self._total_bytes))

    def _count(self, result: Result, arrived: list[Needed], failed: dict[bytes, Failed]) -> None:
        """Take in how a transfer ended; what is to be noted of a download is put to the rest."""
        job, error, was_there = result
        if isinstance(job, Uploading):
            self._report.files_uploaded += error is None and not was_there
            self._awaited.note_uploaded(result)
            return
        if job.content in self._awaited.fetching:
            following = self._awaited.note_fetched(result)
            if following is not None:
                self._jobs.add(following)
                self._total_bytes += job_size(following)
            if error is not None:
                return
        if error is None:
            self._report.files_downloaded += not was_there
            arrived.append(job.content)
            return
        if result.failed is not None:
            failed[job.content.sha256] = result.failed
        self._lacking.pass_over(job, str(error))

    def _end_transfers(self) -> None:
        transfers, self._transfers = self._transfers, None
        if transfers is not None:
            transfers.__exit__(None)
            if transfers.is_given_up:
                self._is_given_up = True
                downloads = (job for job in self._jobs if isinstance(job, Downloading))
                self._lacking.give_up(job for job in downloads if job.content not in self._awaited.fetching)
                self._jobs.under_way.clear()

    def _expect(self, left_bytes: int) -> None:
        """Tell that so many bytes are to come, at the least. What is done stays so, and there was never less to do."""
        if left_bytes:
            self._total_bytes = max(self._total_bytes, self._done_bytes + left_bytes)
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
        """Replace what is left. Both are given with the smallest first; some may be under way: these are not left."""
        given = set(self.under_way)  # by the time that they would have their turn, they may have ended
        self._left = (job for job in heapq.merge(uploads, downloads, key=job_size) if job.content not in given)
        self._next = None

    def next_size(self) -> int | None:
        """Return how many bytes the next one has, or None if there is none."""
        while self._next is None or self._next.content in self.under_way:
            self._next = next(self._left, None)
            if self._next is None:
                return None
        return job_size(self._next)

    def add(self, job: Job) -> None:
        """Put one more to what is left."""
        self._left = heapq.merge((job,), self._left, key=job_size)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Job:
        if self.next_size() is None or self._next is None:
            raise StopIteration
        job, self._next = self._next, None
        self.under_way[job.content] = 0
        return job
