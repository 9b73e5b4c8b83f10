"""
Constraints: which objects are meant.

One small expression tree. It is built in Python (`attribute("done") == False`),
travels as a proto message, and is decided by `matches`, wherever it is used.

A comparison with null, with a missing attribute or between two types is false,
whatever the operator: so `attribute("n") != 1` holds for 2, not for "x" or for an
object without n. Use `~` for the opposite.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, TypeAlias

from tidelog._errors import InvalidConstraint, InvalidValue
from tidelog._patch import check_attribute_name
from tidelog._values import check, decode, encode, equal
from tidelog.v1 import constraint_pb2

CONSTRAINT_DEPTH_MAX = 32
CONSTRAINT_VALUES_MAX = 1_000

_ORDERED = (int, float, str, bytes, datetime, Decimal)


class Constraint:
    """An expression over an object's attributes that is true or false. Combine with `&`, `|` and `~`."""

    def __and__(self, other: Constraint) -> Constraint:
        return All((self, other))

    def __or__(self, other: Constraint) -> Constraint:
        return Any_((self, other))

    def __invert__(self) -> Constraint:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a constraint has no truth value: combine with & | ~ instead of and, or, not")

    def matches(self, attributes: Mapping[str, Any]) -> bool:
        """Tell whether an object with these attributes is meant."""
        raise NotImplementedError

    def to_message(self) -> constraint_pb2.Constraint:
        """Return the wire form."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Comparison(Constraint):
    """
    Compares an attribute with a value.

    Attributes:
        attribute: Name of the attribute.
        operator: One of == != < <= > >= in contains exists.
        value: The value; for `in` a list of values, for `exists` None.
    """

    attribute: str
    operator: str
    value: Any = None

    def __post_init__(self) -> None:
        if self.operator not in _TESTS:
            raise InvalidConstraint(f"unknown operator {self.operator!r}: use one of {' '.join(_TESTS)}")
        try:
            check_attribute_name(self.attribute)
            check(self.value, "the value of a constraint")
        except InvalidValue as error:
            raise InvalidConstraint(str(error)) from error
        if type(self.value) is list and len(self.value) > CONSTRAINT_VALUES_MAX:
            raise InvalidConstraint(
                f"a constraint over {len(self.value)} values: the limit is {CONSTRAINT_VALUES_MAX}"
            )
        if self.operator == "in" and type(self.value) is not list:
            raise InvalidConstraint(f"`in` needs a list of values, got {type(self.value).__name__}")
        if self.operator in ("<", "<=", ">", ">=") and type(self.value) not in _ORDERED:
            raise InvalidConstraint(f"a {type(self.value).__name__} has no order: use == != or in")

    def matches(self, attributes: Mapping[str, Any]) -> bool:
        present = attributes.get(self.attribute)
        return present is not None and _TESTS[self.operator](present, self.value)

    def to_message(self) -> constraint_pb2.Constraint:
        comparison = constraint_pb2.Comparison(attribute=self.attribute, operator=_NUMBERS[self.operator])
        if self.operator != "exists":
            comparison.value = encode(self.value)
        return constraint_pb2.Constraint(comparison=comparison)


@dataclass(frozen=True, slots=True)
class All(Constraint):
    """True if all members are."""

    members: tuple[Constraint, ...]

    def matches(self, attributes: Mapping[str, Any]) -> bool:
        return all(member.matches(attributes) for member in self.members)

    def to_message(self) -> constraint_pb2.Constraint:
        return constraint_pb2.Constraint(all=_list_message(self.members))


@dataclass(frozen=True, slots=True)
class Any_(Constraint):  # noqa: N801 - typing has taken the name
    """True if any member is."""

    members: tuple[Constraint, ...]

    def matches(self, attributes: Mapping[str, Any]) -> bool:
        return any(member.matches(attributes) for member in self.members)

    def to_message(self) -> constraint_pb2.Constraint:
        return constraint_pb2.Constraint(any=_list_message(self.members))


@dataclass(frozen=True, slots=True)
class Not(Constraint):
    """True if its member is not."""

    member: Constraint

    def matches(self, attributes: Mapping[str, Any]) -> bool:
        return not self.member.matches(attributes)

    def to_message(self) -> constraint_pb2.Constraint:
        message = constraint_pb2.Constraint()
        getattr(message, "not").CopyFrom(self.member.to_message())
        return message


class attribute:  # noqa: N801 - reads as a word of the expression
    """
    Names an attribute in a constraint: `attribute("done") == False`, `attribute("tag").is_in(["a"])`.

    Raises:
        InvalidConstraint: A comparison that makes no sense.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, value: object) -> Constraint:  # type: ignore[override]
        return Comparison(self._name, "==", value)

    def __ne__(self, value: object) -> Constraint:  # type: ignore[override]
        return Comparison(self._name, "!=", value)

    def __lt__(self, value: Any) -> Constraint:
        return Comparison(self._name, "<", value)

    def __le__(self, value: Any) -> Constraint:
        return Comparison(self._name, "<=", value)

    def __gt__(self, value: Any) -> Constraint:
        return Comparison(self._name, ">", value)

    def __ge__(self, value: Any) -> Constraint:
        return Comparison(self._name, ">=", value)

    def is_in(self, values: Iterable[Any]) -> Constraint:
        """True if the attribute equals one of *values*."""
        return Comparison(self._name, "in", list(values))

    def contains(self, value: Any) -> Constraint:
        """True if the attribute is a list that has *value*, or a string that has it as a part."""
        return Comparison(self._name, "contains", value)

    def exists(self) -> Constraint:
        """True if the attribute is there and not null."""
        return Comparison(self._name, "exists")


Where: TypeAlias = Constraint | Mapping[str, Any] | None


def constraint_of(where: Where) -> Constraint | None:
    """
    Return the constraint that *where* states; a mapping means that all its attributes are equal.

    Raises:
        InvalidConstraint: It is neither a constraint nor a mapping.
    """
    if where is None or isinstance(where, Constraint):
        return where
    if isinstance(where, Mapping):
        return All(tuple(Comparison(name, "==", value) for name, value in where.items()))
    raise InvalidConstraint(f"where must be a constraint or a mapping, got {where!r}")


def constraint_from_message(message: constraint_pb2.Constraint, depth: int = 0) -> Constraint:
    """
    Read the wire form of a constraint.

    Raises:
        InvalidConstraint: It makes no sense, or is nested too deeply.
    """
    if depth >= CONSTRAINT_DEPTH_MAX:
        raise InvalidConstraint(f"a constraint is nested deeper than {CONSTRAINT_DEPTH_MAX} levels")
    which = message.WhichOneof("expression")
    if which == "comparison":
        name = _OPERATORS.get(message.comparison.operator)
        if name is None:
            raise InvalidConstraint(f"unknown comparison operator {message.comparison.operator}")
        try:
            value = None if name == "exists" else decode(message.comparison.value)
        except InvalidValue as error:
            raise InvalidConstraint(f"the value of a constraint: {error}") from error
        return Comparison(message.comparison.attribute, name, value)
    if which == "not":
        return Not(constraint_from_message(getattr(message, "not"), depth + 1))
    if which in {"all", "any"}:
        listed = getattr(message, which).constraints
        members = tuple(constraint_from_message(member, depth + 1) for member in listed)
        return All(members) if which == "all" else Any_(members)
    raise InvalidConstraint("a constraint without an expression")


def _list_message(members: tuple[Constraint, ...]) -> constraint_pb2.ConstraintList:
    return constraint_pb2.ConstraintList(constraints=[member.to_message() for member in members])


def _ordered(test: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda present, value: type(present) is type(value) and test(present, value)


def _contains(present: Any, value: Any) -> bool:
    if type(present) is list:
        return any(equal(member, value) for member in present)
    return type(present) is str and type(value) is str and value in present


_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "==": equal,
    "!=": lambda present, value: type(present) is type(value) and not equal(present, value),
    "<": _ordered(operator.lt),
    "<=": _ordered(operator.le),
    ">": _ordered(operator.gt),
    ">=": _ordered(operator.ge),
    "in": lambda present, values: any(equal(present, value) for value in values),
    "contains": _contains,
    "exists": lambda _present, _value: True,
}
_NUMBERS = {
    "==": constraint_pb2.COMPARISON_OPERATOR_EQUAL,
    "!=": constraint_pb2.COMPARISON_OPERATOR_NOT_EQUAL,
    "<": constraint_pb2.COMPARISON_OPERATOR_LESS,
    "<=": constraint_pb2.COMPARISON_OPERATOR_LESS_OR_EQUAL,
    ">": constraint_pb2.COMPARISON_OPERATOR_GREATER,
    ">=": constraint_pb2.COMPARISON_OPERATOR_GREATER_OR_EQUAL,
    "in": constraint_pb2.COMPARISON_OPERATOR_IN,
    "contains": constraint_pb2.COMPARISON_OPERATOR_CONTAINS,
    "exists": constraint_pb2.COMPARISON_OPERATOR_EXISTS,
}
_OPERATORS = {number: name for name, number in _NUMBERS.items()}
