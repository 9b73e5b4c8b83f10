"""
What an operation does to attributes, written a second time.

The checkers use this and not the product's own `Patch.apply`, so that a mistake
there shows as a difference instead of agreeing with itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, TypeAlias

from tidelog._operation import Operation, OperationKind
from tidelog._patch import Patch

Attributes: TypeAlias = dict[str, Any]
Key: TypeAlias = tuple[str, str]


class Misfit(Exception):
    """An intent that does not fit the value that is there."""


def same(left: Any, right: Any) -> bool:
    """Tell whether two values have the same type and value; NaN is like NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right) or (left != left and right != right)


def patched(attributes: Mapping[str, Any], patch: Patch) -> Attributes:
    """Return *attributes* with a patch applied. Raises Misfit."""
    result = {name: value for name, value in attributes.items() if name not in patch.unset}
    result.update(patch.set)
    for name, amount in patch.increment.items():
        result[name] = _sum(result.get(name), amount)
    for name, members in patch.add.items():
        present = _members(result.get(name))
        for member in members:
            if not any(same(member, one) for one in present):
                present.append(member)
        result[name] = present
    for name, members in patch.remove.items():
        present = _members(result.get(name))
        result[name] = [one for one in present if not any(same(one, member) for member in members)]
    return result


def replayed(attributes: Attributes | None, operation: Operation) -> Attributes | None:
    """Return what a replica shows after an operation; None stands for no object."""
    if operation.kind is OperationKind.DELETE:
        return None
    patch = operation.decoded_patch()
    if operation.kind is OperationKind.CREATE:
        return dict(patch.set)
    if attributes is None:
        return None
    try:
        return patched(attributes, patch)
    except Misfit:
        return attributes


def _sum(present: Any, amount: Any) -> Any:
    if present is None:
        return amount
    numbers = (int, float, Decimal)
    if type(present) not in numbers or type(amount) not in (type(present), int):
        raise Misfit
    total = present + amount
    if type(total) is int and not -(2**63) <= total < 2**63:
        raise Misfit
    return total


def _members(present: Any) -> list[Any]:
    if present is None:
        return []
    if type(present) is not list:
        raise Misfit
    return list(present)
