"""Survivor: a few bytes that outlive the process that wrote them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Final

from tidelog._logging import get_logger

ROOM_BYTES: Final = 16 * 1024

_HEADER: Final = struct.Struct(">II")  # length, checksum

_log = get_logger("tidelog.store")


class Survivor:
    """
    A small value in a file, written over in place and never synced.

    A process that is killed leaves it as it was written last; a machine that loses power may
    lose it. What a kill cut short reads as empty.

    Raises:
        OSError: The file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open("r+b", buffering=0)
        self._has_failed = False
        if path.stat().st_size < ROOM_BYTES:
            # Made once and for all: writing over it needs no room on the disk.
            self._put(bytes(ROOM_BYTES))

    def read(self) -> bytes:
        """Return what was written last; empty if nothing was."""
        self._file.seek(0)
        data = self._file.read(ROOM_BYTES)
        if len(data) < _HEADER.size:
            return b""
        length, checksum = _HEADER.unpack_from(data)
        value = data[_HEADER.size : _HEADER.size + length]
        return value if len(value) == length and zlib.crc32(value) == checksum else b""

    def write(self, value: bytes) -> None:
        """Replace the value. A failing disk is logged: whoever writes has better to do than to fail for this."""
        self._put(_HEADER.pack(len(value), zlib.crc32(value)) + value)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _put(self, data: bytes) -> None:
        try:
            self._file.seek(0)
            self._file.write(data)
        except OSError as error:
            if not self._has_failed:
                _log.warning("cannot note what is under way", path=self._file.name, detail=str(error))
            self._has_failed = True
