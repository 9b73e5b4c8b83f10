"""
The file exchange: what a synchronization does with contents, around its sessions.

Before a session the server is asked which contents it lacks that operations refer to. The
small ones go up at once; operations that need another one stay behind. After the session
the others go up, and what objects lack comes down. What stayed behind then goes in another
session. So no object and no small file waits for a large one, and no operation ever refers
to a content that the server does not have.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Final

from tidelog._errors import SynchronizationError, Unauthenticated
from tidelog._limits import FILES_STAT_MAX
from tidelog._logging import get_logger
from tidelog_client._call_errors import Transient
from tidelog_client._file_calls import FileRefused, Presence
from tidelog_client._file_wishes import FileMode
from tidelog_client._files import Missing, Needed
from tidelog_client._plans import Plans
from tidelog_client._report import Phase, Progress, Skipped, SkipReason
from tidelog_client._set_aside import SET_ASIDE_FOLDER
from tidelog_client._transfer import ContentLost, Downloading, Patience, Result, Transfers, Uploading
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
# How many results of downloads are written down together.
NOTED_AT_ONCE: Final = 500
SWEEP_SECONDS: Final = 24 * 3600.0

_log = get_logger("tidelog.files")


class FileExchange:
    """
    The contents of one synchronization.

    In memory is what the pending operations with files refer to, not what is downloaded.

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
        self._ready: set[bytes] = set()
        self._lost: set[bytes] = set()
        self._waiting: dict[bytes, Uploading] = {}
        # Why they are not there, of those that were tried.
        self._reasons: dict[bytes, str] = {}
        # What could not be downloaded, and is not tried twice.
        self._tried: set[bytes] = set()
        self._plan = NO_FILES
        self._seqs: Sequence[int] | None = None
        self._needed: dict[int, list[Needed]] = {}
        self._done_bytes = 0
        self._total_bytes = 0

    # --- before a session -----------------------------------------------------

    def prepare(self, seqs: Sequence[int] | None) -> FilePlan:
        """
        Ask which contents the server lacks, upload the small ones, and return what the session has to know.

        Args:
            seqs: The operations to be uploaded. None: all that are pending.

        Raises:
            Transient: The server could not be asked.
            Unauthenticated: It does not accept the token.
        """
        with self._storage.environment.read() as transaction:
            if not self._files.any_uploads(transaction):
                self._plan, self._needed = NO_FILES, {}
                return self._plan
            until = self._storage.last_seq(transaction)
        self._seqs = seqs
        self._needed = self._needed_contents(until, seqs)
        unknown = self._unknown()
        small = self._small_uploads()
        if unknown or small:
            self._begin_progress(0)
            patience = Patience(self._end)
            with self._transfers(patience) as transfers:
                self._ask(transfers, unknown)
                patience.limit(SMALL_UPLOADS_SECONDS)
                small = self._small_uploads()
                self._total_bytes = sum(one.content.size for one in small)
                self._count_up(transfers.run(small), is_last_try=False)
        self._plan = self._planned(until)
        return self._plan

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
        return [one for one in contents if not any(one.sha256 in where for where in known)]

    def _ask(self, transfers: Transfers, contents: Sequence[Needed]) -> None:
        """Find out how contents stand. Those of which the server says nothing wait, with the reason."""
        for first in range(0, len(contents), FILES_STAT_MAX):
            asked = contents[first : first + FILES_STAT_MAX]
            try:
                statuses = transfers.ask(asked)
            except Unauthenticated:
                raise
            except SynchronizationError as error:
                for one in asked:
                    self._waiting[one.sha256] = Uploading(one)
                    self._reasons[one.sha256] = str(error)
                continue
            for one, status in zip(asked, statuses, strict=True):
                if status.presence is not Presence.MISSING:
                    self._ready.add(one.sha256)
                elif self._files.has(*one):
                    self._waiting[one.sha256] = Uploading(one, status.received_bytes)
                else:
                    self._lose(one.sha256, "it is not here any more")

    def _lose(self, sha256: bytes, why: str) -> None:
        _log.warning("the content of a file cannot be uploaded", sha256=sha256.hex(), detail=why)
        self._files.note_gone(sha256, self._storage.environment.path / SET_ASIDE_FOLDER)
        self._lost.add(sha256)

    def _small_uploads(self) -> list[Uploading]:
        """Return what is uploaded before the session: the smallest contents, as far as there is room."""
        room_bytes = SMALL_UPLOADS_BYTES
        small = []
        for one in self._uploads():
            room_bytes -= one.content.size
            if room_bytes < 0:
                break
            small.append(one)
        return small

    def _uploads(self) -> list[Uploading]:
        """Return what is to be uploaded and was not tried in vain, the smallest first."""
        untried = (one for sha256, one in self._waiting.items() if sha256 not in self._reasons)
        return sorted(untried, key=lambda one: one.content.size)

    def _planned(self, until: int) -> FilePlan:
        held = {seq for seq, needed in self._needed.items() if any(one.sha256 in self._waiting for one in needed)}
        lost = {
            seq: found
            for seq, needed in self._needed.items()
            if (found := [one.sha256 for one in needed if one.sha256 in self._lost])
        }
        return FilePlan(until, held, lost)

    # --- after a session ------------------------------------------------------

    def exchange(self, selected: Collection[ObjectKey] | None, *, is_all: bool) -> bool:
        """
        Upload what operations wait for, and download what objects lack; tell whether operations need not wait longer.

        Args:
            selected: The objects that were selected. None: none were.
            is_all: Whether the contents of all objects are downloaded; else of those that the session brought.

        Raises:
            SynchronizationError: There is no token to be had.
        """
        if self._files.is_idle():
            return False
        lacking = dict.fromkeys(selected or ())
        for key in self._files.look_again():
            if not is_all:
                lacking[key] = None
        uploads = self._uploads()
        if not uploads and not self._wanted_any(None if is_all else lacking):
            return False
        jobs: Iterator[Job] = heapq.merge(
            uploads, self._wanted(None if is_all else lacking), key=lambda job: job.content.size
        )
        self._begin_progress(
            sum(one.content.size for one in uploads)
            + sum(one.content.size for one in self._wanted(None if is_all else lacking))
        )
        ready_count = len(self._ready) + len(self._lost)
        with self._transfers(Patience(self._end)) as transfers:
            self._count(transfers.run(jobs))
        return len(self._ready) + len(self._lost) > ready_count

    def _wanted_any(self, keys: Iterable[ObjectKey] | None) -> bool:
        return next(self._wanted(keys), None) is not None

    def _wanted(self, keys: Iterable[ObjectKey] | None) -> Iterator[Downloading]:
        """Yield what is to be downloaded, the smallest first; of some objects, or, None, of all."""
        wanted: Iterator[Missing]
        if keys is None:
            wanted = heapq.merge(*map(self._wanted_of, self._files.missing_entities()))
        else:
            missing = sorted(one for key in keys for one in self._files.missing_of(key))
            wanted = (one for one in missing if self._wishes.of(one.key[0]).wants(one.size))
        for (size, sha256), same in groupby(wanted, key=lambda one: one[:2]):
            keys_of_it = [one.key for one in same]
            if sha256 not in self._tried:
                yield Downloading(Needed(sha256, size), keys_of_it)

    def _wanted_of(self, entity: str) -> Iterator[Missing]:
        wish = self._wishes.of(entity)
        if wish.mode is FileMode.EAGER:  # else there may be many to look at for nothing
            yield from takewhile(lambda one: wish.wants(one.size), self._files.missing(entity))

    def _count(self, results: Iterable[Result]) -> None:
        """Take in how transfers ended."""
        arrived: list[Missing] = []
        failed: dict[bytes, str] = {}
        try:
            for result in results:
                if isinstance(result.job, Uploading):
                    self._count_up([result], is_last_try=True)
                    continue
                (sha256, size), keys = result.job
                if result.error is None:
                    self._report.files_downloaded += not result.was_there
                    arrived += [Missing(size, sha256, key) for key in keys]
                else:
                    self._tried.add(sha256)
                    if not isinstance(result.error, Transient):
                        failed[sha256] = str(result.error)
                    self._report.skipped += [
                        Skipped(*key, SkipReason.FILE_NOT_DOWNLOADED, str(result.error)) for key in keys
                    ]
                if len(arrived) + len(failed) >= NOTED_AT_ONCE:
                    self._files.note_arrived(arrived, failed)
                    arrived, failed = [], {}
        finally:
            self._files.note_arrived(arrived, failed)

    def _count_up(self, results: Iterable[Result], *, is_last_try: bool) -> None:
        for job, error, was_there in results:
            sha256 = job.content.sha256
            if error is None:
                self._report.files_uploaded += not was_there
            elif isinstance(error, ContentLost):
                self._lose(sha256, str(error))
            elif not (isinstance(error, FileRefused) and error.is_too_large):
                if is_last_try or not isinstance(error, Transient):
                    self._reasons[sha256] = str(error)
                self._waiting[sha256] = Uploading(job.content)
                continue
            self._waiting.pop(sha256, None)
            if sha256 not in self._lost:
                self._ready.add(sha256)

    # --- at the end -----------------------------------------------------------

    def finish(self) -> None:
        """Report which operations had to stay behind, and delete contents that nobody refers to any more."""
        if self._files.any_contents():
            now = time.time()
            swept = float(self._storage.meta("files_swept") or 0)
            if not swept <= now <= swept + SWEEP_SECONDS:
                self._files.sweep()
                self._storage.set_meta(files_swept=str(now).encode())
        if self._files.is_idle():
            return
        self._report_held()
        for _ in self._files.look_again():
            pass
        self._files.collect()

    def _report_held(self) -> None:
        if not self._plan.held:
            return
        held = {seq: self._why_held(seq) for seq in self._plan.held}
        excluded = Plans.decode(self._storage.meta("plans")).upload_excluded if self._seqs is None else ()
        until = self._plan.until or 0
        for unit, cause in sifted(self._storage, Sieve(excluded, held), until=until, seqs=self._seqs):
            if cause is Cause.FILE:
                self._report.skipped += [
                    Skipped(
                        *one.key,
                        SkipReason.FILE_NOT_UPLOADED,
                        f"the content of its file is not on the server: {held[one.seq]}"
                        if one.seq in held
                        else "an operation that comes before it waits for the content of a file",
                        seq=one.seq,
                    )
                    for one in unit
                ]

    def _why_held(self, seq: int) -> str:
        waiting = (one.sha256 for one in self._needed[seq] if one.sha256 in self._waiting)
        return next((self._reasons[one] for one in waiting if one in self._reasons), "there was no time left")

    # --- transfers ------------------------------------------------------------

    def _transfers(self, patience: Patience) -> Transfers:
        return Transfers(self._files, self._caller, patience, self._moved)

    def _begin_progress(self, total_bytes: int) -> None:
        self._done_bytes, self._total_bytes = 0, total_bytes
        self._on_progress(Progress(Phase.FILES, 0, total_bytes))

    def _moved(self, job: Job, more_bytes: int, sent_bytes: int) -> None:
        if isinstance(job, Uploading):
            self._report.file_bytes_sent += sent_bytes
        else:
            self._report.file_bytes_received += sent_bytes
        self._done_bytes += more_bytes
        self._on_progress(Progress(Phase.FILES, self._done_bytes, self._total_bytes))
