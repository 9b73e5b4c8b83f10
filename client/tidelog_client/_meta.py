"""Meta: what a replica remembers beside its data, single values under a name each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidelog._keys import POSITION_BYTES, unpack_position

if TYPE_CHECKING:
    from tidelog._environment import Environment, LmdbTransaction


class Meta:
    """
    The values in an environment's database `meta`.

    What takes a transaction is part of the caller's; the others open their own.
    """

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._database = environment.database("meta")

    def read(self, name: str) -> bytes:
        """Return a value; empty if there is none."""
        with self._environment.read() as transaction:
            return self.get(transaction, name)

    def write(self, **values: bytes) -> None:
        """Remember values."""
        self._environment.write(lambda transaction: self.put(transaction, **values))

    def get(self, transaction: LmdbTransaction, name: str) -> bytes:
        """Return a value; empty if there is none."""
        return transaction.get(name.encode(), b"", db=self._database)

    def positions(self, transaction: LmdbTransaction, name: str) -> set[int]:
        """Return a value that is positions of the log; empty if there is none."""
        value = self.get(transaction, name)
        return {
            unpack_position(value[start : start + POSITION_BYTES]) for start in range(0, len(value), POSITION_BYTES)
        }

    def put(self, transaction: LmdbTransaction, **values: bytes) -> None:
        """Remember values."""
        for name, value in values.items():
            transaction.put(name.encode(), value, db=self._database)
