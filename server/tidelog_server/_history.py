"""
History: what an object was before, rebuilt from the change log's before-images.

It can be told as it was written, or in the terms of today: who compares it with an
operation needs the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tidelog._errors import StorageError
from tidelog._operation import OperationKind
from tidelog._values import Attributes, decode_trusted
from tidelog_server._records import Change, ObjectState
from tidelog_server._retelling import Retelling
from tidelog_server._store import Reader


def attributes_before(change: Change, after: Attributes | None) -> Attributes | None:
    """Return what an object held before a change (None: it was not there), given what it holds *after* it."""
    if change.kind is OperationKind.CREATE:
        return None
    before = decode_trusted(change.before)
    if change.kind is OperationKind.DELETE:
        return before  # type: ignore[no-any-return]
    present, absent = before
    kept = after.items() if after is not None else ()
    return {**{name: value for name, value in kept if name not in absent}, **present}


def undone_changes(reader: Reader, state: ObjectState) -> Iterator[tuple[Change, Attributes | None]]:
    """
    Yield the changes that led to a state, the newest first, each with what the object held before it.

    Raises:
        StorageError: The change log does not reach back as far as it is read.
    """
    attributes = None if state.deleted else decode_trusted(state.attributes)
    version = state.version
    while version:
        change = reader.change(version)
        if change is None:
            raise StorageError(f"the change log does not reach back to version {version}")
        attributes = attributes_before(change, attributes)
        yield change, attributes
        version = change.previous


def kept_changes(newest: int, change_of: Callable[[int], Change | None]) -> Iterator[Change]:
    """
    Yield the changes of one key from its *newest* one back, as far as they are kept.

    Args:
        newest: Version of the object now.
        change_of: Returns the change of a version, or None if it is not kept.
    """
    position = newest
    while position and (change := change_of(position)) is not None:
        yield change
        position = change.previous


def reaches_back(version: int, newest: int, change_of: Callable[[int], Change | None]) -> bool:
    """Tell whether all changes of one key above a version are kept; *newest* is the version of the object now."""
    position = newest
    while position > version:
        change = change_of(position)
        if change is None:
            return False
        position = change.previous
    return True


def changes_since(version: int, newest: int, change_of: Callable[[int], Change | None]) -> Iterator[Change]:
    """
    Yield what was done to one object above *version*, from its *newest* change back, in the terms of today.

    What migrations did is left out, since nobody meant it; what is older than one is
    retold, also what was done under a former key. It goes back as far as the changes are kept.

    Args:
        version: Where to end.
        newest: Version of the object now.
        change_of: Returns the change of a version, or None if it is not kept.
    """
    retellings: list[Retelling] = []
    position = newest
    while position > version and (change := change_of(position)) is not None:
        if change.new_names is not None:
            former = change_of(change.moved_from) if change.moved_from else change
            if former is None:
                return
            retellings.append(Retelling.after_migration(change, former))
            position = former.previous
            continue
        position = change.previous
        for retelling in reversed(retellings):
            change = retelling.told(change)
        yield change
