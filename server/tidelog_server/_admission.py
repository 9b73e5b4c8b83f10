"""
Admission: who is let in, and when those who are not should come again.

A server that takes everybody serves nobody: each one waits behind all others, gives up
and comes again, and what was done for him is done once more. So there are so many
places; whoever finds none is sent away at the door, before anything was read or
checked, and told when to come again. One after the other gets a later moment, at the
pace at which places become free: those who come together after an outage come back in
a row, however many they are. Chance spreads them, since clocks do not.

Nobody holds a place for another one: who comes at the right moment gets it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Final

from tidelog._errors import InvalidValue
from tidelog._limits import FILE_BYTES_MAX_DEFAULT
from tidelog._logging import get_logger
from tidelog_server._errors import ServerBusy
from tidelog_server._principal import Principal

RETRY_AFTER_SECONDS_MIN: Final = 0.1
RETRY_AFTER_SECONDS_MAX: Final = 30.0
# What is told is between these parts of what was worked out.
JITTER: Final = (0.75, 1.25)

# How long a place is taken, before anybody has left one; and how much each one who leaves changes that.
SECONDS_A_PLACE_FIRST: Final = 0.2
LEARNING_RATE: Final = 0.2

# Calls that do not synchronize: online reads, and work on failures.
CALLS_MAX: Final = 200

# What a user may have uploaded that nothing refers to yet: all photos of a device, say, and not a whole disk.
FILE_ROOM_DEFAULT: Final = 16 * 1024**3

# Tenants and users that are remembered although nobody of them may be there.
LINES_KEPT_MIN: Final = 1_000

LOG_SECONDS: Final = 10.0

_log = get_logger("tidelog.admission")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """
    How many a server serves at once. Whoever comes above that is told when to come again.

    Attributes:
        sessions: Sessions that are open at once. Each has a connection, so the system has to
            allow the process more open files than that.
        sessions_per_tenant: The same, of one tenant. None: as many as of all.
        sessions_per_user: The same, of one user. None: as many as of his tenant.
        uploads: Sessions that upload at once.
        idle_seconds: How long a session waits for a client that neither sends what is
            awaited nor reads what is sent. On the slowest connection it has to be enough for a
            small message, 16 KiB, or for the largest object or commit group, up to 2 MiB:
            the default is with 7 kB/s.
        file_transfers: Contents of files that are on their way at once, up or down; and, besides, questions
            how contents stand.
        file_transfers_per_user: The same, of one user. None: as many as of all.
        file_bytes: How large a file may be that is uploaded, in bytes.
        file_room_per_user: How much a user may have uploaded, or begun to, that no operation of his refers to
            yet, in bytes. One file alone always fits; more than this in one commit group never goes. None:
            whatever it is.

    Raises:
        InvalidValue: One of them is not above zero.
    """

    sessions: int = 1_000
    sessions_per_tenant: int | None = None
    sessions_per_user: int | None = None
    uploads: int = 200
    idle_seconds: float = 300.0
    file_transfers: int = 200
    file_transfers_per_user: int | None = None
    file_bytes: int = FILE_BYTES_MAX_DEFAULT
    file_room_per_user: int | None = FILE_ROOM_DEFAULT

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise InvalidValue(f"the limit {field.name!r} is above zero, got {value!r}")


class Admission:
    """
    The door. Used by one thread.

    Args:
        limits: How many are let in.
        clock: Returns seconds that only grow.
        dice: Spreads those who are sent away.
    """

    def __init__(
        self,
        limits: ServerLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
        dice: random.Random | None = None,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._dice = dice or random.Random()
        self.sessions = self._line("sessions", limits.sessions)
        self.uploads = self._line("sessions that upload", limits.uploads)
        self.calls = self._line("calls", CALLS_MAX)
        self.file_transfers = self._line("transfers of files", limits.file_transfers)
        self.file_questions = self._line("questions about files", limits.file_transfers)
        self._of_some: dict[tuple[str, ...], Line] = {}
        self._crowd = LINES_KEPT_MIN
        self.put_off_count = 0
        self._told_count = 0
        self._told_at = -LOG_SECONDS

    def session(self) -> AbstractContextManager[None]:
        """Take a place for a session. Raises ServerBusy."""
        return self._place(self.sessions)

    def session_of(self, principal: Principal) -> AbstractContextManager[None]:
        """Take the place of a session among those of its tenant and user. Raises ServerBusy."""
        tenant, limits = principal.tenant, self._limits
        self._forget_strangers()  # before a line is chosen: one that was forgotten would count for nobody else
        lines = []
        if limits.sessions_per_tenant is not None:
            lines.append(self._own((tenant,), "sessions of a tenant", limits.sessions_per_tenant))
        if limits.sessions_per_user is not None:
            lines.append(self._own((tenant, principal.user_id), "sessions of a user", limits.sessions_per_user))
        return self._place(*lines)

    def upload(self) -> AbstractContextManager[None]:
        """Take a place for the upload of a session. Raises ServerBusy."""
        return self._place(self.uploads)

    def call(self) -> AbstractContextManager[None]:
        """Take a place for a call that does not synchronize. Raises ServerBusy."""
        return self._place(self.calls)

    def file_transfer(self) -> AbstractContextManager[None]:
        """Take a place for the transfer of a content. Raises ServerBusy."""
        return self._place(self.file_transfers)

    def file_transfer_of(self, principal: Principal) -> AbstractContextManager[None]:
        """Take the place of such a transfer among those of its user. Raises ServerBusy."""
        return self._files_of(principal, "transfers", self._limits.file_transfers_per_user)

    def file_question(self) -> AbstractContextManager[None]:
        """Take a place for a question how contents stand. Raises ServerBusy."""
        return self._place(self.file_questions)

    def file_question_of(self, principal: Principal) -> AbstractContextManager[None]:
        """Take the place of such a question among those of its user: half of all, at the most. Raises ServerBusy."""
        limits = self._limits
        limit = limits.file_transfers_per_user or max(limits.file_transfers // 2, 1)
        return self._files_of(principal, "questions", limit)

    def _files_of(self, principal: Principal, what: str, limit: int | None) -> AbstractContextManager[None]:
        self._forget_strangers()
        if limit is None:
            return self._place()
        return self._place(self._own((principal.tenant, principal.user_id, what), f"{what} of a user", limit))

    @contextmanager
    def _place(self, *lines: Line) -> Iterator[None]:
        with ExitStack() as taken:
            try:
                for line in lines:
                    taken.callback(line.leave, line.enter())
            except ServerBusy:
                self._note_put_off()
                raise
            yield

    def _note_put_off(self) -> None:
        """Count one who was sent away. The log hears of them now and then, not of each."""
        self.put_off_count += 1
        now = self._clock()
        if now - self._told_at >= LOG_SECONDS:
            _log.warning(
                "busy: some are told to come again later",
                put_off_count=self.put_off_count - self._told_count,
                session_count=self.sessions.taken,
                upload_count=self.uploads.taken,
            )
            self._told_at, self._told_count = now, self.put_off_count

    def _own(self, key: tuple[str, ...], what: str, places: int) -> Line:
        line = self._of_some.get(key)
        if line is None:
            line = self._of_some[key] = self._line(what, places)
        return line

    def _forget_strangers(self) -> None:
        """Tenants and users come and go: of many, those of whom nobody is here or expected are forgotten."""
        if len(self._of_some) >= self._crowd - 1:  # two may come
            self._of_some = {key: one for key, one in self._of_some.items() if not one.is_forgettable}
            self._crowd = max(2 * len(self._of_some), LINES_KEPT_MIN)

    def _line(self, what: str, places: int) -> Line:
        return Line(what, places, self._clock, self._dice)


class Line:
    """
    Places of one kind, and those who were sent away for want of one.

    Attributes:
        taken: How many are taken.
    """

    def __init__(self, what: str, places: int, clock: Callable[[], float], dice: random.Random) -> None:
        self.taken = 0
        self._what = what
        self._places = places
        self._clock = clock
        self._dice = dice
        self._mean_seconds = SECONDS_A_PLACE_FIRST
        # When the last of those who were sent away is to come again.
        self._last_return = clock()

    @property
    def is_forgettable(self) -> bool:
        """Tell whether nobody is here, and nobody expected."""
        return not self.taken and self._last_return <= self._clock()

    def enter(self) -> float:
        """Take a place; return when. Raises ServerBusy."""
        now = self._clock()
        if self.taken >= self._places:
            retry_after = self._put_off(now)
            raise ServerBusy(
                f"the server is busy, {self._places} {self._what} are all that it serves at once: "
                f"come again in {retry_after:.1f} seconds",
                retry_after_seconds=retry_after,
            )
        self.taken += 1
        return now

    def leave(self, since: float) -> None:
        """Give a place back."""
        self.taken -= 1
        self._mean_seconds += LEARNING_RATE * (self._clock() - since - self._mean_seconds)

    def _put_off(self, now: float) -> float:
        earliest = max(self._last_return, now + RETRY_AFTER_SECONDS_MIN)
        wait = min(earliest + self._mean_seconds / self._places - now, RETRY_AFTER_SECONDS_MAX)
        self._last_return = now + wait
        return wait * self._dice.uniform(*JITTER)
