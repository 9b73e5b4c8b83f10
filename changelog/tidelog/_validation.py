"""
Validation: whether objects and changes fit what a schema says of their entity.

The declarations are worked out once, when the schema is made, so that checking an
object costs a look-up and a comparison of types for each attribute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Final

from tidelog._constraints import Comparison
from tidelog._entity import Entity
from tidelog._errors import InvalidConstraint, ValidationFailed, quoted
from tidelog._patch import Patch
from tidelog._value_check import ValueCheck
from tidelog._values import Attributes, copied

_NUMBERS: Final = (int, float, Decimal)
_MUST_HAVE_VALUE: Final = "must have a value"
_UNKNOWN_ATTRIBUTE: Final = "the schema has no such attribute"


class EntityRules:
    """
    The rules of one entity, ready to be asked often.

    Args:
        entity: The entity.
        open: Whether attributes that are not declared are accepted.
    """

    def __init__(self, entity: Entity, *, open: bool) -> None:  # noqa: A002 - the word of the schema
        self._name = entity.name
        self._open = open
        self._checks = {name: declared.value_check() for name, declared in entity.attributes.items()}
        self._required = tuple(name for name, declared in entity.attributes.items() if declared.required)
        self._defaults: Attributes = {
            name: default
            for name, declared in entity.attributes.items()
            if (default := getattr(declared, "default", None)) is not None
        }

    @property
    def can_refuse(self) -> bool:
        """Whether anything can break a rule."""
        return not self._open or bool(self._required) or any(check.kind is not None for check in self._checks.values())

    @property
    def has_defaults(self) -> bool:
        """Whether any attribute has a default."""
        return bool(self._defaults)

    def with_defaults(self, attributes: Attributes) -> Attributes:
        """Return the attributes of a creation with what it leaves out: the same object if that is nothing."""
        missing = self._defaults.keys() - attributes.keys()
        if not missing:
            return attributes
        return {
            **attributes,
            **{name: copied(default) for name, default in self._defaults.items() if name in missing},
        }

    def check_object(self, attributes: Mapping[str, Any], id_: str) -> None:
        """Check all attributes of an object. Raises ValidationFailed."""
        checks = self._checks
        for name, value in attributes.items():
            check = checks.get(name)
            if check is None:
                if not self._open:
                    raise self._unknown(name, value, id_)
            elif value is not None:
                # What `broken_rule` does, without a call for each attribute of each object.
                kind, phrase, rule, _ = check
                if type(value) is not kind and kind is not None:
                    raise self._failed(name, value, f"must be {phrase}", id_)
                if rule is not None and (broken := rule(value)) is not None:
                    raise self._failed(name, value, broken, id_)
        for name in self._required:
            if attributes.get(name) is None:
                raise self._failed(name, None, _MUST_HAVE_VALUE, id_)

    def check_written(self, attributes: Mapping[str, Any], written: Iterable[str], id_: str) -> None:
        """Check those attributes of an object that were written, or removed. Raises ValidationFailed."""
        for name in written:
            self._check_value(name, attributes.get(name), id_)

    def check_patch(self, patch: Patch, id_: str) -> None:
        """Check what an update writes, as far as it can be told without the object. Raises ValidationFailed."""
        for name, value in patch.set.items():
            self._check_value(name, value, id_)
        for name in patch.unset:
            self._check_value(name, None, id_)
        for name, amount in patch.increment.items():
            check = self._check_of(name, amount, id_)
            if check is None or check.kind is None:
                continue
            # Whole amounts fit into any kind of number.
            if check.kind not in _NUMBERS or type(amount) not in (check.kind, int):
                raise self._failed(name, amount, f"must be {check.phrase}", id_, how="is incremented by")
        for name, members in (*patch.add.items(), *patch.remove.items()):
            check = self._check_of(name, members, id_)
            if check is None or check.kind is None:
                continue
            how = "gets the members" if name in patch.add else "loses the members"
            if check.kind is not list:
                raise self._failed(name, members, f"must be {check.phrase}", id_, how=how)
            if check.member is None or name in patch.remove:
                continue  # members that cannot be there are not there: it is no harm to remove them
            for member in members:
                if (broken := check.member.broken_rule(member)) is not None:
                    raise self._failed(name, member, broken, id_, how="gets the member")

    def check_comparison(self, comparison: Comparison) -> None:
        """Check that a constraint names a known attribute and a value that it may have. Raises InvalidConstraint."""
        name, operator, value = comparison.attribute, comparison.operator, comparison.value
        check = self._checks.get(name)
        if check is None:
            if self._open:
                return
            raise InvalidConstraint(f"{self._name} has no attribute {name!r}")
        # A claim of the principal's is not known yet.
        if operator == "exists" or check.kind is None or comparison.claim:
            return
        kind: type | None = check.kind
        phrase = check.phrase
        if operator == "contains":
            if kind is list:
                if check.member is None:
                    return
                kind, phrase = check.member.kind, f"a list in which each member is {check.member.phrase}"
            elif kind is not str:
                raise InvalidConstraint(f"{self._name}: attribute {name!r} is {phrase}, which contains nothing")
        for one in value if operator == "in" else (value,):
            if type(one) is not kind and one is not None:
                raise InvalidConstraint(
                    f"{self._name}: attribute {name!r} is {phrase}, which is never compared with {quoted(one)}"
                )

    def _check_value(self, name: str, value: Any, id_: str) -> None:
        check = self._check_of(name, value, id_)
        if check is None:
            return
        if value is None:
            if name in self._required:
                raise self._failed(name, None, _MUST_HAVE_VALUE, id_)
        elif (broken := check.broken_rule(value)) is not None:
            raise self._failed(name, value, broken, id_)

    def _check_of(self, name: str, value: Any, id_: str) -> ValueCheck | None:
        """Return what is asked of an attribute; None: nothing, since it may be there without being declared."""
        check = self._checks.get(name)
        if check is None and not self._open:
            raise self._unknown(name, value, id_)
        return check

    def _failed(self, name: str, value: Any, rule: str, id_: str, how: str = "is") -> ValidationFailed:
        return ValidationFailed(entity=self._name, id=id_, attribute=name, value=value, rule=rule, how=how)

    def _unknown(self, name: str, value: Any, id_: str) -> ValidationFailed:
        return ValidationFailed(
            entity=self._name, id=id_, attribute=name, value=value, rule=_UNKNOWN_ATTRIBUTE, is_mismatch=True
        )
