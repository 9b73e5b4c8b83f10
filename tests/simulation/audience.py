"""An audience: whoever looks at what a replica shows while a download comes into view in steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tests.simulation import promises
from tests.simulation.records import read_shown

from tidelog import Operation
from tidelog_client._storage import Storage


class Audience:
    """
    Looks after each step of a publication.

    Attributes:
        is_looking: Whether what is written is a step of the publication; else it is a user's.
    """

    def __init__(self, storage: Storage) -> None:
        self.is_looking = True
        self._storage = storage
        self._expected = self._shown = read_shown(storage)

    @property
    def sees_nothing_new(self) -> bool:
        """Whether the newest step shows nothing."""
        return self._shown == self._expected

    def look(self) -> None:
        """Look at what shows after a step, which may have been the last one."""
        self._shown = read_shown(self._storage)

    def check(self) -> None:
        """Check that the newest step shows nothing: it was not the last."""
        promises.check_nothing_shows(self._expected, self._shown)

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """Let the user work."""
        self.is_looking = False
        try:
            yield
        finally:
            self.is_looking = True

    def take_in(self, operations: Iterable[Operation]) -> None:
        """Check that what the user did shows."""
        shown = read_shown(self._storage)
        promises.check_commits_show(self._expected, operations, shown)
        self._expected = self._shown = shown
