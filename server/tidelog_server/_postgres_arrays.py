"""
Arrays: many values on their way to PostgreSQL as one parameter.

A batch is read and written with a handful of statements over arrays, one for each
column. PostgreSQL takes them in binary form: a header, then each member behind its
length. Written here, and not by the driver, because it looks at every member to find
out what they are; and because a type that depends on the members makes another
prepared statement of each.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import chain, repeat
from typing import Any, ClassVar, Final

# Dimensions, whether there may be nulls, type of the members; then count and lower bound of the one dimension.
_HEADER: Final = struct.Struct(">iiIii")
_EMPTY: Final = struct.Struct(">iiI")
_LENGTH: Final = struct.Struct(">i")
_LENGTHS: Final = tuple(_LENGTH.pack(length) for length in range(4_096))


class Array(ABC):
    """
    Members of one type, encoded when it is made: what cannot be stored is found out before anything is sent.

    Attributes:
        MEMBER_OID: PostgreSQL's number of the type.
        ARRAY_OID: That of its arrays.
        data: PostgreSQL's binary form.
    """

    MEMBER_OID: ClassVar[int]
    ARRAY_OID: ClassVar[int]

    __slots__ = ("_count", "data")

    def __init__(self, members: Iterable[Any]) -> None:
        known = list(members)
        self._count = len(known)
        if known:
            self.data = _HEADER.pack(1, 0, self.MEMBER_OID, len(known), 1) + self._encoded(known)
        else:
            self.data = _EMPTY.pack(0, 0, self.MEMBER_OID)

    def __len__(self) -> int:
        return self._count

    @abstractmethod
    def _encoded(self, members: list[Any]) -> bytes:
        """Return the members, each behind its length."""


class Bigints(Array):
    """Integers of 64 bits."""

    MEMBER_OID = 20
    ARRAY_OID = 1016

    def _encoded(self, members: list[Any]) -> bytes:
        return struct.pack(">" + "iq" * len(members), *_interleaved(8, members))


class Smallints(Array):
    """Integers of 16 bits."""

    MEMBER_OID = 21
    ARRAY_OID = 1005

    def _encoded(self, members: list[Any]) -> bytes:
        return struct.pack(">" + "ih" * len(members), *_interleaved(2, members))


class Booleans(Array):
    """Truth values."""

    MEMBER_OID = 16
    ARRAY_OID = 1000

    def _encoded(self, members: list[Any]) -> bytes:
        return struct.pack(">" + "i?" * len(members), *_interleaved(1, members))


class Byteas(Array):
    """Bytes."""

    MEMBER_OID = 17
    ARRAY_OID = 1001

    def _encoded(self, members: list[Any]) -> bytes:
        return _behind_lengths(members)


class Texts(Array):
    """Text."""

    MEMBER_OID = 25
    ARRAY_OID = 1009

    def _encoded(self, members: list[Any]) -> bytes:
        return _behind_lengths(text.encode() for text in members)


ARRAYS: Final[tuple[type[Array], ...]] = (Bigints, Booleans, Byteas, Smallints, Texts)


def _interleaved(length: int, members: list[Any]) -> Iterable[Any]:
    return chain.from_iterable(zip(repeat(length), members, strict=False))


def _behind_lengths(members: Iterable[bytes]) -> bytes:
    known, count = _LENGTHS, len(_LENGTHS)
    parts = []
    for member in members:
        length = len(member)
        parts.append(known[length] if length < count else _LENGTH.pack(length))
        parts.append(member)
    return b"".join(parts)
