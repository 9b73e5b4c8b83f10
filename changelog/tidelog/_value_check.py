"""
Value checks: what is asked of one value that is not null.

A rule is a function that returns what a value breaks, as the end of a sentence for
people ("must be at least 1"), or None. It is asked values of the right type only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from tidelog._errors import InvalidValue, quoted
from tidelog._limits import PATTERN_TEXT_CHARS_MAX
from tidelog._values import check_id

Rule: TypeAlias = Callable[[Any], str | None]

SHA256_BYTES: Final = 32
_FILE_FIELDS: Final = {"name": str, "size": int, "media_type": str, "sha256": bytes}


class ValueCheck(NamedTuple):
    """
    What a declaration asks of a value that is not null, ready to be asked often.

    Attributes:
        kind: Type that the value must have. None: any.
        phrase: The type in words: "an integer".
        rule: What else it must obey.
        member: What the members of a list must be. None: anything.
    """

    kind: type | None
    phrase: str
    rule: Rule | None = None
    member: ValueCheck | None = None

    def broken_rule(self, value: Any) -> str | None:
        """Return the rule that a value breaks, as the end of a sentence, or None."""
        if type(value) is not self.kind and self.kind is not None:
            return f"must be {self.phrase}"
        return None if self.rule is None else self.rule(value)


def all_of(first: Rule | None, second: Rule | None) -> Rule | None:
    """Return the rule that obeys both, either of which may be none."""
    if first is None or second is None:
        return first or second
    return lambda value: first(value) or second(value)


def range_rule(minimum: Any, maximum: Any) -> Rule | None:
    """Return the rule of a least and a greatest value."""
    if minimum is None and maximum is None:
        return None

    def rule(value: Any) -> str | None:
        # Asked this way round because NaN compares with nothing.
        if minimum is not None and not value >= minimum:
            return f"must be at least {minimum}"
        if maximum is not None and not value <= maximum:
            return f"must be at most {maximum}"
        return None

    return rule


def length_rule(min_length: int | None, max_length: int | None, unit: str) -> Rule | None:
    """Return the rule of a least and a greatest number of *unit*."""
    shortest, longest = min_length or 0, max_length
    if not shortest and longest is None:
        return None

    def rule(value: Any) -> str | None:
        if len(value) < shortest:
            return f"must have at least {shortest} {unit}"
        if longest is not None and len(value) > longest:
            return f"must have at most {longest} {unit}"
        return None

    return rule


def pattern_rule(pattern: str | None) -> Rule | None:
    """Return the rule of a regular expression that a whole string must match."""
    if pattern is None:
        return None
    matches = re.compile(pattern).fullmatch
    broken = f"must match the pattern {pattern}"

    def rule(value: str) -> str | None:
        return None if len(value) <= PATTERN_TEXT_CHARS_MAX and matches(value) else broken

    return rule


def choice_rule(values: Sequence[str]) -> Rule:
    """Return the rule of a value that is one of a few."""
    known = frozenset(values)
    broken = f"must be one of {quoted(list(values))}"
    return lambda value: None if value in known else broken


def members_rule(member: ValueCheck) -> Rule:
    """Return the rule of a list whose members are all asked the same."""
    kinds = {member.kind}

    def rule(value: list[Any]) -> str | None:
        if member.rule is None and kinds.issuperset(map(type, value)):
            return None
        for place, one in enumerate(value):
            if (broken := member.broken_rule(one)) is not None:
                return f"its member {place} is {quoted(one)}, which {broken}"
        return None

    return rule


def id_rule(value: str) -> str | None:
    """Ask that a string can be an object's id."""
    try:
        check_id(value)
    except InvalidValue:
        return "must be the id of an object: 1 to 128 bytes, no NUL"
    return None


def file_rule(value: dict[str, Any]) -> str | None:
    """Ask that a map is that of a file."""
    if (
        value.keys() == _FILE_FIELDS.keys()
        and all(type(value[name]) is kind for name, kind in _FILE_FIELDS.items())
        and value["size"] >= 0
        and len(value["sha256"]) == SHA256_BYTES
    ):
        return None
    return 'must be a file: a map of "name", "size" (at least 0), "media_type" and "sha256" (32 bytes), and no more'
