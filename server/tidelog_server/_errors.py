"""
What ends a call or a session on the server. How that is told on the wire: `_status`.

* TidelogError
  + AuthenticationFailed       the credentials of a call are not accepted
  + AuthenticationUnavailable  nobody can tell at the moment who is calling
  + RequestInvalid             a request that the protocol does not allow
    - OperationsOutOfOrder     positions in an upload that do not rise
  + ProtocolVersionUnknown     a client of another protocol version
  + SessionSuperseded          a newer session of the replica has begun to upload
  + ReplicaRetired             the replica was away for so long that it cannot upload any more
  + HistoryCollected           the change log does not reach back as far as it is needed
  + SessionIdle                the client neither sends what is awaited nor reads what is sent
    + NothingRead              the latter
  + ServerBusy                 as many are served as may be at once: come again later
  + OperationForked            a settled position was sent with another nonce
  + ReplicaOwned               the replica id belongs to another principal
  + NotFound                   what was asked for by name is not there (to this principal)
  + OperationRefused           a rule or a hook refuses what the service itself wanted to do
  + ChangedMeanwhile           what a transaction of the service read was changed before its end
  + FailureSettled             the failure is no longer open
  + FailureStale               what the failure's operation writes was changed since it was refused
  + OperatorRequired           only an operator may do this
  + FileTooLarge               a content of a size that the server does not take
  + FileRoomExhausted          a user has uploaded as much as he may without referring to it
  + UploadSuperseded           another upload of the same content by the same user has begun
  + AddressUnavailable         the server cannot listen where it should
  + ExtraMissing               what is asked for needs a library that is not installed
* StorageError
  + StoreUnavailable           the database, or the place of contents, cannot be reached now
  + ServerOutdated             another server makes the store ready for another schema, or has done so
  + SchemaContradicted         what the store holds does not fit the application's schema
  + MigrationUnfinished        a migration of the store was broken off, and this would not finish it
  + BackupDamaged              something is wrong in a backup that was to be restored
"""

from __future__ import annotations

from tidelog._errors import StorageError, TidelogError
from tidelog._failure import FailureReason
from tidelog._finding import Finding
from tidelog._limits import REASON_BYTES_MAX


def for_people(message: object) -> str:
    """Return a message as text that fits the wire, whatever an application's code made of it."""
    data = str(message).encode("utf-8", "backslashreplace")
    if len(data) <= REASON_BYTES_MAX:
        return data.decode()
    return data[: REASON_BYTES_MAX - 3].decode("utf-8", "ignore") + "..."


class AuthenticationFailed(TidelogError):
    """The credentials of a call are not accepted. The message is told to the caller and logged."""


class AuthenticationUnavailable(TidelogError):
    """Nobody can tell at the moment who is calling: the same credentials may be accepted later."""


class RequestInvalid(TidelogError):
    """The request breaks a rule of the protocol."""


class OperationsOutOfOrder(RequestInvalid):
    """The positions in an upload do not rise."""


class ProtocolVersionUnknown(TidelogError):
    """The client speaks a version of the protocol that this server does not."""


class SessionSuperseded(TidelogError):
    """A newer session of the replica has begun to upload: this one may write nothing more."""


class ReplicaRetired(TidelogError):
    """What became of the replica's operations is forgotten: it goes on under another id."""


class HistoryCollected(TidelogError):
    """The change log does not reach back as far as it is needed."""


class SessionIdle(TidelogError):
    """The client neither sends what is awaited nor reads what is sent, for too long."""


class NothingRead(SessionIdle):
    """The client does not read what is sent. So it does not read the error either."""


class ServerBusy(TidelogError):
    """
    As many are served as may be at once. Nothing was begun.

    Attributes:
        retry_after_seconds: When to come again.
    """

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class OperationForked(TidelogError):
    """A settled position of the replica's log was sent with another nonce: there are two logs."""


class ReplicaOwned(TidelogError):
    """The replica id belongs to the principal that used it first."""


class NotFound(TidelogError):
    """What was asked for by name is not there, or not to be seen by this principal."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class OperationRefused(TidelogError):
    """
    A rule or a hook refuses what the service itself wanted to do. Nothing was done.

    Attributes:
        entity: Type of the object.
        id: Its id.
        reason: Why, as for a synchronization failure.
        code: The application's own code for it; empty: none.
    """

    def __init__(self, message: str, *, entity: str, id: str, reason: FailureReason, code: str = "") -> None:  # noqa: A002
        super().__init__(message)
        self.entity = entity
        self.id = id
        self.reason = reason
        self.code = code


class ChangedMeanwhile(TidelogError):
    """What a transaction of the service read was changed before its end. Nothing was done: repeat it."""


class FailureSettled(TidelogError):
    """The failure was retried or dismissed already."""


class FailureStale(TidelogError):
    """What the failure's operation writes was changed since it was refused."""


class OperatorRequired(TidelogError):
    """Only an operator may do this."""


class FileTooLarge(TidelogError):
    """A content is larger than the server takes."""


class FileRoomExhausted(TidelogError):
    """A user has uploaded as much as he may without referring to it. Nothing was begun."""


class UploadSuperseded(TidelogError):
    """Another upload of the same content by the same user has begun: this one may append nothing more."""


class StoreUnavailable(StorageError):
    """
    The database of a store, or the place of its contents, cannot be reached now, or does not answer as it should.

    It may later. What was under way was not done; if the connection broke while it was being committed, it
    may have been done all the same.
    """


class ServerOutdated(StorageError):
    """
    Another server makes the store ready for another schema, or has done so: this one may not go on.

    Whoever is told so may come again: to a server that has that schema, or when this one has it.
    """


class SchemaContradicted(StorageError):
    """
    What the store holds does not fit the application's schema. Nothing was changed.

    Attributes:
        summary: What is wrong and what can be done, in a sentence.
        contradictions: The first 20, each a sentence that names tenant, object, attribute, value and rule.
        count: How many there are.
    """

    def __init__(self, summary: str, contradictions: list[str], *, count: int) -> None:
        super().__init__("\n".join((summary, *contradictions)))
        self.summary = summary
        self.contradictions = contradictions
        self.count = count


class MigrationUnfinished(StorageError):
    """A migration of the store was broken off. Only the same schema, told to migrate, can finish it."""


class AddressUnavailable(TidelogError):
    """The server cannot listen at the address it was given."""


class ExtraMissing(TidelogError):
    """What is asked for needs a library that is not installed. The message says how to install it."""


class BackupDamaged(StorageError):
    """
    Something is wrong in a backup that was to be restored. Nothing was changed.

    Attributes:
        findings: What, the first of it.
    """

    def __init__(self, message: str, findings: list[Finding]) -> None:
        super().__init__(message)
        self.findings = findings
