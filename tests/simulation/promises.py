"""
What tidelog promises, one checker a promise.

A checker yields a sentence for each violation that it finds in what is on disk. Most
hold at any moment, in the middle of a session and after a crash; those named
`..._when_quiet` once nothing is left to be synchronized.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple, ParamSpec
from uuid import UUID

from tests.simulation.application import Business
from tests.simulation.model import Attributes, Key, Misfit, patched, replayed, same
from tests.simulation.records import Committed, History, Past, ReplicaRecord, ServerRecord
from tests.simulation.rights import Eyes

from tidelog._downloads import DownloadMode
from tidelog._failure import FailureReason
from tidelog._operation import Operation, OperationKind, decode_operation
from tidelog._patch import decode_patch
from tidelog._schema import Schema
from tidelog._values import decode, decode_map
from tidelog.v1 import failure_pb2, sync_pb2
from tidelog_client._view import ViewRecord
from tidelog_server._records import Change, ObjectState, Settled

FINDINGS_SHOWN_MAX = 5

_P = ParamSpec("_P")


class PromiseBroken(AssertionError):
    """A promise does not hold."""

    def __init__(self, promise: str, findings: list[str]) -> None:
        super().__init__("\n  - ".join([f"promise broken: {promise}", *findings]))
        self.promise = promise
        self.findings = findings


def promise(text: str) -> Callable[[Callable[_P, Iterator[str]]], Callable[_P, None]]:
    """Make a function that yields violations into one that raises PromiseBroken."""

    def decorate(find: Callable[_P, Iterator[str]]) -> Callable[_P, None]:
        @functools.wraps(find)
        def check(*args: _P.args, **kwargs: _P.kwargs) -> None:
            findings = list(islice(find(*args, **kwargs), FINDINGS_SHOWN_MAX))
            if findings:
                raise PromiseBroken(text, findings)

        return check

    return decorate


class Settlement(NamedTuple):
    """
    When an operation was settled.

    Attributes:
        order: Number of the store's transaction that did.
        before: The tenant's version before it.
        after: The tenant's version after it.
    """

    order: int
    before: int
    after: int


class Rules(NamedTuple):
    """
    What an application may refuse.

    Attributes:
        schema: Its schema.
        may_hooks_refuse: Tells whether its hooks have a reason to refuse, for this reason, this
            operation on an object that was in one of these states.
        business: What the seed made of the application.
        eyes: What the author may do. None: everything.
        is_put_back: Whether the store was put back from a backup: then base versions may be of another history.
        has_copies: Whether directories are copied, and what may be asked for is forgotten.
        former_failures: Ids of failures that were recorded before the store was put back.
        may_lack_contents: Tells whether an operation that refers to files may be refused for this reason.
    """

    schema: Schema
    may_hooks_refuse: Callable[[FailureReason, Operation, list[Attributes | None]], bool]
    business: Business = Business()
    eyes: Eyes | None = None
    is_put_back: bool = False
    has_copies: bool = False
    former_failures: Collection[bytes] = ()
    may_lack_contents: Callable[[FailureReason, Operation], bool] = lambda _reason, _operation: False

    def readable(self, entity: str, attributes: Attributes | None) -> Attributes | None:
        """Return what the author of an operation may read of an object."""
        return attributes if self.eyes is None else self.eyes.readable(entity, attributes)


# --- the replica's log ------------------------------------------------------------------


@promise("Durable: every committed operation is in the log, in order and without gaps, byte for byte as committed")
def check_log(replica: ReplicaRecord, committed: Committed) -> Iterator[str]:
    """Compare the log with what was committed; only settled operations may have been trimmed."""
    expected = list(range(1, len(committed.data) + 1))
    if list(committed.data) != expected or replica.last_seq != len(expected):
        yield f"{len(expected)} operations were committed, seqs {_ranges(committed.data)}; last seq {replica.last_seq}"
    for seq, data in committed.data.items():
        if seq in replica.log and replica.log[seq] != data:
            yield f"seq {seq} is logged with other bytes than were committed"
        if seq not in replica.log and (seq in replica.pending or seq in _replayed_seqs(replica)):
            yield f"seq {seq} is still needed and not in the log"
    if surplus := replica.log.keys() - committed.data.keys():
        yield f"the log holds what nobody committed: seqs {_ranges(sorted(surplus))}"


# --- operations on their way ------------------------------------------------------------


@promise("Settled once: every operation is at any time exactly one of pending, applied once, failed with a record")
def check_settled_once(
    server: ServerRecord,
    replica: ReplicaRecord,
    committed: Committed,
    merging: Collection[str] = (),
    *,
    lost: Collection[int] = (),
) -> Iterator[str]:
    """
    Compare what the replica believes of each operation with what the server did.

    Args:
        server: What the server did.
        replica: What the replica believes.
        committed: The operations.
        merging: Entities of which the server merges stale edits.
        lost: Seqs of what nobody has any more: trimmed here, and lost there when the store was put back.
    """
    id_ = replica.replica_id
    yield from _settled_twice_or_never(replica, committed)
    for seq, operation in committed.operations.items():
        settled = server.settled[id_].get(seq)
        changes = server.changes_of.get((id_, seq), [])
        is_pending, outcome = seq in replica.pending, replica.outcomes.get(seq)
        if settled is None:
            if not is_pending and seq not in lost:
                yield f"seq {seq} is not pending on its replica, and the server never settled it"
            if changes:
                yield f"seq {seq} is not settled on the server, and changed {[one.version for one in changes]}"
            continue
        if settled.nonce != operation.nonce:
            yield f"seq {seq} is settled with another nonce"
        if outcome is not None and (outcome.version, outcome.failure_id) != _outcome_of(settled):
            yield f"seq {seq}: the replica remembers {outcome}, the server {settled}"
        yield from _misapplied(operation, settled, changes, server.history, is_merged=operation.entity in merging)
    if surplus := [key for key in server.changes_of if key[0] == id_ and key[1] not in committed.operations]:
        yield f"the server applied what nobody committed: {surplus}"


@promise("Settled once: every operation is pending or settled on its replica, and not both")
def check_settled_on_replica(replica: ReplicaRecord, committed: Committed) -> Iterator[str]:
    """Look at what a replica believes of each operation, whatever the server does."""
    yield from _settled_twice_or_never(replica, committed)


@promise("Forks and restores: whatever is copied and put back, no operation takes effect twice")
def check_effects(
    server: ServerRecord,
    operations: Mapping[int, Operation],
    marks: Mapping[tuple[str, int], Settled],
    doubted: Collection[int],
    merging: Collection[str] = (),
) -> Iterator[str]:
    """
    Compare the changes with what is settled under all ids that copies of a replica have.

    Args:
        server: The store.
        operations: All that anybody ever committed, by nonce.
        marks: What was settled since the store is this one, by replica id and seq.
        doubted: Nonces of those that were refused because it was forgotten what had become of them.
        merging: Entities of which stale edits are merged.
    """
    changes: dict[int, list[Change]] = {}
    for place, caused in server.changes_of.items():
        if place in marks:
            own = changes.setdefault(marks[place].nonce, [])
            if any(not one.by_hook for one in own) and any(not one.by_hook for one in caused):
                yield f"{operations.get(marks[place].nonce)} was applied under several ids"
            own += caused
        elif UUID(place[0]).int:
            yield f"{place} has changed {[one.version for one in caused]}, and was never settled"
    for (replica_id, seq), settled in marks.items():
        if settled.nonce not in operations:
            yield f"seq {seq} of replica {replica_id} is settled as an operation that nobody committed"
        elif settled.nonce in doubted:
            failure = server.failures.get(str(UUID(bytes=settled.failure_id))) if settled.failure_id else None
            if failure is not None and not changes.get(settled.nonce):
                continue
            if failure is not None and failure.reason != FailureReason.SUPERSEDED.number:
                yield f"seq {seq} of replica {replica_id} was applied once, and refused: {failure.message}"
        else:
            yield from _misapplied(
                operations[settled.nonce],
                settled,
                changes.get(settled.nonce, []),
                server.history,
                is_merged=operations[settled.nonce].entity in merging,
            )


@promise("Forks and restores: what is offered again keeps its refusal, and overwrites nothing that was done since")
def check_offered_again(
    server: ServerRecord,
    acknowledged: Mapping[int, str],
    operations: Mapping[int, Operation],
    marks: Mapping[tuple[str, int], Settled],
    since: int,
) -> Iterator[str]:
    """
    Look at what became of operations that replicas knew to be settled when the store was put back.

    Args:
        server: The store.
        acknowledged: The ids of their failures, by nonce; empty if they were applied.
        operations: All that anybody ever committed, by nonce.
        marks: What was settled since the store is this one, by replica id and seq.
        since: The version at which it was put back.
    """
    for settled in marks.values():
        former = acknowledged.get(settled.nonce)
        if former is None:
            continue
        operation = operations[settled.nonce]
        if former and _outcome_of(settled)[1] != former:
            yield f"{operation.kind.name} of {operation.key} was refused as {former}, and is settled as {settled}"
        if settled.version > since:
            for change in server.history.changes_to.get(operation.key, ()):
                if since < change.version < settled.version and _is_overwritten(change, operation):
                    yield f"{operation.kind.name} of {operation.key} at {settled.version} overwrites {change}"


@promise("Forks and restores: nothing that is kept in a log is lost, and no operation is taken for another one")
def check_kept_when_quiet(
    server: ServerRecord,
    replica: ReplicaRecord,
    committed: Committed,
    marks: Mapping[tuple[str, int], Settled],
) -> Iterator[str]:
    """Look up what became of each operation in a log, under whichever id the server settled it."""
    settled = {one.nonce: one for one in marks.values()}
    for seq in replica.log.keys() - replica.pending.keys():
        one = settled.get(committed.operations[seq].nonce)
        if one is None:
            yield f"seq {seq} is settled on its replica, and the server knows nothing of it"
        elif one.failure_id:
            failure = server.failures.get(str(UUID(bytes=one.failure_id)))
            if failure is None or committed.data[seq] not in {failure.operation, *failure.group_operations}:
                yield f"seq {seq} failed, and the server has no record of it"


@promise("Nothing lost on refusal: the failure record, with the whole payload, is durable on the server and replica")
def check_failures(server: ServerRecord, replica: ReplicaRecord, committed: Committed) -> Iterator[str]:
    """Look up the record of each refused operation, on both sides."""
    id_ = replica.replica_id
    for seq, settled in server.settled[id_].items():
        if not settled.failure_id or seq not in committed.operations:
            continue
        failure_id = str(UUID(bytes=settled.failure_id))
        places = [("the server", server.failures.get(failure_id))]
        if seq in replica.outcomes:
            places.append(("the replica", replica.failures.get(failure_id)))
        for place, failure in places:
            if failure is None:
                yield f"seq {seq} failed, and {place} has no record {failure_id}"
            else:
                yield from _lost_payload(seq, settled, failure, committed, place)


@promise("In order: operations on one object are settled in log order")
def check_order(
    server: ServerRecord, replica_id: str, committed: Committed, lost: Collection[int] = ()
) -> Iterator[str]:
    """Look for an operation that was settled before an earlier one on its object, which is not *lost*."""
    settled = server.settled[replica_id]
    for key, seqs in committed.seqs_of.items():
        unsettled: int | None = None
        newest = 0
        for seq in seqs:
            one = settled.get(seq)
            if one is None and seq in lost:
                continue
            if one is None:
                unsettled = seq if unsettled is None else unsettled
                continue
            if unsettled is not None:
                yield f"{key}: seq {seq} is settled, seq {unsettled} before it is not"
            if not one.failure_id:
                if one.version < newest:
                    yield f"{key}: seq {seq} was applied at {one.version}, an earlier operation at {newest}"
                newest = one.version


@promise("In order: operations on one object are settled in log order (as the server's transactions ran)")
def check_settlement_order(
    replica_id: str, committed: Committed, settlements: Mapping[tuple[str, int], Settlement]
) -> Iterator[str]:
    """Look for an operation that an earlier transaction settled than one before it on its object."""
    for key, seqs in committed.seqs_of.items():
        orders = [settlements[replica_id, seq].order for seq in seqs if (replica_id, seq) in settlements]
        if orders != sorted(orders):
            yield f"{key}: seqs {seqs} were settled by the transactions {orders}"


@promise("Commit group: the operations of a commit group are applied all or none, in one transaction")
def check_groups(
    server: ServerRecord,
    replica_id: str,
    committed: Committed,
    settlements: Mapping[tuple[str, int], Settlement] | None = None,
    lost: Collection[int] = (),
) -> Iterator[str]:
    """Compare the outcomes of each commit group's members, unless some are *lost*."""
    settled = server.settled[replica_id]
    groups: dict[int, list[int]] = {}
    for seq, operation in committed.operations.items():
        if operation.group is not None:
            groups.setdefault(operation.group.id, []).append(seq)
    for first, seqs in groups.items():
        size = committed.operations[first].group
        if size is None or len(seqs) != size.size:
            yield f"the group at seq {first} is logged with {len(seqs)} members: {size}"
        if any(seq in lost for seq in seqs):
            continue
        outcomes = [settled.get(seq) for seq in seqs]
        kinds = {None if one is None else one.failure_id for one in outcomes}
        if len(kinds) > 1:
            yield f"the group at seq {first}: {outcomes}"
        culprits = [one for one in outcomes if one is not None and one.failure_id and one.culprit]
        if any(one is not None and one.failure_id for one in outcomes) and len(culprits) != 1:
            yield f"the group at seq {first} was refused because of {len(culprits)} of its members"
        orders = {settlements.get((replica_id, seq)) for seq in seqs} if settlements is not None else {None}
        if len(orders) > 1:
            yield f"the group at seq {first} was settled by several transactions: {orders}"


@promise("No poison: an operation is refused for a reason that was true in the transaction that refused it")
def check_refusals(
    server: ServerRecord,
    replica_id: str,
    committed: Committed,
    settlements: Mapping[tuple[str, int], Settlement],
    rules: Rules,
) -> Iterator[str]:
    """Ask of each refusal whether it had to be."""
    for seq, settled in server.settled[replica_id].items():
        failure = server.failures.get(str(UUID(bytes=settled.failure_id))) if settled.failure_id else None
        if failure is None or not settled.culprit or (replica_id, seq) not in settlements:
            continue
        if settled.failure_id in rules.former_failures:
            continue  # it was looked at when it was recorded first
        reason = FailureReason.of_number(failure.reason)
        operation, when = committed.operations[seq], settlements[replica_id, seq]
        if rules.is_put_back:
            operation = operation._replace(base_version=0)
        is_dependent = reason is FailureReason.DEPENDENCY_FAILED
        if is_dependent and rules.has_copies and _is_of_copy(failure, replica_id, server):
            continue  # what another copy did is not in this log
        if is_dependent:
            because = _is_caused(failure, replica_id, committed, settlements, server, rules)
        else:
            because = _is_justified(reason, operation, when, server, rules)
        if not because:
            yield f"seq {seq} ({operation.kind.name} {operation.key}) at {when}: {reason} {failure.message!r}"


# --- the server's data ------------------------------------------------------------------


@promise("Change log: its changes, replayed forward, make the snapshots, and taken back, the states before")
def check_change_log(server: ServerRecord) -> Iterator[str]:
    """Replay the change log both ways."""
    history, newest, creations = server.history, dict[Key, Change](), dict[Key, Change]()
    for expected, change in enumerate(history.changes, start=1):
        key, before = change.key, history.at(change.key, change.version - 1)
        if change.version != expected:
            yield f"version {expected} is missing, {change.version} follows"
            return
        former = newest.get(key)
        # Nothing is known of what stood before a tombstone that is collected.
        is_forgotten = former is not None and not change.previous and _is_collected(former, server)
        if change.previous != (former.version if former is not None else 0) and not is_forgotten:
            yield f"version {change.version} of {key} names {change.previous} as the change before it"
        if (change.kind is OperationKind.CREATE) is not (before is None):
            yield f"version {change.version}: {change.kind.name} of {key}, which was {before}"
        after = history.at(key, change.version)
        if not same(_before(change, after), before):
            yield f"version {change.version} of {key}: taken back it gives {_before(change, after)}, it was {before}"
        newest[key] = change
        if change.kind is OperationKind.CREATE:
            creations[key] = change
    if server.head.version != len(history.changes):
        yield f"the head is {server.head.version}, the change log ends at {len(history.changes)}"
    if server.head.version and server.head_commit_id != server.head.commit_id:
        yield f"the head's commit id is not that of version {server.head.version}"
    absent = {key for key in newest.keys() - server.objects.keys() if not _is_collected(newest[key], server)}
    if surplus := absent | (server.objects.keys() - newest.keys()):
        yield f"objects without changes, or changes without object: {surplus}"
        return
    for key, state in server.objects.items():
        yield from _wrong_state(key, state, newest[key], creations[key], history)


@promise("By version: each object has exactly one entry in the index, at its latest version")
def check_by_version(server: ServerRecord) -> Iterator[str]:
    """Compare the index with the objects."""
    expected = sorted((state.version, key) for key, state in server.objects.items())
    if server.by_version != expected:
        yield f"missing {set(expected) - set(server.by_version)}, surplus {set(server.by_version) - set(expected)}"


@promise("Settled marks: the ranges, the newest seq and its nonce are those of the settled operations")
def check_settled_marks(server: ServerRecord) -> Iterator[str]:
    """Compare each replica's summary with its settled operations."""
    for id_, state in server.replicas.items():
        settled = server.settled[id_]
        if state is None:
            if settled:
                yield f"{id_} is unknown and has settled operations"
            continue
        in_ranges = [seq for first, last in state.settled_ranges for seq in range(first, last + 1)]
        newest = max(settled, default=0)
        if in_ranges != sorted(settled):
            yield f"{id_}: ranges {state.settled_ranges}, settled {_ranges(sorted(settled))}"
        if state.newest_seq != newest or (newest and state.newest_nonce != settled[newest].nonce):
            yield f"{id_}: newest seq {state.newest_seq}, settled {_ranges(sorted(settled))}"


@promise("Sole writer: the mark is on objects only that their creator's own operations alone have made")
def check_sole_writers(server: ServerRecord, committed: Mapping[str, Committed]) -> Iterator[str]:
    """Look at every change since the creation of each marked object."""
    for key, state in server.objects.items():
        if not state.sole_writer:
            continue
        creator = str(UUID(bytes=state.creator))
        for change in server.history.changes_to[key]:
            if change.version < state.created:
                continue
            operation = committed[creator].operations.get(change.seq)
            if change.replica != state.creator or change.by_hook or operation is None:
                yield f"{key} was written at {change.version} by another or by a hook"
            elif not same(decode_patch(change.patch), operation.decoded_patch()):
                yield f"{key} was written at {change.version} with another patch than the operation's"
            elif operation.decoded_patch().has_intents:
                yield f"{key} was written at {change.version} with an intent"


@promise("References: what an object refers to is there, if the schema says what becomes of it otherwise")
def check_references(server: ServerRecord, schema: Schema) -> Iterator[str]:
    """Look up what all objects refer to."""
    objects = server.visible()
    for key, (version, attributes) in objects.items():
        binding = {one.attribute for one in schema.references(key[0]) if one.on_delete != "keep"}
        for attribute, target in schema.referenced(key[0], attributes):
            if attribute in binding and target not in objects:
                yield f"{key} at {version} refers to {target} by {attribute!r}, which is not there"


# --- the replica's view -----------------------------------------------------------------


@promise("View: an object is its base with every operation replayed that is pending or applied above the base")
def check_view(
    history: Past,
    replica: ReplicaRecord,
    committed: Committed,
    *,
    others: Collection[Past] = (),
    knows_outcomes: bool = True,
) -> Iterator[str]:
    """
    Make the view anew from the server's history and the committed operations.

    Args:
        history: The server's.
        replica: What is on disk.
        committed: The operations.
        others: Histories that the server had before it was put back; what is held may be of them.
        knows_outcomes: Whether the outcomes that the replica knows are those of *history*.
    """
    for key in dict.fromkeys([*replica.keys, *committed.seqs_of]):
        unconfirmed = replica.unconfirmed.get(key, [])
        shown, held = replica.view.get(key), replica.held(key)
        if shown is not None and shown.dirty is not bool(unconfirmed):
            yield f"{key} is marked dirty={shown.dirty}, unconfirmed are {unconfirmed}"
        if not unconfirmed and key in replica.base:
            yield f"{key} has a base entry and nothing unconfirmed"
        base: Attributes | None = None
        if held is not None:
            base = decode_map(held.attributes)
        if held is not None and history.follows(key[0]) and not _was_ever((history, *others), key, held.version, base):
            yield f"{key} is held at {held.version} as {base}, the server had {history.at(key, held.version)}"
        for seq, _ in unconfirmed:
            base = replayed(base, committed.operations[seq])
        if unconfirmed and not same(base, None if shown is None else decode_map(shown.attributes)):
            yield f"{key} is shown as {shown}, base and {unconfirmed} make {base}"
        if history.follows(key[0]) and knows_outcomes:
            yield from _wrongly_replayed(key, held, history, replica, committed)


@promise("View: nothing of a download shows before all of it does")
def check_nothing_shows(before: Mapping[Key, ViewRecord], shown: Mapping[Key, ViewRecord]) -> Iterator[str]:
    """Compare what was shown before a step of a publication that is not over with what is after it."""
    for key in dict.fromkeys([*before, *shown]):
        if before.get(key) != shown.get(key):
            yield f"{key} showed as {before.get(key)}, and shows as {shown.get(key)} before all is there"


@promise("View: what a user commits while a download comes into view shows at once, and nothing else")
def check_commits_show(
    before: Mapping[Key, ViewRecord], operations: Iterable[Operation], shown: Mapping[Key, ViewRecord]
) -> Iterator[str]:
    """Compare what is shown with what the user's operations make of what was."""
    expected = {key: decode_map(one.attributes) for key, one in before.items()}
    for operation in operations:
        attributes = replayed(expected.pop(operation.key, None), operation)
        if attributes is not None:
            expected[operation.key] = attributes
    for key in dict.fromkeys([*expected, *shown]):
        found = None if (record := shown.get(key)) is None else decode_map(record.attributes)
        if not same(expected.get(key), found):
            yield f"{key} shows as {found}, its user made {expected.get(key)} of it"


@promise("Incarnation: an operation names the version that its author sees, and none of an object of his own making")
def check_versions_shown(replica: ReplicaRecord, committed: Committed) -> Iterator[str]:
    """Look at the version that the next operation on each object would name."""
    for key, shown in replica.view.items():
        unconfirmed, held = replica.unconfirmed.get(key, []), replica.held(key)
        seen = 0 if held is None or _creates(unconfirmed, committed) else held.version
        if shown.version != seen:
            yield f"{key} is shown with version {shown.version}, what its author sees is of version {seen}"


@promise("Cursor behind state: whatever the server had at the cursor's version, the replica has, or something newer")
def check_cursor(history: Past, replica: ReplicaRecord) -> Iterator[str]:
    """Compare each object that the replica holds with what the server had at the cursor."""
    if replica.cursor is None:
        return
    version = replica.cursor.version
    if version > history.version:
        yield f"the cursor is at {version}, the server at {history.version}"
    for key in dict.fromkeys([*history.keys, *replica.keys]):
        if not history.follows(key[0]):
            continue
        held = replica.held(key)
        if held is None:
            if not history.was_absent(key, version):
                yield f"{key} is not held, the server has had it ever since {version}"
        else:
            following = history.next_after(key, held.version)
            if following is not None and following <= version:
                yield f"{key} is held at {held.version}, changed at {following}, and the cursor is at {version}"
    for key, unconfirmed in replica.unconfirmed.items():
        for seq, applied in unconfirmed:
            # The deletion of what was gone already has no version of its own: it may linger without effect.
            if 0 < applied <= version and history.at(key, applied) is not None and history.follows(key[0]):
                yield f"{key}: seq {seq} is replayed, applied at {applied}, and the cursor is at {version}"


@promise("Cursor: it only moves forward")
def check_cursor_moves_forward(before: int, after: int) -> Iterator[str]:
    """Compare two versions that a replica's cursor named, one after the other."""
    if after < before:
        yield f"from {before} to {after}"


@promise("Fresh: what a mode covers is afterwards as the server had it during the session, or newer")
def check_fresh(history: Past, replica: ReplicaRecord, keys: Collection[Key], *, since: int) -> Iterator[str]:
    """Compare objects with the states that the server had from version *since* on."""
    for key in keys:
        if not history.follows(key[0]):
            continue
        held = replica.held(key)
        if held is None:
            if not history.was_absent(key, since):
                yield f"{key} is not held, the server has had it ever since {since}"
        elif held.version < since:
            following = history.next_after(key, held.version)
            if following is not None and following <= since:
                yield f"{key} is held at {held.version}, changed at {following}; the session was at {since}"


@promise("Private: what is sent of an object is what its receiver may read of it")
def check_private(history: Past, page: sync_pb2.SnapshotPage) -> Iterator[str]:
    """Compare the snapshots of a page with what may be read of those versions."""
    for one in page.snapshots:
        key, sent = (one.entity, one.id), decode_map(one.attributes)
        if not same(sent, history.at(key, one.version)):
            yield f"{key} at {one.version} is sent as {sent}, readable is {history.at(key, one.version)}"


@promise("No poison: one synchronization settles everything that can be settled")
def check_uploaded(replica: ReplicaRecord, seqs: Collection[int], not_ready: Collection[int]) -> Iterator[str]:
    """Look for operations that a complete synchronization left pending without a word."""
    for seq in seqs:
        if seq in replica.pending and seq not in not_ready:
            yield f"seq {seq} is still pending, and was not reported as not ready"


@promise("Projection: after a complete synchronize-all, local state is the server's, with pending operations on top")
def check_converged_when_quiet(
    server: ServerRecord, replica: ReplicaRecord, not_ready: Collection[int], eyes: Eyes | None = None
) -> Iterator[str]:
    """Compare the replica with what the server shows it: all objects, or what *eyes* see of them."""
    if left := [seq for seq in replica.pending if seq not in not_ready]:
        yield f"pending, and not reported as not ready: {left}"
    for key, unconfirmed in replica.unconfirmed.items():
        if applied := [one for one in unconfirmed if one[1]]:
            yield f"{key} still replays applied operations: {applied}"
    visible = server.visible()
    for key in dict.fromkeys([*visible, *replica.keys]):
        held = replica.held(key)
        if eyes is not None:
            if (
                eyes.mode(key[0]) is DownloadMode.NOTHING_CLEAR
                and held is not None
                and not replica.unconfirmed.get(key)
            ):
                yield f"{key} should have been cleared"
            if not eyes.downloads(key[0]):
                continue
            version, attributes = visible.pop(key, (0, None))
            if (seen := eyes.shown(key[0], attributes)) is not None:
                visible[key] = version, seen
        local = None if held is None else (held.version, decode_map(held.attributes))
        there = visible.get(key)
        if (local is None) is not (there is None) or (
            local is not None and there is not None and not (local[0] == there[0] and same(local[1], there[1]))
        ):
            yield f"{key}: the server has {there}, the replica {local}"
    if not replica.pending and (replica.base or replica.unconfirmed):
        yield f"nothing is pending, and there are {len(replica.base)} bases, {len(replica.unconfirmed)} unconfirmed"


# --- all of them ------------------------------------------------------------------------


def check_server(server: ServerRecord, committed: Mapping[str, Committed]) -> None:
    """Check what holds of a server's store at any moment."""
    check_change_log(server)
    check_by_version(server)
    check_settled_marks(server)
    check_sole_writers(server, committed)


def check_replica(
    server: ServerRecord,
    replica: ReplicaRecord,
    committed: Committed,
    *,
    seen: Past | None = None,
    merging: Collection[str] = (),
    lost: Collection[int] = (),
) -> None:
    """Check what holds at any moment between a server and a replica, which knows the history as *seen*."""
    seen = seen or server.history
    check_log(replica, committed)
    check_settled_once(server, replica, committed, merging, lost=lost)
    check_failures(server, replica, committed)
    check_order(server, replica.replica_id, committed, lost)
    check_groups(server, replica.replica_id, committed, lost=lost)
    check_view(seen, replica, committed)
    check_versions_shown(replica, committed)
    check_cursor(seen, replica)


def check_everything(
    server: ServerRecord, replicas: Mapping[str, ReplicaRecord], committed: Mapping[str, Committed]
) -> None:
    """Check what holds at any moment of a server and its replicas, by replica id."""
    check_server(server, committed)
    for id_, replica in replicas.items():
        check_replica(server, replica, committed[id_])


# --- helpers ----------------------------------------------------------------------------


def _settled_twice_or_never(replica: ReplicaRecord, committed: Committed) -> Iterator[str]:
    for seq in committed.operations:
        is_pending, is_settled = seq in replica.pending, seq in replica.outcomes
        if is_pending and is_settled:
            yield f"seq {seq} is pending and settled on its replica"
        if not is_pending and not is_settled and seq in replica.log:
            yield f"seq {seq} is neither pending nor settled on its replica"


def _is_overwritten(change: Change, operation: Operation) -> bool:
    """Tell whether an operation sets what the service itself set."""
    if UUID(bytes=change.replica).int or change.kind is not OperationKind.UPDATE:
        return False
    return not decode_patch(change.patch).set.keys().isdisjoint(operation.decoded_patch().set)


def _was_ever(histories: Iterable[Past], key: Key, version: int, attributes: Attributes | None) -> bool:
    """Tell whether an object was changed to this at a version, in one of several histories."""
    return any(one.version_at(key, version) == version and same(attributes, one.at(key, version)) for one in histories)


def _is_collected(newest: Change, server: ServerRecord) -> bool:
    return newest.kind is OperationKind.DELETE and newest.version <= server.collected


def _misapplied(
    operation: Operation, settled: Settled, changes: list[Change], history: History, *, is_merged: bool
) -> Iterator[str]:
    seq = operation.seq
    own = [change for change in changes if not change.by_hook]
    if settled.failure_id:
        if changes:
            yield f"seq {seq} failed, and changed {[one.version for one in changes]}"
        return
    if not own:
        if operation.kind is not OperationKind.DELETE or history.at(operation.key, settled.version) is not None:
            yield f"seq {seq} ({operation.kind.name}) is applied at {settled.version}, and no change says so"
        return
    if len(own) > 1:
        yield f"seq {seq} was applied {len(own)} times: {[one.version for one in own]}"
    if (own[0].version, own[0].key) != (settled.version, operation.key) or (
        own[0].kind is not operation.kind and not is_merged
    ):
        yield f"seq {seq} is applied at {settled.version}, its change is {own[0]}"


def _outcome_of(settled: Settled) -> tuple[int, str]:
    return settled.version, str(UUID(bytes=settled.failure_id)) if settled.failure_id else ""


def _lost_payload(
    seq: int, settled: Settled, failure: failure_pb2.SynchronizationFailure, committed: Committed, place: str
) -> Iterator[str]:
    operation = committed.operations[seq]
    if settled.culprit and failure.operation != committed.data[seq]:
        yield f"seq {seq}: the record on {place} holds another payload"
    if settled.culprit and (failure.entity, failure.object_id) != operation.key:
        yield f"seq {seq} on {operation.key}: the record on {place} names {failure.entity} {failure.object_id!r}"
    if operation.group is not None:
        first = operation.group.id
        members = [committed.data[member] for member in range(first, first + operation.group.size)]
        if list(failure.group_operations) != members:
            yield f"seq {seq}: the record on {place} does not hold the whole group"
    elif failure.group_operations:
        yield f"seq {seq}: the record on {place} speaks of a group"


def _before(change: Change, after: Attributes | None) -> Attributes | None:
    if change.kind is OperationKind.CREATE:
        return None
    if change.kind is OperationKind.DELETE:
        return decode_map(change.before)
    replaced, were_absent = decode(change.before)
    kept = {name: value for name, value in (after or {}).items() if name not in were_absent}
    return {**kept, **replaced}


def _wrong_state(key: Key, state: ObjectState, newest: Change, creation: Change, history: History) -> Iterator[str]:
    expected = history.at(key, newest.version)
    if state.version != newest.version:
        yield f"{key} is at {state.version}, its newest change at {newest.version}"
    if (state.created, state.creator) != (creation.version, creation.replica):
        yield f"{key} says it was created at {state.created}, it was at {creation.version}"
    if state.deleted is not (expected is None):
        yield f"{key} is marked deleted={state.deleted}, its changes make {expected}"
    elif not state.deleted and not same(decode_map(state.attributes), expected):
        yield f"{key} is {decode_map(state.attributes)}, its changes make {expected}"


def _wrongly_replayed(
    key: Key, held: ViewRecord | None, history: Past, replica: ReplicaRecord, committed: Committed
) -> Iterator[str]:
    """Compare the operations that are replayed on an object with those that have to be."""
    replayed_at = dict(replica.unconfirmed.get(key, []))
    for seq in committed.seqs_of.get(key, []):
        outcome, applied = replica.outcomes.get(seq), replayed_at.pop(seq, None)
        if seq in replica.pending:
            if applied != 0:
                yield f"{key}: seq {seq} is pending and not replayed as such ({applied})"
        elif outcome is None or outcome.failure_id:
            if applied is not None:
                yield f"{key}: seq {seq} is replayed ({applied}), its outcome is {outcome}"
        elif applied is not None:
            if applied != outcome.version or (held is not None and applied <= held.version):
                yield f"{key}: seq {seq} is replayed as applied at {applied} on {held}, its outcome is {outcome}"
        elif held is None:
            if not history.was_absent(key, outcome.version):
                yield f"{key}: seq {seq}, applied at {outcome.version}, has vanished from the view"
        elif held.version < outcome.version and history.at(key, outcome.version) is not None:
            yield f"{key}: seq {seq}, applied at {outcome.version}, is not replayed on {held}"
    if replayed_at:
        yield f"{key} replays operations of other objects: {replayed_at}"


def _shows_same(one: ViewRecord | None, other: ViewRecord | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.attributes == other.attributes or same(decode_map(one.attributes), decode_map(other.attributes))


def _creates(unconfirmed: list[tuple[int, int]], committed: Committed) -> bool:
    """Tell whether what is shown is an object that the replica itself created, whatever its base is."""
    return any(committed.operations[seq].kind is OperationKind.CREATE for seq, _ in unconfirmed)


def _is_justified(
    reason: FailureReason,
    operation: Operation,
    when: Settlement,
    server: ServerRecord,
    rules: Rules,
) -> bool:
    history, key, business, eyes = server.history, operation.key, rules.business, rules.eyes
    states = list(history.states_between(key, when.before, when.after))
    seen = [rules.readable(key[0], state) for state in states]
    if reason in (FailureReason.HOOK_REJECTED, FailureReason.HOOK_ERROR):
        return rules.may_hooks_refuse(reason, operation, states)
    if reason in (FailureReason.FILE_MISSING, FailureReason.TOO_LARGE):
        return rules.may_lack_contents(reason, operation)
    if operation.group is not None:
        return True  # what its group had done before it is gone without a trace
    match reason:
        case FailureReason.ALREADY_EXISTS:
            return operation.kind is OperationKind.CREATE and any(state is not None for state in states)
        case FailureReason.OBJECT_GONE:
            # Of another incarnation than its author saw: created since, by somebody else.
            created = (one.version for one in history.changes_to.get(key, ()) if one.kind is OperationKind.CREATE)
            return None in seen or any(operation.base_version < version <= when.after for version in created)
        case FailureReason.DANGLING_REFERENCE:
            if operation.kind is not OperationKind.CREATE and None in seen:
                return True
            # Members that were there are written too.
            targets = rules.schema.referenced(operation.entity, _written(operation, states))
            return any(rules.readable(target[0], history.at(target, when.after)) is None for _, target in targets)
        case FailureReason.VALIDATION_FAILED | FailureReason.SCHEMA_MISMATCH:
            return any(_misfits(state, operation, business) for state in states)
        case FailureReason.UNIQUE_VIOLATED:
            return business.is_strict and _is_taken(operation, states, when, history)
        case FailureReason.REFERENCED:
            return operation.kind is OperationKind.DELETE and business.restricts(operation.entity)
        case FailureReason.CONFLICT:
            return operation.entity in business.policies and any(
                change.version > operation.base_version for change in history.changes_to.get(key, ())
            )
        case FailureReason.ACCESS_DENIED | FailureReason.ATTRIBUTE_DENIED:
            return eyes is not None and not all(_may(eyes, operation, state) for state in states)
        case FailureReason.MALFORMED:
            return operation.kind is OperationKind.DELETE and bool(operation.patch)
        case FailureReason.SUPERSEDED:
            return rules.has_copies
        case _:
            return False


def _may(eyes: Eyes, operation: Operation, state: Attributes | None) -> bool:
    try:
        return eyes.may(operation, state)
    except Misfit:
        return True


def _is_taken(operation: Operation, states: list[Attributes | None], when: Settlement, history: History) -> bool:
    """Tell whether the unique value that an operation gives its object was another's in its transaction."""
    values = [after["n"] for state in states if (after := _after(operation, state)) and "n" in after]
    others = (key for key in history.keys if key[0] == operation.entity and key != operation.key)
    return any(
        state is not None and any(same(state.get("n"), value) for value in values)
        for key in others
        for state in history.states_between(key, when.before, when.after)
    )


def _after(operation: Operation, state: Attributes | None) -> Attributes | None:
    patch = operation.decoded_patch()
    if operation.kind is OperationKind.CREATE:
        return dict(patch.set)
    return None if state is None else patched(state, patch)


def _is_caused(  # noqa: PLR0917 - two failures, and where what they are about is to be looked up
    failure: failure_pb2.SynchronizationFailure,
    replica_id: str,
    committed: Committed,
    settlements: Mapping[tuple[str, int], Settlement],
    server: ServerRecord,
    rules: Rules,
) -> bool:
    """
    Tell whether a failure that is put down to another one hangs under it rightly.

    The cause is a failure of the same log, settled no later, that kept an object from being created: one that
    the operation, or a member of its commit group, is about or refers to.
    """
    cause = server.failures.get(failure.cause_failure_id)
    if cause is None or cause.replica_id != replica_id:
        return False
    refused = _operations(cause)
    orders = [settlements[replica_id, one.seq].order for one in refused if (replica_id, one.seq) in settlements]
    concerned = _operations(failure)
    own = [settlements[replica_id, one.seq].order for one in concerned]
    if not orders or max(orders) > min(own):
        return False
    needed: set[Key] = {one.key for one in concerned}
    for one in concerned:
        patch = one.decoded_patch()
        for written in (patch.set, patch.add):
            needed.update(target for _, target in rules.schema.referenced(one.entity, written))
    earlier = [one for one in refused if one.kind is OperationKind.CREATE and one.key in needed]
    # An object that was created after all, by a later operation of its author's, is not lacking.
    return any(not _was_created_since(one, concerned, committed, settlements, server, replica_id) for one in earlier)


def _is_of_copy(failure: failure_pb2.SynchronizationFailure, replica_id: str, server: ServerRecord) -> bool:
    """Tell whether a failure, or its cause, was recorded under another id than a replica has now."""
    cause = server.failures.get(failure.cause_failure_id)
    return failure.replica_id != replica_id or (cause is not None and cause.replica_id != replica_id)


def _was_created_since(  # noqa: PLR0917 - two operations, and where they are to be looked up
    refused: Operation,
    concerned: list[Operation],
    committed: Committed,
    settlements: Mapping[tuple[str, int], Settlement],
    server: ServerRecord,
    replica_id: str,
) -> bool:
    """Tell whether the author created the object by another operation, after the refused one and before these."""
    for seq in committed.seqs_of.get(refused.key, ()):
        settled = server.settled[replica_id].get(seq)
        if (
            refused.seq < seq < concerned[0].seq
            and committed.operations[seq].kind is OperationKind.CREATE
            and settled is not None
            and not settled.failure_id
            and settlements[replica_id, seq].order < settlements[replica_id, concerned[0].seq].order
            and server.history.at(refused.key, settlements[replica_id, concerned[0].seq].before) is not None
        ):
            return True
    return False


def _operations(failure: failure_pb2.SynchronizationFailure) -> list[Operation]:
    return [decode_operation(data) for data in failure.group_operations or [failure.operation]]


def _written(operation: Operation, states: list[Attributes | None]) -> Attributes:
    """Return what an operation writes, lists with all that may have been in them."""
    patch = operation.decoded_patch()
    written = dict(patch.set)
    for name, members in patch.add.items():
        present = [member for state in states if state and type(state.get(name)) is list for member in state[name]]
        written[name] = [*present, *members]
    return written


def _misfits(state: Attributes | None, operation: Operation, business: Business) -> bool:
    try:
        after = _after(operation, state)
    except Misfit:
        return True
    return after is not None and business.breaks_rules(operation.entity, after)


def _replayed_seqs(replica: ReplicaRecord) -> set[int]:
    return {seq for entries in replica.unconfirmed.values() for seq, _ in entries}


def _ranges(seqs: Collection[int]) -> str:
    if not seqs:
        return "none"
    return f"{min(seqs)}-{max(seqs)} ({len(seqs)})"
