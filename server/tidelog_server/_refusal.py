"""Refusal: what keeps an operation from being applied."""

from __future__ import annotations

from tidelog._failure import FailureReason
from tidelog._keys import ObjectKey
from tidelog_server._errors import for_people


class Refused(Exception):
    """
    The operation is refused.

    Attributes:
        message: Why, in a sentence for people.
        reason: Why, for programs.
        code: The application's own code for it; empty: none.
        cause: Id of the failure that led to this one; empty: none did.
        position: Place in its unit of the operation that is to blame.
    """

    def __init__(self, reason: FailureReason, message: object, *, code: str = "", cause: bytes = b"") -> None:
        self.message = for_people(message)
        super().__init__(self.message)
        self.reason = reason
        self.code = code
        self.cause = cause
        self.position = 0


class NotReady(Exception):
    """
    The operation can be applied once its replica has done something else. Until then it stays pending.

    Attributes:
        message: What, in a sentence for people.
    """

    def __init__(self, message: str) -> None:
        self.message = for_people(message)
        super().__init__(self.message)


class Waits(Exception):
    """
    The operation cannot be judged yet.

    Attributes:
        message: Why, in a sentence for people.
        target: The object that it refers to, which has not arrived.
        position: Place in its unit of the operation that waits.
    """

    def __init__(self, target: ObjectKey, message: str) -> None:
        self.message = for_people(message)
        super().__init__(self.message)
        self.target = target
        self.position = 0
