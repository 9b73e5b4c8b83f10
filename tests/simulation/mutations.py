"""
Known mistakes, put into the product on purpose: a checker that misses one of them checks too little.

Each is a patch of the running code that a tired programmer might have written. The
simulation must find every one; which promise told, and after how many worlds, is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from types import SimpleNamespace
from typing import Any, Final, NamedTuple
from unittest import mock

from tests.simulation.run import run_seed
from tests.simulation.world import STEPS_DEFAULT

from tidelog import FailureReason, MassRemoval, Patch, StorageError, _schema
from tidelog._environment import put_many
from tidelog._keys import pack_position
from tidelog_client import (
    _commit,
    _curtain,
    _lineage,
    _plans,
    _publication,
    _storage,
    _synchronization,
    _synchronizer,
    _view,
)
from tidelog_client import _files as client_files
from tidelog_client._report import PublishedCounts
from tidelog_server import (
    _access,
    _action,
    _applier,
    _author,
    _checkpoints,
    _collection,
    _conflicts,
    _download,
    _engine,
    _file_rules,
    _formers,
    _hooks,
    _integrity,
    _knowledge,
    _lmdb_store,
    _overlay,
    _projection,
    _records,
    _session,
)
from tidelog_server import _files as server_files
from tidelog_server._application import TransientError
from tidelog_server._errors import NotFound
from tidelog_server._file_records import content_record
from tidelog_server._records import Head, ReplicaState, Writes, merged_ranges
from tidelog_server._refusal import Refused
from tidelog_server._units import split_units

SEEDS_MAX: Final = 400
CALM: Final = dict.fromkeys(
    (
        "kill",
        "trap",
        "server trap",
        "weather",
        "token",
        "clock",
        "wishes",
        "collect",
        "fault",
        "trim",
        "restart",
        "burst",
    ),
    0,
)
RESTORES: Final = {"copies": 4, "restore": 3, "back up": 2, "relapse": 0}
ONLY_RESTORES: Final = {
    "copies": 4,
    "restore": 4,
    "back up": 3,
    **dict.fromkeys(("copy", "put aside", "put back", "relapse"), 0),
}

CONTENDED: Final = {"contention": 7}

_Patch = AbstractContextManager[Any]


class Mutation(NamedTuple):
    """
    A mistake.

    Attributes:
        name: What it does, in a few words.
        apply: Makes it, for as long as the context lasts.
        focus: What has to happen more often than usual for the worlds to find it soon.
    """

    name: str
    apply: Callable[[], _Patch]
    focus: Mapping[str, float] = {}


class Caught(NamedTuple):
    """
    How a mistake was found.

    Attributes:
        promise: The promise that was broken, or the error that the product itself raised.
        seed: In which world.
        seed_count: How many worlds it took.
    """

    promise: str
    seed: int
    seed_count: int


# --- the server ---------------------------------------------------------------------------


def _skip_the_dedupe() -> _Patch:
    return mock.patch.object(_engine._Evaluator, "_settled_before", return_value=({}, set()))


def _written(change: Callable[[Writes], Writes]) -> _Patch:
    evaluation = _engine._Evaluator._evaluation

    def changed(self: Any, results: Any) -> Any:
        found = evaluation(self, results)
        return found._replace(writes=change(found.writes))

    return mock.patch.object(_engine._Evaluator, "_evaluation", changed)


def _lose_failures() -> _Patch:
    return _written(lambda writes: writes._replace(failures=[]))


def _lose_settled() -> _Patch:
    return _written(lambda writes: writes._replace(settled=[]))


def _forget_tombstones() -> _Patch:
    return _written(
        lambda writes: writes._replace(
            objects={key: written for key, written in writes.objects.items() if not written[0].deleted}
        )
    )


def _results_before_commit() -> _Patch:
    def write_group(self: Any, group: Any) -> None:
        outcomes: list[Any] = []

        def work(transaction: Any) -> None:
            outcomes[:] = self._run_group(transaction, group)

        with suppress(BaseException):  # that is the mistake
            self._environment.write(work)
        for job, (result, refusal) in zip(group, outcomes or [(None, StorageError())] * len(group), strict=True):
            if refusal is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(refusal)

    return mock.patch.object(_lmdb_store.LmdbStore, "_write_group", write_group)


def _groups_in_parts() -> _Patch:
    return mock.patch.object(
        _engine, "split_units", lambda members: [(one,) for unit in split_units(members) for one in unit]
    )


def _no_fence() -> _Patch:
    begin = _session.begin_upload

    def same_number(*arguments: Any) -> tuple[Writes, ReplicaState]:
        writes, begun = begin(*arguments)
        begun = begun._replace(session_number=1)
        return writes._replace(replica=(arguments[1], begun)), begun

    return mock.patch.object(_session, "begin_upload", same_number)


def _confirm_without_sole_writer() -> _Patch:
    add = _download._Page.add

    def confirming(self: Any, key: Any, state: Any, seen: bytes, **options: Any) -> None:
        add(self, key, state._replace(sole_writer=True), seen, **options)

    return mock.patch.object(_download._Page, "add", confirming)


def _transient_is_failure() -> _Patch:
    call = _hooks.call

    def settling(*arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except TransientError as error:
            raise Refused(FailureReason.HOOK_ERROR, str(error)) from error

    return mock.patch.object(_action, "call", settling)


def _overtake_the_held() -> _Patch:
    hold = _engine._Evaluator._hold

    def forgetting(self: Any, unit: Any, message: str) -> Any:
        found = hold(self, unit, message)
        self._held_keys.clear()
        return found

    return mock.patch.object(_engine._Evaluator, "_hold", forgetting)


def _skip_removals() -> _Patch:
    return mock.patch.object(_download._Page, "add_removal")


def _cursor_at_the_present() -> _Patch:
    complete = _session.Session.complete

    def late(self: Any) -> Any:
        with self._store.read(self._principal.tenant) as reader:
            head: Head = reader.head()
        self._download.head = head
        return complete(self)

    return mock.patch.object(_session.Session, "complete", late)


def _show_hidden_attributes() -> _Patch:
    encoded = _projection.Sight.encoded

    def whole(self: Any, state: Any) -> bytes | None:
        return None if encoded(self, state) is None else state.attributes

    return mock.patch.object(_projection.Sight, "encoded", whole)


def _older_clock_loses() -> _Patch:
    apply = _applier.UnitApplier._apply
    newest: dict[Any, int] = {}

    def by_clock(self: Any, member: Any, position: int, failure: bytes) -> Any:
        operation = member.operation
        if operation is not None:
            if operation.client_time_us < newest.get(operation.key, -(2**62)):
                raise Refused(FailureReason.CONFLICT, "an older edit came late")
            newest[operation.key] = operation.client_time_us
        return apply(self, member, position, failure)

    return mock.patch.object(_applier.UnitApplier, "_apply", by_clock)


def _ranges_without_gaps() -> _Patch:
    def closed(*arguments: Any) -> Any:
        ranges = merged_ranges(*arguments)
        return ((ranges[0][0], ranges[-1][1]),) if ranges else ranges

    return mock.patch.object(_records, "merged_ranges", closed)


def _applied_as(change: Callable[[Patch], Patch]) -> _Patch:
    """Apply another patch than an author's."""
    update = _action.Action.update

    def updating(self: Any, key: Any, patch: Patch, encoded: bytes) -> int:
        if self.depth == 0 and (other := change(patch)) != patch:
            patch, encoded = other, other.encode()
        return update(self, key, patch, encoded)

    return mock.patch.object(_action.Action, "update", updating)


def _double_increments() -> _Patch:
    return _applied_as(
        lambda patch: patch._replace(increment={name: 2 * one for name, one in patch.increment.items()})
    )


def _drop_what_is_unset() -> _Patch:
    return _applied_as(lambda patch: patch._replace(unset=()))


def _drop_members() -> _Patch:
    return _applied_as(lambda patch: patch._replace(add={name: some[:1] for name, some in patch.add.items()}))


def _nothing_is_foreign() -> _Patch:
    return mock.patch.object(_conflicts, "_is_foreign", return_value=False)


def _hooks_are_nobody() -> _Patch:
    is_foreign = _conflicts._is_foreign
    return mock.patch.object(
        _conflicts, "_is_foreign", lambda change, *known: not change.by_hook and is_foreign(change, *known)
    )


def _intents_always_merge() -> _Patch:
    collision = _conflicts.collision
    return mock.patch.object(
        _conflicts,
        "collision",
        lambda change, patch: None if patch is not None and patch.has_intents else collision(change, patch),
    )


def _any_incarnation() -> _Patch:
    return mock.patch.object(_applier.UnitApplier, "_has_seen", return_value=True)


def _create_anything() -> _Patch:
    return mock.patch.object(_access.EntityRights, "check_create")


def _write_anything() -> _Patch:
    return mock.patch.multiple(_access.EntityRights, check_written=mock.DEFAULT, check_update=mock.DEFAULT)


def _become_anything() -> _Patch:
    return mock.patch.object(_access.EntityRights, "check_update")


def _delete_anything() -> _Patch:
    return mock.patch.object(_access.EntityRights, "check_delete")


def _take_unique_values() -> _Patch:
    return mock.patch.object(_integrity.Integrity, "taken", return_value=None)


def _check_no_updates() -> _Patch:
    return mock.patch.object(_schema.Schema, "check_written")


def _refer_to_what_is_hidden() -> _Patch:
    return mock.patch.object(_knowledge.Knowledge, "sees", lambda self, key: self._overlay.exists(key))


def _remove_what_nobody_saw() -> _Patch:
    return mock.patch.object(_download._Scan, "_may_be_known", return_value=True)


def _tell_what_is_hidden() -> _Patch:
    return mock.patch.object(_knowledge.Knowledge, "reads", return_value=True)


def _confirm_half_objects() -> _Patch:
    def add(self: Any, key: Any, state: Any, seen: bytes, **options: Any) -> None:
        add_seen(self, key, state, seen, **{**options, "confirms": True})

    add_seen = _download._Page.add
    return mock.patch.object(_download._Page, "add", add)


def _half_a_rollback() -> _Patch:
    def rollback(self: Any, mark: Any) -> None:
        kept = self.changes[: mark[1] + 1]
        rolled(self, mark)
        self.changes[:] = kept

    rolled = _overlay.Overlay.rollback
    return mock.patch.object(_overlay.Overlay, "rollback", rollback)


# --- copies, restores, and what is forgotten ----------------------------------------------


def _no_checkpoints() -> _Patch:
    return mock.patch.object(_checkpoints.Checkpoints, "contradicts", return_value=False)


def _no_runs() -> _Patch:
    return mock.patch.object(_checkpoints, "lacks", return_value=False)


def _nothing_lost() -> _Patch:
    return mock.patch.object(_storage.Storage, "_settled_outside", return_value=())


def _execute_former_failures() -> _Patch:
    first_try = _engine._Evaluator._first_try

    def unaware(self: Any, unit: Any) -> Any:
        return first_try(self, tuple(member._replace(former=None) for member in unit))

    return mock.patch.object(_engine._Evaluator, "_first_try", unaware)


def _overwrite_after_restore() -> _Patch:
    return mock.patch.object(_applier.UnitApplier, "_check_not_superseded")


@contextmanager
def _trust_any_log() -> Iterator[None]:
    settled_before = _engine._Evaluator._settled_before

    def trusting(self: Any, members: Any) -> Any:
        known = self._reader.settled(self._uploader.replica, [member.seq for member in members])
        taken = [one._replace(nonce=known[one.seq].nonce) if one.seq in known else one for one in members]
        return settled_before(self, taken)

    with (
        mock.patch.object(_synchronization.Synchronization, "_check_log"),
        mock.patch.object(_engine._Evaluator, "_settled_before", trusting),
    ):
        yield


def _fork_in_name_only() -> _Patch:
    def keeping(self: Any, transaction: Any, **_options: Any) -> str:
        return str(self._meta.get(transaction, "replica_id").decode())

    return mock.patch.object(_lineage.Lineage, "fork", keeping)


def _no_guard() -> _Patch:
    return mock.patch.object(_publication.Publication, "_check_removals")


def _guard_the_whole() -> _Patch:
    check_each = _publication.Publication._check_removals

    def check_all(self: Any, *arguments: Any, **options: Any) -> None:
        try:
            check_each(self, *arguments, **options)
        except MassRemoval as error:
            if 2 * sum(error.removed.values()) > sum(error.present.values()):
                raise

    return mock.patch.object(_publication.Publication, "_check_removals", check_all)


def _let_more_go() -> _Patch:
    check = _publication.Publication._check_removals

    def check_late(self: Any, *arguments: Any, **options: Any) -> None:
        unasked_max = _publication.REMOVED_OBJECTS_UNASKED
        with mock.patch.object(_publication, "REMOVED_OBJECTS_UNASKED", 2 * unasked_max + 1):
            check(self, *arguments, **options)

    return mock.patch.object(_publication.Publication, "_check_removals", check_late)


def _ask_whatever_the_cause() -> _Patch:
    return mock.patch.object(_plans.Plans, "states_cause", return_value=False)


def _forget_former_ids() -> _Patch:
    return mock.patch.object(_lineage.Lineage, "_formers", return_value=[])


def _keep_from_copies() -> _Patch:
    return mock.patch.object(_formers.Formers, "notes", return_value={})


def _horizon_stays() -> _Patch:
    start_of = _download.Download.start_of

    def unaware(self: Any, reader: Any, *arguments: Any, **options: Any) -> Any:
        with mock.patch.object(type(reader), "collected", return_value=0):
            return start_of(self, reader, *arguments, **options)

    return mock.patch.object(_download.Download, "start_of", unaware)


def _forget_too_much() -> _Patch:
    def all_of_them(reader: Any, replica: Any, _before_us: int) -> list[int]:
        return [seq for seq, _ in reader.first_settled(replica, _collection.STEP_ENTRIES)]

    return mock.patch.object(_collection, "settled_before", all_of_them)


def _apply_what_is_forgotten() -> _Patch:
    settled_before = _engine._Evaluator._settled_before

    def trusting(self: Any, members: Any) -> Any:
        return settled_before(self, members)[0], set()

    return mock.patch.object(_engine._Evaluator, "_settled_before", trusting)


def _forget_gaps() -> _Patch:
    def old(reader: Any, replica: Any, before_us: int) -> list[int]:
        state = reader.replica(replica)
        found = reader.first_settled(replica, _collection.STEP_ENTRIES)
        collected = reader.collected()
        return [seq for seq, one in found if state.retired or _collection._is_old(reader, one, collected, before_us)]

    return mock.patch.object(_collection, "settled_before", old)


def _trust_old_bases() -> _Patch:
    sight = _author.Author.sight
    return mock.patch.object(
        _author.Author, "sight", lambda self, *operation: sight(self._replace(old_bases=None), *operation)
    )


# --- the replica --------------------------------------------------------------------------


def _repeat_nonces() -> _Patch:
    return mock.patch.object(
        _commit, "struct", SimpleNamespace(unpack=lambda _format, data: range(1, len(data) // 8 + 1))
    )


def _lose_staged_pages() -> _Patch:
    append = _publication._append_pages
    return mock.patch.object(
        _publication,
        "_append_pages",
        lambda transaction, database, pages: append(transaction, database, pages[:-1] or pages),
    )


def _cursor_first() -> _Patch:
    publish = _publication.Publication.publish

    def early(self: Any, pages: Any, object_count: int, *, complete: Any, **options: Any) -> Any:
        self._meta.write(cursor=complete.cursor, cursor_version=pack_position(complete.version))
        return publish(self, pages, object_count, complete=complete, **options)

    return mock.patch.object(_publication.Publication, "publish", early)


def _no_rebase() -> _Patch:
    def over(self: Any, transaction: Any, *snapshot: Any, force: bool, **_options: Any) -> None:
        self.put_clean_snapshots(transaction, [snapshot], force=force)

    return mock.patch.object(_view.View, "put_snapshot", over)


def _settle_before_durable() -> _Patch:
    def unsaved(self: Any, *arguments: Any) -> Any:
        class Undone(Exception):
            pass

        counts: list[Any] = []

        def work(transaction: Any) -> None:
            counts.append(self._settle(transaction, *arguments))
            raise Undone

        work.__qualname__ = "Storage.settle"
        with suppress(Undone):
            self.environment.write(work)
        return counts[-1]

    return mock.patch.object(_storage.Storage, "settle", unsaved)


def _lose_local_failures() -> _Patch:
    record = _storage.Storage._record_failure

    def unrecorded(self: Any, transaction: Any, members: Any) -> Any:
        failure = record(self, transaction, members)
        transaction.delete(failure.id.encode(), db=self._failures)
        return failure

    return mock.patch.object(_storage.Storage, "_record_failure", unrecorded)


def _keep_refused_changes() -> _Patch:
    return mock.patch.object(_view.View, "settle_refused")


def _publish_half() -> _Patch:
    step = _publication.Publication._publish_step

    def half(self: Any, transaction: Any, end: Any) -> Any:
        counts = step(self, transaction, end)
        publisher = self._publisher(transaction, end)
        transaction.drop(self._incoming, delete=False)
        removed, _ = self._end_step(transaction, publisher, end)
        self._view.unveil(transaction)
        return counts.plus(PublishedCounts(removed=removed))

    half.__qualname__ = step.__qualname__
    return mock.patch.object(_publication.Publication, "_publish_step", half)


def _draw_no_curtain() -> _Patch:
    return mock.patch.object(_view.View, "draw")


def _write_only_in_front() -> _Patch:
    write = _view.View._write_behind

    def in_front(self: Any, *arguments: Any) -> None:
        with mock.patch.object(self, "_rebuild"):
            write(self, *arguments)

    return mock.patch.object(_view.View, "_write_behind", in_front)


def _hang_up_again() -> _Patch:
    def hang(self: Any, transaction: Any, items: Any) -> None:
        put_many(transaction, self.database, list(items))

    return mock.patch.object(_curtain.Curtain, "hang", hang)


def _keep_the_unseen() -> _Patch:
    end = _publication._Publisher.end

    def lenient(self: Any) -> Iterator[bool]:
        self._end = self._end._replace(track_seen=False)
        return end(self)

    return mock.patch.object(_publication._Publisher, "end", lenient)


def _keep_foreign_pages() -> _Patch:
    return mock.patch.object(_publication.Publication, "discard_staged")


def _ignore_removals() -> _Patch:
    return mock.patch.object(_view.View, "remove", return_value=False)


def _double_intents() -> _Patch:
    return mock.patch.object(_view.View, "_drop_confirmed")


def _fold_too_early() -> _Patch:
    settle = _view.View.settle_applied

    def folding(self: Any, transaction: Any, applied: Any, **options: Any) -> None:
        settle(self, transaction, applied, **options)
        for key, _, version in applied:
            self.drop_stale(transaction, key, version)

    return mock.patch.object(_view.View, "settle_applied", folding)


def _trim_what_is_needed() -> _Patch:
    return mock.patch.object(_view.View, "is_needed", return_value=False)


def _two_at_once() -> _Patch:
    return mock.patch.object(_synchronizer, "_acquire", return_value=None)


# --- files --------------------------------------------------------------------------------


def _refer_to_anything() -> _Patch:
    return mock.patch.multiple(_file_rules.FileRules, check_authored=mock.DEFAULT, check_there=mock.DEFAULT)


def _refer_to_whatever_is_there() -> _Patch:
    return mock.patch.object(_file_rules.FileRules, "reads", return_value=True)


def _collect_what_is_needed() -> _Patch:
    def is_old(reader: Any, sha256: bytes, before_us: int) -> bool:
        record = content_record(sha256, reader.index)
        return record is not None and record.time_us < before_us

    return mock.patch.object(_collection, "is_unneeded", is_old)


def _read_any_file() -> _Patch:
    def size(self: Any, principal: Any, sha256: bytes, key: Any) -> int:
        with self._store.read(principal.tenant) as reader:
            record = content_record(sha256, reader.index)
        if record is None:
            raise NotFound("no such file", reason="FILE_NOT_FOUND")
        return record.size

    return mock.patch.object(server_files.Files, "_readable_size", size)


def _operations_before_contents() -> _Patch:
    return mock.patch.object(client_files.Files, "_note_operation")


def _delete_shared_contents() -> _Patch:
    return mock.patch.object(client_files.Files, "_is_used", return_value=False)


def _keep_unneeded_contents() -> _Patch:
    return mock.patch.object(client_files.Files, "collect", return_value=0)


def _pages_without_end() -> _Patch:
    begin = _download._Page.__init__

    def roomy(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        self.objects_left = 1_000_000

    return mock.patch.object(_download._Page, "__init__", roomy)


def _send_without_waiting() -> _Patch:
    next_batch = _synchronization.Synchronization._next_batch

    def next_two(self: Any) -> Any:
        return next_batch(self) + (next_batch(self) if self._in_flight else [])

    return mock.patch.object(_synchronization.Synchronization, "_next_batch", next_two)


MUTATIONS: Final = (
    Mutation("the server applies again what it has settled", _skip_the_dedupe),
    Mutation("the server loses failure records", _lose_failures),
    Mutation("the server changes objects and does not note what it settled", _lose_settled),
    Mutation("the server forgets tombstones", _forget_tombstones),
    Mutation("results leave the server before they are durable", _results_before_commit),
    Mutation("a commit group is applied in parts", _groups_in_parts),
    Mutation(
        "a session that was superseded goes on", _no_fence, {"fault": 4, "duplicate": 8, "late": 8, "advance": 0.4}
    ),
    Mutation("an object is confirmed to who is not its sole writer", _confirm_without_sole_writer),
    Mutation("an outage makes a failure record", _transient_is_failure, {"weather": 5}),
    Mutation("an operation overtakes one that is held", _overtake_the_held),
    Mutation("the server skips removals", _skip_removals),
    Mutation(
        "the cursor is where the server is, not where the download ended",
        _cursor_at_the_present,
        {"service": 10, "third party": 5},
    ),
    Mutation("hidden attributes are sent", _show_hidden_attributes),
    Mutation("an edit with an older clock loses", _older_clock_loses),
    Mutation("the settled ranges have no gaps", _ranges_without_gaps),
    Mutation("increments are applied twice as large", _double_increments),
    Mutation("what is unset stays", _drop_what_is_unset),
    Mutation("only the first of several members is added", _drop_members),
    Mutation("nothing that others did is a conflict", _nothing_is_foreign, CONTENDED),
    Mutation("what the hooks of others wrote is no conflict", _hooks_are_nobody, CONTENDED),
    Mutation("an intent overwrites what others have set", _intents_always_merge, CONTENDED),
    Mutation("an edit hits another object than its author saw", _any_incarnation, CONTENDED),
    Mutation("everybody may create everything", _create_anything, CONTENDED),
    Mutation("everybody may write everything", _write_anything, CONTENDED),
    Mutation("an object may become what its author may not write", _become_anything, CONTENDED),
    Mutation("everybody may delete what he sees", _delete_anything, CONTENDED),
    Mutation("a unique value is another object's too", _take_unique_values),
    Mutation("edits need not fit the schema", _check_no_updates),
    Mutation("one may write and refer to what one does not see", _refer_to_what_is_hidden, CONTENDED),
    Mutation("objects are removed of which nobody knew", _remove_what_nobody_saw, CONTENDED),
    Mutation("a refusal says what hidden attributes hold", _tell_what_is_hidden, CONTENDED),
    Mutation("an object is confirmed of which a part is hidden", _confirm_half_objects, CONTENDED),
    Mutation("a change of a refused operation stays in the change log", _half_a_rollback),
    Mutation("every commit takes the same nonces", _repeat_nonces),
    Mutation("the last of several pages is not staged", _lose_staged_pages),
    Mutation("the cursor moves before the data", _cursor_first),
    Mutation("a snapshot replaces what is pending", _no_rebase),
    Mutation("a replica counts as settled what it has not written", _settle_before_durable),
    Mutation("a replica loses failure records", _lose_local_failures),
    Mutation("a refused change stays in the view", _keep_refused_changes),
    Mutation("a download is published by half", _publish_half),
    Mutation("a download that takes steps shows with each of them", _draw_no_curtain),
    Mutation("what is committed while a download comes into view is lost behind it", _write_only_in_front),
    Mutation("what is shown meanwhile changes with each step", _hang_up_again),
    Mutation("a reconciliation removes nothing", _keep_the_unseen),
    Mutation(
        "pages that were staged for another cursor are published", _keep_foreign_pages, {"wishes": 8, "fault": 2}
    ),
    Mutation("a replica skips removals", _ignore_removals),
    Mutation("an applied intent is replayed on the snapshot that contains it", _double_intents),
    Mutation("an applied change is folded before its snapshot is there", _fold_too_early),
    Mutation("a log entry is trimmed that the view needs", _trim_what_is_needed),
    Mutation("two synchronizations run at once", _two_at_once),
    Mutation("nobody notices that the server's store was put back", _no_checkpoints),
    Mutation("what is settled is not missed when its history is not", _no_runs, RESTORES),
    Mutation("a replica offers nothing again", _nothing_lost),
    Mutation("what had failed before a restore is executed", _execute_former_failures, ONLY_RESTORES),
    Mutation(
        "what is offered again overwrites what was done since",
        _overwrite_after_restore,
        {**ONLY_RESTORES, **CALM, "restore": 0, "set back": 20, "act": 2, "synchronize": 3},
    ),
    Mutation("nobody is asked before most of an entity goes", _no_guard, RESTORES),
    Mutation("the guard looks at all entities together", _guard_the_whole, RESTORES),
    Mutation("the guard lets twice as many objects go", _let_more_go, RESTORES),
    Mutation("consent is asked for although the server says why", _ask_whatever_the_cause),
    Mutation("an operation is taken for the one that another copy has in its place", _trust_any_log),
    Mutation("a copy keeps its id", _fork_in_name_only),
    Mutation("a copy does not say whose it is", _forget_former_ids),
    Mutation("what a copy settled is not noted for the others", _keep_from_copies, {"copies": 4}),
    Mutation("a cursor from before what is collected is served", _horizon_stays, {"collect": 5}),
    Mutation("outcomes are forgotten that may be asked for", _forget_too_much, {"collect": 5}),
    Mutation("outcomes are forgotten behind a gap", _forget_gaps, {"collect": 5}),
    Mutation("a base of before a restore is taken for one of today", _trust_old_bases, {**RESTORES, **CONTENDED}),
    Mutation("what is forgotten is applied once more", _apply_what_is_forgotten, {"collect": 5}),
    Mutation("a page has all that there is", _pages_without_end),
    Mutation("a replica sends without waiting for answers", _send_without_waiting),
    Mutation("nobody looks whether the content is there", _refer_to_anything),
    Mutation("whoever knows a hash may refer to the content", _refer_to_whatever_is_there),
    Mutation("a content is collected that something refers to", _collect_what_is_needed),
    Mutation("whoever knows a hash gets the content", _read_any_file, {"pry": 5}),
    Mutation("operations are sent, and their contents are not", _operations_before_contents),
    Mutation("a replica deletes a content that another object still refers to", _delete_shared_contents),
    Mutation("a replica keeps contents that nobody refers to", _keep_unneeded_contents),
)


def catch(index: int, seeds: Sequence[int], *, steps: int = STEPS_DEFAULT) -> Caught | None:
    """Run worlds with a mistake until one of them finds it, and tell which promise told. None: none found it."""
    mutation = MUTATIONS[index]
    with mutation.apply():
        for count, seed in enumerate(seeds, start=1):
            outcome = run_seed(seed, steps=steps, focus=mutation.focus)
            if outcome.error:
                return Caught(outcome.broken, seed, count)
    return None
