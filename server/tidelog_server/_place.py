"""
Place: whether the contents of files lie where they were put.

A disk that is not mounted, a folder that was renamed, a bucket or a prefix that was
mistyped: each looks like a place where nothing was ever stored, and whoever believed it
would call every content lost. So the first content brings a mark with it, the epoch of
the store that it belongs to, and the store notes that there is one. Where the mark is
missing nothing is known of any content, and nothing is written or deleted.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

from tidelog._errors import StorageError
from tidelog_server._content_store import MARK_NAME, ContentStore
from tidelog_server._file_records import CONTENTS, ContentRecord, content_of, unpack_content
from tidelog_server._store import Store

# What a server notes in its store once the place of its contents has a mark.
MARKED_NOTE: Final = "contents marked"

# How many contents are looked for in a place that has no mark yet.
_LOOKED_FOR: Final = 100


class Place:
    """
    The place of a store's contents.

    Args:
        store: Knows which contents there are.
        contents: The place.
    """

    def __init__(self, store: Store, contents: ContentStore) -> None:
        self._store = store
        self._contents = contents
        self._is_marked = False

    @property
    def _mark(self) -> bytes:
        return self._store.identity.epoch.encode()

    def check(self, *, marks: bool = False) -> None:
        """
        Require that contents lie where they were put.

        Args:
            marks: Whether the first content is about to come.

        Raises:
            StorageError: They are somewhere else, or out of reach.
        """
        found = self._contents.mark()
        if found is None:
            self._check_unused()
            if marks:
                self._contents.set_mark(self._mark)
        elif found != self._mark:
            raise StorageError(f"the contents in this place belong to another store, {found.decode(errors='replace')}")
        if not self._is_marked and (marks or found is not None):
            # After the mark: a note without one would be a place that is gone.
            if not self._store.note(MARKED_NOTE):
                self._store.set_note(MARKED_NOTE, self._mark)
            self._is_marked = True

    def look(self) -> None:
        """Require the same at the start, of what was stored before. Raises StorageError."""
        self.check(marks=next(self._on_record(), None) is not None)

    def _check_unused(self) -> None:
        """Require that nothing was ever stored, or what is there to be that, if it came before there were marks."""
        if not self._is_marked and not self._store.note(MARKED_NOTE):
            known = list(islice(self._on_record(), _LOOKED_FOR))
            if not known or any(
                self._contents.size(tenant, sha256, record.copy) == record.size for tenant, sha256, record in known
            ):
                return
        raise StorageError(
            "the contents of files are not where they were put: is the disk mounted, the address right? If they were "
            f"moved, or are lost for good, a file {MARK_NAME!r} that says {self._mark.decode()} makes it their place"
        )

    def _on_record(self) -> Iterator[tuple[str, bytes, ContentRecord]]:
        for tenant in self._store.tenants():
            with self._store.read(tenant) as reader:
                page = reader.index_range(CONTENTS, b"", _LOOKED_FOR)
            for key, value in page:
                yield tenant, content_of(key), unpack_content(value)
