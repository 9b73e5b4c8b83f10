"""The records that are measured with: tasks of about 370 bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

ENTITY: Final = "Task"

_TEXT: Final = (
    "The tide turns at six, and the pilot wants the charts aboard by then. Check the buoys off the reef, "
    "log the depth at each, and note where the channel has moved since the spring gales. Two lanterns on the "
    "quay are out; the harbour office knows. Whoever has the late watch: the mooring at berth nine chafes. "
)
_WORDS: Final = _TEXT.lower().split()
_STATUS: Final = ("open", "waiting", "in progress", "done")


def tasks(first: int, last: int) -> Iterator[dict[str, Any]]:
    """Yield the attributes of the tasks from *first* to before *last*, the same at each call."""
    for number in range(first, last):
        yield {
            "title": f"Task {number}: {_text(number, 40)}",
            "description": _text(number * 3, 139),
            "status": _STATUS[number % 4],
            "done": False,
            "priority": number % 5,
            "estimate_hours": number % 80 / 4,
            "assignee": f"{_word(number)}.{_word(number + 7)}@example.org",
            "project": f"project-{number % 100:03}",
            "tags": [_word(number), _word(number + 1), _word(number + 2)],
            "created_at": 1_760_000_000 + number,
            "due_at": 1_770_000_000 + number % 10_000,
        }


def _text(number: int, length: int) -> str:
    start = number % (len(_TEXT) - length)
    return _TEXT[start : start + length]


def _word(number: int) -> str:
    return _WORDS[number % len(_WORDS)]
