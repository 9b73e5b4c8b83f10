"""
What can go wrong, by name, and the count of what did.

Everything that the simulation does to the product on purpose is in one of these lists.
A run that is long enough must have met all of it: what it did not reach it cannot have
checked.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import product
from typing import NamedTuple, get_args

from tidelog import DownloadMode, FailureReason
from tidelog._attributes import OnDelete


class Fault(enum.StrEnum):
    """What happens to the network, the processes, the disks and the clocks."""

    CUT = "a link is cut, and both sides see it"
    DROP = "messages under way are lost"
    DELAY = "messages stay under way while other things happen"
    DUPLICATE = "what a stream has carried comes a second time, as another stream"
    REORDER = "what a former stream carried comes after its successor has begun"
    BLACK_HOLE = "messages vanish in both directions, and nobody is told"
    HALF_OPEN = "the server gets everything, its answers vanish"
    SLOW_CONSUMER = "the replica does not read what the server has sent"
    BURST = "batches of several sessions are committed together"
    CLIENT_KILLED = "a replica's process is killed between two writes"
    CLIENT_CRASH = "a replica's process dies at a commit"
    CLIENT_DISK_FULL = "a replica's disk is full"
    CLIENT_MAP_FULL = "a replica's map is full, and is enlarged"
    CLIENT_WRITE_FAILED = "a replica's write fails"
    CLIENT_CLOCK = "a replica's clock jumps by a year"
    SERVER_RESTART = "the server is restarted between two writes"
    SERVER_CRASH = "the server dies at a commit"
    SERVER_DISK_FULL = "the server's disk is full"
    SERVER_MAP_FULL = "the server's map is full, and is enlarged"
    SERVER_WRITE_FAILED = "the server's write fails"
    SERVER_CLOCK = "the server's clock jumps by a year"
    SERVICE_DOWN = "what a hook needs is down"
    ROLLOUT = "replicas are of a newer schema than the server, until it follows"
    TOKEN_REFUSED = "a token expires on its way"
    TWO_AT_ONCE = "a replica is synchronized while it is being synchronized"
    COPIED = "a replica's directory is copied to a second device, and both go on"
    PUT_BACK = "an old copy of a replica's directory is put in its place"
    RESTORED = "the server's store is restored from a backup"
    SILENTLY_RESTORED = "an old copy of the server's store is put in its place, and nobody is told"
    COLLECTED = "the server forgets history"
    FILE_CUT = "a content's transfer is cut, and both sides see it"
    FILE_LATE = "what was sent of a content before the cut arrives late"
    FILE_DELAY = "a content stays under way while other things happen"
    FILE_BLACK_HOLE = "a content's messages vanish in both directions, and nobody is told"
    CONTENT_LOST = "a replica loses a content"
    CONTENT_DAMAGED = "a replica's content is damaged"
    SERVER_CONTENT_LOST = "the server loses a content"
    SERVER_CONTENT_DAMAGED = "the server's content is damaged"


class Commit(enum.StrEnum):
    """What is written in one transaction, on either side."""

    OPEN = "a replica: its id"
    LOCAL = "a replica: what its user did"
    SESSION = "a replica: what the server says of itself"
    SETTLE = "a replica: results"
    STAGE = "a replica: staged pages"
    UNSTAGE = "a replica: staged pages are discarded"
    PUBLISH = "a replica: a download at once"
    PUBLISHING = "a replica: how a download ends that takes steps"
    PUBLISH_STEP = "a replica: a step of a download"
    STAGE_MERGE = "a replica: staged pages without a cursor"
    UNSTAGE_MERGE = "a replica: staged pages without a cursor are discarded"
    MERGE = "a replica: a download without a cursor"
    MERGE_STEP = "a replica: a step of a download without a cursor"
    START_OVER = "a replica: it asks for all states"
    FORK = "a replica: another id, because its log is a copy"
    REBASE = "a replica: a new timeline of the server's"
    KEEP = "a replica: what the server has of its former ids"
    TRIM = "a replica: its log is trimmed"
    NUMBER = "the server: a session's number"
    BATCH = "the server: a batch"
    HELD = "the server: held operations"
    SERVICE = "the server: what the service itself writes"
    COPIES = "the server: what a copy settled, noted for the others"
    TIMELINE = "the server: a new timeline, because a replica knows more"
    NOTE = "the server: what it keeps of itself, as the schema that it is made ready for"
    MIGRATION = "the server: a page of migrated objects"
    INDEXES = "the server: a page of indexes made anew"
    COLLECT = "the server: a part of its history is forgotten"
    COLLECT_OUTCOMES = "the server: what became of operations is forgotten"
    COLLECT_INDEX = "the server: what objects no longer match is forgotten"
    RETIRE = "the server: a replica is retired"
    LOOK = "a replica: what objects refer to"
    ARRIVED = "a replica: contents that have come, or could not be had"
    GONE = "a replica: a content of its own is not there"
    DISCARD = "a replica: contents that nobody refers to"
    STRAY = "a replica: contents that nobody ever referred to"
    PART = "a replica: bytes of a content"
    CONTENT = "a replica: a content, whole"
    CONTENT_DELETED = "a replica: a content is deleted"
    UPLOAD = "the server: an upload begins"
    RECORD = "the server: a content on record"
    GRANT = "the server: who may refer to contents"
    BROKEN_CONTENT = "the server: a content is lost, or back"
    COLLECT_UPLOADS = "the server: uploads are given up"
    COLLECT_CONTENT = "the server: a content is taken off the record"
    COLLECT_GRANTS = "the server: who might refer to contents is forgotten"
    SERVER_PART = "the server: bytes of a content"
    SERVER_CONTENT = "the server: a content, whole"
    SERVER_CONTENT_DELETED = "the server: a content is deleted"


class Moment(enum.StrEnum):
    """When a process dies at a commit."""

    BEFORE = "before"
    AFTER = "after"


class CrashPoint(NamedTuple):
    """Where a process can die."""

    commit: Commit
    moment: Moment

    def __str__(self) -> str:
        return f"{self.commit.name}.{self.moment.name}"


CRASH_POINTS = tuple(CrashPoint(commit, moment) for commit, moment in product(Commit, Moment))

# Not of a record's own are the reasons of a commit group's other members.
REASONS = tuple(one for one in FailureReason if one is not FailureReason.GROUP_REJECTED)
MODES = ("ALL", "UNSYNCHRONIZED", "SELECTED")
SETTINGS = (
    *(f"on_delete {one}" for one in get_args(OnDelete)),
    *(f"policy {one}" for one in ("reject_stale", "merge")),
    *(f"download {one.value}" for one in DownloadMode if one not in {DownloadMode.ALL, DownloadMode.NEVER}),
    "strict schema",
    "access rules",
    "third party",
    "contention",
    "copies and restores",
    "files",
    "files lazy",
    "files never",
)
# What has to come of it now and then.
TURNS = ("mass removals asked for", "mass removals agreed to")

_CLIENT_WRITES = {
    "Lineage._make_replica_id": Commit.OPEN,
    "Committer._write": Commit.LOCAL,
    "Meta.write": Commit.SESSION,
    "Storage.settle": Commit.SETTLE,
    "Files.note_late": Commit.SETTLE,
    "Publication.stage": Commit.STAGE,
    "Publication.discard_staged": Commit.UNSTAGE,
    "Publication.publish": Commit.PUBLISH,
    "Publication._begin_steps": Commit.PUBLISHING,
    "Publication._begin_merge": Commit.PUBLISHING,
    "Publication._publish_step": Commit.PUBLISH_STEP,
    "Publication.stage_merge": Commit.STAGE_MERGE,
    "Publication.discard_merge": Commit.UNSTAGE_MERGE,
    "Publication.merge": Commit.MERGE,
    "Publication._merge_step": Commit.MERGE_STEP,
    "Publication.forget_states": Commit.START_OVER,
    "Storage.fork": Commit.FORK,
    "Storage.begin_rebase": Commit.REBASE,
    "Storage.keep_settled": Commit.KEEP,
    "Storage.trim": Commit.TRIM,
}
_CLIENT_FILE_WRITES = {
    "Files._look_step": Commit.LOOK,
    "Files.note_arrived": Commit.ARRIVED,
    "Files.note_gone": Commit.GONE,
    "Files._mark": Commit.GONE,
    "Files._collect": Commit.DISCARD,
    "Files._note_garbage": Commit.STRAY,
}
_SERVER_JOBS = {
    "Session._begin": Commit.NUMBER,
    "Services._upload_operations": Commit.NUMBER,
    "Upload._submit_batch": Commit.BATCH,
    "Upload.settle_held": Commit.HELD,
    "Tenant.submit": Commit.SERVICE,
    "_Data.submit": Commit.SERVICE,
    "LmdbStore.set_note": Commit.NOTE,
    "_migrate": Commit.MIGRATION,
    "_rebuild_indexes": Commit.INDEXES,
    "_note_referrers": Commit.INDEXES,
    "_indexed": Commit.INDEXES,
    "without_past": Commit.COLLECT,
    "without_left_entries": Commit.COLLECT_INDEX,
    "without_outcomes": Commit.COLLECT_OUTCOMES,
    "without_old_notes": Commit.COLLECT_OUTCOMES,
    "without_refused_creations": Commit.COLLECT_OUTCOMES,
    "retired": Commit.RETIRE,
}
_SERVER_FILE_JOBS = {
    "Files._begin": Commit.UPLOAD,
    "_known": Commit.UPLOAD,
    "Files._complete": Commit.RECORD,
    "Files._granted": Commit.GRANT,
    "Files._note": Commit.BROKEN_CONTENT,
    "_given_up": Commit.COLLECT_UPLOADS,
    "without_content": Commit.COLLECT_CONTENT,
    "without_grants": Commit.COLLECT_GRANTS,
}

CLIENT_COMMITS = tuple(dict.fromkeys(_CLIENT_WRITES.values()))
SERVER_COMMITS = tuple(dict.fromkeys([*_SERVER_JOBS.values(), Commit.COPIES, Commit.TIMELINE]))
CLIENT_FILE_COMMITS = (*_CLIENT_FILE_WRITES.values(), Commit.PART, Commit.CONTENT, Commit.CONTENT_DELETED)
# The collection of uploads comes seldom: it takes many traps there to meet it.
SERVER_FILE_COMMITS = (
    *dict.fromkeys(_SERVER_FILE_JOBS.values()),
    Commit.COLLECT_UPLOADS,
    Commit.SERVER_PART,
    Commit.SERVER_CONTENT,
    Commit.SERVER_CONTENT_DELETED,
)


def client_commit(work: object) -> Commit:
    """Name what a replica is about to write. A write that has no name yet needs one, and a crash point."""
    return _named(work, _CLIENT_WRITES | _CLIENT_FILE_WRITES)


def server_commit(job: object) -> Commit:
    """Name what a server's store is about to write."""
    captured = _captured(job)
    return _named(captured.get("evaluate", captured.get("work", job)), _SERVER_JOBS | _SERVER_FILE_JOBS)


def _named(work: object, names: dict[str, Commit]) -> Commit:
    name = getattr(getattr(work, "func", work), "__qualname__", "").partition(".<locals>")[0]
    if name not in names:
        raise AssertionError(f"{name!r} writes, and is no crash point of the simulation: give it a name in faults.py")
    return names[name]


def _captured(work: object) -> dict[str, object]:
    """Return the variables that a function has taken with it."""
    cells = getattr(work, "__closure__", None) or ()
    names = getattr(getattr(work, "__code__", None), "co_freevars", ())
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


@dataclass
class Coverage:
    """
    How often what happened.

    Attributes:
        faults: By kind.
        commits: How often each was reached.
        crashes: By crash point.
        reasons: Failure records by reason.
        modes: Synchronizations that came to their end, by mode.
        settings: What seeds drew.
        totals: Synchronizations, restarts, ..., by name.
        rounds_max: Most synchronizations of each replica until all agreed.
    """

    faults: Counter[str] = field(default_factory=Counter)
    commits: Counter[str] = field(default_factory=Counter)
    crashes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    settings: Counter[str] = field(default_factory=Counter)
    totals: Counter[str] = field(default_factory=Counter)
    rounds_max: int = 0

    def add(self, other: Coverage) -> None:
        """Take in what another run covered."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
        self.rounds_max = max(self.rounds_max, other.rounds_max)

    def holes(self) -> Iterator[str]:
        """Yield what can happen and never did."""
        yield from (f"fault {one.name}" for one in Fault if not self.faults[one.name])
        yield from (f"reason {one.name}" for one in REASONS if not self.reasons[one.name])
        yield from (f"mode {one}" for one in MODES if not self.modes[one])
        yield from (f"setting {one}" for one in SETTINGS if not self.settings[one])
        yield from (f"turn {one}" for one in TURNS if not self.totals[one])
        yield from (f"crash {one}" for one in CRASH_POINTS if not self.crashes[str(one)])

    def lines(self) -> Iterator[str]:
        """Yield lines for people."""
        for title, counts in (
            ("faults", self.faults),
            ("commits", self.commits),
            ("crash points", self.crashes),
            ("failure reasons", self.reasons),
            ("completed, by mode", self.modes),
            ("drawn", self.settings),
            ("totals", self.totals),
        ):
            yield f"{title}: {', '.join(f'{name} {count:,}' for name, count in sorted(counts.items()))}"
        yield f"most rounds until all agreed: {self.rounds_max}"
