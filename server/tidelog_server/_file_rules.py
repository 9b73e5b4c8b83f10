"""
File rules: whether an operation may refer to a content. No I/O.

A content has to be there before anything refers to it; and whoever refers to it must
have uploaded it, or be able to read an object that refers to it: knowing a hash gives
nobody a content. Who may not is told what he would be told if nobody had it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Final

from tidelog._failure import FailureReason
from tidelog._file_reference import FileReference, file_references
from tidelog._keys import ObjectKey
from tidelog._limits import FILE_BYTES_MAX_DEFAULT
from tidelog._values import Attributes
from tidelog_server._access import Rights
from tidelog_server._file_records import content_record, grant_key, objects_prefix, referring_object
from tidelog_server._overlay import Overlay
from tidelog_server._refusal import NotReady, Refused

# Objects that are looked at to find one that somebody may read: for one content, and in all.
REFERRERS_MAX: Final = 1_000
REFERRERS_IN_ALL_MAX: Final = 10_000


class FileRules:
    """
    What one user may refer to.

    Args:
        overlay: The objects, and what is noted of contents.
        rights: What the user may read. None: everything.
        user_id: The user. None: the service itself, which may refer to all that is there.
        bytes_max: How large a content may be.
        lost: Contents that the user's replica says it has lost.
    """

    def __init__(
        self,
        overlay: Overlay,
        rights: Rights | None,
        *,
        user_id: str | None,
        bytes_max: int = FILE_BYTES_MAX_DEFAULT,
        lost: Collection[bytes] = (),
    ) -> None:
        self._overlay = overlay
        self._rights = rights
        self._user_id = user_id
        self._bytes_max = bytes_max
        self._looked_at_count = 0
        # Objects that may have come to refer to a content since the overlay was made.
        self._noted: defaultdict[bytes, set[ObjectKey]] = defaultdict(set)
        self.lost = lost

    def check_authored(self, key: ObjectKey, authored: Attributes, *, before: Attributes) -> None:
        """
        Require that the user may have an object refer to contents.

        Args:
            key: The object.
            authored: The attributes that are to be written.
            before: What it holds.

        Raises:
            Refused: The user may not.
            NotReady: The user has to upload a content before.
        """
        for attribute, reference in file_references(authored):
            if self._user_id is None:
                self._require(key, attribute, reference, FailureReason.FILE_MISSING, FailureReason.VALIDATION_FAILED)
            else:
                self._check_reference(key, attribute, reference, before)

    def check_there(self, key: ObjectKey, written: Attributes) -> None:
        """Require that contents are there, whoever has an object refer to them. Raises Refused."""
        for attribute, reference in file_references(written):
            self._require(key, attribute, reference, FailureReason.HOOK_ERROR, FailureReason.HOOK_ERROR)
            self._noted[reference.sha256].add(key)

    def may_refer(self, sha256: bytes, key: ObjectKey | None = None, before: Attributes | None = None) -> bool:
        """Tell whether the user may have an object, which held some attributes *before*, refer to a content."""
        if self._user_id is None or self._overlay.index(grant_key(sha256, self._user_id)) is not None:
            return True
        if key is not None and before and self._refers(key, before, sha256):
            return True
        return any(
            self._overlay.exists(one) and self._refers(one, self._overlay.attributes(one), sha256)
            for one in self._candidates(sha256)
        )

    def _check_reference(self, key: ObjectKey, attribute: str, reference: FileReference, before: Attributes) -> None:
        where = f"{key[0]} {key[1]!r}: attribute {attribute!r}"
        if reference.size > self._bytes_max:
            message = f"{where} refers to a file of {reference.size} bytes: the limit is {self._bytes_max}"
            raise Refused(FailureReason.TOO_LARGE, message)
        record = content_record(reference.sha256, self._overlay.index)
        if record is not None and self.may_refer(reference.sha256, key, before):
            if record.size != reference.size:
                message = f"{where} says that its file has {reference.size} bytes: it has {record.size}"
                raise Refused(FailureReason.VALIDATION_FAILED, message)
        elif reference.sha256 in self.lost:
            message = f"{where} refers to the file {reference.name!r}, whose content was lost before it was uploaded"
            raise Refused(FailureReason.FILE_MISSING, message)
        else:
            raise NotReady(f"{where} refers to the file {reference.name!r}: its content was not uploaded yet")

    def _require(
        self, key: ObjectKey, attribute: str, reference: FileReference, missing: FailureReason, wrong: FailureReason
    ) -> None:
        """Require that a content is there, whoever uploaded it."""
        where = f"{key[0]} {key[1]!r}: attribute {attribute!r}"
        record = content_record(reference.sha256, self._overlay.index)
        if record is None:
            raise Refused(missing, f"{where} refers to the file {reference.name!r}, whose content is not there")
        if record.size != reference.size:
            raise Refused(wrong, f"{where} says that its file has {reference.size} bytes: it has {record.size}")

    def _refers(self, key: ObjectKey, attributes: Attributes, sha256: bytes) -> bool:
        """Tell whether an object refers to a content as far as the user may read it."""
        readable = attributes if self._rights is None else self._rights.entity(key[0]).readable(attributes)
        return readable is not None and any(one.sha256 == sha256 for _, one in file_references(readable))

    def _candidates(self, sha256: bytes) -> Iterator[ObjectKey]:
        """Yield objects that may refer to a content, as many as may be looked at."""
        yield from tuple(self._noted.get(sha256, ()))
        for entry in islice(self._overlay.index_entries(objects_prefix(sha256)), REFERRERS_MAX):
            if self._looked_at_count >= REFERRERS_IN_ALL_MAX:
                return
            self._looked_at_count += 1
            yield referring_object(entry)
