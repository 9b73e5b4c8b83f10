"""
Awaited contents: what operations to be uploaded refer to, and how each of these contents stands.

An operation can go once the server has its contents, or nobody has them any more. One
that the server lacks goes up; if it is not here either it comes down before, by what the
replica shows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Final

from tidelog._errors import StorageError
from tidelog._limits import FILE_COST_BYTES
from tidelog._logging import get_logger
from tidelog_client._file_calls import FileRefused, Presence
from tidelog_client._file_room import Awaited, FileRoom
from tidelog_client._links import LinkReader
from tidelog_client._plans import Plans
from tidelog_client._report import Skipped, SkipReason
from tidelog_client._set_aside import SET_ASIDE_FOLDER
from tidelog_client._transfer import ASKED_OBJECTS_MAX, ContentLost, Downloading, Uploading, job_size
from tidelog_client._upload import NO_FILES, Cause, FilePlan, Sieve, sifted

if TYPE_CHECKING:
    from tidelog._keys import ObjectKey
    from tidelog_client._file_calls import Standings
    from tidelog_client._file_room import Unit
    from tidelog_client._files import Needed
    from tidelog_client._links import Links
    from tidelog_client._storage import Storage
    from tidelog_client._transfer import Job, Result

_OVERTAKEN: Final = "an operation that comes before it waits for the content of a file"
_REFERRED_TO: Final = "an operation that refers to the object waits for the content of a file"
_TOGETHER: Final = "an operation of its commit group waits for the content of a file"

_log = get_logger("tidelog.files")


class AwaitedContents:
    """
    What pending operations with files refer to, which is in memory.

    Attributes:
        is_any: Whether any operation to be uploaded refers to contents.
        unanswered: The contents of which the server has not said yet how they stand.
        fetching: The contents that are not here, and come down before they go up.
        lacking: Objects that turned out to lack a content.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._files = storage.files
        self.is_any = False
        # Where the log ended when it was looked at.
        self._until = 0
        # The operations to be uploaded, if they were chosen, and what is known of what they refer to.
        self._seqs: Sequence[int] | None = None
        self._needed: dict[int, list[Needed]] = {}
        self._plan = NO_FILES
        # Deletions that stay behind with what refers to their objects.
        self._deletions: set[int] = set()
        # Contents by what is known of them: nothing, as long as the server has not answered; whether operations that
        # refer to them can go as they are, whether nobody has them any more, and, of those to be uploaded, how far
        # the server has them.
        self.unanswered: dict[Needed, None] = {}
        self._ready: set[Needed] = set()
        self._lost: set[Needed] = set()
        # What only other operations refer to than those to be uploaded: whether it takes room is known.
        self._others: set[Needed] = set()
        self._waiting: dict[Needed, Uploading] = {}
        # Of these, what is not here; what came down once; and what came damaged.
        self.fetching: dict[Needed, Downloading] = {}
        self._fetched: set[Needed] = set()
        self._damaged: set[Needed] = set()
        # Why they are not there, of those that were tried.
        self._reasons: dict[Needed, str] = {}
        self.lacking: dict[ObjectKey, None] = {}
        self._room = FileRoom()
        # The operations that cannot go before another one does that waits.
        self._overtaken: set[int] = set()

    def __contains__(self, content: Needed) -> bool:
        """Tell whether operations wait for a content."""
        return content in self._waiting

    @property
    def settled_count(self) -> int:
        """Of how many contents it is known that no operation waits for them any more."""
        return len(self._ready) + len(self._lost)

    def look(self, seqs: Sequence[int] | None) -> None:
        """
        Find out what operations refer to.

        Args:
            seqs: The operations to be uploaded. None: all that are pending.
        """
        with self._storage.environment.read() as transaction:
            self._until = self._storage.last_seq(transaction)
            self.is_any = self._files.any_uploads(transaction)
        self._seqs = seqs
        pending = self._pending_contents() if self.is_any else {}
        self._note_settled(pending)
        self._needed = self._chosen(pending)
        known = (self._ready, self._lost, self._waiting)
        contents = self._contents()
        self.unanswered = {one: None for one in contents if not any(one in where for where in known)}
        # The room is that of all that is pending, whatever is chosen.
        others = (one for needed in pending.values() for one in needed if one not in contents)
        self.unanswered |= {one: None for one in others if one not in self._others}

    def _contents(self) -> dict[Needed, None]:
        """Return the contents that the operations to be uploaded refer to, in the order of the log."""
        return dict.fromkeys(one for needed in self._needed.values() for one in needed)

    def _note_settled(self, pending: Mapping[int, list[Needed]]) -> None:
        """Note that what operations referred to that are not pending any more takes no room."""
        for seq in self._needed.keys() - pending.keys():
            self._room.note_settled(self._needed[seq])

    def has_more(self) -> bool:
        """Tell whether the session found out that further operations refer to contents."""
        return bool(self._chosen(self._pending_contents()).keys() - self._needed.keys())

    def is_log_longer(self) -> bool:
        """Tell whether operations were committed since that are to be uploaded too."""
        with self._storage.environment.read() as transaction:
            return self._seqs is None and self._storage.last_seq(transaction) > self._until

    def plan(self) -> FilePlan:
        """Return what a session has to know: of what is known now, until it is asked again."""
        if not self.is_any:
            self._plan = NO_FILES
            return self._plan
        held = {seq for seq, needed in self._needed.items() if not all(map(self._is_settled, needed))}
        lost = {
            seq: found
            for seq, needed in self._needed.items()
            if (found := [one.sha256 for one in needed if one in self._lost])
        }
        self._deletions = self._deletions_behind(held)
        self._plan = FilePlan(self._until, held | self._deletions, lost)
        return self._plan

    def _deletions_behind(self, held: AbstractSet[int]) -> set[int]:
        """Return the deletions of objects to which something refers that stays behind: it was committed before."""
        links = LinkReader(self._storage)
        found: set[int] = set()
        if not held or not links.is_any:
            return found
        behind = set(held)
        sieve = Sieve(self._excluded(), behind)
        bound: set[ObjectKey] = set()
        for unit, cause in sifted(self._storage, sieve, until=self._until, seqs=self._seqs):
            stays = cause is Cause.FILE
            if cause is None and links.deletes_any(unit, bound):
                stays = True
                found.update(one.seq for one in unit)
                behind |= found
                sieve.holds_back(unit)
            if stays:
                bound |= links.bound(unit)
        return found

    def _is_settled(self, content: Needed) -> bool:
        return content in self._ready or content in self._lost

    def _pending_contents(self) -> dict[int, list[Needed]]:
        return dict(self._files.uploads(until=self._until))

    def _chosen(self, pending: Mapping[int, list[Needed]]) -> dict[int, list[Needed]]:
        """Return those of the operations that are to be uploaded."""
        chosen = None if self._seqs is None else set(self._seqs)
        excluded = self._excluded()
        return {
            seq: contents
            for seq, contents in pending.items()
            if (chosen is None or seq in chosen) and not (excluded and self._entity(seq) in excluded)
        }

    def _excluded(self) -> Collection[str]:
        return Plans.decode(self._storage.meta("plans")).upload_excluded if self._seqs is None else ()

    def _entity(self, seq: int) -> str:
        with self._storage.environment.read() as transaction:
            pending = self._storage.pending_at(transaction, seq)
        return "" if pending is None else pending.key[0]

    # --- how contents stand ---------------------------------------------------

    def note_answer(self, asked: Sequence[Needed], answer: Standings | Exception) -> None:
        """Take in how contents stand, or why the server refuses to say that."""
        contents = self._contents()
        for one in asked:
            self.unanswered.pop(one, None)
            if one not in contents:
                self._others.add(one)
            elif isinstance(answer, Exception):
                self._let_wait(one, str(answer))
        if isinstance(answer, Exception):
            return
        self._room.bytes_max = answer.room_bytes
        for one, status in zip(asked, answer.statuses, strict=True):
            if status.takes_room:
                self._room.note_taking(one)
            if one not in contents:
                continue
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
            self.lacking |= dict.fromkeys(self._files.look_again())
        except StorageError as error:
            self._let_wait(content, str(error))
            return
        holders = () if content in self._fetched else self._files.holders(content.sha256, ASKED_OBJECTS_MAX)
        if holders:
            self._fetched.add(content)
            self.fetching[content] = Downloading(content, holders)
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

    # --- transfers ------------------------------------------------------------

    def share_room(self, under_way: AbstractSet[Needed]) -> None:
        """
        Find out what is uploaded for the next session.

        Where there may not be room for everything nothing more goes before all is known: what takes some of it, how
        much there is, and, from the first session, the schema. Else parts of several commit groups would fill it.
        """
        waiting = self._waiting.keys()
        self._overtaken = set()
        if self._room.is_enough_for(waiting | self.unanswered.keys() | self._others):
            self._room.open(waiting)
            return
        if self.unanswered or not self._storage.lineage.epoch:
            return
        pending = self._pending_contents()
        self._note_settled(pending)
        links = LinkReader(self._storage)
        held: set[int] = set()
        sieve = Sieve(self._excluded(), held)
        # Objects whose creation stays behind: what refers to them would not be ready.
        uncreated: set[ObjectKey] = set()
        chosen = None if self._seqs is None else set(self._seqs)

        def hold_back(unit: Unit) -> None:
            held.update(one.seq for one in unit)
            sieve.holds_back(unit)

        def may_go() -> Iterator[tuple[Unit, Links]]:
            for unit, cause in sifted(self._storage, sieve, until=self._until):
                found = links.of(unit)
                if chosen is not None and unit[0].seq not in chosen:
                    pass
                elif cause is None and uncreated.isdisjoint(found.referenced):
                    yield unit, found
                    if unit[0].seq not in held:
                        continue
                else:
                    self._overtaken.update(one.seq for one in unit)
                    hold_back(unit)
                uncreated.update(found.created)

        self._room.share(
            may_go(),
            Awaited(
                lambda unit: {content for one in unit for content in self._needed.get(one.seq, ())},
                waiting,
                self._reasons.keys(),
                under_way,
                {content for needed in pending.values() for content in needed},
            ),
            hold_back,
        )

    def uploads(self) -> list[Uploading]:
        """Return what is to be uploaded, is here, and was not tried in vain, the smallest first."""
        return sorted(
            (one for content, one in self._waiting.items() if self._may_go(content) and content not in self.fetching),
            key=job_size,
        )

    def _may_go(self, content: Needed) -> bool:
        return content in self._room.going and content not in self._reasons

    def jobs(self) -> list[Job]:
        """Return what is to be uploaded or comes down before, and was not tried in vain, the smallest first."""
        fetches = (one for content, one in self.fetching.items() if self._may_go(content))
        return sorted((*self.uploads(), *fetches), key=job_size)

    def note_uploaded(self, result: Result) -> None:
        """Take in how an upload ended."""
        content, error = result.job.content, result.error
        if isinstance(error, ContentLost):
            self._miss(content, str(error))
        elif error is None or (isinstance(error, FileRefused) and error.is_too_large):
            self._waiting.pop(content, None)
            self._ready.add(content)
            if error is None:
                self._room.note_taking(content)
        else:
            self._let_wait(content, str(error))

    def note_fetched(self, result: Result) -> Job | None:
        """Take in how the download of a content ended that is to be uploaded; return what is to be done of it now."""
        content, error = result.job.content, result.error
        if error is None:
            del self.fetching[content]
            return self._waiting[content]
        if isinstance(error, FileRefused) and error.is_damaged and content not in self._damaged:
            # What came of it may have begun long ago. Now it comes from the start.
            self._damaged.add(content)
            return self.fetching[content]
        if isinstance(error, FileRefused):
            del self.fetching[content]
            self._lose(content, f"it is not here any more, and the server does not give it: {error}")
        else:
            self._reasons[content] = f"it is not here any more, and could not be downloaded: {error}"
        return None

    # --- at the end -----------------------------------------------------------

    def skipped(self, why_not_sent: str) -> Iterator[Skipped]:
        """
        Yield which operations had to stay behind.

        Args:
            why_not_sent: Why no session took those whose contents are on the server by now. Empty: one did.
        """
        # Of those that a session was to take, only what is still pending counts.
        behind = self._needed if why_not_sent else self._plan.held
        if not behind:
            return
        held = {seq: self._why_held(seq, why_not_sent) for seq in behind if seq in self._needed}
        held |= dict.fromkeys(self._deletions - held.keys(), _REFERRED_TO)
        sieve = Sieve(self._excluded(), held)
        for unit, cause in sifted(self._storage, sieve, until=self._plan.until or 0, seqs=self._seqs):
            if cause is Cause.FILE:
                for one in unit:
                    is_too_much = one.seq in self._room.exceeding
                    reason = SkipReason.FILES_EXCEED_ROOM if is_too_much else SkipReason.FILE_NOT_UPLOADED
                    other = _TOGETHER if any(one.seq in held for one in unit) else _OVERTAKEN
                    why = self._why_too_much(one.seq) if is_too_much else held.get(one.seq, other)
                    yield Skipped(*one.key, reason, why, seq=one.seq)

    def _why_held(self, seq: int, why_not_sent: str) -> str:
        waiting = [one for one in self._needed[seq] if not self._is_settled(one)]
        if not waiting:
            return f"the content of its file came to the server too late for it: {why_not_sent}"
        late = "there was no time left"
        if seq in self._overtaken:
            late = _OVERTAKEN
        elif any(one not in self._room.going for one in waiting):
            late = "the server did not answer" if self.unanswered else "others came first"
        reason = next((self._reasons[one] for one in waiting if one in self._reasons), late)
        return f"the content of its file is not on the server: {reason}"

    def _why_too_much(self, seq: int) -> str:
        return (
            f"the files that it needs with its commit group have {self._room.exceeding[seq]} bytes, {FILE_COST_BYTES} "
            f"more for each included, and the server takes {self._room.bytes_max} at once, "
            "its limit file_room_per_user: "
            "commit fewer in one group, or have the limit raised"
        )
