"""Attachments: what a program hands over as a file becomes a content, and a value that refers to it."""

from __future__ import annotations

import io
import mimetypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

from tidelog._errors import InvalidValue, LimitExceeded, quoted
from tidelog._file_reference import FileReference
from tidelog._limits import FILE_NAME_BYTES_MAX
from tidelog._values import check
from tidelog_client._files import Files

FileSource: TypeAlias = str | Path | bytes | bytearray | memoryview | BinaryIO

MEDIA_TYPE_DEFAULT: Final = "application/octet-stream"


def stored_file(
    files: Files, source: FileSource, *, name: str | None, media_type: str | None, default_name: str
) -> dict[str, Any]:
    """
    Store what a program hands over, and return the value of an attribute that refers to it.

    Args:
        files: The replica's contents.
        source: A path, the bytes themselves, or a binary stream, read to its end.
        name: What the file is called. None: the path's name, else *default_name*.
        media_type: What it holds. None: what its name suggests.
        default_name: See *name*.

    Raises:
        InvalidValue: *source* is none of these, or cannot be read, or *name* or *media_type* cannot be stored.
        DiskFull, StorageError: It cannot be stored.
    """
    if name is None:
        name = Path(source).name if isinstance(source, str | Path) else default_name
    if media_type is None:
        media_type = mimetypes.guess_type(name)[0] or MEDIA_TYPE_DEFAULT
    for what, text in (("name", name), ("media type", media_type)):
        if not isinstance(text, str):
            raise InvalidValue(f"the {what} of a file is a string, got {quoted(text)}")
        check(text, f"the {what} of a file")
        if len(text.encode()) > FILE_NAME_BYTES_MAX:
            raise LimitExceeded(f"the {what} of a file has more than {FILE_NAME_BYTES_MAX} bytes")
    with _opened(source) as stream:
        content = files.add(_Checked(stream))  # type: ignore[arg-type]  # all that is asked of it is to read
    return FileReference(name, content.size, media_type, content.sha256).to_value()


class _Checked:
    """A stream that answers with bytes, or an error of tidelog's."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        """Read at most so many bytes; none at the end."""
        try:
            data = self._stream.read(size)
        except (OSError, ValueError) as error:  # which a closed stream raises
            raise InvalidValue(f"the file cannot be read: {error}") from error
        if not isinstance(data, bytes | bytearray | memoryview):
            raise InvalidValue(f"a file is a stream of bytes; this one gave {quoted(data)}")
        return bytes(data)


@contextmanager
def _opened(source: FileSource) -> Iterator[BinaryIO]:
    if isinstance(source, str | Path):
        try:
            stream: BinaryIO = Path(source).open("rb")  # noqa: SIM115 - closed below
        except (OSError, ValueError) as error:
            raise InvalidValue(f"the file {str(source)!r} cannot be read: {error}") from error
        with stream:
            yield stream
    elif isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source)
    elif callable(getattr(source, "read", None)):
        yield source
    else:
        raise InvalidValue(f"a file is a path, bytes or a binary stream, got {quoted(source)}")
