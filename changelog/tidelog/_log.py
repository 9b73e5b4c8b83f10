"""
The operation log: a replica's append-only record of its operations.

seq -> CRC-32 + the serialized `tidelog.v1.Operation`, byte for byte what the wire
carries. The check sum stands in front so that the operation is one slice of the
entry and goes into a batch without being decoded.

The log knows nothing of what became of an operation; whoever trims it names the
positions that must stay.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from tidelog._errors import InvalidValue, LogCorrupt
from tidelog._keys import pack_position, unpack_position
from tidelog._operation import Operation, decode_operation

if TYPE_CHECKING:
    from tidelog._environment import Environment, LmdbTransaction

_CRC_BYTES: Final = 4
_SCAN_PAGE_ENTRIES: Final = 500
_SCAN_PAGE_BYTES: Final = 4 * 1024 * 1024


class OperationLog:
    """
    The log in an environment's database `log`.

    What takes a transaction is part of the caller's; the others open their own.
    """

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._database = environment.database("log")

    def append(self, transaction: LmdbTransaction, entries: Iterable[tuple[int, bytes]]) -> None:
        """
        Append serialized operations at their seq, which must rise.

        Raises:
            LogCorrupt: The log holds an entry at or above one of the positions.
        """
        for seq, data in entries:
            entry = zlib.crc32(data).to_bytes(_CRC_BYTES, "big") + data
            # LMDB answers False to an append out of order and raises nothing.
            if not transaction.put(pack_position(seq), entry, db=self._database, append=True):
                raise LogCorrupt(f"the operation log has an entry above seq {seq}, which should be its end", seq=seq)

    def get(self, transaction: LmdbTransaction, seq: int) -> bytes | None:
        """Return the serialized operation at *seq*, or None. Raises LogCorrupt."""
        entry = transaction.get(pack_position(seq), db=self._database)
        return None if entry is None else checked(seq, entry)

    def damaged(self, transaction: LmdbTransaction) -> Iterator[tuple[int, bytes]]:
        """Iterate over the entries that fail their check or cannot be read: seq, what is there."""
        for key, entry in transaction.cursor(self._database):
            seq = unpack_position(key)
            try:
                is_sound = decode_operation(checked(seq, entry)).seq == seq
            except (LogCorrupt, InvalidValue):
                is_sound = False
            if not is_sound:
                yield seq, entry[_CRC_BYTES:]

    def stored(self, transaction: LmdbTransaction, seq: int) -> bytes:
        """Return what is stored as the operation at *seq*, be it damaged; empty if nothing is."""
        return transaction.get(pack_position(seq), b"", db=self._database)[_CRC_BYTES:]

    def remove(self, transaction: LmdbTransaction, seq: int) -> None:
        """Remove an entry that is damaged."""
        transaction.delete(pack_position(seq), db=self._database)

    def first(self, transaction: LmdbTransaction) -> tuple[int, bytes] | None:
        """Return (seq, serialized operation) of the oldest entry that is kept. Raises LogCorrupt."""
        cursor = transaction.cursor(self._database)
        if not cursor.first():
            return None
        seq = unpack_position(cursor.key())
        return seq, checked(seq, cursor.value())

    def first_seq(self, transaction: LmdbTransaction) -> int:
        """Return the position of the oldest entry that is kept, 0 if there is none."""
        cursor = transaction.cursor(self._database)
        return unpack_position(cursor.key()) if cursor.first() else 0

    def last_seq(self, transaction: LmdbTransaction) -> int:
        """Return the position of the newest entry that is kept, 0 if there is none."""
        cursor = transaction.cursor(self._database)
        return unpack_position(cursor.key()) if cursor.last() else 0

    def scan(self, *, after: int = 0, until: int | None = None) -> Iterator[Operation]:
        """
        Iterate over the operations with *after* < seq <= *until*, oldest first.

        Pages are read in transactions of their own, so a slow reader holds nothing;
        what is appended meanwhile is seen.

        Raises:
            LogCorrupt: An entry fails its check.
        """
        position = after
        while True:
            page = self._page(position, until)
            for seq, data in page:
                try:
                    yield decode_operation(data)
                except InvalidValue as error:
                    raise LogCorrupt(f"the operation at seq {seq} cannot be read: {error}", seq=seq) from error
            if not page:
                return
            position = page[-1][0]

    def entry_count(self, transaction: LmdbTransaction) -> int:
        """Return how many operations are kept."""
        return int(transaction.stat(self._database)["entries"])

    def size_bytes(self, transaction: LmdbTransaction) -> int:
        """Return how much of the file the log takes."""
        stat = transaction.stat(self._database)
        return int(stat["psize"] * (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]))

    def trim(
        self, transaction: LmdbTransaction, *, going: Callable[[int, bytes], int], count_max: int
    ) -> list[tuple[int, bytes]]:
        """
        Remove entries from the oldest on, and return (seq, serialized operation) of each.

        Args:
            transaction: The caller's.
            going: Asked with seq and serialized operation of the oldest entry. Returns how many
                entries go together, it and those behind it; 0 ends the trimming.
            count_max: At how many the trimming ends; the last ones that go together go whole.
        """
        trimmed: list[tuple[int, bytes]] = []
        left = 0
        cursor = transaction.cursor(self._database)
        found = cursor.first()
        while found:
            seq, data = unpack_position(cursor.key()), cursor.value()[_CRC_BYTES:]
            if not left:
                left = going(seq, data) if len(trimmed) < count_max else 0
                if not left:
                    break
            found = cursor.delete() and bool(cursor.key())
            trimmed.append((seq, data))
            left -= 1
        return trimmed

    def _page(self, after: int, until: int | None) -> list[tuple[int, bytes]]:
        page: list[tuple[int, bytes]] = []
        size_bytes = 0
        with self._environment.read() as transaction:
            cursor = transaction.cursor(self._database)
            found = cursor.set_range(pack_position(after + 1))
            while found and len(page) < _SCAN_PAGE_ENTRIES and size_bytes < _SCAN_PAGE_BYTES:
                key, entry = cursor.item()
                seq = unpack_position(key)
                if until is not None and seq > until:
                    break
                page.append((seq, checked(seq, entry)))
                size_bytes += len(entry)
                found = cursor.next()
        return page


def checked(seq: int, entry: bytes) -> bytes:
    """Return the serialized operation in an entry of the log. Raises LogCorrupt if it fails its check sum."""
    data = entry[_CRC_BYTES:]
    if not data or zlib.crc32(data) != int.from_bytes(entry[:_CRC_BYTES], "big"):
        raise LogCorrupt(
            f"the operation at seq {seq} fails its check sum: the file was damaged outside tidelog", seq=seq
        )
    return data
