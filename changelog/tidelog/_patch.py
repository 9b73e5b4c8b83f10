"""
Patches: what an operation does to an object's attributes.

A patch replaces and removes attributes (`set`, `unset`) and can say what is
*meant* instead of what results: `increment` a number, `add` and `remove` members
of a set-like list. Two intents of one kind merge whatever their order; against a
`set` the order of arrival decides.

`apply` is the one place where attributes change. The replica calls it to show a
pending operation, the server to apply it, and both get the same result.
"""

from __future__ import annotations

import decimal
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from tidelog._errors import InvalidValue, quoted
from tidelog._values import (
    DECIMAL_BYTES_MAX,
    INTEGER_MAX,
    INTEGER_MIN,
    Attributes,
    are_known_names,
    check,
    check_name,
    decode_flat_map,
    decode_map,
    encode,
    identity,
)

_SET_PREFIX = b"\x81\xa3set"  # a MessagePack map of one pair whose key is "set"
_FIELDS = frozenset(("set", "unset", "increment", "add", "remove"))

_EXACT = decimal.Context(
    prec=4 * DECIMAL_BYTES_MAX,
    Emax=decimal.MAX_EMAX,
    Emin=decimal.MIN_EMIN,
    traps=[decimal.Inexact, decimal.InvalidOperation, decimal.Overflow, decimal.Subnormal],
)

# An attribute's value lies inside the patch and inside one of its fields.
_ATTRIBUTE_DEPTH = 3

_NO_MAP: Attributes = {}
# Values of these types can be stored, but for strings with a lone surrogate.
_PLAIN = frozenset((str, bool, float, bytes, type(None)))


class Patch(NamedTuple):
    """
    A change to attributes. An attribute stands in one field only.

    Attributes:
        set: Values that replace what is there, by attribute.
        unset: Attributes to be removed.
        increment: Numbers to be added, by attribute.
        add: Members that a set-like list gets unless it holds them, by attribute.
        remove: Members that it loses, by attribute.
    """

    set: Attributes = _NO_MAP
    unset: tuple[str, ...] = ()
    increment: Attributes = _NO_MAP
    add: Attributes = _NO_MAP
    remove: Attributes = _NO_MAP

    @property
    def written(self) -> list[str]:
        """Names of the attributes that the patch writes, each once."""
        return [*self.set, *self.unset, *self.increment, *self.add, *self.remove]

    @property
    def has_intents(self) -> bool:
        """Tell whether the result depends on what is there."""
        return bool(self.increment or self.add or self.remove)

    def apply(self, attributes: Attributes) -> Attributes:
        """
        Return *attributes* with the patch applied; the argument stays as it is.

        Raises:
            InvalidValue: An intent does not fit the value that is there.
        """
        result = {**attributes, **self.set}
        for name in self.unset:
            result.pop(name, None)
        for name, amount in self.increment.items():
            result[name] = _incremented(name, result.get(name), amount)
        for name, members in self.add.items():
            result[name] = _with_members(_members_of(name, result.get(name)), members)
        for name, members in self.remove.items():
            gone = set(map(identity, members))
            present = _members_of(name, result.get(name))
            result[name] = [one for one in present if identity(one) not in gone]
        return result

    def encode(self) -> bytes:
        """Return the MessagePack form that `decode_patch` reads. Raises InvalidValue."""
        fields: dict[str, Any] = {name: value for name, value in zip(self._fields, self, strict=True) if value}
        if "unset" in fields:
            fields["unset"] = list(self.unset)
        return encode(fields or {"set": {}})

    def check(self) -> None:
        """Check a patch that a program handed over. Raises InvalidValue."""
        check_attributes(self.set)
        for members_by_name in (self.add, self.remove):
            check_attributes(members_by_name)
        if self.unset or self.has_intents:
            _check_shape(self)


def patch_of(
    attributes: Mapping[str, Any] | None = None,
    *,
    unset: Sequence[str] = (),
    increment: Mapping[str, Any] | None = None,
    add: Mapping[str, Sequence[Any]] | None = None,
    remove: Mapping[str, Sequence[Any]] | None = None,
) -> Patch:
    """
    Return the patch of an update as a program says it, not checked yet.

    Raises:
        InvalidValue: A list is none.
    """
    return Patch(
        dict(attributes or {}),
        tuple(_listed("unset", unset)),
        dict(increment or {}),
        {name: _listed(name, members) for name, members in (add or {}).items()},
        {name: _listed(name, members) for name, members in (remove or {}).items()},
    )


def decode_patch(data: bytes) -> Patch:
    """
    Decode the patch of an operation that came from outside.

    Raises:
        InvalidValue: The bytes are no patch.
    """
    encoded = encoded_attributes(data)
    if encoded is not None:
        plain = decode_flat_map(encoded)
        if plain is not None and are_known_names(plain.keys()):
            return Patch(plain)
    fields = decode_map(data)
    if len(fields) == 1 and "set" in fields:
        attributes = fields["set"]
        if type(attributes) is not dict:
            raise InvalidValue('"set" of a patch is no map')
        for name in attributes:
            check_attribute_name(name)
        return Patch(attributes)
    if not fields.keys() <= _FIELDS:
        raise InvalidValue(f"unknown key in a patch: {', '.join(sorted(fields.keys() - _FIELDS))}")
    unset = fields.get("unset", [])
    if type(unset) is not list:
        raise InvalidValue('"unset" of a patch is no list')
    for name in ("set", "increment", "add", "remove"):
        if type(fields.get(name, _NO_MAP)) is not dict:
            raise InvalidValue(f'"{name}" of a patch is no map')
    patch = Patch(
        fields.get("set", _NO_MAP),
        tuple(unset),
        fields.get("increment", _NO_MAP),
        fields.get("add", _NO_MAP),
        fields.get("remove", _NO_MAP),
    )
    _check_shape(patch)
    return patch


def encoded_attributes(data: bytes) -> bytes | None:
    """
    Return the encoded attributes inside an encoded patch that only sets, without decoding.

    None if the patch is another, or is encoded in an unusual way: then decode it.
    """
    return data[len(_SET_PREFIX) :] if data.startswith(_SET_PREFIX) else None


def patch_setting(attributes: bytes) -> bytes:
    """Return the encoded patch that sets these encoded attributes."""
    return _SET_PREFIX + attributes


def check_attributes(attributes: Attributes) -> None:
    """Check names and values of attributes. Raises InvalidValue."""
    for name, value in attributes.items():
        check_attribute_name(name)
        if type(value) not in _PLAIN or (type(value) is str and not value.isascii()):
            check(value, f"attribute {name!r}", _ATTRIBUTE_DEPTH)


def check_attribute_name(name: str) -> None:
    """Check the name of an attribute. Raises InvalidValue."""
    check_name(name, "an attribute name")


def _listed(name: str, members: Sequence[Any]) -> list[Any]:
    """Return members as a list. A string is a sequence too, but never one that was meant."""
    if isinstance(members, str | bytes | Mapping):
        raise InvalidValue(f"{name!r}: expected a list, got {members!r}")
    return list(members)


def _check_shape(patch: Patch) -> None:
    written = patch.written
    seen: set[str] = set()
    for name in written:
        check_attribute_name(name)
        if name in seen:
            raise InvalidValue(f"attribute {name!r} stands twice in one patch")
        seen.add(name)
    for name, amount in patch.increment.items():
        if type(amount) not in (int, float, Decimal):
            raise InvalidValue(f"attribute {name!r} is incremented by {quoted(amount)}, which is no number")
        check(amount, f"the increment of attribute {name!r}")
    for members_by_name in (patch.add, patch.remove):
        for name, members in members_by_name.items():
            if type(members) is not list:
                raise InvalidValue(f"members of attribute {name!r} must come as a list, got {quoted(members)}")


def _incremented(name: str, present: Any, amount: Any) -> Any:
    if present is None:
        return amount
    kind = type(present)
    # An integer fits into any kind of number; nothing else is converted, because
    # the result would not be what either author meant.
    if kind not in (int, float, Decimal) or type(amount) not in (kind, int):
        raise InvalidValue(f"attribute {name!r} is {quoted(present)}: {amount!r} cannot be added to it")
    if kind is Decimal:
        return _exact_sum(name, present, Decimal(amount))
    total = present + amount
    if kind is int and not INTEGER_MIN <= total <= INTEGER_MAX:
        raise InvalidValue(f"attribute {name!r} would exceed 64 bits")
    return total


def _exact_sum(name: str, present: Decimal, amount: Decimal) -> Decimal:
    """Add without rounding, so that increments merge to the same sum in any order."""
    try:
        total = _EXACT.add(present, amount)
        check(total, f"attribute {name!r}")
    except (decimal.DecimalException, InvalidValue):
        raise InvalidValue(f"attribute {name!r} would have more digits than a decimal can hold") from None
    return total


def _members_of(name: str, present: Any) -> list[Any]:
    if present is None:
        return []
    if type(present) is not list:
        raise InvalidValue(f"attribute {name!r} is {quoted(present)}: it has no members")
    return present


def _with_members(present: list[Any], members: list[Any]) -> list[Any]:
    result = list(present)
    known = set(map(identity, present))
    for member in members:
        key = identity(member)
        if key not in known:
            known.add(key)
            result.append(member)
    return result
