"""
Slow links: whose last session was ended because it did not read a page in time.

How much of a message has passed, gRPC does not tell. So a client that has come to a halt
and one whose link is slow look the same, and both are ended. The latter would be sent the
same page again, with the same end: hence it gets the least pages there are, until a
session of it comes to its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tidelog._limits import PAGE_BYTES_MAX
from tidelog_server._errors import NothingRead
from tidelog_server._room import PAGE_BYTES_LEAST

# The oldest are forgotten: they find out anew.
LINKS_KEPT_MAX: Final = 10_000


class SlowLinks:
    """Remembers them while the server runs. Used by one thread."""

    def __init__(self) -> None:
        self._slow: dict[tuple[str, ...], None] = {}

    @contextmanager
    def session(self, *client: str) -> Iterator[int]:
        """Let a client have a session; yields how much one of its pages may hold."""
        try:
            yield PAGE_BYTES_LEAST if client in self._slow else PAGE_BYTES_MAX
        except NothingRead:
            self._slow.pop(client, None)
            self._slow[client] = None
            if len(self._slow) > LINKS_KEPT_MAX:
                del self._slow[next(iter(self._slow))]
            raise
        self._slow.pop(client, None)
