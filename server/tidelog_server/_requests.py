"""Reading requests: what any service checks of a message before it asks for anything."""

from __future__ import annotations

from typing import Final, TypeVar

import uuid_utils
from google.protobuf.message import DecodeError, Message

from tidelog_server._errors import RequestInvalid

LIST_PAGE_DEFAULT: Final = 100
LIST_PAGE_MAX: Final = 1_000

_M = TypeVar("_M", bound=Message)


def parsed(kind: type[_M], data: bytes) -> _M:
    """Return the message. Raises RequestInvalid."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise RequestInvalid(f"the bytes are no {kind.DESCRIPTOR.name}") from error


def page_size(requested: int) -> int:
    """Return how many entries a page may hold. Raises RequestInvalid."""
    if requested < 0:
        raise RequestInvalid(f"a page size of {requested}")
    return min(requested or LIST_PAGE_DEFAULT, LIST_PAGE_MAX)


def uuid_bytes(text: str, what: str) -> bytes:
    """Return the 16 bytes of a UUID. Raises RequestInvalid."""
    try:
        return uuid_utils.UUID(text).bytes
    except ValueError:
        raise RequestInvalid(f"{what} is a UUID, got {text[:60]!r}") from None
