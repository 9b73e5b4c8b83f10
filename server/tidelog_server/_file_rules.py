"""
File rules: whether an operation may refer to a content. No I/O.

A content has to be there before anything refers to it; and whoever refers to it must
have uploaded it, or be able to read an object that refers to it: knowing a hash gives
nobody a content. Who may not is told what he would be told if nobody had it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from itertools import islice, product
from typing import Any, Final

from tidelog._contents import SHA256_BYTES
from tidelog._failure import FailureReason
from tidelog._file_reference import FileReference, file_references
from tidelog._keys import ObjectKey
from tidelog._limits import FILE_BYTES_MAX_DEFAULT
from tidelog._logging import get_logger
from tidelog._values import Attributes
from tidelog_server._access import Rights
from tidelog_server._file_records import (
    SERVICE,
    content_record,
    grant_key,
    is_upload_grant,
    objects_prefix,
    referring_object,
)
from tidelog_server._overlay import Overlay
from tidelog_server._refusal import NotReady, Refused

# Objects that are looked at to find one that somebody may read, for each content: so few that the time it takes
# tells next to nothing of whether there are any, and never as many for one content because of another.
REFERRERS_MAX: Final = 32
# How many contents it is remembered of that some object which the user may read refers to them.
READ_MAX: Final = 500_000

_NOT_THERE: Final = "what hooks write refers to a file whose content is not there"

_log = get_logger("tidelog.engine")


class FileRules:
    """
    What one user may refer to.

    Args:
        overlay: The objects, and what is noted of contents.
        rights: What the user may read. None: everything.
        user_id: The user. None: the service itself, which may refer to all that is there.
        bytes_max: How large a content may be.
        lost: Contents that the user's replica says it has lost.
        vouching: Other users whose uploads count as the user's, from `vouching_since_us` on.
        asked: The only contents that are asked about. None: any may be.
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
        asked: Collection[bytes] | None = None,
    ) -> None:
        self._overlay = overlay
        self._rights = rights
        self._user_id = user_id
        self._vouching = vouching
        self.vouching_since_us = 0
        self._bytes_max = bytes_max
        # Objects that may have come to refer to a content since the overlay was made, in their order.
        self._noted: defaultdict[bytes, dict[ObjectKey, None]] = defaultdict(dict)
        self._asked = asked
        self._said = b""
        # What was decided of contents that the author refers to.
        self._judged: dict[bytes, bool] = {}
        # To what objects refer as far as the user may read them: as the store has them, and as the present
        # operation found those that were written before.
        self._read: dict[ObjectKey, frozenset[bytes]] = {}
        self._read_written: dict[ObjectKey, frozenset[bytes]] = {}
        self._read_count = 0
        # What hooks have seen: contents that objects refer to, and other bytes that may name one.
        self._seen_referred: set[bytes] = set()
        self._seen_otherwise: set[bytes] = set()
        self.lost = lost

    def begin(self, said: bytes) -> None:
        """Take note of what the author of the operation that follows says: its patch, encoded."""
        self._said = said
        self._judged = {}
        self._read_written = {}
        self._seen_referred, self._seen_otherwise = set(), set()

    def note_seen(self, attributes: Attributes, *, is_stored: bool) -> None:
        """
        Take note of what a hook gets to see of an object, which it may make references of.

        Args:
            attributes: The object's.
            is_stored: Whether the object refers to what they say already, else it may come to.
        """
        for value in attributes.values():
            if type(value) is dict and (reference := FileReference.of(value)) is not None:
                if is_stored:
                    self._seen_referred.add(reference.sha256)
            elif type(value) in {bytes, list, dict}:
                self._seen_otherwise.update(_hashes_in(value))

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
        held: frozenset[bytes] | None = None
        for attribute, reference in file_references(authored):
            where = f"{key[0]} {key[1]!r}: attribute {attribute!r}"
            sha256 = reference.sha256
            if self._user_id is None:
                self._require(where, reference, FailureReason.FILE_MISSING, FailureReason.VALIDATION_FAILED)
            else:
                if sha256 not in self._judged:
                    if held is None:
                        held = self._readable_contents(key, before)
                    # Asked of a content that is not there too: the time it takes should not tell.
                    self._judged[sha256] = sha256 in held or self.may_refer(sha256)
                self._check_reference(where, f"the file {reference.name!r}", reference, self._judged[sha256])
            self._overlay.named.append(sha256)

    def check_there(self, key: ObjectKey, written: Attributes, *, after: Attributes) -> None:
        """
        Require that contents are there, whoever has an object refer to them.

        A hash that the author named in any way is the author's, whatever hooks made of it; so is one that
        waited in an object for a hook to make a reference of it. If a hook has seen an object that refers to
        it, the application may as well have moved that: then it only matters whether the author can read it.

        A content that the server has lost keeps hooks from nothing: what referred to it may be moved.

        Args:
            key: The object.
            written: The attributes that are written.
            after: All that it holds then.

        Raises:
            Refused: One is not there, or the author may not refer to it.
            NotReady: The author has to upload it before.
        """
        readable: frozenset[bytes] | None = None
        for attribute, reference in file_references(written):
            sha256 = reference.sha256
            if self._is_the_authors(sha256):
                if readable is None:
                    readable = self._readable_contents(key, after)
                if sha256 in readable or sha256 not in self._seen_referred:
                    self._check_made(reference)
            record = content_record(sha256, self._overlay.index)
            if record is not None or not self._is_referred_to(sha256):
                where = f"{key[0]} {key[1]!r}: attribute {attribute!r}"
                self._require(where, reference, FailureReason.HOOK_ERROR, FailureReason.HOOK_ERROR)
            self._noted[sha256][key] = None

    def referred(self) -> Iterator[tuple[str, bytes]]:
        """
        Yield (user, content): what the author named in what was applied, and whose upload it may be.

        Whether an object refers to it in the end makes no difference: what comes later in the batch, or hooks, may
        have changed that, and of what hooks do the author must not learn.
        """
        users = (SERVICE if self._user_id is None else self._user_id, *self._vouching)
        yield from product(users, self._overlay.named)

    def lost_in(self, key: ObjectKey, authored: Attributes, *, before: Attributes) -> list[str]:
        """Return the attributes that refer to contents which the user's replica has lost, and which are not there."""
        held = self._readable_contents(key, before)
        there: dict[bytes, bool] = {}
        lost = []
        for attribute, reference in file_references(authored):
            sha256 = reference.sha256
            if sha256 in self.lost:
                if sha256 not in there:
                    is_on_record = content_record(sha256, self._overlay.index) is not None
                    there[sha256] = is_on_record and (sha256 in held or self.may_refer(sha256))
                if not there[sha256]:
                    lost.append(attribute)
        return lost

    def may_refer(self, sha256: bytes) -> bool:
        """Tell whether the user may have an object refer to a content."""
        return (
            self._user_id is None
            or self._overlay.index(grant_key(sha256, self._user_id)) is not None
            or any(self.has_uploaded(sha256, user_id, self.vouching_since_us) for user_id in self._vouching)
            or self.reads(sha256)
        )

    def has_uploaded(self, sha256: bytes, user_id: str, since_us: int = 0) -> bool:
        """Tell whether a user uploaded a content not long ago, at a time or later."""
        return is_upload_grant(self._overlay.index(grant_key(sha256, user_id)), since_us)

    def reads(self, sha256: bytes) -> bool:
        """Tell whether the user may read a content by some object."""
        return any(sha256 in self._contents_read(one) for one in self._candidates(sha256))

    def _is_the_authors(self, sha256: bytes) -> bool:
        """Tell whether a hash that a hook writes may come from the author, who is still to be asked for a right."""
        return (
            self._user_id is not None
            and not self._judged.get(sha256)
            and (sha256 in self._said or sha256 in self._seen_otherwise)
        )

    def _check_made(self, reference: FileReference) -> None:
        """Require that the author may refer to what a hook made a reference of."""
        sha256 = reference.sha256
        self._judged[sha256] = self.may_refer(sha256)
        if sha256 in self._said:
            # Which object hooks write, and what they call its file, is not for everybody to know.
            self._check_reference("what hooks write", "a file", reference, self._judged[sha256])
        elif not self._judged[sha256]:
            raise Refused(FailureReason.HOOK_ERROR, _NOT_THERE)  # as if nobody had it; no upload helps

    def _check_reference(self, where: str, what: str, reference: FileReference, may_refer: bool) -> None:  # noqa: FBT001
        record = content_record(reference.sha256, self._overlay.index)
        if record is not None and may_refer:
            if record.size != reference.size:
                message = f"{where} says that its file has {reference.size} bytes: it has {record.size}"
                raise Refused(FailureReason.VALIDATION_FAILED, message)
        elif reference.size > self._bytes_max:
            message = f"{where} refers to a file of {reference.size} bytes: the limit is {self._bytes_max}"
            raise Refused(FailureReason.TOO_LARGE, message)
        elif reference.sha256 in self.lost:
            message = f"{where} refers to {what}, whose content was lost before it was uploaded"
            raise Refused(FailureReason.FILE_MISSING, message)
        else:
            raise NotReady(f"{where} refers to {what}: its content was not uploaded yet")

    def _require(self, where: str, reference: FileReference, missing: FailureReason, wrong: FailureReason) -> None:
        """Require that a content is there, whoever uploaded it."""
        record = content_record(reference.sha256, self._overlay.index)
        if record is None:
            reason, message = missing, f"{where} refers to the file {reference.name!r}, whose content is not there"
        elif record.size != reference.size:
            reason = wrong
            message = f"{where} says that its file has {reference.size} bytes: it has {record.size}"
        else:
            return
        if self._rights is not None:
            # What hooks write, and where, is not for everybody to know.
            _log.warning("a hook refers to a content that is not there", detail=message)
            message = _NOT_THERE
        raise Refused(reason, message)

    def _is_referred_to(self, sha256: bytes) -> bool:
        """Tell whether any object refers to a content."""
        return any(self._overlay.passed_by(one) is not None for one in self._candidates(sha256))

    def _contents_read(self, key: ObjectKey) -> frozenset[bytes]:
        """Return the contents that an object refers to, as far as the user may read it. Looked at once."""
        known = self._read_written if self._overlay.is_written(key) else self._read
        contents = known.get(key)
        if contents is None:
            contents = self._readable_contents(key, self._overlay.passed_by(key) or {})
            self._read_count += len(contents)
            if self._read_count > READ_MAX:
                self._read.clear()
                self._read_count = len(contents)
            known[key] = contents
        return contents

    def _readable_contents(self, key: ObjectKey, attributes: Attributes) -> frozenset[bytes]:
        """Return the contents that an object with some attributes refers to, as far as the user may read them."""
        readable = attributes if self._rights is None else self._rights.entity(key[0]).readable(attributes)
        found = (one.sha256 for _, one in file_references(readable or {}))
        return frozenset(found if self._asked is None else (sha256 for sha256 in found if sha256 in self._asked))

    def _candidates(self, sha256: bytes) -> Iterator[ObjectKey]:
        """Yield objects that may refer to a content, as many as may be looked at, the newest of this batch first."""
        yield from islice(reversed(self._noted.get(sha256, {})), REFERRERS_MAX)
        entries = self._overlay.index_entries(objects_prefix(sha256), REFERRERS_MAX)
        for entry in islice(entries, REFERRERS_MAX):
            yield referring_object(entry)


def _hashes_in(value: Any) -> Iterator[bytes]:
    """Yield what may be the hash of a content in a value."""
    if type(value) is bytes:
        if len(value) == SHA256_BYTES:
            yield value
    elif type(value) in {list, dict}:
        for one in value if type(value) is list else value.values():
            yield from _hashes_in(one)
