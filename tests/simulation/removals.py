"""
The removal of most of an entity: when it has to wait for consent, and when it must not.

What a reconciliation takes away is looked up in the server's history, and in what the
replica held before; what the product counts for itself is only compared with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from tests.simulation.model import Key
from tests.simulation.promises import promise
from tests.simulation.records import History, ReplicaRecord
from tests.simulation.rights import Eyes

from tidelog import MassRemoval
from tidelog.v1 import sync_pb2

PROMISE = "No mass delete: most of an entity goes with a cause that the server states, or with consent"


@dataclass(frozen=True)
class Loss:
    """
    What a download takes away without a cause.

    Attributes:
        known: The objects of the server's that the replica has, by entity, of those that are reconciled so. One
            that its user has deleted is among them until the server knows of that: it may come back.
        surely: Those that the server did not show at any moment of the download.
        perhaps: Those that it did not show at some moment of it.
        unasked_max: As many may go in any case.
    """

    known: Mapping[str, frozenset[Key]]
    surely: Mapping[str, frozenset[Key]]
    perhaps: Mapping[str, frozenset[Key]]
    unasked_max: int

    def is_mass(self, entity: str, count: int) -> bool:
        """Tell whether it needs consent that so many objects of an entity go."""
        return count > self.unasked_max and 2 * count > len(self.known[entity])


@dataclass(frozen=True)
class Reconciled:
    """
    What a server says it reconciles, and whether a replica has any reason to doubt it.

    Attributes:
        started: The server's words.
        is_rebasing: Whether the replica's objects are of another life of the store: then no cause explains a loss.
        had_cursor: Whether the server had told it of all of them. If not, nothing was ever complete.
    """

    started: sync_pb2.SessionStarted
    is_rebasing: bool
    had_cursor: bool

    def is_unexplained(self, entity: str) -> bool:
        """Tell whether what is not there any more of an entity goes, and nobody says why."""
        if not self.is_rebasing and not self.had_cursor:
            return False
        started = self.started
        plan = next((one for one in started.entities if one.entity == entity), None)
        if not started.reconcile and not (plan is not None and plan.reconcile):
            return False
        cause = started.reconcile_cause if started.reconcile or plan is None else plan.reconcile_cause
        return self.is_rebasing or cause == sync_pb2.RECONCILE_CAUSE_UNSPECIFIED


def loss(
    reconciled: Reconciled,
    replica: ReplicaRecord,
    eyes: Eyes,
    history: History,
    since: int,
    *,
    waiting: Collection[Key],
    unasked_max: int,
) -> Loss:
    """
    Work out what a download takes away.

    Args:
        reconciled: What is reconciled.
        replica: What was on disk before.
        eyes: What the replica's user sees.
        history: The server's.
        since: The version at which the download began.
        waiting: The objects that wait to be created anew at a server that was put back. They stay in view.
        unasked_max: As many may go in any case.
    """
    known: dict[str, set[Key]] = {}
    surely: dict[str, set[Key]] = {}
    perhaps: dict[str, set[Key]] = {}
    for key in replica.keys:
        entity = key[0]
        if replica.held(key) is None or not eyes.downloads(entity) or not reconciled.is_unexplained(entity):
            continue
        known.setdefault(entity, set()).add(key)
        if key in waiting:
            continue
        shown = [eyes.shown(entity, state) is not None for state in history.states_between(key, since)]
        if not any(shown):
            surely.setdefault(entity, set()).add(key)
        if not all(shown):
            perhaps.setdefault(entity, set()).add(key)
    return Loss(_frozen(known, known), _frozen(surely, known), _frozen(perhaps, known), unasked_max)


@promise(PROMISE)
def check_adopted(expected: Loss, after: ReplicaRecord) -> Iterator[str]:
    """Look for what went without a word, in a download to which nobody had consented."""
    for entity, keys in expected.surely.items():
        gone = [key for key in keys if after.held(key) is None]
        if expected.is_mass(entity, len(gone)):
            yield f"{len(gone)} of {len(expected.known[entity])} {entity} went, and nobody was asked: {sorted(gone)}"


@promise(PROMISE)
def check_refused(
    expected: Loss, error: MassRemoval, before: ReplicaRecord, after: ReplicaRecord, *, has_consent: bool
) -> Iterator[str]:
    """Ask of a refusal whether it had to be, whether it says what is so, and whether all stayed."""
    if has_consent:
        yield f"{error}: it had been agreed to"
    if not any(expected.is_mass(entity, len(keys)) for entity, keys in expected.perhaps.items()):
        yield f"{error}: {expected} is no reason to ask"
    for entity, count in error.removed.items():
        least, most = len(expected.surely.get(entity, ())), len(expected.perhaps.get(entity, ()))
        if not least <= count <= most:
            yield f"{count} {entity} are said to go, it is {least} to {most}"
        if error.present[entity] != len(expected.known.get(entity, ())):
            yield f"{error.present[entity]} {entity} are said to be here, it is {expected.known.get(entity)}"
    for what in ("view", "base", "unconfirmed", "cursor"):
        if getattr(before, what) != getattr(after, what):
            yield f"nothing was to go, and the {what} has changed"


def _frozen(keys: Mapping[str, set[Key]], known: Mapping[str, set[Key]]) -> dict[str, frozenset[Key]]:
    return {entity: frozenset(keys.get(entity, ())) for entity in known}
