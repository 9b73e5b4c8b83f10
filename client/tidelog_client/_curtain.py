"""
Curtain: what a replica shows while a download comes into view in more than one transaction.

    curtain   object key -> its record as it was before, with what its user did since;
                            of an object that is not shown, the version of its base

Nothing of a download shows before all of it does. While the curtain is drawn, who changes
an object hangs up before what was shown until then, and readers see that. The last of the
transactions opens it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidelog_client._meta import Meta

if TYPE_CHECKING:
    from collections.abc import Iterable

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
        """Let readers see what is behind it."""
        self._meta.put(transaction, curtain=b"")
        transaction.drop(self.database, delete=False)

    def is_drawn(self, transaction: LmdbTransaction) -> bool:
        """Tell whether what is changed must not show."""
        return bool(self._meta.get(transaction, "curtain"))

    def is_empty(self, transaction: LmdbTransaction) -> bool:
        """Tell whether readers see the view itself."""
        return not transaction.stat(self.database)["entries"]

    def get(self, transaction: LmdbTransaction, key: bytes) -> bytes | None:
        """Return what hangs in front of an object; None: nothing does."""
        return transaction.get(key, db=self.database)

    def put(self, transaction: LmdbTransaction, key: bytes, value: bytes) -> None:
        """Let readers see something else of an object."""
        transaction.put(key, value, db=self.database)

    def hang(self, transaction: LmdbTransaction, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Hang up what is shown of objects, where nothing hangs yet."""
        cursor = transaction.cursor(self.database)
        cursor.putmulti(items, overwrite=False)
        cursor.close()
