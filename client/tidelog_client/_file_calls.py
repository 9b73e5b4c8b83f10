"""File calls: what transfers of contents ask of a server, whatever carries it."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from tidelog._channel import Metadata
    from tidelog._keys import ObjectKey
    from tidelog_client._files import Needed


class Presence(enum.Enum):
    """Whether a server needs a content."""

    PRESENT = enum.auto()
    MISSING = enum.auto()
    TOO_LARGE = enum.auto()


class ContentStatus(NamedTuple):
    """
    How a content stands with a server.

    Attributes:
        presence: Whether it needs it.
        received_bytes: How far an interrupted upload got.
        takes_room: Whether it takes some of the room that the user has.
    """

    presence: Presence
    received_bytes: int = 0
    takes_room: bool = False


class Standings(NamedTuple):
    """
    How contents stand with a server.

    Attributes:
        statuses: How each does.
        room_bytes: How much may be there of the user's that no operation refers to yet. None: however much.
    """

    statuses: Sequence[ContentStatus]
    room_bytes: int | None = None


class FileRefused(Exception):
    """
    The server does not take a content, or does not give it. Asking again at once does not help.

    Attributes:
        is_too_large: Whether it takes no content of that size.
        is_damaged: Whether bytes came, and in vain: they are not the content.
        is_denied: Whether it does not give it by the object that was named. By another one it may.
    """

    def __init__(
        self, message: str, *, is_too_large: bool = False, is_damaged: bool = False, is_denied: bool = False
    ) -> None:
        super().__init__(message)
        self.is_too_large = is_too_large
        self.is_damaged = is_damaged
        self.is_denied = is_denied


class FileCalls(Protocol):
    """
    Calls that many threads may make at once. Each may last as long as the network takes, until `close`.

    All raise Transient, if a repetition may mend it, and SynchronizationError.
    """

    def stat(self, metadata: Metadata, contents: Sequence[Needed]) -> Standings:
        """Ask how up to 1,000 contents stand."""
        ...

    def upload(self, metadata: Metadata, content: Needed, offset: int, chunks: Iterable[bytes]) -> None:
        """Upload what follows on *offset* of a content. Raises FileRefused, and whatever *chunks* raises."""
        ...

    def download(self, metadata: Metadata, sha256: bytes, key: ObjectKey, offset: int) -> Iterator[bytes]:
        """Download what follows on *offset* of a content that an object refers to. Raises FileRefused."""
        ...

    def close(self) -> None:
        """End all calls, without a wait: they raise Transient, later ones ResourceClosed."""
        ...
