"""
The synchronizer: attempts until one completes, the deadline passes, or the server refuses.

Only one synchronization of a replica runs at a time, in whatever thread or process:
a lock file of its own says so, which a crash gives back.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from filelock import FileLock, Timeout

from tidelog._downloads import Download
from tidelog._errors import (
    NotConfigured,
    ProtocolViolated,
    ReplicaForked,
    ReplicaRetired,
    ServerUnavailable,
    SynchronizationInProgress,
    TidelogError,
    Unauthenticated,
)
from tidelog._limits import BATCH_BYTES_MAX
from tidelog._logging import get_logger
from tidelog_client._call_errors import Transient
from tidelog_client._connection import Connection, Stream
from tidelog_client._file_exchange import FileExchange
from tidelog_client._file_wishes import FileWishes
from tidelog_client._files import Needed
from tidelog_client._publication import PageDamaged
from tidelog_client._report import OnProgress, Report, ignore
from tidelog_client._synchronization import Consent, Mode, PlansChanged, Synchronization, TimelineChanged
from tidelog_client._transfer import CALL_SECONDS_MAX, Downloading, Patience, Transfers
from tidelog_client._view import StateLost

if TYPE_CHECKING:
    from tidelog._file_reference import FileReference
    from tidelog._keys import ObjectKey
    from tidelog_client._selection import Selection
    from tidelog_client._storage import Storage

BACKOFF_SECONDS_FIRST: Final = 0.1
BACKOFF_SECONDS_MAX: Final = 5.0

# Without a deadline of the caller's: how long to go on trying since the first attempt in vain. A path may have died
# long ago without a word: finding that out is no trying yet.
SILENCE_SECONDS_MAX: Final = 30.0

# The same for a server that answers, and does nothing but tell when to come again.
BUSY_SECONDS_MAX: Final = 600.0

# After an attempt of which not one batch was answered, a link may be too slow for batches of that size: the next one's
# are so many times smaller, down to this. Each synchronization that completes lets them become larger again.
BATCH_SHRINKAGE: Final = 4
BATCH_BYTES_LEAST: Final = 4 * 1024
BATCH_GROWTH: Final = 2

# How often a server may begin a new timeline while one synchronization is under way.
NEW_TIMELINES_MAX: Final = 3

_NO_CONSENT: Final = Consent()
_EVERY_FILE: Final = FileWishes({})
_LOCK_FILE: Final = "synchronize.lock"
_log = get_logger("tidelog.synchronizer")


class Synchronizer:
    """Synchronizes one replica with one server, if it has one."""

    def __init__(
        self,
        storage: Storage,
        connection: Connection | None,
        schema_version: int,
        downloads: Mapping[str, Download],
        files: FileWishes = _EVERY_FILE,
    ) -> None:
        self._storage = storage
        self._schema_version = schema_version
        self._downloads = downloads
        self._files = files
        self._connection = connection
        self._batch_bytes = BATCH_BYTES_MAX

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()

    def go_on(self) -> None:
        """
        Bring into view what an interrupted synchronization had begun to; not if one runs, which does that itself.

        What cannot be done now, on a full disk say, is left to the next synchronization.
        """
        if not self._storage.publication.is_under_way():
            return
        lock = self._lock()
        try:
            _acquire(lock)
            self._storage.publication.finish()
        except SynchronizationInProgress:
            pass
        except (TidelogError, StateLost, OSError) as error:
            _log.warning("a download is not all in view yet", detail=str(error))
        finally:
            _release(lock)

    def run(
        self,
        mode: Mode,
        report: Report,
        *,
        timeout: float | None,
        on_progress: OnProgress | None,
        selection: Callable[[], Selection] | None = None,
        consent: Consent = _NO_CONSENT,
    ) -> None:
        """
        Synchronize, and tell *report* what was done.

        Args:
            mode: What to synchronize.
            report: Filled in as the work goes on, so that it tells the truth after an error too.
            timeout: Seconds until the deadline. None: no deadline while the server
                answers, 30 seconds of trying when it does not, and ten minutes when it
                is busy and tells when to come again.
            on_progress: Called with each step's `Progress`.
            selection: Works out the selection, under the lock. Mode selected only.
            consent: What the caller agrees to.

        Raises:
            SynchronizationInProgress: Another synchronization of this replica runs.
            SynchronizationError: See the subclasses.
        """
        connection = self._connection
        if connection is None:
            raise NotConfigured("the replica was opened without a server: pass server='host:port'")
        lock = self._lock()
        deadline = _Deadline(timeout)
        progress = on_progress or ignore
        files = FileExchange(
            self._storage, connection, wishes=self._files, report=report, on_progress=progress, end=deadline.end
        )
        try:
            _acquire(lock)
            with files:
                backoff = BACKOFF_SECONDS_FIRST
                token_refused = False
                has_new_plans = has_lost_pages = False
                timelines_left = NEW_TIMELINES_MAX
                completed: _Completed | None = None
                while True:
                    report.begin_attempt()
                    try:
                        report.count_published(self._storage.publication.finish())
                        # A new timeline is adopted with all of its data, whatever was asked for. And where a part of
                        # what is prepared was lost, nothing shows before all is there.
                        needs_all = self._storage.lineage.is_rebasing or self._storage.view.is_veiled()
                        adopts = needs_all and mode is not Mode.ALL
                        selected = selection() if selection is not None and not adopts else None
                        attempt = Synchronization(
                            self._storage,
                            Mode.ALL if adopts else mode,
                            report,
                            progress,
                            selection=selected,
                            schema_version=self._schema_version,
                            downloads=self._downloads,
                            consent=consent,
                            files=files.prepare(None if selected is None else selected.seqs),
                            batch_bytes=self._batch_bytes,
                        )
                        self._attempt(connection, attempt, report, deadline)
                    except StateLost as error:
                        # Not seen outside; the next attempt asks for all states.
                        if self._storage.meta("state_lost"):
                            raise ProtocolViolated(
                                "the server confirmed a state although it was asked for all"
                            ) from error
                        _log.warning(
                            "a confirmed state is missing: reconciling", replica_id=self._storage.lineage.replica_id
                        )
                        self._storage.publication.start_over()
                    except PageDamaged as error:
                        if has_lost_pages:
                            raise
                        has_lost_pages = True
                        _log.warning("what was downloaded is lost: reconciling", detail=str(error))
                        self._storage.publication.start_over()
                    except Unauthenticated:
                        # A provider's token may have expired on its way; two in a row did not.
                        if token_refused or not connection.may_get_another_token:
                            raise
                        token_refused = True
                    except (ReplicaForked, ReplicaRetired) as error:
                        if report.former_replica_id:
                            raise
                        report.former_replica_id = self._storage.fork()
                        _log.warning(
                            "the directory is a copy, or was away for too long: it goes on under another replica id",
                            former_replica_id=report.former_replica_id,
                            replica_id=self._storage.lineage.replica_id,
                            detail=str(error),
                        )
                    except TimelineChanged as error:
                        timelines_left -= 1
                        if not timelines_left:
                            raise ServerUnavailable(f"{error} again and again: synchronize later") from error
                    except PlansChanged as error:
                        if has_new_plans:
                            raise ServerUnavailable(f"{error} again and again: synchronize later") from error
                        has_new_plans = True
                    except Transient as error:
                        if deadline.heard:
                            backoff = BACKOFF_SECONDS_FIRST
                            token_refused = False
                        retry_after = error.retry_after_seconds
                        pause = max(backoff * random.uniform(0.5, 1.0), retry_after or 0.0)
                        if retry_after is None:
                            deadline.note_broken()
                        else:
                            deadline.note_busy(pause)
                        if pause > deadline.remaining() and completed is not None:
                            # What was asked for was done. This one was for what came while contents travelled.
                            report.give_up_attempt()
                            files.exchange(completed.keys, is_all=mode is Mode.ALL, is_last=True)
                            files.finish(str(error))
                            return
                        if pause > deadline.remaining():
                            raise ServerUnavailable(
                                f"the server could not be reached, or broke off, {report.attempts} times: {error}; "
                                "nothing is lost, synchronize again when it is back"
                            ) from error
                        deadline.heard = False
                        time.sleep(pause)
                        if retry_after is None:  # else the server knows better
                            backoff = min(backoff * 2, BACKOFF_SECONDS_MAX)
                    else:
                        report.end_session()
                        if adopts:
                            # What is offered again may wait for its contents.
                            files.exchange(None, is_all=True)
                            continue
                        completed = _Completed(None if selected is None else selected.keys)
                        is_more = files.exchange(completed.keys, is_all=mode is Mode.ALL)
                        if not is_more or deadline.remaining() <= 0:
                            files.finish("there was no time left" if is_more else "")
                            return
        finally:
            _release(lock)

    def fetch(self, reference: FileReference, key: ObjectKey, *, timeout: float | None) -> str | None:
        """
        Download the content of a file of an object; return why that is not possible, or None once it is here.

        Raises:
            TokenUnavailable: The token provider failed.
        """
        if self._connection is None:
            return "the replica was opened without a server"
        end = None if timeout is None else time.monotonic() + timeout
        content = Needed(reference.sha256, reference.size)
        with Transfers(self._storage.files, self._connection, Patience(end), ignore) as transfers:
            result = next(filter(None, transfers.run(iter([Downloading(content, [key])]))), None)
        if result is None:
            return "there was no time left"
        if result.error is None:
            self._storage.files.note_arrived([content], {})
            return None
        if result.failed is not None:
            self._storage.files.note_arrived([], {content.sha256: result.failed})
        return str(result.error)

    def _lock(self) -> FileLock:
        # One of its own for each call: two of one process exclude each other too.
        return FileLock(Path(self._storage.environment.path) / _LOCK_FILE, timeout=0, is_singleton=False)

    def _attempt(self, connection: Connection, attempt: Synchronization, report: Report, deadline: _Deadline) -> None:
        metadata = connection.authorization()
        stream = connection.synchronize(metadata, deadline.call_timeout())
        started = time.monotonic()
        try:
            self._send(stream, attempt.begin(), report)
            upload_over = started
            while not attempt.done:
                data = stream.receive()
                if data is None:
                    raise Transient("the server ended the session before it was complete")
                deadline.note_heard()
                report.received_bytes += len(data)
                was_uploaded = attempt.uploaded
                self._send(stream, attempt.receive(data), report)
                if attempt.uploaded and not was_uploaded:
                    upload_over = time.monotonic()
                    report.upload_seconds += upload_over - started
            report.download_seconds += time.monotonic() - upload_over
            self._batch_bytes = min(self._batch_bytes * BATCH_GROWTH, BATCH_BYTES_MAX)
        except Transient:
            if attempt.is_stuck:
                self._batch_bytes = max(self._batch_bytes // BATCH_SHRINKAGE, BATCH_BYTES_LEAST)
            attempt.keep()
            raise
        finally:
            stream.cancel()

    def _send(self, stream: Stream, messages: list[bytes | None], report: Report) -> None:
        report.sent_bytes += sum(len(message) for message in messages if message is not None)
        stream.send(messages)


class _Completed(NamedTuple):
    """A session that did what was asked for: of the selected objects, if there was a selection."""

    keys: Collection[ObjectKey] | None


class _Deadline:
    """
    The caller's deadline, or, without one, patience with a silent server.

    Attributes:
        end: The caller's deadline, by the monotonic clock. None: there is none.
        heard: Whether the server answered since that was last set back.
    """

    def __init__(self, timeout: float | None) -> None:
        self.end = None if timeout is None else time.monotonic() + timeout
        self._broken_since: float | None = None
        self._busy_since: float | None = None
        self.heard = False

    def note_heard(self) -> None:
        """Note that the server answered."""
        self._broken_since = None
        self._busy_since = None
        self.heard = True

    def note_broken(self) -> None:
        """Note that an attempt was in vain."""
        if self._broken_since is None:
            self._broken_since = time.monotonic()

    def note_busy(self, pause: float) -> None:
        """Note that the server is there, and wants nothing to be tried for so many seconds."""
        now = time.monotonic()
        self._broken_since = now + pause
        if self._busy_since is None:
            self._busy_since = now

    def remaining(self) -> float:
        """Return the seconds left to try in."""
        now = time.monotonic()
        if self.end is not None:
            return self.end - now
        until = (now if self._broken_since is None else self._broken_since) + SILENCE_SECONDS_MAX
        if self._busy_since is not None:
            until = min(until, self._busy_since + BUSY_SECONDS_MAX)
        return until - now

    def call_timeout(self) -> float | None:
        """Return the seconds that a call may take, None if it may take as long as it likes."""
        return None if self.end is None else min(max(0.0, self.end - time.monotonic()), CALL_SECONDS_MAX)


def _acquire(lock: FileLock) -> None:
    try:
        lock.acquire()
    except Timeout:
        raise SynchronizationInProgress from None


def _release(lock: FileLock) -> None:
    try:
        lock.release()
    finally:
        lock.release()  # does nothing, unless an interrupt came in the way of the first
