"""
What was applied: whether it says what its author said, and whether it had to be refused.

Other checkers ask of what was refused whether it had to be. Here what was applied is held
against a second account of the rules: what an operation means, who else wrote what it
writes, what its author may do, what the schema and the hooks let pass. All of it is told
from the change log, from the operations as they were committed, and from who committed them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from tests.simulation.application import Business, tidied
from tests.simulation.model import Attributes, Key, Misfit, patched, same
from tests.simulation.promises import Settlement, promise
from tests.simulation.records import History
from tests.simulation.rights import Eyes

from tidelog._file_reference import FileReference
from tidelog._operation import Operation, OperationKind
from tidelog._patch import Patch, decode_patch
from tidelog._schema import Schema
from tidelog_server._records import Change, Settled

Place = tuple[str, int]


class Commit(NamedTuple):
    """
    An operation, and what is known of it by one who saw it committed.

    Attributes:
        operation: The operation.
        eyes: What its author may do.
        life: Of which of the store's lives its base version is. None: it cannot be told.
        is_translated: Whether the server can be told that the base version is of an earlier life.
        replica: The id of the replica then.
    """

    operation: Operation
    eyes: Eyes
    life: int | None = 0
    is_translated: bool = True
    replica: bytes = b""


class Applied(NamedTuple):
    """
    An operation that was applied.

    Attributes:
        commit: The operation.
        change: What it did to its object.
        settlement: When it was settled.
        before: What its object was before.
        after: What it was then.
        said: What the operation says, without files whose contents nobody has any more.
    """

    commit: Commit
    change: Change
    settlement: Settlement
    before: Attributes | None
    after: Attributes | None
    said: Patch

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left out of it."""
        return self.commit.operation.kind is OperationKind.DELETE or same(
            self.said.set, self.commit.operation.decoded_patch().set
        )


@dataclass(frozen=True)
class Account:
    """
    What is to be looked at.

    Attributes:
        history: The change log.
        business: The application.
        marks: What was settled, by replica id and seq.
        settlements: When.
        commits: All operations that anybody ever committed, by nonce.
        logs: The nonces of each log that there ever was: what stands in one log is of one author.
        restored_at: Each time the store was put back, the version at which it was.
        has_copies: Whether directories are copied, and the store put back: what is whose cannot always be told then.
        has_lost_contents: Whether what is offered again may lack its files.
    """

    history: History
    business: Business
    marks: Mapping[Place, Settled]
    settlements: Mapping[Place, Settlement]
    commits: Mapping[int, Commit]
    logs: Collection[AbstractSet[int]] = ()
    restored_at: tuple[int, ...] = ()
    has_copies: bool = False
    has_lost_contents: bool = False

    def applied(self) -> Iterator[Applied]:
        """Yield what was applied of the operations, in order."""
        for change in self.history.changes:
            nonce = self.nonce_of(change)
            if change.by_hook or nonce not in self.commits:
                continue
            commit = self.commits[nonce]
            yield Applied(
                commit,
                change,
                self.settlements[_place(change)],
                self.history.at(change.key, change.version - 1),
                self.history.at(change.key, change.version),
                self._said(commit.operation, change),
            )

    def nonce_of(self, change: Change) -> int:
        """Return the nonce of the operation that caused a change; 0: none did."""
        mark = self.marks.get(_place(change))
        return mark.nonce if mark is not None else 0

    def base_of(self, commit: Commit) -> int:
        """Return up to which version of the present history the author of an operation surely knows its object."""
        operation = commit.operation
        base = operation.base_version
        is_of_present = not self._is_old(commit) or self.history.version_at(operation.key, base) == base
        return base if is_of_present or not commit.is_translated else min(base, self.restored_at[-1])

    def _is_old(self, commit: Commit) -> bool:
        """Tell whether an author's states were of an earlier life of the store."""
        return commit.life is not None and commit.life < len(self.restored_at)

    def news(self, one: Applied, *, creations: bool = False) -> Iterator[Change]:
        """Yield what others did to an object that the author of an operation did not know, the newest first."""
        changes = self.history.changes_to[one.change.key]
        base, removed = self.base_of(one.commit), set[str]()
        if one.change.former_version and self.restored_at:
            base = max(base, self.restored_at[-1])  # what was done before it was applied first, it was applied to
        is_old = self._is_old(one.commit)
        for change in reversed(changes[: _index(changes, one.change.version)]):
            if change.version <= base:
                return
            if change.new_names is not None:
                removed.update(decode_patch(change.patch).unset)
                continue
            is_creation = change.kind is OperationKind.CREATE
            # What was applied anew since the store was put back its author may have seen.
            is_news = not self._is_of(one, change) and not (is_old and change.former_version)
            if is_news and (is_creation if creations else _collides(change, one, removed)):
                yield change
            if is_creation:
                return

    def _is_of(self, one: Applied, change: Change) -> bool:
        """Tell whether a change is by the author of an operation too, under whichever id."""
        if change.replica in {one.change.replica, one.commit.replica}:
            return True  # for all that the server knows: a copy of the directory may have gone on under that id
        nonces = {self.nonce_of(change), one.commit.operation.nonce}
        return any(nonces <= log for log in self.logs)

    def _said(self, operation: Operation, change: Change) -> Patch:
        if operation.kind is OperationKind.DELETE:
            return Patch()
        patch = operation.decoded_patch()
        if not (self.has_lost_contents and change.former_version and change.kind is not OperationKind.DELETE):
            return patch
        written = decode_patch(change.patch).written
        kept = {name: value for name, value in patch.set.items() if name in written or not _is_file(value)}
        return patch._replace(set=kept)


@promise("As said: what an operation changes is what its author meant, by its author's name")
def check_said(account: Account) -> Iterator[str]:
    """Compare each change with its operation, and what came of it with what the operation and the hooks make."""
    for one in account.applied():
        operation, change = one.commit.operation, one.change
        what = f"{operation.kind.name} of {change.key} at {change.version}"
        if change.user_id != one.commit.eyes.principal.user_id:
            yield f"{what} by {one.commit.eyes.principal.user_id} is put down to {change.user_id}"
        if account.business.policies.get(change.key[0]) == "merge" and operation.kind is not OperationKind.CREATE:
            theirs = next(account.news(one), None) if one.commit.life is not None else None
            if theirs is not None:
                if not _is_merged(one):
                    yield f"{what} is not merged with {theirs}: {one.before} became {one.after}"
                continue
            if account.has_copies and _is_merged(one):
                continue  # with what another copy did, for all that the server knows
        yield from (f"{what} {problem}" for problem in _misread(one))


@promise("Conflict: what is applied overwrites nothing that its author did not know, if the policy says so")
def check_conflicts(account: Account) -> Iterator[str]:
    """Look up what others did to an object since the author of an operation saw it."""
    for one in account.applied():
        operation, change = one.commit.operation, one.change
        if operation.kind is OperationKind.CREATE or one.commit.life is None:
            continue
        what = f"{operation.kind.name} of {change.key} at {change.version} (base {operation.base_version})"
        if (creation := next(account.news(one, creations=True), None)) is not None:
            yield f"{what} is about another object: it was created anew by {creation}"
        is_stale = account.business.policies.get(change.key[0]) == "reject_stale"
        if (is_stale or change.former_version) and (theirs := next(account.news(one), None)) is not None:
            yield f"{what} overwrites {theirs}"


@promise("Rights: what is applied its author may do")
def check_rights(account: Account, schema: Schema) -> Iterator[str]:
    """Ask of each operation whether its author may do this to the object as it was, and refer to what it names."""
    for one in account.applied():
        operation, eyes, key = one.commit.operation, one.commit.eyes, one.change.key
        what = f"{operation.kind.name} of {key} at {one.change.version} by {eyes.principal}"
        try:
            if one.is_whole and not eyes.may(operation, one.before):
                yield f"{what}: {one.said} on {one.before} is not allowed"
        except Misfit:
            continue  # see `check_said`
        known = list(schema.referenced(key[0], eyes.readable(key[0], one.before) or {}))
        stored = list(schema.referenced(key[0], one.after or {}))
        for written in (one.said.set, one.said.add):
            for attribute, target in schema.referenced(key[0], written):
                # By a merge it may have come to nothing.
                is_new = (attribute, target) in stored and target != key and (attribute, target) not in known
                if is_new and not _is_there(account, one, target):
                    yield f"{what} refers to {target} by {attribute!r}, which its author does not see"


@promise("Rules: what is stored fits the schema, and what the hooks let pass")
def check_rules(account: Account) -> Iterator[str]:
    """Look at every state that any object ever had, whoever brought it about."""
    history, business = account.history, account.business
    ends = {end for one in account.settlements.values() for end in (one.before, one.after)}
    owners: dict[object, set[Key]] = {}
    for change in history.changes:
        key = change.key
        before, after = history.at(key, change.version - 1), history.at(key, change.version)
        if after is not None and (problem := business.refuses(key[0], after)):
            yield f"{key} became {after} at {change.version}: {problem}"
        if after is None and before is not None and (problem := business.refuses_deletion(key[0], before)):
            yield f"{key} was deleted at {change.version}: {problem}"
        for state, take in ((before, set[Key].discard), (after, set[Key].add)):
            if (value := business.unique_value(key[0], state)) is not None:
                take(owners.setdefault(value, set()), key)
        if change.version in ends:
            for shared, keys in owners.items():
                if len(keys) > 1:
                    yield f"{keys} all have {shared} at {change.version}"


def check_applied(account: Account) -> None:
    """Check all that was applied."""
    check_said(account)
    check_conflicts(account)
    check_rights(account, account.business.schema(1))
    check_rules(account)


# --- helpers ----------------------------------------------------------------------------


def _place(change: Change) -> Place:
    return str(UUID(bytes=change.replica)), change.seq


def _index(changes: list[Change], version: int) -> int:
    """Return how many of an object's changes are older than a version."""
    return bisect_left(changes, version, key=lambda one: one.version)


def _collides(change: Change, one: Applied, removed: Collection[str]) -> bool:
    """Tell whether a change and an operation write the same, and not with intents that add up."""
    if one.commit.operation.kind is OperationKind.DELETE or change.kind is not OperationKind.UPDATE:
        return True
    mine = _kinds(one.said)
    return any(
        name in mine and name not in removed and (kind == "set" or mine[name] != kind)
        for name, kind in _kinds(decode_patch(change.patch)).items()
    )


def _kinds(patch: Patch) -> dict[str, str]:
    """Return how a patch writes each attribute: what is set or unset is overwritten, intents add up."""
    return {
        **dict.fromkeys(patch.set, "set"),
        **dict.fromkeys(patch.unset, "set"),
        **dict.fromkeys(patch.increment, "increment"),
        **dict.fromkeys(patch.add, "add"),
        **dict.fromkeys(patch.remove, "remove"),
    }


def _misread(one: Applied) -> Iterator[str]:
    """Yield how a change differs from its operation."""
    operation, change = one.commit.operation, one.change
    if change.kind is not operation.kind:
        yield f"is a {change.kind.name}"
        return
    if change.kind is OperationKind.DELETE:
        return
    try:
        meant = dict(one.said.set) if change.kind is OperationKind.CREATE else patched(one.before or {}, one.said)
    except Misfit:
        yield f"cannot be done to {one.before}: {one.said}"
        return
    expected = tidied(change.key[0], meant)
    if not same(expected, one.after):
        yield f"made {one.after} of {one.before}: {one.said} makes {expected}"
    if same(expected, meant) and not _reads_alike(decode_patch(change.patch), one.said):
        yield f"says {decode_patch(change.patch)}: its author said {one.said}"


def _reads_alike(one: Patch, other: Patch) -> bool:
    return sorted(one.unset) == sorted(other.unset) and all(
        map(same, (one.set, one.increment, one.add, one.remove), (other.set, other.increment, other.add, other.remove))
    )


def _is_merged(one: Applied) -> bool:
    """Tell whether an operation only added to its object, as the merging policy has it. See `make_application`."""
    before, after = one.before or {}, one.after
    if one.change.kind is not OperationKind.UPDATE or after is None:
        return False
    if not all(name in after and same(after[name], value) for name, value in before.items()):
        return False
    added = {name: value for name, value in after.items() if name not in before}
    if one.commit.operation.kind is OperationKind.DELETE:
        return not added
    return all(same(value, one.said.set.get(name, value)) for name, value in added.items())


def _is_there(account: Account, one: Applied, target: Key) -> bool:
    """Tell whether an author saw an object at some moment of a transaction, or it was created by it."""
    history, when = account.history, one.settlement
    for state in history.states_between(target, when.before, when.after):
        if one.commit.eyes.readable(target[0], state) is not None:
            return True
    return any(
        when.before < change.version <= when.after and change.kind is OperationKind.CREATE
        for change in history.changes_to.get(target, ())
    )


def _is_file(value: object) -> bool:
    return FileReference.of(value) is not None
