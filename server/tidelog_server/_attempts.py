"""
Attempts: which operation ends the process.

A process that is killed from within, by a hook that exits or by a crash below Python,
leaves no failure behind, only what was under way: a store notes that (see
`Store.submit`). Whoever was under way is *suspected*, mostly wrongly: it may have had
company, or the kill may have come from outside. So its operations are tried one by one,
each in a transaction of its own, and the next death accuses one of them alone. After
five such attempts it is *given up*: refused without being run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, cast

import msgpack

from tidelog._logging import get_logger
from tidelog._operation import identity_of

if TYPE_CHECKING:
    from tidelog_server._store import Store

ATTEMPTS_MAX: Final = 5
# The oldest are forgotten: should one of them end the process again, it is suspected again.
SUSPECTS_MAX: Final = 1_000

_NOTE: Final = "suspects"

_log = get_logger("tidelog.attempts")


class Attempt(NamedTuple):
    """
    What of a replica a job tries to settle.

    Attributes:
        replica: The replica's id in 16 bytes.
        seq: Of operations that are tried together, the last; of a unit that is tried on its own, the first.
        number: The how many-th attempt on its own it is. 0: it is tried together with others.
        alone: Whether the job gets a transaction of its own.
    """

    replica: bytes
    seq: int
    number: int = 0
    alone: bool = False


# What was under way: attempts with their tenants.
UnderWay = Sequence[tuple[str, Attempt]]


def last_seq(operations: Sequence[bytes]) -> int:
    """Return the last seq of a batch that can be read; 0: none can."""
    return next((seq for data in reversed(operations) if (seq := identity_of(data)[0])), 0)


def encode_under_way(attempts: UnderWay) -> bytes:
    """Return attempts as bytes; nothing as none."""
    return _packed([(tenant, *attempt[:3]) for tenant, attempt in attempts])


def decode_under_way(data: bytes) -> UnderWay:
    """Return the attempts that `encode_under_way` was given."""
    entries = msgpack.unpackb(data, use_list=False) if data else ()
    return [(tenant, Attempt(*attempt)) for tenant, *attempt in entries]


@dataclass(slots=True)
class _Suspect:
    """
    A replica one of whose operations may end the process.

    Attributes:
        until: The last operation that may.
        attempts: How often a unit was tried on its own when the process died, by its first seq.
    """

    until: int
    attempts: dict[int, int] = field(default_factory=dict)


class Suspicion(NamedTuple):
    """
    What is held against a replica while it uploads.

    Attributes:
        until: Up to here its operations are tried one by one. 0: nothing is held against it.
        attempts: How often a unit was tried on its own when the process died, by its first seq.
    """

    until: int = 0
    attempts: tuple[tuple[int, int], ...] = ()

    def covers(self, operations: Sequence[bytes]) -> bool:
        """Tell whether one of a batch's operations, in log order, may end the process."""
        return bool(self.until and operations) and identity_of(operations[0])[0] <= self.until

    def next_attempt(self, replica: bytes, first_seq: int) -> Attempt:
        """Return the next attempt at a unit on its own."""
        return Attempt(replica, first_seq, dict(self.attempts).get(first_seq, 0) + 1, alone=True)

    @property
    def given_up(self) -> frozenset[int]:
        """The first seqs of units that are not run again."""
        return frozenset(seq for seq, count in self.attempts if count >= ATTEMPTS_MAX)


class Suspects:
    """
    Who may end the process, remembered durably. Safe to use from any thread but inside a job.

    Made anew when a process begins with a store: then what the former one left under way counts.
    """

    def __init__(self, store: Store | None = None) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._suspects: dict[tuple[str, bytes], _Suspect] = {}
        if store is None:
            return
        if under_way := store.left_under_way():
            self._change(store, lambda: self._accuse(under_way))
            store.forget_under_way()
        else:
            self._load(store.note(_NOTE))

    def suspicion(self, tenant: str, replica: bytes) -> Suspicion:
        """Return what is held against a replica."""
        with self._lock:
            suspect = self._suspects.get((tenant, replica))
            return _NONE if suspect is None else Suspicion(suspect.until, tuple(suspect.attempts.items()))

    def clear(self, tenant: str, replica: bytes) -> None:
        """Forget what is held against a replica that has sent what it is suspected of, but for what did not settle."""
        with self._lock:
            suspect, store = self._suspects.get((tenant, replica)), self._store
            if suspect is None or store is None:
                return
            with store.read(tenant) as reader:
                settled = reader.settled(replica, suspect.attempts)
            self._change(store, lambda: self._lift(tenant, replica, settled))

    def _accuse(self, under_way: UnderWay) -> None:
        for tenant, attempt in under_way:
            self._accuse_one(tenant, attempt)

    def _accuse_one(self, tenant: str, attempt: Attempt) -> None:
        suspect = self._suspects.pop((tenant, attempt.replica), None) or _Suspect(0)
        self._suspects[tenant, attempt.replica] = suspect
        suspect.until = max(suspect.until, attempt.seq)
        if attempt.number:
            # Not one more than before: a process may die here too, and find the same note again.
            suspect.attempts[attempt.seq] = attempt.number
        _log.error(
            "the process before this one ended while operations were applied",
            tenant=tenant,
            replica=attempt.replica.hex(),
            seq=attempt.seq,
            attempts_alone=attempt.number,
            attempts_max=ATTEMPTS_MAX,
        )

    def _lift(self, tenant: str, replica: bytes, settled: Container[int]) -> None:
        suspect = self._suspects.get((tenant, replica))
        if suspect is None:
            return  # another server was told the same
        suspect.attempts = {seq: count for seq, count in suspect.attempts.items() if seq not in settled}
        suspect.until = max(suspect.attempts, default=0)
        if not suspect.attempts:
            del self._suspects[tenant, replica]

    def _change(self, store: Store, change: Callable[[], object]) -> None:
        """Change what is noted, with what other servers have noted meanwhile."""
        while True:
            noted = store.note(_NOTE)
            self._load(noted)
            change()
            if store.set_note(_NOTE, self._noted(), expected=noted):
                return

    def _load(self, noted: bytes) -> None:
        self._suspects = {
            (tenant, replica): _Suspect(until, attempts)
            for tenant, replica, until, attempts in msgpack.unpackb(noted or b"\x90", strict_map_key=False)
        }

    def _noted(self) -> bytes:
        while len(self._suspects) > SUSPECTS_MAX:
            del self._suspects[next(iter(self._suspects))]
        return _packed([(*place, suspect.until, suspect.attempts) for place, suspect in self._suspects.items()])


def _packed(entries: Sequence[object]) -> bytes:
    return cast("bytes", msgpack.packb(entries)) if entries else b""


_NONE: Final = Suspicion()
# For whoever has no store to remember them in.
NO_SUSPECTS: Final = Suspects()
