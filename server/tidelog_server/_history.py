"""History: what an object was at an earlier version, from the change log's before-images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tidelog._operation import OperationKind
from tidelog._values import Attributes, decode_trusted
from tidelog_server._records import Change


def changes_since(version: int, newest: int, change_of: Callable[[int], Change | None]) -> Iterator[Change]:
    """
    Yield the changes of one object above *version*, from its *newest* one back, as far as they are kept.

    Args:
        version: Where to end.
        newest: Version of the object now.
        change_of: Returns the change of a version, or None if it is not kept.
    """
    position = newest
    while position > version:
        change = change_of(position)
        if change is None:
            return
        yield change
        position = change.previous


def attributes_before(change: Change, after: Attributes | None) -> Attributes | None:
    """Return an object's attributes before a change that led to *after*; None: it was not there."""
    if change.kind is OperationKind.CREATE:
        return None
    if change.kind is OperationKind.DELETE:
        return decode_trusted(change.before)  # type: ignore[no-any-return]
    values, missing = decode_trusted(change.before)
    before = {**(after or {}), **values}
    for name in missing:
        before.pop(name, None)
    return before
