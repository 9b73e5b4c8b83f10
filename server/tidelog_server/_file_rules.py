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
from tidelog_server._file_records import content_record, grant_key, is_upload_grant, objects_prefix, referring_object
from tidelog_server._overlay import Overlay
from tidelog_server._refusal import NotReady, Refused

# Objects that are looked at to find one that somebody may read, for each content: so few that the time it takes
# tells next to nothing of whether there are any, and never as many for one content because of another.
REFERRERS_MAX: Final = 32


class FileRules:
    """
    What one user may refer to.

    Args:
        overlay: The objects, and what is noted of contents.
        rights: What the user may read. None: everything.
        user_id: The user. None: the service itself, which may refer to all that is there.
        bytes_max: How large a content may be.
        lost: Contents that the user's replica says it has lost.
        vouching: Other users whose uploads count as the user's.
    """

    def __init__(
        self,
        overlay: Overlay,
        rights: Rights | None,
        *,
        user_id: str | None,
        bytes_max: int = FILE_BYTES_MAX_DEFAULT,
        lost: Collection[bytes] = (),
        vouching: Collection[str] = (),
    ) -> None:
        self._overlay = overlay
        self._rights = rights
        self._user_id = user_id
        self._vouching = vouching
        self._bytes_max = bytes_max
        # Objects that may have come to refer to a content since the overlay was made, in their order.
        self._noted: defaultdict[bytes, dict[ObjectKey, None]] = defaultdict(dict)
        self._said = b""
        self._judged: set[bytes] = set()
        self.lost = lost

    def begin(self, said: bytes) -> None:
        """Take note of what the author of the operation that follows says: its patch, encoded."""
        self._said = said
        self._judged = set()

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
                where = f"{key[0]} {key[1]!r}: attribute {attribute!r}"
                # Asked of a content that is not there too: the time it takes should not tell.
                self._check_reference(where, reference, self.may_refer(reference.sha256, key, before))
                self._judged.add(reference.sha256)

    def check_there(self, key: ObjectKey, written: Attributes) -> None:
        """
        Require that contents are there, whoever has an object refer to them.

        A hash that the author named in any way is the author's, whatever hooks made of it.

        Raises:
            Refused: One is not there, or the author may not refer to it.
            NotReady: The author has to upload it before.
        """
        for attribute, reference in file_references(written):
            if self._user_id is not None and reference.sha256 in self._said and reference.sha256 not in self._judged:
                # Which object hooks write is not for everybody to know.
                self._check_reference("what hooks write", reference, self.may_refer(reference.sha256))
            self._require(key, attribute, reference, FailureReason.HOOK_ERROR, FailureReason.HOOK_ERROR)
            self._noted[reference.sha256][key] = None

    def lost_in(self, key: ObjectKey, authored: Attributes, *, before: Attributes) -> list[str]:
        """Return the attributes that refer to contents which the user's replica has lost, and which are not there."""
        return [
            attribute
            for attribute, reference in file_references(authored)
            if reference.sha256 in self.lost
            and not (
                content_record(reference.sha256, self._overlay.index) is not None
                and self.may_refer(reference.sha256, key, before)
            )
        ]

    def may_refer(self, sha256: bytes, key: ObjectKey | None = None, before: Attributes | None = None) -> bool:
        """Tell whether the user may have an object, which held some attributes *before*, refer to a content."""
        return (
            self._user_id is None
            or self._overlay.index(grant_key(sha256, self._user_id)) is not None
            or any(self.has_uploaded(sha256, user_id) for user_id in self._vouching)
            or self.reads(sha256, key, before)
        )

    def has_uploaded(self, sha256: bytes, user_id: str) -> bool:
        """Tell whether a user uploaded a content not long ago."""
        return is_upload_grant(self._overlay.index(grant_key(sha256, user_id)))

    def reads(self, sha256: bytes, key: ObjectKey | None = None, before: Attributes | None = None) -> bool:
        """Tell whether the user may read a content by some object: as it was *before*, or as it is."""
        if key is not None and before and self._refers(key, before, sha256):
            return True
        return any(
            self._overlay.exists(one) and self._refers(one, self._overlay.attributes(one), sha256)
            for one in self._candidates(sha256)
        )

    def _check_reference(self, where: str, reference: FileReference, may_refer: bool) -> None:  # noqa: FBT001
        record = content_record(reference.sha256, self._overlay.index)
        if record is not None and may_refer:
            if record.size != reference.size:
                message = f"{where} says that its file has {reference.size} bytes: it has {record.size}"
                raise Refused(FailureReason.VALIDATION_FAILED, message)
        elif reference.size > self._bytes_max:
            message = f"{where} refers to a file of {reference.size} bytes: the limit is {self._bytes_max}"
            raise Refused(FailureReason.TOO_LARGE, message)
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
        """Yield objects that may refer to a content, as many as may be looked at, the newest of this batch first."""
        yield from islice(reversed(self._noted.get(sha256, {})), REFERRERS_MAX)
        entries = self._overlay.index_entries(objects_prefix(sha256), REFERRERS_MAX)
        for entry in islice(entries, REFERRERS_MAX):
            yield referring_object(entry)
