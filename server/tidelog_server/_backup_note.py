"""The note in a backup: what it is a copy of, and by what it is known whether it is still that."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

import msgspec

from tidelog._environment import DATA_FILE
from tidelog._errors import StorageError
from tidelog_server._records import Identity

BACKUP_FILE: Final = "BACKUP"


class BackupNote(msgspec.Struct, frozen=True):
    """
    What a backup says of itself.

    Attributes:
        epoch: Names the store that it is of.
        timeline: The store's timeline then.
        time: When it was made, in UTC.
        versions: Each tenant's version.
        data_bytes: Size of its data.
        data_sha256: Their digest, in hexadecimal digits.
    """

    epoch: str
    timeline: str
    time: str
    versions: dict[str, int]
    data_bytes: int
    data_sha256: str

    @classmethod
    def of(cls, directory: Path, identity: Identity, versions: dict[str, int]) -> Self:
        """Return what there is to say of a copy."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(identity.epoch, identity.timeline, time, versions, data_bytes(directory), data_sha256(directory))

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Return the note of a backup. Raises StorageError if there is none, or none that can be read."""
        file = directory / BACKUP_FILE
        try:
            return msgspec.json.decode(file.read_bytes(), type=cls)
        except FileNotFoundError:
            raise StorageError(f"{directory} is no backup: it has no file {BACKUP_FILE}") from None
        except (OSError, msgspec.MsgspecError) as error:
            raise StorageError(f"{file} cannot be read: {error}") from error

    def write(self, directory: Path) -> None:
        """Write the note into a backup."""
        (directory / BACKUP_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(self)) + b"\n")


def data_bytes(directory: Path) -> int:
    """Return the size of the data in a directory; 0 if there are none."""
    data = directory / DATA_FILE
    return data.stat().st_size if data.exists() else 0


def data_sha256(directory: Path) -> str:
    """Return the digest of the data in a directory."""
    with (directory / DATA_FILE).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
