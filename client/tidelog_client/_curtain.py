"""
Curtain: what a replica shows while a download comes into view in more than one transaction.

    curtain   object key -> version of its base, then its record as it was before, with what its
                            user did since; no record: it is not shown

Nothing of a download shows before all of it does. While the curtain is drawn, who changes
an object hangs up before what was shown until then, and readers see that. The last of the
transactions opens it. Where these come to no end, because a state or a page turns out to be
lost, it stays drawn until everything was downloaded anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidelog._keys import POSITION_BYTES
from tidelog_client._meta import Meta

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tidelog._environment import Environment, LmdbTransaction


class Curtain:
    """
    What hangs in front of the view. Each method is part of the caller's transaction.

    Attributes:
        database: Where it is kept.
    """

    def __init__(self, environment: Environment) -> None:
        self.database = environment.database("curtain")
        self._meta = Meta(environment)

    def draw(self, transaction: LmdbTransaction) -> None:
        """Let readers see what is shown now until it is opened."""
        self._meta.put(transaction, curtain=b"1")

    def open(self, transaction: LmdbTransaction) -> None:
        """Let readers see what is behind it. Does nothing if it is open."""
        if self.is_drawn(transaction):
            self._meta.put(transaction, curtain=b"")
            transaction.drop(self.database, delete=False)

    def is_drawn(self, transaction: LmdbTransaction) -> bool:
        """Tell whether what is changed must not show."""
        return bool(self._meta.get(transaction, "curtain"))

    def is_empty(self, transaction: LmdbTransaction) -> bool:
        """Tell whether readers see the view itself."""
        return not transaction.stat(self.database)["entries"]

    def get(self, transaction: LmdbTransaction, key: bytes) -> tuple[bytes, bytes] | None:
        """Return the packed version of the base, and the record, that hang in front of an object; None: none do."""
        value = transaction.get(key, db=self.database)
        return None if value is None else (value[:POSITION_BYTES], value[POSITION_BYTES:])

    def records(self, transaction: LmdbTransaction, start: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Iterate over (object key, record) in front of the objects from a key on; an empty one hides its object."""
        cursor = transaction.cursor(self.database)
        if cursor.set_range(start):
            for key, value in cursor:
                yield key, value[POSITION_BYTES:]

    def change(self, transaction: LmdbTransaction, key: bytes, record: bytes) -> None:
        """Let readers see another record of an object in front of which one hangs, or, if it is empty, none."""
        version, _ = self.get(transaction, key) or (b"", b"")
        transaction.put(key, version + record, db=self.database)

    def hang(self, transaction: LmdbTransaction, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Hang up (object key, version of the base and record), where nothing hangs yet."""
        cursor = transaction.cursor(self.database)
        cursor.putmulti(items, overwrite=False)
        cursor.close()
