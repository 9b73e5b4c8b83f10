"""
Verification of what a server keeps of files, of one tenant. No I/O but what a content store does.

Who refers to a content stands in the objects and failures, and once more in the table
of indexes; a content that an object refers to is on record; and a content that is on
record is in the content store, whole.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Final, Protocol

from tidelog._contents import SHA256_BYTES
from tidelog._errors import TidelogError
from tidelog._file_reference import file_references
from tidelog._finding import Finding, FindingKind
from tidelog._keys import ObjectKey
from tidelog._values import Attributes
from tidelog_server._content_store import ContentLost, ContentStore
from tidelog_server._file_records import (
    CONTENTS,
    GRANTS,
    REFERRERS,
    content_of,
    contents_of_failure,
    contents_of_object,
    entries_of,
    failure_referrer,
    kept_record,
    object_referrer,
    referrers_prefix,
    split_referrer,
    unpack_content,
    unpack_grant,
)
from tidelog_server._records import ObjectState
from tidelog_server._store import Reader
from tidelog_server._upload_records import UPLOADS, check_entry

PAGE_CONTENTS: Final = 500

FILE_TABLES: Final = (CONTENTS, GRANTS, REFERRERS, UPLOADS)


class FileRecords(Protocol):
    """What is read of one tenant's records."""

    def state(self, key: ObjectKey) -> ObjectState | None:
        """Return one object, or None."""
        ...

    def failure(self, failure_id: bytes) -> bytes | None:
        """Return one serialized record, or None."""
        ...

    def index(self, key: bytes) -> bytes | None:
        """Return one value of the table of indexes, or None."""
        ...


class FileVerification:
    """
    Compares the table of indexes with what refers to files.

    Args:
        records: One tenant's.
    """

    def __init__(self, records: FileRecords) -> None:
        self._records = records

    def of_object(self, key: ObjectKey, attributes: Attributes) -> Iterator[Finding]:
        """Yield what is wrong with the references of an object."""
        where = f"{key[0]} {key[1]!r}"
        contents = set()
        for attribute, reference in file_references(attributes):
            contents.add(reference.sha256)
            try:
                record = kept_record(reference.sha256, self._records.index)
            except ValueError:
                continue  # the entry is named for itself
            if record is None or record.size != reference.size:
                yield Finding(
                    FindingKind.FILE_REFERENCE_WRONG,
                    f"{where}, attribute {attribute!r}",
                    f"the content {reference.sha256.hex()} of {reference.size} bytes to be on record",
                    "none" if record is None else f"one of {record.size} bytes",
                )
        yield from self._missing(where, object_referrer(key), contents)

    def of_failure(self, where: str, failure_id: bytes, data: bytes) -> Iterator[Finding]:
        """Yield what is wrong with the references of a failure."""
        yield from self._missing(where, failure_referrer(failure_id, data), contents_of_failure(data))

    def expected(self, key: bytes, value: bytes) -> str:
        """Return what was to be expected in place of an entry of `FILE_TABLES`; empty if it is right."""
        if key[:1] == UPLOADS:
            return self._expected_upload(key, value)
        sha256 = key[1 : 1 + SHA256_BYTES]
        if len(sha256) < SHA256_BYTES:
            return "the hash of a content"
        table, rest = key[:1], key[1 + SHA256_BYTES :]
        try:
            if table == CONTENTS:
                unpack_content(value)
                return "no more than a hash" if rest else ""
            if table == GRANTS:
                unpack_grant(value)
                return "" if rest.decode() else "a user"
            _, referrer = split_referrer(key)
        except ValueError:
            return "an entry of its table"
        if isinstance(referrer, bytes):
            data = self._records.failure(referrer)
            refers = data is not None and key in entries_of(
                failure_referrer(referrer, data), contents_of_failure(data)
            )
        else:
            state = self._records.state(referrer)
            refers = state is not None and sha256 in contents_of_object(state.attributes)
        return "" if refers else "one that refers to this content"

    def _expected_upload(self, key: bytes, value: bytes) -> str:
        try:
            check_entry(key, value)
        except ValueError:
            return "an entry of its table"
        return ""

    def _missing(self, where: str, referrer: bytes, contents: Iterable[bytes]) -> Iterator[Finding]:
        for entry in entries_of(referrer, contents):
            if self._records.index(entry) is None:
                yield Finding(
                    FindingKind.INDEX_WRONG, where, f"an entry that it refers to {entry[1:33].hex()}", "none"
                )


def content_findings(
    read: Callable[[], AbstractContextManager[Reader]], tenant: str, contents: ContentStore, counts: Counter[str]
) -> Iterator[Finding]:
    """Yield what is wrong with a tenant's contents. Nothing of the store is being read while they are."""

    def is_wrong(finding: Finding, key: bytes) -> bool:
        """Tell whether a content should be there: it may have been collected, now or while a backup was made."""
        with read() as reader:
            if reader.index(key) is None:
                return False
            if finding.kind is not FindingKind.CONTENT_LOST:
                return True
            record = kept_record(content_of(key), reader.index)
            is_needed = bool(reader.index_range(referrers_prefix(content_of(key)), b"", 1))
        # Another copy may have taken its place: a server that finds it puts it on record.
        others = (one for one in contents.contents(tenant) if one.sha256 == content_of(key))
        return is_needed and record is not None and all(one.size != record.size for one in others)

    after = b""
    while True:
        with read() as reader:
            page = reader.index_range(CONTENTS, after, PAGE_CONTENTS)
        if not page:
            return
        for after, value in page:
            counts["contents"] += 1
            finding = _content_finding(contents, tenant, after, value)
            if finding is not None and is_wrong(finding, after):
                yield replace(finding, tenant=tenant)


def _content_finding(contents: ContentStore, tenant: str, key: bytes, value: bytes) -> Finding | None:
    """Return what is wrong with a content that an entry of the table of indexes puts on record. All of it is read."""
    sha256 = content_of(key)
    try:
        record = unpack_content(value)
    except ValueError:
        return None  # the entry is named for itself
    size = record.size
    where, expected = f"content {sha256.hex()}", f"{size} bytes of this hash"
    try:
        found, digest = _read(contents, tenant, sha256, record.copy)
    except ContentLost:
        return Finding(FindingKind.CONTENT_LOST, where, expected, "none")
    except TidelogError as error:
        return Finding(FindingKind.CONTENT_DAMAGED, where, expected, str(error))
    if (found, digest) == (size, sha256):
        return None
    return Finding(FindingKind.CONTENT_DAMAGED, where, expected, f"{found} bytes with the hash {digest.hex()}")


def _read(contents: ContentStore, tenant: str, sha256: bytes, copy: str) -> tuple[int, bytes]:
    """Return length and hash of a content."""
    digest = hashlib.sha256()
    size = 0
    for piece in contents.read(tenant, sha256, copy=copy):
        digest.update(piece)
        size += len(piece)
    return size, digest.digest()
