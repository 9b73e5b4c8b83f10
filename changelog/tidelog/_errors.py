"""
What tidelog raises.

* TidelogError
  + InvalidValue                 a value, name or id that cannot be stored; nothing was done
    - LimitExceeded              it is over a limit
    - ValidationFailed           it does not fit the schema
  + InvalidConstraint            a constraint that makes no sense
  + InvalidSchema                a schema that contradicts itself
  + InvalidRule                  a rule of an application that contradicts itself or the schema
  + ObjectNotFound               the object to be changed is not there (or no longer)
  + ObjectExists                 an object of this id is there already
  + StorageError                 the directory on disk
    - DiskFull                   nothing of this commit was written; make room, then repeat
    - LogCorrupt                 an entry of the operation log fails its check
    - FormatUnsupported          the directory was written in another format
    - StoreInUse                 another server process has the store open
    - TargetExists               what was to be made is there already; nothing was changed
    - InheritedEnvironment       opened before a fork, used after it; open again in the child
  + FileUnavailable              the content of a file is not here, and cannot be had now
  + ResourceClosed               you closed it
  + SynchronizationError         synchronize_*() did not complete; nothing is lost, call again
    - SynchronizationInProgress  another one of this replica is running
    - ServerUnavailable          could not be reached, or broke off, until the deadline
    - NotConfigured              the replica was opened without a server
    - TokenUnavailable           the program's token provider failed
    - Unauthenticated            the server does not accept the credentials
    - PermissionRefused          the server does not let this principal do that
    - DownloadRefused            the replica asks for objects by what the schema does not have
    - ProtocolUnsupported        client and server speak different versions
    - ProtocolViolated           the other side sent what the protocol does not allow
    - ReplicaForked              the server knows another log under this replica's id
    - ReplicaRetired             the server has forgotten what became of this replica's operations
    - ForeignServer              the server is not the one that this replica belongs to
    - MassRemoval                most of an entity would be removed, and the server does not say why

Branch on the class and on attributes; the sentence is for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

QUOTED_CHARS_MAX: Final = 80


def quoted(value: Any) -> str:
    """Return a value as messages quote it: null as such, what is long cut short."""
    if value is None:
        return "null"
    if isinstance(value, str | bytes):
        value = value[: QUOTED_CHARS_MAX + 1]
    text = repr(value)
    return text if len(text) <= QUOTED_CHARS_MAX else f"{text[:QUOTED_CHARS_MAX]}..."


class TidelogError(Exception):
    """Root of everything that tidelog raises on purpose."""


class InvalidValue(TidelogError, ValueError):
    """A value, a name or an id that cannot be stored. Nothing was done."""


class LimitExceeded(InvalidValue):
    """Something is larger than any server would take. Nothing was done."""


class ValidationFailed(InvalidValue):
    """
    An object or a change that does not fit the schema. Nothing was done.

    Args:
        entity: Type of the object.
        id: Its id; empty if it is not known.
        attribute: The attribute; empty if the entity itself is not in the schema.
        value: What it would be; null and what is missing are None.
        rule: The rule that this breaks, as the end of a sentence: "must be at least 1".
        is_mismatch: Whether names do not fit (an entity or attribute that the schema
            does not have), as opposed to a value that breaks a rule.
        how: What is between attribute and value in the message.
    """

    def __init__(
        self,
        *,
        entity: str,
        id: str = "",  # noqa: A002 - the glossary's word
        attribute: str = "",
        value: Any = None,
        rule: str,
        is_mismatch: bool = False,
        how: str = "is",
    ) -> None:
        what = f"attribute {attribute!r} {how} {quoted(value)}, but " if attribute else ""
        super().__init__(f"{entity}{f' {id!r}' if id else ''}: {what}{rule}")
        self.entity = entity
        self.id = id
        self.attribute = attribute
        self.value = value
        self.rule = rule
        self.is_mismatch = is_mismatch


class InvalidConstraint(TidelogError, ValueError):
    """A constraint that cannot be evaluated."""


class InvalidSchema(TidelogError, ValueError):
    """A schema that contradicts itself."""


class InvalidRule(TidelogError, ValueError):
    """A rule of an application (access, download, conflicts) that contradicts itself or the schema."""


class _ObjectError(TidelogError):
    def __init__(self, message: str, *, entity: str, id: str) -> None:  # noqa: A002 - the glossary's word
        super().__init__(message)
        self.entity = entity
        self.id = id


class ObjectNotFound(_ObjectError):
    """
    The object to be read or changed is not there (or no longer).

    Attributes:
        entity: Type of the object.
        id: Its id.
        unsaved: The uncommitted changes of the live handle that found out, by
            attribute; empty otherwise. They are not lost: the caller holds them.
    """

    def __init__(self, *, entity: str, id: str, unsaved: dict[str, Any] | None = None) -> None:  # noqa: A002
        note = f"; it had uncommitted changes to {', '.join(sorted(unsaved))}" if unsaved else ""
        super().__init__(f"{entity} {id!r} does not exist here (or no longer){note}", entity=entity, id=id)
        self.unsaved: dict[str, Any] = unsaved or {}


class ObjectExists(_ObjectError):
    """An object of this id is there already. Nothing was done."""

    def __init__(self, *, entity: str, id: str) -> None:  # noqa: A002
        super().__init__(f"{entity} {id!r} exists already: update it, or choose another id", entity=entity, id=id)


class FileUnavailable(TidelogError):
    """
    The content of a file is not here, and cannot be had now.

    Attributes:
        entity: Type of the object.
        id: Its id.
        attribute: The attribute that refers to the content.
        reason: Why, for people.
    """

    def __init__(self, *, entity: str, id: str, attribute: str, reason: str) -> None:  # noqa: A002
        super().__init__(f"the content of {attribute!r} of {entity} {id!r} is not here: {reason}")
        self.entity = entity
        self.id = id
        self.attribute = attribute
        self.reason = reason


class StorageError(TidelogError):
    """The directory on disk cannot be used as it should."""


class DiskFull(StorageError):
    """There is no room on the disk. Nothing of this commit was written: make room, then repeat it."""


def damaged(what: str) -> StorageError:
    """Return the error for a record that is not what was written."""
    return StorageError(f"{what} cannot be read: the file was damaged outside tidelog")


class LogCorrupt(StorageError):
    """
    An entry of the operation log fails its check.

    Attributes:
        seq: Position of the entry.
    """

    def __init__(self, message: str, *, seq: int) -> None:
        super().__init__(message)
        self.seq = seq


class FormatUnsupported(StorageError):
    """
    The directory was written in a format that this version does not read.

    Attributes:
        found: Format of the directory.
        supported: Format that this version reads and writes.
    """

    def __init__(self, path: str, *, found: str, supported: str) -> None:
        super().__init__(
            f"{path} holds {found}, this version of tidelog reads {supported}: "
            "use the version of tidelog that wrote it, or another directory"
        )
        self.found = found
        self.supported = supported


class StoreInUse(StorageError):
    """Another process serves from this store. An embedded store has one server."""


class TargetExists(StorageError):
    """A backup or a restored store would take the place of something. Nothing was changed."""


class InheritedEnvironment(StorageError):
    """A forked child used what its parent had opened. Open it again in the child."""


class ResourceClosed(TidelogError):
    """You closed this already."""


class SynchronizationError(TidelogError):
    """
    A synchronization did not complete.

    No visible local data changed because of the download, what was uploaded
    stays on the server, pending operations stay pending: call again.

    Attributes:
        report: What was done until then, as the method would have returned it; None
            if nothing was begun.
    """

    report: Any = None


class SynchronizationInProgress(SynchronizationError):
    """Another synchronization of this replica is running, in this process or another."""

    def __init__(self) -> None:
        super().__init__(
            "Performing simultaneous synchronizations is not supported. "
            "Please try again after the current synchronization is completed."
        )


class ServerUnavailable(SynchronizationError):
    """The server could not be reached, or broke off, until the deadline. Already retried."""


class NotConfigured(SynchronizationError):
    """The replica was opened without the address of a server."""


class TokenUnavailable(SynchronizationError):
    """The program's token provider failed. What it raised is the cause."""


class Unauthenticated(SynchronizationError):
    """The server does not accept the credentials. A token provider was asked again already."""


class PermissionRefused(SynchronizationError):
    """The server does not let this principal use this replica."""


class DownloadRefused(SynchronizationError):
    """
    The server does not take a constraint on what the replica wants to download.

    It does not fit the server's schema: open the replica with another one. What is
    pending can still be uploaded, by the other modes.
    """


class ProtocolUnsupported(SynchronizationError):
    """Client and server speak different versions of the protocol."""


class ProtocolViolated(SynchronizationError):
    """The other side sent what the protocol does not allow."""


class ReplicaForked(SynchronizationError):
    """
    The server knows other operations under this replica's id: one of the two logs is a copy.

    A synchronization goes on from there by itself, under another replica id. It is raised
    only if that happens again at once.
    """


class ReplicaRetired(SynchronizationError):
    """
    The server has forgotten what became of this replica's operations: it was away for too long.

    A synchronization goes on from there by itself, under another replica id. It is raised
    only if that happens again at once.
    """


class ForeignServer(SynchronizationError):
    """
    The server is not the one that this replica belongs to. Nothing was exchanged.

    `synchronize_all(accept_foreign_server=True)` makes the replica one of that server.

    Attributes:
        expected: Epoch of the store that the replica belongs to.
        actual: Epoch of the store that answered.
    """

    def __init__(self, *, expected: str, actual: str) -> None:
        super().__init__(
            f"this replica belongs to the store {expected}, the server has the store {actual}: "
            "connect to the right server, use another replica directory, or accept this server"
        )
        self.expected = expected
        self.actual = actual


class MassRemoval(SynchronizationError):
    """
    More than half of an entity, and more than 20 objects, would be removed, and the server does not say why.

    Nothing was removed; what was uploaded is settled. `synchronize_all(accept_mass_removal=True)`
    goes on.

    Attributes:
        removed: How many objects would be removed, by entity.
        present: How many objects of the server's are here, by entity.
    """

    def __init__(self, *, removed: Mapping[str, int], present: Mapping[str, int]) -> None:
        counts = ", ".join(
            f"{count} of {present[entity]} {entity}" for entity, count in sorted(removed.items()) if count
        )
        super().__init__(
            f"the server lacks {counts}, and does not say that they were deleted: "
            "is it the right server, with all its data? Nothing was removed; to go on, accept the removal"
        )
        self.removed = removed
        self.present = present
