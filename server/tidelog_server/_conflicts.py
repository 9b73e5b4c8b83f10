"""
Conflicts: what others did to an object since the author of an operation looked at it.

Changes of the author's own replica are no conflict, nor is what a hook wrote while its
operation was applied; intents of one kind merge with each other. What a migration did is
nobody's change: the past is told as if it had always been so.
"""

from __future__ import annotations

from typing import NamedTuple

from tidelog._errors import InvalidValue
from tidelog._operation import Operation, OperationKind
from tidelog._patch import Patch, decode_patch
from tidelog._values import Attributes
from tidelog_server._author import Author, Sight
from tidelog_server._errors import HistoryCollected
from tidelog_server._history import attributes_before, changes_since
from tidelog_server._overlay import Overlay
from tidelog_server._records import Change, ObjectState


class Divergence(NamedTuple):
    """
    Two histories of one object.

    Attributes:
        attribute: An attribute that both change; empty if one of them deletes the object.
        base: The object as the author saw it at its base version.
        mine: The same with what the author's replica did to it since.
    """

    attribute: str
    base: Attributes
    mine: Attributes


def divergence(  # noqa: PLR0917 - the two histories, and what is asked of them
    overlay: Overlay,
    state: ObjectState,
    attributes: Attributes,
    operation: Operation,
    author: Author,
    sight: Sight,
    patch: Patch | None,
    *,
    is_retried: bool,
) -> Divergence | None:
    """
    Return what an operation collides with, or None if nobody else changed what it writes.

    Args:
        overlay: Where the changes are.
        state: The object as it is.
        attributes: Its attributes.
        operation: The operation.
        author: Who made it.
        sight: What its author had seen.
        patch: What the operation writes; None: it deletes the object.
        is_retried: Whether the operation was refused before: then what its author did
            before it may have been retried too.

    Raises:
        HistoryCollected: Something was done to the object since, and what it was is no longer kept.
    """
    base_version = sight.base_version
    retried_before = operation.seq if is_retried else 0
    if state.version <= base_version or (state.sole_writer and state.creator == author.replica):
        return None
    changes = list(changes_since(max(base_version, state.created - 1), state.version, overlay.change))
    foreign = (change for change in changes if _is_foreign(change, author, sight, retried_before))
    attribute = next((found for change in foreign if (found := collision(change, patch)) is not None), None)
    if attribute is None:
        return None
    base: Attributes | None = attributes
    for change in changes:
        base = attributes_before(change, base)
    mine = base = base or {}
    for change in reversed(changes):
        if not _is_foreign(change, author, sight, retried_before):
            mine = _redone(change, mine)
    return Divergence(attribute, base, mine)


def collision(change: Change, patch: Patch | None) -> str | None:
    """Return the attribute that a change and an operation both write ("": the object), or None if they get along."""
    if patch is None or change.kind is not OperationKind.UPDATE:
        return ""
    theirs = decode_patch(change.patch)
    for mine_by_name, merging in (
        (patch.set, {}),
        (dict.fromkeys(patch.unset), {}),
        (patch.increment, theirs.increment),
        (patch.add, theirs.add),
        (patch.remove, theirs.remove),
    ):
        for name in theirs.written:
            if name in mine_by_name and name not in merging:
                return name
    return None


def is_superseded(  # noqa: PLR0917 - the operation, and what it meets
    overlay: Overlay, state: ObjectState, operation: Operation, author: Author, sight: Sight, patch: Patch | None
) -> bool:
    """
    Tell whether what an operation writes was changed since the store was put back from a backup.

    By somebody else, or by the author with a later operation.

    What cannot be told any more counts as changed.

    Args:
        overlay: Where the changes are.
        state: The object as it is, or its tombstone.
        operation: The operation.
        author: Who made it.
        sight: What its author had seen.
        patch: What the operation writes; None: it creates or deletes the object.
    """
    bases = author.old_bases
    common_version = bases.common_version if bases is not None else 0
    try:
        return any(
            collision(change, patch) is not None
            for change in changes_since(common_version, state.version, overlay.change)
            if not (author.wrote(change) and change.seq <= operation.seq) and not sight.covers(change)
        )
    except HistoryCollected:
        return True


def _is_foreign(change: Change, author: Author, sight: Sight, retried_before: int) -> bool:
    """Tell whether a change is news to the author: what was retried is, but for operations before this one."""
    if sight.covers(change):
        return False
    return not author.wrote(change) or (bool(change.failure) and change.seq >= retried_before)


def _redone(change: Change, attributes: Attributes) -> Attributes:
    if change.kind is not OperationKind.UPDATE:
        return decode_patch(change.patch).set if change.kind is OperationKind.CREATE else attributes
    try:
        return decode_patch(change.patch).apply(attributes)
    except InvalidValue:
        return attributes  # an intent that fitted only what others had made of it
