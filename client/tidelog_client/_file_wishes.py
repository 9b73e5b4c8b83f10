"""File wishes: which contents a replica wants to have, by entity."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from tidelog._errors import InvalidValue
from tidelog._values import check_name


class FileMode(enum.StrEnum):
    """
    When contents are downloaded.

    Attributes:
        EAGER: With the objects that refer to them.
        LAZY: When they are opened the first time.
        NEVER: Not at all.
    """

    EAGER = "eager"
    LAZY = "lazy"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class FileDownload:
    """
    Which contents of the files of an entity are downloaded.

    Attributes:
        mode: When: a `FileMode`, or its name.
        bytes_max: Larger ones are not downloaded before they are opened. None: all are.

    Raises:
        InvalidValue: One of them is none.
    """

    mode: FileMode | str = FileMode.EAGER
    bytes_max: int | None = None

    def __post_init__(self) -> None:
        names = ", ".join(mode.value for mode in FileMode)
        if self.mode not in tuple(FileMode):
            raise InvalidValue(f"a download of files is one of {names}, got {self.mode!r}")
        object.__setattr__(self, "mode", FileMode(self.mode))
        if self.bytes_max is not None and (type(self.bytes_max) is not int or self.bytes_max < 0):
            raise InvalidValue(f"a largest size of {self.bytes_max!r} bytes")

    def wants(self, size: int) -> bool:
        """Tell whether a content of a size is downloaded before it is opened."""
        return self.mode is FileMode.EAGER and (self.bytes_max is None or size <= self.bytes_max)


FileWish: TypeAlias = FileDownload | FileMode | str

_EVERYTHING: Final = FileDownload()


class FileWishes:
    """
    What a program states by entity; where it says nothing, everything is downloaded.

    Raises:
        InvalidValue: A name of an entity, or a wish, that is none.
    """

    def __init__(self, wishes: Mapping[str, FileWish]) -> None:
        for entity in wishes:
            check_name(entity, "an entity name")
        self._wishes = {
            entity: wish if isinstance(wish, FileDownload) else FileDownload(wish) for entity, wish in wishes.items()
        }

    def of(self, entity: str) -> FileDownload:
        """Return what is wanted of an entity's files."""
        return self._wishes.get(entity, _EVERYTHING)
