"""
Constraints: which objects are meant.

One small expression tree. It is built in Python (`attribute("done") == False`), written as
text (`done == false`), travels as a proto message, and is decided by `matches`, wherever
it is used. The limits are held when the tree is built, so what was built can travel.

A comparison with null, with a missing attribute or between two types is false,
whatever the operator: so `attribute("n") != 1` holds for 2, not for "x" or for an
object without n. Use `~` for the opposite.

In place of a value may stand `claim("user_id")`: what the principal brings. Such a
constraint cannot be decided before `bind` has put the values in.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple, TypeAlias

from tidelog._errors import InvalidConstraint, InvalidValue
from tidelog._limits import CONSTRAINT_BYTES_MAX, CONSTRAINT_DEPTH_MAX, CONSTRAINT_PARTS_MAX
from tidelog._patch import check_attribute_name
from tidelog._values import check, check_name, decode, encode, equal, identity, literal
from tidelog.v1 import constraint_pb2

# Words of the text form: an attribute that is called so stands in backticks there.
RESERVED_WORDS: Final = frozenset(
    ("all", "and", "any", "contains", "exists", "false", "in", "not", "null", "or", "true")
)

_PLAIN_WORD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ORDERED: Final = (int, float, str, bytes, datetime, Decimal)
_keep: Final = object.__setattr__  # how a frozen dataclass gets what is derived from its fields

_Test: TypeAlias = Callable[[Any], bool]


class Facts(NamedTuple):
    """
    What is known of a constraint without evaluating it.

    Attributes:
        attributes: Names of the attributes that it compares.
        claims: Names of the claims that it compares with.
        depth: Levels of nesting; a comparison has one.
        parts: Number of comparisons and combinations.
        size_bytes: Size of its message.
    """

    attributes: frozenset[str]
    claims: frozenset[str]
    depth: int
    parts: int
    size_bytes: int


class Constraint:
    """
    An expression over an object's attributes that is true or false. Combine with `&`, `|` and `~`.

    Two constraints are equal if they are the same expression over equal values. `str` gives
    the text form, which `parse_constraint` reads.
    """

    __slots__ = ()

    facts: Facts

    def __and__(self, other: Constraint) -> Constraint:
        if not isinstance(other, Constraint):
            return NotImplemented
        return All((*_members(All, self), *_members(All, other)))

    def __or__(self, other: Constraint) -> Constraint:
        if not isinstance(other, Constraint):
            return NotImplemented
        return Any_((*_members(Any_, self), *_members(Any_, other)))

    def __invert__(self) -> Constraint:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a constraint has no truth value: combine with & | ~ instead of and, or, not")

    def matches(self, attributes: Mapping[str, Any]) -> bool:
        """
        Tell whether an object with these attributes is meant.

        Raises:
            InvalidConstraint: It compares with claims, and `bind` has not put in their values.
        """
        if self.facts.claims:
            names = ", ".join(sorted(self.facts.claims))
            raise InvalidConstraint(f"a constraint cannot be decided before its claims have values: {names}")
        return self.holds(attributes)

    def holds(self, attributes: Mapping[str, Any]) -> bool:
        """Decide as `matches` does; the caller knows that there are no claims."""
        raise NotImplementedError

    def attributes(self) -> frozenset[str]:
        """Return the names of the attributes that it compares."""
        return self.facts.attributes

    def claims(self) -> frozenset[str]:
        """Return the names of the claims that it compares with."""
        return self.facts.claims

    def bind(self, claims: Mapping[str, Any]) -> Constraint:
        """
        Return the constraint with the values of claims in place of their names.

        A comparison becomes false if the claim is missing or null, if it is no value that
        can be so compared, or no list where the operator is `in`. Tuples and sets are lists.
        Behind `~` such a comparison becomes true: that lets in who lacks the claim.

        Raises:
            InvalidConstraint: With these values it is over a limit.
        """
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
        value: The value; for `in` a list of values; for `exists`, and beside a claim, None.
        claim: Name of the claim whose value it is compared with; empty: with `value`.
    """

    attribute: str
    operator: str
    value: Any = field(default=None, compare=False)
    claim: str = ""
    facts: Facts = field(init=False, repr=False, compare=False)
    _identity: Any = field(init=False, repr=False)
    _test: _Test = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.operator not in _TESTS:
            raise InvalidConstraint(f"unknown operator {self.operator!r}: use one of {' '.join(_TESTS)}")
        try:
            check_attribute_name(self.attribute)
            if self.claim:
                check_name(self.claim, "the name of a claim")
            check(self.value, f"what attribute {self.attribute!r} is compared with")
            # What travels is what is compared: values of the constraint's own, timestamps in UTC.
            value = decode(encode(self.value))
        except InvalidValue as error:
            raise InvalidConstraint(str(error)) from error
        if self.operator == "exists":
            if value is not None or self.claim:
                raise InvalidConstraint(f"attribute {self.attribute!r}: `exists` compares with nothing")
        elif self.claim:
            if value is not None:
                raise InvalidConstraint(
                    f"attribute {self.attribute!r} is compared with a value and with claim {self.claim!r}: give one"
                )
        elif reason := _misfit(self.operator, value):
            raise InvalidConstraint(f"attribute {self.attribute!r}: {reason}")
        _keep(self, "value", value)
        _keep(self, "_identity", identity(value))
        _keep(self, "_test", _TESTS[self.operator](value))
        claims = frozenset((self.claim,) if self.claim else ())
        size_bytes = self.to_message().ByteSize()
        _keep(self, "facts", _within_limits(Facts(frozenset((self.attribute,)), claims, 1, 1, size_bytes)))

    def __reduce__(self) -> tuple[Any, ...]:
        # A test is a closure, which cannot be pickled.
        return Comparison, (self.attribute, self.operator, self.value, self.claim)

    def __str__(self) -> str:
        name = _word(self.attribute)
        if self.operator == "exists":
            return f"exists({name})"
        value = f"claim.{_word(self.claim)}" if self.claim else literal(self.value)
        return f"{name} {self.operator} {value}"

    def holds(self, attributes: Mapping[str, Any]) -> bool:
        present = attributes.get(self.attribute)
        return present is not None and self._test(present)

    def bind(self, claims: Mapping[str, Any]) -> Constraint:
        if not self.claim:
            return self
        value = _listed(claims.get(self.claim))
        if value is None or _misfit(self.operator, value):
            return NEVER
        try:
            check(value)
        except InvalidValue:
            return NEVER
        return Comparison(self.attribute, self.operator, value)

    def to_message(self) -> constraint_pb2.Constraint:
        comparison = constraint_pb2.Comparison(attribute=self.attribute, operator=_NUMBERS[self.operator])
        if self.claim:
            comparison.claim = self.claim
        elif self.operator != "exists":
            comparison.value = encode(self.value)
        return constraint_pb2.Constraint(comparison=comparison)


@dataclass(frozen=True, slots=True)
class _Combination(Constraint):
    members: tuple[Constraint, ...]
    facts: Facts = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        size_bytes = _field_bytes(sum(_field_bytes(member.facts.size_bytes) for member in self.members))
        _keep(self, "facts", _facts_around(self.members, size_bytes))

    def bind(self, claims: Mapping[str, Any]) -> Constraint:
        return type(self)(tuple(member.bind(claims) for member in self.members)) if self.claims() else self

    def _list_message(self) -> constraint_pb2.ConstraintList:
        return constraint_pb2.ConstraintList(constraints=[member.to_message() for member in self.members])


@dataclass(frozen=True, slots=True)
class All(_Combination):
    """True if all members are."""

    def __str__(self) -> str:
        if len(self.members) > 1:
            return " and ".join(map(_operand, self.members))
        return f"all({''.join(map(str, self.members))})"

    def holds(self, attributes: Mapping[str, Any]) -> bool:
        for member in self.members:  # noqa: SIM110 - twice as fast as all() over a generator
            if not member.holds(attributes):
                return False
        return True

    def to_message(self) -> constraint_pb2.Constraint:
        return constraint_pb2.Constraint(all=self._list_message())


@dataclass(frozen=True, slots=True)
class Any_(_Combination):  # noqa: N801 - typing has taken the name
    """True if any member is."""

    def __str__(self) -> str:
        if len(self.members) > 1:
            return " or ".join(map(_operand, self.members))
        return f"any({''.join(map(str, self.members))})"

    def holds(self, attributes: Mapping[str, Any]) -> bool:
        for member in self.members:  # noqa: SIM110 - twice as fast as any() over a generator
            if member.holds(attributes):
                return True
        return False

    def to_message(self) -> constraint_pb2.Constraint:
        return constraint_pb2.Constraint(any=self._list_message())


@dataclass(frozen=True, slots=True)
class Not(Constraint):
    """True if its member is not."""

    member: Constraint
    facts: Facts = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _keep(self, "facts", _facts_around((self.member,), _field_bytes(self.member.facts.size_bytes)))

    def __str__(self) -> str:
        return f"not {_operand(self.member)}"

    def holds(self, attributes: Mapping[str, Any]) -> bool:
        return not self.member.holds(attributes)

    def bind(self, claims: Mapping[str, Any]) -> Constraint:
        return Not(self.member.bind(claims))

    def to_message(self) -> constraint_pb2.Constraint:
        message = constraint_pb2.Constraint()
        getattr(message, "not").CopyFrom(self.member.to_message())
        return message


class claim:  # noqa: N801 - reads as a word of the expression
    """
    Names a claim of the principal, to compare with: `attribute("technician") == claim("user_id")`.

    Its value is not known where the constraint is written: `Constraint.bind` puts it in.

    Raises:
        InvalidConstraint: The name is empty, too long or holds a NUL.
    """

    def __init__(self, name: str) -> None:
        try:
            check_name(name, "the name of a claim")
        except InvalidValue as error:
            raise InvalidConstraint(str(error)) from error
        self.name = name


class attribute:  # noqa: N801 - reads as a word of the expression
    """
    Names an attribute in a constraint: `attribute("done") == False`, `attribute("tag").is_in(["a"])`.

    What it is compared with is a value or a `claim`.

    Raises:
        InvalidConstraint: A comparison that makes no sense.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, value: object) -> Constraint:  # type: ignore[override]
        return self._compared("==", value)

    def __ne__(self, value: object) -> Constraint:  # type: ignore[override]
        return self._compared("!=", value)

    def __lt__(self, value: Any) -> Constraint:
        return self._compared("<", value)

    def __le__(self, value: Any) -> Constraint:
        return self._compared("<=", value)

    def __gt__(self, value: Any) -> Constraint:
        return self._compared(">", value)

    def __ge__(self, value: Any) -> Constraint:
        return self._compared(">=", value)

    def is_in(self, values: Iterable[Any] | claim) -> Constraint:
        """True if the attribute equals one of *values*."""
        if isinstance(values, str | bytes):
            raise InvalidConstraint(f"attribute {self._name!r}: is_in needs several values, got {values!r}")
        return self._compared("in", values if isinstance(values, claim) else list(values))

    def contains(self, value: Any) -> Constraint:
        """True if the attribute is a list that has *value*, or a string that has it as a part."""
        return self._compared("contains", value)

    def exists(self) -> Constraint:
        """True if the attribute is there and not null."""
        return Comparison(self._name, "exists")

    def _compared(self, operator: str, value: Any) -> Constraint:
        if isinstance(value, claim):
            return Comparison(self._name, operator, claim=value.name)
        return Comparison(self._name, operator, value)


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
        return All(tuple(attribute(name) == value for name, value in where.items()))
    raise InvalidConstraint(f"where must be a constraint or a mapping, got {where!r}")


def constraint_from_message(message: constraint_pb2.Constraint) -> Constraint:
    """
    Read the wire form of a constraint.

    Raises:
        InvalidConstraint: It makes no sense, or is over a limit.
    """
    # Before anything is decoded: one byte can become an object of a hundred. Of the depth protobuf takes care.
    _check_size(message.ByteSize())
    return _from_message(message)


def comparisons(constraint: Constraint) -> Iterator[Comparison]:
    """Iterate over the comparisons that a constraint is made of."""
    match constraint:
        case Comparison():
            yield constraint
        case All(members) | Any_(members):
            for member in members:
                yield from comparisons(member)
        case Not(member):
            yield from comparisons(member)


def required_values(constraint: Constraint) -> dict[str, list[Any]]:
    """
    Return what attributes must equal, one of the values each, for the constraint to be true.

    Only what follows from the expression alone: an index over one of these attributes finds
    all objects that are meant, and others.
    """
    match constraint:
        case Comparison(operator="==", claim=""):
            return {constraint.attribute: [constraint.value]}
        case Comparison(operator="in", claim=""):
            return {constraint.attribute: list(constraint.value)}
        case All(members):
            required: dict[str, list[Any]] = {}
            for member in members:
                for name, values in required_values(member).items():
                    if name not in required or len(values) < len(required[name]):
                        required[name] = values
            return required
        case Any_(members):
            ways = [required_values(member) for member in members if member != NEVER]
            names = ways[0].keys() if ways else ()
            return {
                name: list({identity(value): value for way in ways for value in way[name]}.values())
                for name in names
                if all(name in way for way in ways)
            }
        case _:
            return {}


def check_parts(parts: int) -> None:
    """Check how many comparisons and combinations a constraint has. Raises InvalidConstraint."""
    if parts > CONSTRAINT_PARTS_MAX:
        raise InvalidConstraint(
            f"a constraint has more than {CONSTRAINT_PARTS_MAX} comparisons and combinations: "
            "to compare with many values use `in`"
        )


def _from_message(message: constraint_pb2.Constraint) -> Constraint:
    which = message.WhichOneof("expression")
    if which == "comparison":
        return _comparison_from_message(message.comparison)
    if which == "not":
        return Not(_from_message(getattr(message, "not")))
    if which in {"all", "any"}:
        members = tuple(map(_from_message, getattr(message, which).constraints))
        return All(members) if which == "all" else Any_(members)
    raise InvalidConstraint("a constraint without an expression")


def _comparison_from_message(message: constraint_pb2.Comparison) -> Constraint:
    name = _OPERATORS.get(message.operator)
    if name is None:
        raise InvalidConstraint(f"unknown comparison operator {message.operator}")
    if name == "exists" or (message.claim and not message.value):
        return Comparison(message.attribute, name, claim=message.claim)
    try:
        value = decode(message.value)
    except InvalidValue as error:
        raise InvalidConstraint(f"what attribute {message.attribute!r} is compared with: {error}") from error
    return Comparison(message.attribute, name, value, message.claim)


def _facts_around(members: tuple[Constraint, ...], size_bytes: int) -> Facts:
    """Return the facts of a combination of these, if it is within the limits. Raises InvalidConstraint."""
    return _within_limits(
        Facts(
            frozenset().union(*(member.facts.attributes for member in members)),
            frozenset().union(*(member.facts.claims for member in members)),
            1 + max((member.facts.depth for member in members), default=0),
            1 + sum(member.facts.parts for member in members),
            size_bytes,
        )
    )


def _within_limits(facts: Facts) -> Facts:
    if facts.depth > CONSTRAINT_DEPTH_MAX:
        raise InvalidConstraint(f"a constraint is nested deeper than {CONSTRAINT_DEPTH_MAX} levels")
    check_parts(facts.parts)
    _check_size(facts.size_bytes)
    return facts


def _check_size(size_bytes: int) -> None:
    if size_bytes > CONSTRAINT_BYTES_MAX:
        raise InvalidConstraint(f"a constraint takes {size_bytes} bytes: the limit is {CONSTRAINT_BYTES_MAX}")


def _field_bytes(size_bytes: int) -> int:
    """Return the size of a message of this size as a field: behind a tag of one byte and its length."""
    return 1 + max(1, -(-size_bytes.bit_length() // 7)) + size_bytes


def _members(kind: type[_Combination], constraint: Constraint) -> tuple[Constraint, ...]:
    """Return the members of a combination of this kind; anything else is one: `a & b & c` nests nothing."""
    return constraint.members if isinstance(constraint, kind) else (constraint,)


def _operand(constraint: Constraint) -> str:
    """Return the text of a part of an expression, in parentheses where it has parts of its own."""
    compound = isinstance(constraint, _Combination) and len(constraint.members) > 1
    return f"({constraint})" if compound else str(constraint)


def _word(name: str) -> str:
    if _PLAIN_WORD.fullmatch(name) and name not in RESERVED_WORDS:
        return name
    return "`" + name.replace("`", "``") + "`"


def _listed(value: Any) -> Any:
    """Return a claim's value with what Python keeps in a tuple or a set as a list; of a set in one order."""
    if isinstance(value, AbstractSet):
        return sorted(value, key=repr)
    return list(value) if isinstance(value, tuple) else value


def _misfit(operator: str, value: Any) -> str:
    """Say why nothing can be compared with a value by an operator; empty: it can."""
    if operator == "in" and type(value) is not list:
        return f"`in` needs a list of values, got {type(value).__name__}"
    if operator in _ORDERS and type(value) not in _ORDERED:
        return f"a {type(value).__name__} has no order: use == != or in"
    return ""


def _equals(value: Any) -> _Test:
    kind = type(value)
    if kind in (float, list, dict):
        return lambda present: equal(present, value)
    return lambda present: type(present) is kind and present == value


def _differs(value: Any) -> _Test:
    kind = type(value)
    return lambda present: type(present) is kind and not equal(present, value)


def _ordered(test: Callable[[Any, Any], bool]) -> Callable[[Any], _Test]:
    def prepared(value: Any) -> _Test:
        kind = type(value)
        return lambda present: type(present) is kind and test(present, value)

    return prepared


def _ordered_or_equal(test: Callable[[Any, Any], bool]) -> Callable[[Any], _Test]:
    # NaN has no order and is yet equal to itself.
    return lambda value: _equals(value) if value != value else _ordered(test)(value)


def _is_in(values: list[Any] | None) -> _Test:
    known = frozenset(map(identity, values or ()))
    return lambda present: identity(present) in known


def _contains(value: Any) -> _Test:
    if value is None:
        return lambda _present: False
    is_member = _equals(value)
    is_text = type(value) is str

    def test(present: Any) -> bool:
        if type(present) is list:
            return any(map(is_member, present))
        return is_text and type(present) is str and value in present

    return test


# Each takes the value once and returns the test for attributes, which are never null.
_TESTS: Final[dict[str, Callable[[Any], _Test]]] = {
    "==": _equals,
    "!=": _differs,
    "<": _ordered(operator.lt),
    "<=": _ordered_or_equal(operator.le),
    ">": _ordered(operator.gt),
    ">=": _ordered_or_equal(operator.ge),
    "in": _is_in,
    "contains": _contains,
    "exists": lambda _: lambda _present: True,
}
_ORDERS: Final = frozenset(("<", "<=", ">", ">="))
_NUMBERS: Final = {
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
_OPERATORS: Final = {number: name for name, number in _NUMBERS.items()}

# What a comparison with a claim becomes if the claim is not there.
NEVER: Final = Any_(())
