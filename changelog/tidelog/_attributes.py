"""
Attribute types: what an attribute may hold, and the rules that its values obey.

A declaration is a small frozen struct. It is checked when it is made, so that a
bound of the wrong type or a default that breaks its own rule is found on the line
that says so. In a schema file the same structs are decoded, with the same checks.

Types are as strict as values are: 1 is no float, and True no integer. Null is no
value: whether it may be there is what `required` says.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final, Literal, TypeAlias, get_args

import msgspec
from msgspec.structs import force_setattr

from tidelog._errors import InvalidSchema, InvalidValue, quoted
from tidelog._limits import ENUMERATION_VALUES_MAX, PATTERN_CHARS_MAX
from tidelog._value_check import (
    ValueCheck,
    all_of,
    choice_rule,
    file_rule,
    id_rule,
    length_rule,
    members_rule,
    pattern_rule,
    range_rule,
)
from tidelog._values import INTEGER_MAX, check, check_name, copied

OnDelete: TypeAlias = Literal["restrict", "cascade", "clear", "keep"]

# What JSON and TOML both tell apart, inside of lists and maps where no declaration helps to read it.
_PLAIN: Final = frozenset((str, int, float, bool))


class Attribute(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, tag=str.lower
):
    """
    What every declaration of an attribute has.

    Attributes:
        required: Whether an object must have a value that is not null.

    Raises:
        InvalidSchema: The declaration contradicts itself.
    """

    required: bool = False

    def __post_init__(self) -> None:
        if type(self.required) is not bool:
            raise self._invalid(f"required is {quoted(self.required)}, but must be True or False")
        default: Any = getattr(self, "default", None)
        self._check_storable("the default", default)
        self._check_rules()
        if default is not None and (broken := self.value_check().broken_rule(default)) is not None:
            raise self._invalid(f"the default is {quoted(default)}, but {broken}")

    def value_check(self) -> ValueCheck:
        """Return what is asked of a value that is not null."""
        raise NotImplementedError

    def _check_rules(self) -> None:
        """Check what subclasses declare besides a default. Raises InvalidSchema."""

    def _check_storable(self, what: str, value: Any) -> None:
        try:
            check(value, what)
        except InvalidValue as error:
            raise self._invalid(str(error)) from error

    def _check_bounds(self, minimum: Any, maximum: Any) -> None:
        kind, phrase, _, _ = self.value_check()
        for name, bound in (("minimum", minimum), ("maximum", maximum)):
            if bound is None:
                continue
            if type(bound) is not kind:
                raise self._invalid(f"{name} is {quoted(bound)}, but must be {phrase}")
            self._check_storable(name, bound)
            if isinstance(bound, float) and not math.isfinite(bound):
                raise self._invalid(f"{name} is {bound}, but must be finite")
        if minimum is not None and maximum is not None and minimum > maximum:
            raise self._invalid(f"minimum {minimum} is above maximum {maximum}")

    def _invalid(self, what: str) -> InvalidSchema:
        return InvalidSchema(f"{type(self).__name__}: {what}")


class _Sized(Attribute, frozen=True, kw_only=True):
    min_length: int | None = None
    max_length: int | None = None

    def _check_rules(self) -> None:
        for name, length in (("min_length", self.min_length), ("max_length", self.max_length)):
            if length is not None and (type(length) is not int or not 0 <= length <= INTEGER_MAX):
                raise self._invalid(f"{name} is {quoted(length)}, but must be an integer from 0")
        if self.min_length is not None and self.max_length is not None and self.min_length > self.max_length:
            raise self._invalid(f"min_length {self.min_length} is above max_length {self.max_length}")


class AnyValue(Attribute, frozen=True, kw_only=True, tag="any"):
    """Anything that tidelog can hold."""

    def value_check(self) -> ValueCheck:
        return ValueCheck(None, "any value")


class String(_Sized, frozen=True, kw_only=True):
    r"""
    A string.

    Attributes:
        default: What an object gets that is created without one.
        min_length: Least number of code points.
        max_length: Greatest number of code points.
        pattern: A regular expression of Python's `re` that the whole string must match.
            A string over 1,000 code points does not match any. A pattern is code of
            the application's: the server runs it while nobody else's operations are
            applied, and does not search it for traps. One whose repetitions nest, as
            in `(a+)+`, can take for ever on a hostile string of 40 characters; write
            `(?>a+)+`, or `a+`.
    """

    default: str | None = None
    pattern: str | None = None

    def value_check(self) -> ValueCheck:
        return ValueCheck(
            str,
            "a string",
            all_of(length_rule(self.min_length, self.max_length, "characters"), pattern_rule(self.pattern)),
        )

    def _check_rules(self) -> None:
        super()._check_rules()
        if self.pattern is None:
            return
        if type(self.pattern) is not str or not 0 < len(self.pattern) <= PATTERN_CHARS_MAX:
            raise self._invalid(
                f"pattern is {quoted(self.pattern)}, but must be a string of 1 to {PATTERN_CHARS_MAX} characters"
            )
        self._check_storable("pattern", self.pattern)
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise self._invalid(f"pattern {quoted(self.pattern)} is no regular expression: {error}") from error


class Integer(Attribute, frozen=True, kw_only=True):
    """
    An integer of 64 bits with a sign.

    Attributes:
        default: What an object gets that is created without one.
        minimum: Least value.
        maximum: Greatest value.
    """

    default: int | None = None
    minimum: int | None = None
    maximum: int | None = None

    def value_check(self) -> ValueCheck:
        return ValueCheck(int, "an integer", range_rule(self.minimum, self.maximum))

    def _check_rules(self) -> None:
        self._check_bounds(self.minimum, self.maximum)


class Float(Attribute, frozen=True, kw_only=True):
    """
    A float of 64 bits. NaN is within no bounds.

    Attributes:
        default: What an object gets that is created without one; finite.
        minimum: Least value; finite.
        maximum: Greatest value; finite.
    """

    default: float | None = None
    minimum: float | None = None
    maximum: float | None = None

    def value_check(self) -> ValueCheck:
        return ValueCheck(float, "a float", range_rule(self.minimum, self.maximum))

    def _check_rules(self) -> None:
        self._check_bounds(self.minimum, self.maximum)
        # JSON has no word for the others.
        if isinstance(self.default, float) and not math.isfinite(self.default):
            raise self._invalid(f"the default is {self.default}, but must be finite")


class DecimalNumber(Attribute, frozen=True, kw_only=True, tag="decimal"):
    """
    A decimal. The name leaves `Decimal` to the values.

    Attributes:
        default: What an object gets that is created without one.
        minimum: Least value.
        maximum: Greatest value.
    """

    default: Decimal | None = None
    minimum: Decimal | None = None
    maximum: Decimal | None = None

    def value_check(self) -> ValueCheck:
        return ValueCheck(Decimal, "a decimal", range_rule(self.minimum, self.maximum))

    def _check_rules(self) -> None:
        self._check_bounds(self.minimum, self.maximum)


class Boolean(Attribute, frozen=True, kw_only=True):
    """
    True or false.

    Attributes:
        default: What an object gets that is created without one.
    """

    default: bool | None = None

    def value_check(self) -> ValueCheck:
        return ValueCheck(bool, "true or false")


class Timestamp(Attribute, frozen=True, kw_only=True):
    """
    A moment, of microseconds. Whatever the time zone, it is kept in UTC.

    Attributes:
        default: What an object gets that is created without one.
        minimum: Earliest moment.
        maximum: Latest moment.
    """

    default: datetime | None = None
    minimum: datetime | None = None
    maximum: datetime | None = None

    def value_check(self) -> ValueCheck:
        return ValueCheck(datetime, "a timestamp", range_rule(self.minimum, self.maximum))

    def _check_rules(self) -> None:
        self._check_bounds(self.minimum, self.maximum)
        # One moment is one declaration: two that say the same compare equal.
        for name in ("default", "minimum", "maximum"):
            moment = getattr(self, name)
            if type(moment) is datetime:
                force_setattr(self, name, moment.astimezone(UTC))


class Bytes(_Sized, frozen=True, kw_only=True):
    """
    A binary.

    Attributes:
        default: What an object gets that is created without one.
        min_length: Least number of bytes.
        max_length: Greatest number of bytes.
    """

    default: bytes | None = None

    def value_check(self) -> ValueCheck:
        return ValueCheck(bytes, "bytes", length_rule(self.min_length, self.max_length, "bytes"))


class _ListOptions(_Sized, frozen=True, kw_only=True):
    default: list[Any] | None = None


class List(_ListOptions, frozen=True):
    """
    A list.

    Attributes:
        member: Type of the members, without rules of its own: `List(String())`. Then
            null is no member. None: anything.
        default: What an object gets that is created without one. It is made of
            strings, numbers but decimals, booleans, lists and maps.
        min_length: Least number of members.
        max_length: Greatest number of members.
    """

    member: String | Integer | Float | DecimalNumber | Boolean | Timestamp | Bytes | List | Map | None = None

    def value_check(self) -> ValueCheck:
        length = length_rule(self.min_length, self.max_length, "members")
        if self.member is None:
            return ValueCheck(list, "a list", length)
        member = self.member.value_check()
        return ValueCheck(list, "a list", all_of(length, members_rule(member)), member)

    def _check_rules(self) -> None:
        super()._check_rules()
        if self.member is not None:
            if not isinstance(self.member, MEMBER_TYPES):
                raise self._invalid(
                    f"member is {quoted(self.member)}, but must be one of "
                    f"{', '.join(f'{kind.__name__}()' for kind in MEMBER_TYPES)}"
                )
            if self.member != type(self.member)():
                raise self._invalid(f"member is {self.member!r}, but members have a type and no rules of their own")
        _check_plain_default(self, list)


class Map(_Sized, frozen=True, kw_only=True):
    """
    A map with string keys.

    Attributes:
        default: What an object gets that is created without one. It is made of
            strings, numbers but decimals, booleans, lists and maps.
        min_length: Least number of keys.
        max_length: Greatest number of keys.
    """

    default: dict[str, Any] | None = None

    def value_check(self) -> ValueCheck:
        return ValueCheck(dict, "a map", length_rule(self.min_length, self.max_length, "keys"))

    def _check_rules(self) -> None:
        super()._check_rules()
        _check_plain_default(self, dict)


class _EnumerationOptions(Attribute, frozen=True, kw_only=True):
    default: str | None = None


class Enumeration(_EnumerationOptions, frozen=True):
    """
    One of a few strings.

    Attributes:
        values: The strings.
        default: What an object gets that is created without one.
    """

    values: Sequence[str]

    def value_check(self) -> ValueCheck:
        return ValueCheck(str, "a string", choice_rule(self.values))

    def _check_rules(self) -> None:
        values = list(self.values) if isinstance(self.values, list | tuple) else []
        if not 0 < len(values) <= ENUMERATION_VALUES_MAX:
            raise self._invalid(
                f"values is {quoted(self.values)}, but must be a list of 1 to {ENUMERATION_VALUES_MAX} strings"
            )
        seen: set[str] = set()
        for value in values:
            if type(value) is not str:
                raise self._invalid(f"{quoted(value)} is among the values, but is no string")
            self._check_storable("a value", value)
            if value in seen:
                raise self._invalid(f"{quoted(value)} is twice among the values")
            seen.add(value)
        force_setattr(self, "values", tuple(values))


class _ReferenceOptions(Attribute, frozen=True, kw_only=True):
    many: bool = False
    on_delete: OnDelete = "restrict"


class Reference(_ReferenceOptions, frozen=True):
    """
    The id of another object, or a list of ids.

    Attributes:
        target: Entity of the object that it names.
        many: Whether it is a list of ids instead of one id.
        on_delete: What becomes of the object when one that it names is deleted.
            "restrict": that deletion is refused. "cascade": it is deleted too.
            "clear": the reference is cleared. "keep": nothing; the reference may
            lead nowhere afterwards.
    """

    target: str

    def value_check(self) -> ValueCheck:
        one = ValueCheck(str, "the id of an object", id_rule)
        return ValueCheck(list, "a list of ids", members_rule(one), one) if self.many else one

    def _check_rules(self) -> None:
        try:
            check_name(self.target, "an entity name")
        except InvalidValue as error:
            raise self._invalid(str(error)) from error
        if type(self.many) is not bool:
            raise self._invalid(f"many is {quoted(self.many)}, but must be True or False")
        if self.on_delete not in get_args(OnDelete):
            raise self._invalid(
                f"on_delete is {quoted(self.on_delete)}, but must be one of {', '.join(get_args(OnDelete))}"
            )
        # What equals the default is left out of a schema's form only if it is the same string object.
        force_setattr(self, "on_delete", sys.intern(self.on_delete))
        if self.on_delete == "clear" and self.required and not self.many:
            raise self._invalid("a required reference cannot be cleared: use another on_delete")


class File(Attribute, frozen=True, kw_only=True):
    """A file: a map of "name" (string), "size" (bytes, an integer), "media_type" (string) and "sha256" (32 bytes)."""

    def value_check(self) -> ValueCheck:
        return ValueCheck(dict, "a file", file_rule)


# What a list may be declared to hold. References and files in a list would be followed by nobody.
MEMBER_TYPES: Final = (String, Integer, Float, DecimalNumber, Boolean, Timestamp, Bytes, List, Map)
AttributeType: TypeAlias = (
    AnyValue | String | Integer | Float | DecimalNumber | Boolean | Timestamp | Bytes | List | Map
    | Enumeration | Reference | File
)  # fmt: skip
ATTRIBUTE_TYPES: Final[tuple[type[Attribute], ...]] = get_args(AttributeType)


def _check_plain_default(attribute: List | Map, kind: type) -> None:
    """Check a default whose parts a schema file must tell without a declaration, and make it the struct's own."""
    default = attribute.default
    if default is None or type(default) is not kind:
        return  # of the wrong type, or none: what is said of every default
    inside: list[Any] = [default]
    while inside:
        value = inside.pop()
        if type(value) is dict:
            inside += value.values()
        elif type(value) is list:
            inside += value
        elif type(value) not in _PLAIN or (type(value) is float and not math.isfinite(value)):
            raise InvalidSchema(
                f"{type(attribute).__name__}: the default holds {quoted(value)}, but must be made of strings, "
                "integers, finite floats, booleans, lists and maps"
            )
    force_setattr(attribute, "default", copied(default))
