"""Verification of a replica's files: whether the tables say what objects and operations do, and contents are whole."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING

from tidelog._contents import READ_BYTES
from tidelog._errors import StorageError, TidelogError
from tidelog._finding import Finding, FindingKind
from tidelog._keys import unpack_object_key
from tidelog_client._files import Files, References, references_of, set_references

if TYPE_CHECKING:
    from tidelog._environment import Environment, LmdbTransaction
    from tidelog_client._view import View

# The contents that operations refer to, by seq, as far as they are known; None: nobody can tell.
_Needed = dict[int, References | None]


class FileVerification:
    """
    Checks what `_files` keeps.

    Args:
        environment: The replica's.
        view: Its view.
        counts: Gets how many contents were looked at.
    """

    def __init__(self, environment: Environment, view: View, counts: Counter[str]) -> None:
        self._files = Files(environment, view)
        self._view = view
        self._counts = counts
        self._is_away = False

    def run(
        self,
        transaction: LmdbTransaction,
        *,
        to_upload: Mapping[int, bytes],
        failed: Mapping[int, bytes],
        is_set_aside: Callable[[int], bool],
    ) -> Iterator[Finding]:
        """
        Yield what is wrong.

        Args:
            transaction: What is verified.
            to_upload: The operations to be uploaded that may refer to files, by seq.
            failed: The operations that failed and may refer to files, by seq.
            is_set_aside: Tells whether an operation failed because it cannot be read: it keeps what it referred to.
        """
        uploads, kept = _needed(to_upload), _needed(failed)
        try:
            self._files.require_place()
        except StorageError as error:
            self._is_away = True  # nobody can say of one of them whether it is there
            yield Finding(FindingKind.CONTENT_LOST, "all contents", "to be where they were put", str(error))
        yield from self._objects(transaction)
        yield from self._uploads(transaction, uploads)
        yield from self._users(transaction, {**kept, **uploads}, is_set_aside)
        yield from self._contents()

    def _objects(self, transaction: LmdbTransaction) -> Iterator[Finding]:
        files = self._files
        keys = heapq.merge(self._view.all_keys(transaction), files.referring(transaction))
        for key, _ in groupby(keys):
            if files.is_marked(transaction, key):
                continue  # what is noted of it is not of today, and worked out again before it is used
            where = _name(key)
            found = files.references(transaction, key)
            try:
                expected = references_of(self._view, transaction, key)
            except TidelogError:
                continue  # named for itself
            if expected != found:
                yield Finding(
                    FindingKind.INDEX_WRONG, f"files of {where}", _contents_text(expected), _contents_text(found)
                )
                continue
            for sha256, (shown, size) in found.items():
                if not files.is_user(transaction, sha256, key):
                    yield Finding(FindingKind.INDEX_WRONG, _content(sha256), f"{where} as a user", "not")
                is_missing = files.is_missing(transaction, key, sha256, size)
                if is_missing and not shown:
                    yield Finding(FindingKind.INDEX_WRONG, _content(sha256), f"not to be missed by {where}", "missed")
                elif shown and not is_missing and self._is_lost(sha256, size):
                    expected_text = f"{size} bytes, for {where} refers to it"
                    yield Finding(FindingKind.CONTENT_LOST, _content(sha256), expected_text, "none, or others")

    def _uploads(self, transaction: LmdbTransaction, uploads: _Needed) -> Iterator[Finding]:
        noted = dict(self._files.noted_uploads(transaction))
        for seq in sorted(noted.keys() | uploads.keys()):
            expected, found = uploads.get(seq, {}), noted.get(seq, {})
            if expected is not None and expected != found:
                where = f"files of operation {seq}"
                yield Finding(FindingKind.INDEX_WRONG, where, _contents_text(expected), _contents_text(found))

    def _is_lost(self, sha256: bytes, size: int) -> bool:
        return not self._is_away and not self._files.has(sha256, size)

    def _users(
        self, transaction: LmdbTransaction, needed: _Needed, is_set_aside: Callable[[int], bool]
    ) -> Iterator[Finding]:
        files = self._files
        for sha256, user in files.all_users(transaction):
            if isinstance(user, int):
                contents = needed.get(user, {})
                refers = contents is None or sha256 in contents or is_set_aside(user)
                where = f"operation {user}"
            else:
                refers = files.is_marked(transaction, user) or sha256 in files.references(transaction, user)
                where = _name(user)
            if not refers:
                yield Finding(FindingKind.INDEX_WRONG, _content(sha256), "only users that refer to it", where)
        for seq, contents in needed.items():
            for sha256 in contents or ():
                if not files.is_user(transaction, sha256, seq):
                    yield Finding(FindingKind.INDEX_WRONG, _content(sha256), f"operation {seq} as a user", "not")

    def _contents(self) -> Iterator[Finding]:
        if self._is_away:
            return
        for content in self._files.contents.contents():
            file = self._files.contents.open(content.sha256)
            if file is None:
                continue  # nobody needed it any more
            self._counts["contents"] += 1
            digest = hashlib.sha256()
            with file:
                while chunk := file.read(READ_BYTES):
                    digest.update(chunk)
            if digest.digest() != content.sha256:
                where = _content(content.sha256)
                yield Finding(FindingKind.CONTENT_DAMAGED, where, "its own hash", f"the hash {digest.hexdigest()}")


def _needed(operations: Mapping[int, bytes]) -> _Needed:
    needed: _Needed = {}
    for seq, data in operations.items():
        try:
            found: References | None = {one.sha256: (False, one.size) for one in set_references(data)}
        except TidelogError:
            found = None  # named for itself
        if found is None or found:
            needed[seq] = found
    return needed


def _content(sha256: bytes) -> str:
    return f"content {sha256.hex()}"


def _contents_text(references: References) -> str:
    return (
        ", ".join(sorted(f"{sha256.hex()[:16]} ({size} bytes)" for sha256, (_, size) in references.items())) or "none"
    )


def _name(key: bytes) -> str:
    entity, id_ = unpack_object_key(key)
    return f"{entity} {id_!r}"
