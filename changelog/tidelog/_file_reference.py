"""
File references: how the attributes of an object refer to the contents of files.

Whatever value of an attribute has the form of a file reference is one, whether a
schema declares it or not. Those inside of lists and maps are followed by nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple, Self

from tidelog._value_check import file_rule
from tidelog._values import decode_trusted

# No encoding of a file reference is without its field's name, nor without one of the bytes that 32 bytes begin with.
# Single bytes are looked for ten times as fast.
_MARK: Final = b"sha256"
_BIN8, _BIN16, _BIN32 = 0xC4, 0xC5, 0xC6


class FileReference(NamedTuple):
    """
    What an attribute says of a file.

    Attributes:
        name: Its name, for people.
        size: Length of its content in bytes.
        media_type: What it holds, such as "image/jpeg".
        sha256: SHA-256 of its content: 32 bytes.
    """

    name: str
    size: int
    media_type: str
    sha256: bytes

    @classmethod
    def of(cls, value: Any) -> Self | None:
        """Return the file reference that a value is, or None if it is none."""
        if type(value) is not dict or len(value) != len(cls._fields) or file_rule(value) is not None:
            return None
        return cls(**value)

    def to_value(self) -> dict[str, Any]:
        """Return the value of an attribute that says this."""
        return self._asdict()


def file_references(attributes: Mapping[str, Any]) -> Iterator[tuple[str, FileReference]]:
    """Iterate over the attributes that refer to files."""
    for name, value in attributes.items():
        if type(value) is dict and (reference := FileReference.of(value)) is not None:
            yield name, reference


def may_refer_to_files(encoded: bytes) -> bool:
    """Tell from encoded attributes, or an operation, whether it is worth decoding them to look for references."""
    return (_BIN8 in encoded or _BIN16 in encoded or _BIN32 in encoded) and _MARK in encoded


def encoded_file_references(encoded: bytes) -> dict[str, FileReference]:
    """Return the file references in encoded attributes, by attribute."""
    return dict(file_references(decode_trusted(encoded))) if may_refer_to_files(encoded) else {}
