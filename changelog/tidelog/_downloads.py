"""
Downloads: how much of an entity a replica has.

The application says how much it offers, a replica may want less. Both use this.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from tidelog._constraints import Constraint, constraint_from_message
from tidelog._errors import InvalidConstraint, InvalidValue
from tidelog._values import check_name
from tidelog.v1 import sync_pb2


class DownloadMode(enum.StrEnum):
    """
    How much of an entity a synchronization of mode *all* downloads.

    Attributes:
        ALL: Every visible object.
        WHERE: The visible objects that match a constraint; what no longer matches is removed.
        NOTHING_CLEAR: Nothing; a local object goes when its last operation is settled.
        NOTHING_PRESERVE: Nothing; local objects stay as they are.
        NEVER: Nothing, and nothing is uploaded either, but by *selected*.
    """

    ALL = "all"
    WHERE = "where"
    NOTHING_CLEAR = "nothing_clear"
    NOTHING_PRESERVE = "nothing_preserve"
    NEVER = "never"

    @property
    def number(self) -> sync_pb2.DownloadMode.ValueType:
        """The mode on the wire."""
        return sync_pb2.DownloadMode.Value(f"DOWNLOAD_MODE_{self.name}")

    @classmethod
    def of_number(cls, number: int) -> DownloadMode:
        """Return the mode that stands for *number* on the wire; an unknown one reads as ALL."""
        return _MODES.get(number, cls.ALL)

    @property
    def downloads(self) -> bool:
        """Whether anything is downloaded."""
        return self in (DownloadMode.ALL, DownloadMode.WHERE)


_MODES: Final = {int(mode.number): mode for mode in DownloadMode}


@dataclass(frozen=True, slots=True)
class Download:
    """
    How much of an entity is downloaded.

    Attributes:
        mode: How much.
        where: Which objects; mode WHERE only.

    Raises:
        InvalidConstraint: A constraint is missing, or there is one that the mode does not use.
    """

    mode: DownloadMode = DownloadMode.ALL
    where: Constraint | None = None

    def __post_init__(self) -> None:
        if (self.mode is DownloadMode.WHERE) != (self.where is not None):
            raise InvalidConstraint("mode where needs a constraint, and no other mode has one")

    def to_message(self, entity: str) -> sync_pb2.EntityDownload:
        """Return the wire form."""
        message = sync_pb2.EntityDownload(entity=entity, mode=self.mode.number)
        if self.where is not None:
            message.where.CopyFrom(self.where.to_message())
        return message

    @classmethod
    def from_message(cls, message: sync_pb2.EntityDownload) -> Download:
        """Read the wire form. Raises InvalidConstraint."""
        where = constraint_from_message(message.where) if message.HasField("where") else None
        return cls(DownloadMode.of_number(message.mode), where)


DownloadWish: TypeAlias = Download | DownloadMode | Constraint | str


def download_of(wish: DownloadWish) -> Download:
    """
    Return the download that a program states: a mode, its name, or a constraint, which means WHERE.

    Raises:
        InvalidValue: It is none of them.
        InvalidConstraint: See `Download`.
    """
    if isinstance(wish, Download):
        return wish
    if isinstance(wish, Constraint):
        return Download(DownloadMode.WHERE, wish)
    try:
        return Download(DownloadMode(wish))
    except ValueError as error:
        if isinstance(error, InvalidConstraint):
            raise
        names = ", ".join(mode.value for mode in DownloadMode)
        raise InvalidValue(f"a download is a constraint or one of {names}, got {wish!r}") from None


def downloads_of(wishes: Mapping[str, DownloadWish]) -> dict[str, Download]:
    """Return what a program states by entity. Raises InvalidValue, InvalidConstraint."""
    for entity in wishes:
        check_name(entity, "an entity name")
    return {entity: download_of(wish) for entity, wish in wishes.items()}
