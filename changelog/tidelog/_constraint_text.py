"""
The text form of constraints, for people and command lines.

    status == "open" and (priority >= 3 or not exists(due)) and technician == claim.user_id

`not` binds stronger than `and`, `and` stronger than `or`. In full, where what stands
in {} may be repeated or left out:

    expression   conjunction {"or" conjunction}
    conjunction  negation {"and" negation}
    negation     "not" negation  |  primary
    primary      "(" expression ")"  |  ("all" | "any") "(" [expression {"," expression}] ")"
                 |  "exists" "(" name ")"  |  name operator (value | "claim" "." name)
    operator     "==" | "!=" | "<" | "<=" | ">" | ">=" | "in" | "contains"
    name         a plain word, or anything in backticks; a backtick in there is doubled

Values are those of JSON, and what `tidelog._values.literal` writes for those that JSON
lacks. `str` of a constraint gives its text; reading that gives the constraint.

The reader goes through the text once and down no deeper than a constraint may be nested,
whatever the text.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Final, NamedTuple, NoReturn, TypeVar

from tidelog._constraints import RESERVED_WORDS, All, Any_, Comparison, Constraint, Not, check_parts
from tidelog._errors import InvalidConstraint, InvalidValue
from tidelog._limits import CONSTRAINT_BYTES_MAX, CONSTRAINT_DEPTH_MAX, NESTING_DEPTH_MAX
from tidelog._values import DECIMAL_BYTES_MAX, check

# One byte of a message is at most seven characters: "false, ".
TEXT_CHARACTERS_MAX: Final = 8 * CONSTRAINT_BYTES_MAX

_EXCERPT_CHARACTERS_MAX: Final = 24
_OPERATORS: Final = ("==", "!=", "<", "<=", ">", ">=", "in", "contains")
_A_VALUE: Final = 'a value like "text", 3, 2.5, 12.50d, true, [1, 2] or claim.user_id'
_NUMBER_CHARACTERS_MAX: Final = DECIMAL_BYTES_MAX + 1

_T = TypeVar("_T")

# Something matches everywhere, so that the tokens of a text follow one another without a gap.
_TOKEN: Final = re.compile(
    r"""
    \s* (?:
        (?P<number> -?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?d?(?!\w) | -inf\b)
        | (?P<string> [tb]?"(?:[^"\\]|\\.)*")
        | (?P<quoted> `(?:[^`]|``)+`)
        | (?P<word> [^\W\d]\w*)
        | (?P<sign> ==|!=|<=|>=|[<>()\[\]{},:.])
        | (?P<end> \Z)
        | (?P<stray> .)
    )
    """,
    re.VERBOSE | re.DOTALL,
)
_TIMESTAMP: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})"
)
_WORDS: Final[dict[str, Any]] = {"true": True, "false": False, "null": None, "inf": math.inf, "nan": math.nan}


def parse_constraint(text: str) -> Constraint:
    """
    Read a constraint from its text form.

    Raises:
        InvalidConstraint: The text makes no sense, and where, or the constraint is over a limit.
    """
    if len(text) > TEXT_CHARACTERS_MAX:
        raise InvalidConstraint(f"a constraint of {len(text)} characters: the limit is {TEXT_CHARACTERS_MAX}")
    return _Reader(text).read()


def parse_value(text: str) -> Any:
    """
    Read a value as constraints write it: JSON, and what JSON has no types for.

    Raises:
        InvalidConstraint: The text is no value, and where.
    """
    return _Reader(text).read_value()


class _Token(NamedTuple):
    kind: str
    text: str
    start: int


class _Reader:
    """Reads by recursive descent, with one token in sight: `_token`, the next one."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._parts = 0
        self._tokens = _TOKEN.finditer(text)
        self._next()

    def read(self) -> Constraint:
        constraint = self._expression(1)
        if self._token.kind != "end":
            self._expected("'and', 'or' or the end")
        return constraint

    def read_value(self) -> Any:
        value = self._value(1)
        if self._token.kind != "end":
            self._expected("the end")
        try:
            check(value)
        except InvalidValue as error:
            self._fail(str(error), 0)
        return value

    def _expression(self, depth: int) -> Constraint:
        members = [self._conjunction(depth)]
        while self._took("or"):
            members.append(self._conjunction(depth))
        return self._counted(Any_(tuple(members))) if len(members) > 1 else members[0]

    def _conjunction(self, depth: int) -> Constraint:
        members = [self._negation(depth)]
        while self._took("and"):
            members.append(self._negation(depth))
        return self._counted(All(tuple(members))) if len(members) > 1 else members[0]

    def _negation(self, depth: int) -> Constraint:
        # Every way down leads through here.
        if depth > CONSTRAINT_DEPTH_MAX:
            self._fail(f"a constraint is nested deeper than {CONSTRAINT_DEPTH_MAX} levels", self._token.start)
        if self._took("not"):
            return self._counted(Not(self._negation(depth + 1)))
        if self._took("("):
            constraint = self._expression(depth + 1)
            self._take(")", "'and', 'or' or ')'")
            return constraint
        for word, kind in (("all", All), ("any", Any_)):
            if self._took(word):
                self._take("(")
                return self._counted(kind(tuple(self._listed(")", lambda: self._expression(depth + 1)))))
        if self._took("exists"):
            self._take("(")
            name = self._name("the name of an attribute")
            self._take(")")
            return self._counted(Comparison(name, "exists"))
        return self._comparison()

    def _comparison(self) -> Constraint:
        start = self._token.start
        name = self._name("a comparison")
        operator = self._token.text
        if operator not in _OPERATORS:
            self._expected(f"one of {' '.join(_OPERATORS)}")
        self._next()
        value, claim = None, ""
        if self._took("claim"):
            self._take(".")
            claim = self._name("the name of a claim")
        else:
            value = self._value(1)
        try:
            comparison = Comparison(name, operator, value, claim)
        except InvalidConstraint as error:
            self._fail(str(error), start)
        return self._counted(comparison)

    def _name(self, what: str) -> str:
        token = self._token
        if token.kind == "quoted":
            name = token.text[1:-1].replace("``", "`")
        elif token.kind == "word" and token.text not in RESERVED_WORDS:
            name = token.text
        else:
            self._expected(what)
        self._next()
        return name

    def _value(self, depth: int) -> Any:
        if depth > NESTING_DEPTH_MAX and self._token.text in {"[", "{"}:
            self._fail(f"a value is nested deeper than {NESTING_DEPTH_MAX} levels", self._token.start)
        if self._took("["):
            return self._listed("]", lambda: self._value(depth + 1))
        if self._took("{"):
            return self._map(depth)
        token = self._token
        if token.kind == "string":
            value = self._decoded_string(token)
        elif token.kind == "number":
            value = self._decoded_number(token)
        elif token.text in _WORDS:
            value = _WORDS[token.text]
        else:
            self._expected(_A_VALUE)
        self._next()
        return value

    def _map(self, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}

        def pair() -> None:
            token = self._token
            if not token.text.startswith('"'):
                self._expected("a key in quotes")
            key = self._decoded_string(token)
            if key in result:
                self._fail(f"the map has the key {key!r} twice", token.start)
            self._next()
            self._take(":")
            result[key] = self._value(depth + 1)

        self._listed("}", pair)
        return result

    def _listed(self, close: str, read: Callable[[], _T]) -> list[_T]:
        """Read what is separated by commas, up to the bracket that closes it."""
        if self._took(close):
            return []
        members = [read()]
        while self._took(","):
            members.append(read())
        self._take(close, f"',' or '{close}'")
        return members

    def _decoded_string(self, token: _Token) -> Any:
        """Return what a string stands for: text, a timestamp behind t, a binary behind b."""
        prefix, quote, rest = token.text.partition('"')
        try:
            text = json.loads(quote + rest)
        except ValueError:
            self._fail("a string has an escape or a control character that JSON does not know", token.start)
        try:
            if prefix == "b":
                return base64.b64decode(text, validate=True)
            if prefix == "t":
                if not _TIMESTAMP.fullmatch(text):
                    raise ValueError(text)
                return datetime.fromisoformat(text)
        except ValueError:
            what = "base64" if prefix == "b" else 'a timestamp like t"2026-01-31T12:00:00Z"'
            self._fail(f"this is not {what}", token.start)
        return text

    def _decoded_number(self, token: _Token) -> int | float | Decimal:
        text = token.text
        if len(text) > _NUMBER_CHARACTERS_MAX:
            self._fail("a number is longer than any value", token.start)
        if text.endswith("d"):
            try:
                return Decimal(text[:-1])
            except InvalidOperation:
                self._fail("a decimal is out of range", token.start)
        if text.lstrip("-").isdigit():
            return int(text)
        number = float(text)
        if math.isinf(number) and text != "-inf":
            self._fail("a float is out of range", token.start)
        return number

    def _counted(self, constraint: Constraint) -> Constraint:
        """Count the parts while they come: an endless text is not read to its end."""
        self._parts += 1
        check_parts(self._parts)
        return constraint

    def _took(self, text: str) -> bool:
        """Go past the next token if it is this one."""
        if self._token.text != text:
            return False
        self._next()
        return True

    def _take(self, text: str, expected: str = "") -> None:
        if not self._took(text):
            self._expected(expected or f"'{text}'")

    def _next(self) -> None:
        found = next(self._tokens)
        kind = found.lastgroup or ""
        self._token = _Token(kind, found[kind], found.start(kind))
        if kind == "stray" and found[kind] in '"`':
            self._fail("what begins here in quotes has no end", found.start(kind))

    def _expected(self, what: str) -> NoReturn:
        self._fail(f"expected {what}", self._token.start)

    def _fail(self, message: str, start: int) -> NoReturn:
        rest = self._text[start : start + _EXCERPT_CHARACTERS_MAX + 1]
        if len(rest) > _EXCERPT_CHARACTERS_MAX:
            rest = f"{rest[:_EXCERPT_CHARACTERS_MAX]}..."
        place = f"at character {start + 1}: {rest}" if rest else "at the end"
        raise InvalidConstraint(f"{message}, {place}") from None
