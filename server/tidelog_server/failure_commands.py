"""What the server adds to the command `tidelog failures`: working off what a server has recorded, over gRPC."""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any, Final, TypeVar

import grpc
import typer
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from tidelog import InvalidConstraint, InvalidValue, Operation, Schema
from tidelog._channel import CLOSE_SECONDS_MAX, Metadata, aside, authorization, check_token, open_channel
from tidelog._constraint_text import parse_value
from tidelog._failure import FailureReason, SynchronizationFailure, moment_of, operation_as_data, operation_in_short
from tidelog._operation import OperationKind, decode_operation
from tidelog._patch import Patch
from tidelog._values import as_json, decode_map
from tidelog.cli import (
    Column,
    CommandFailed,
    ExitCode,
    JsonOption,
    ServerOption,
    TlsCaOption,
    TlsCertificateOption,
    TlsKeyOption,
    TlsOption,
    TokenFileOption,
    given_tls,
    given_token,
    print_json,
    print_table,
    shared_group,
)
from tidelog.v1 import failure_pb2, failure_pb2_grpc, schema_pb2, schema_pb2_grpc

CALL_SECONDS_MAX: Final = 60.0
PAGE_FAILURES: Final = 1_000

# What no other code means is a refusal.
_EXIT_CODES: Final = {
    grpc.StatusCode.UNAVAILABLE: ExitCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: ExitCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExitCode.UNAVAILABLE,
    grpc.StatusCode.NOT_FOUND: ExitCode.REJECTED,
    grpc.StatusCode.INVALID_ARGUMENT: ExitCode.USAGE,
}

_FAILURE_COLUMNS = (
    Column("FAILURE"),
    Column("STATUS"),
    Column("REASON"),
    Column("USER"),
    Column("KIND"),
    Column("ENTITY"),
    Column("ID"),
    Column("MESSAGE", fit="fold"),
)
_GROUP_COLUMNS = (
    Column("COMMIT GROUP"),
    Column("KIND"),
    Column("ENTITY"),
    Column("ID"),
    Column("CHANGE", fit="shorten"),
)
_ACTION_COLUMNS = (
    Column("DONE"),
    Column("BY"),
    Column("AS"),
    Column("TIME"),
    Column("OUTCOME", fit="fold"),
    Column("NOTE", fit="fold"),
)
_RESULT_COLUMNS = (
    Column("FAILURE"),
    Column("STATUS"),
    Column("ENTITY"),
    Column("ID"),
    Column("OUTCOME", fit="fold"),
)

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)

FailureArgument = Annotated[str, typer.Argument(metavar="FAILURE", help="Id of the failure.")]
FailuresArgument = Annotated[list[str], typer.Argument(metavar="FAILURE...", help="Ids of the failures.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Overrule what was changed since the operation was refused.")
]
NoteOption = Annotated[str, typer.Option(metavar="TEXT", help="Why, for the record.")]


class Status(enum.StrEnum):
    """Where a failure stands."""

    OPEN = "open"
    RETRIED = "retried"
    DISMISSED = "dismissed"

    @property
    def number(self) -> failure_pb2.FailureStatus.ValueType:
        """The status on the wire."""
        return failure_pb2.FailureStatus.Value(f"FAILURE_STATUS_{self.name}")


def register(app: typer.Typer) -> None:
    """Add the commands to the group `failures`."""
    group = shared_group(app, "failures")
    for command in (list_, show, retry, edit, dismiss):
        group.command(command.__name__.rstrip("_"))(_calling(command))


def list_(
    server: _Server,
    *,
    status: Annotated[list[Status] | None, typer.Option(help="Only those that stand there. Repeatable.")] = None,
    entity: Annotated[str, typer.Option(metavar="ENTITY", help="Only those of operations on this entity.")] = "",
    object_id: Annotated[str, typer.Option("--id", metavar="ID", help="Only those on objects of this id.")] = "",
    user: Annotated[str, typer.Option(metavar="USER", help="Only those of this user's operations.")] = "",
    replica_id: Annotated[str, typer.Option(metavar="UUID", help="Only those of this replica.")] = "",
    reason: Annotated[
        list[FailureReason] | None, typer.Option(metavar="REASON", help="Only those refused for this. Repeatable.")
    ] = None,
    since: Annotated[
        str, typer.Option(metavar="TIME", help="Only those refused then or later: 2026-01-31, 2026-01-31T12:00:00Z.")
    ] = "",
    before: Annotated[str, typer.Option(metavar="TIME", help="Only those refused before.")] = "",
    cause: Annotated[str, typer.Option(metavar="FAILURE", help="Only those that this failure caused.")] = "",
    limit: Annotated[int | None, typer.Option(min=0, metavar="N", help="Show so many at the most.")] = None,
    json_: JsonOption = False,
) -> None:
    """List the failures that a server has recorded: one's own, an operator those of everybody."""
    request = failure_pb2.ListFailuresRequest(
        page_size=PAGE_FAILURES if limit is None else max(1, min(limit, PAGE_FAILURES)),
        statuses=[one.number for one in status or ()],
        entity=entity,
        object_id=object_id,
        user_id=user,
        replica_id=replica_id,
        reasons=[one.number for one in reason or ()],
        since=_time(since, "--since"),
        before=_time(before, "--before"),
        cause_failure_id=cause,
    )
    found = islice(_all_failures(server, request), limit)
    if json_:
        for record in found:
            print_json(_record_as_data(record))
    else:
        print_table(_FAILURE_COLUMNS, map(_failure_row, found))


def show(server: _Server, *, failure: FailureArgument, json_: JsonOption = False) -> None:
    """
    Show a failure beside the object as it is now, what it caused, and what was done about it.

    Exit code 1: there is none.
    """
    found = server.call(server.failures.GetFailure, failure_pb2.GetFailureRequest(id=failure))
    present = decode_map(found.present.attributes) if found.HasField("present") else None
    if json_:
        data = _record_as_data(found.failure)
        data["present"] = None if present is None else {"version": found.present.version, "attributes": present}
        data["dependents"] = list(found.dependents)
        print_json(data)
    else:
        _print_failure(found, present)


def retry(
    server: _Server,
    *,
    failures: FailuresArgument,
    force: ForceOption = False,
    note: NoteOption = "",
    json_: JsonOption = False,
) -> None:
    """
    Apply the operations of failures as their authors, by today's rules; what was refused because of them follows.

    Exit code 1: done, but some were refused again; these stay open.
    """
    requests = (failure_pb2.RetryFailureRequest(id=one, force=force, note=note) for one in failures)
    _retry_all(server, requests, json_=json_)


def edit(
    server: _Server,
    *,
    failure: FailureArgument,
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=JSON",
            help='Write this value instead. Also 12.50d, t"2026-01-31T12:00:00Z" and b"AP8=". Repeatable.',
        ),
    ] = None,
    unset: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Remove the attribute from the object. Repeatable.")
    ] = None,
    omit: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Leave the attribute as it is. Repeatable.")
    ] = None,
    force: ForceOption = False,
    note: NoteOption = "",
    json_: JsonOption = False,
) -> None:
    """
    Change what a refused operation writes, then retry it.

    Exit code 1: it was refused again, or something that follows it; the failure then stays open as it was.
    """
    written = dict(_name_and_value(one) for one in values or ())
    if not (written or unset or omit):
        raise typer.BadParameter("say what to change, or retry", param_hint="--set, --unset and --omit")
    record = server.call(server.failures.GetFailure, failure_pb2.GetFailureRequest(id=failure)).failure
    patch = _edited(record, server.schema(), written, unset or (), omit or ())
    request = failure_pb2.RetryFailureRequest(id=failure, force=force, note=note, patch=patch.encode())
    _retry_all(server, [request], json_=json_)


def dismiss(server: _Server, *, failures: FailuresArgument, note: NoteOption = "", json_: JsonOption = False) -> None:
    """Close failures: their operations are given up."""
    for one in dict.fromkeys(failures):
        request = failure_pb2.DismissFailureRequest(id=one, note=note)
        record = server.call(server.failures.DismissFailure, request).failure
        _print_results([failure_pb2.RetryResult(failure=record)], json_=json_)


# --- a server -----------------------------------------------------------------


class _Server:
    """A server that the commands call."""

    def __init__(self, channel: grpc.Channel, metadata: Metadata) -> None:
        self.failures = failure_pb2_grpc.FailureServiceStub(channel)
        self._schemas = schema_pb2_grpc.SchemaServiceStub(channel)
        self._metadata = metadata

    def call(self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request) -> _Response:
        """Call a method as the user."""
        return aside(functools.partial(method, request, timeout=CALL_SECONDS_MAX, metadata=self._metadata))

    def schema(self) -> Schema | None:
        """Return the application's schema, or None if it has none."""
        try:
            response = self.call(self._schemas.GetSchema, schema_pb2.GetSchemaRequest())
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return None
            raise
        return Schema.from_message(response.schema)


@contextmanager
def _server(
    *,
    server: ServerOption,
    token_file: TokenFileOption = None,
    tls: TlsOption = False,
    tls_ca: TlsCaOption = None,
    tls_certificate: TlsCertificateOption = None,
    tls_key: TlsKeyOption = None,
) -> Iterator[_Server]:
    token = given_token(token_file)
    metadata = authorization(None if token is None else check_token(token))
    tls_given = given_tls(tls=tls, ca=tls_ca, certificate=tls_certificate, key=tls_key)
    channel = aside(functools.partial(open_channel, server, tls_given))
    try:
        yield _Server(channel, metadata)
    except grpc.RpcError as error:
        exit_code = _EXIT_CODES.get(error.code(), ExitCode.REFUSED)
        raise CommandFailed(f"{server}: {error.details()}", exit_code) from error
    finally:
        with suppress(TimeoutError):
            aside(channel.close, CLOSE_SECONDS_MAX)


def _calling(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that takes, in place of its server, the options that say which one to call, and as whom."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    options = list(inspect.signature(_server, eval_str=True).parameters.values())

    @functools.wraps(command)
    def run(**given: Any) -> None:
        with _server(**{option.name: given.pop(option.name) for option in options}) as server:
            command(server, **given)

    del run.__wrapped__  # typer would look at its signature
    run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in (*own, *options)}
    return run


# --- what the commands do -----------------------------------------------------


def _all_failures(
    server: _Server, request: failure_pb2.ListFailuresRequest
) -> Iterator[failure_pb2.SynchronizationFailure]:
    """Yield the failures of all pages."""
    while True:
        page = server.call(server.failures.ListFailures, request)
        yield from page.failures
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def _retry_all(server: _Server, requests: Iterable[failure_pb2.RetryFailureRequest], *, json_: bool) -> None:
    retried: set[str] = set()
    refused = False
    for request in requests:
        if request.id in retried:
            continue  # it followed one before it
        results = server.call(server.failures.RetryFailure, request).results
        _print_results(results, json_=json_)
        retried.update(result.failure.id for result in results)
        refused = refused or not all(result.version for result in results)
    if refused:
        raise typer.Exit(ExitCode.REJECTED)


def _edited(
    record: failure_pb2.SynchronizationFailure,
    schema: Schema | None,
    values: dict[str, Any],
    unset: Iterable[str],
    omitted: Iterable[str],
) -> Patch:
    """Return the refused operation's patch, in the names of the present schema, with changes."""
    patch, is_creation = Patch(), False
    try:
        operation = decode_operation(record.operation)
        is_creation = operation.kind is OperationKind.CREATE
        patch = operation.decoded_patch()
        if schema is not None:
            _entity, patch = schema.upcast(operation.entity, patch, operation.schema_version)
    except InvalidValue:
        pass  # then what is given is all of it; whether that helps is the server's to say
    gone = {*unset, *omitted}
    others = gone | values.keys()
    edited = Patch(
        {**_without(patch.set, gone), **values},
        # What a creation does not set is not there.
        (*(name for name in patch.unset if name not in others), *(() if is_creation else unset)),
        _without(patch.increment, others),
        _without(patch.add, others),
        _without(patch.remove, others),
    )
    edited.check()
    return edited


def _without(values: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _name_and_value(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise typer.BadParameter(f"expected NAME=JSON, got {text!r}", param_hint="--set")
    try:
        return name, parse_value(value)
    except InvalidConstraint as error:
        raise typer.BadParameter(f"{name}: {error}; a text stands in quotes", param_hint="--set") from error


def _time(text: str, option: str) -> Timestamp | None:
    """Read a time; without an offset it is UTC."""
    if not text:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no time", param_hint=option) from error
    found = Timestamp()
    found.FromDatetime(time.replace(tzinfo=UTC) if time.tzinfo is None else time)
    return found


# --- what they print ----------------------------------------------------------


def _print_results(results: Iterable[failure_pb2.RetryResult], *, json_: bool) -> None:
    if json_:
        for result in results:
            print_json(_result_as_data(result))
    else:
        print_table(_RESULT_COLUMNS, map(_result_row, results))


def _print_failure(found: failure_pb2.GetFailureResponse, present: dict[str, Any] | None) -> None:
    record = found.failure
    failure = SynchronizationFailure.from_message(record)
    facts = {
        "status": _status(record),
        "reason": failure.reason.value + (f" ({record.code})" if record.code else ""),
        "message": record.message,
        "user": record.user_id + (f" ({', '.join(record.roles)})" if record.roles else ""),
        "replica": record.replica_id,
        "refused": f"{_iso(record.create_time)}, at version {record.version}",
        "operation": _operation_in_words(failure, record),
        "cause": record.cause_failure_id,
    }
    print_table(
        (Column("FAILURE"), Column(record.id, fit="fold")), ((name, text) for name, text in facts.items() if text)
    )
    kind = "OPERATION" if failure.operation is None else failure.operation.kind.name
    now = "NOT THERE NOW" if present is None else f"PRESENT, VERSION {found.present.version}"
    beside_columns = (Column("ATTRIBUTE"), Column(f"REFUSED {kind}", fit="fold"), Column(now, fit="fold"))
    for columns, lines in (
        (beside_columns, list(_beside(failure.operation, present or {}))),
        (_GROUP_COLUMNS, [_group_row(operation) for operation in failure.group_operations]),
        ((Column("CAUSED THE FAILURES"),), [(one,) for one in found.dependents]),
        (_ACTION_COLUMNS, [_action_row(action) for action in record.actions]),
    ):
        if lines:
            print()
            print_table(columns, lines)


def _operation_in_words(failure: SynchronizationFailure, record: failure_pb2.SynchronizationFailure) -> str:
    if failure.operation is not None:
        return f"{failure.operation.kind.name.lower()} {failure.entity} {failure.object_id}"
    return "no longer kept" if record.payload_removed else "cannot be read"


def _beside(operation: Operation | None, present: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield each attribute with what an operation does to it and what it is now."""
    try:
        patch = operation.decoded_patch() if operation is not None else Patch()
    except InvalidValue as error:
        patch = Patch()
        yield "", str(error), ""
    written = {name: as_json(value) for name, value in patch.set.items()}
    written |= dict.fromkeys(patch.unset, "unset")
    written |= {name: f"increment {as_json(value)}" for name, value in patch.increment.items()}
    written |= {name: f"add {as_json(value)}" for name, value in patch.add.items()}
    written |= {name: f"remove {as_json(value)}" for name, value in patch.remove.items()}
    for name in dict.fromkeys((*written, *present)):
        yield name, written.get(name, ""), as_json(present[name]) if name in present else ""


def _failure_row(record: failure_pb2.SynchronizationFailure) -> tuple[str, ...]:
    operation = SynchronizationFailure.from_message(record).operation
    return (
        record.id,
        _status(record),
        FailureReason.of_number(record.reason).value,
        record.user_id,
        operation.kind.name.lower() if operation is not None else "?",
        record.entity,
        record.object_id,
        record.message,
    )


def _group_row(operation: Operation) -> tuple[str, ...]:
    return (
        str(operation.seq),
        operation.kind.name.lower(),
        operation.entity,
        operation.id,
        operation_in_short(operation),
    )


def _action_row(action: failure_pb2.FailureAction) -> tuple[str, ...]:
    what = _action(action)
    details = [word for word, is_so in (("edited", action.edited_operation), ("forced", action.forced)) if is_so]
    return (
        f"{what} ({', '.join(details)})" if details else what,
        action.user_id,
        action.acted_as,
        _iso(action.time),
        action.outcome,
        action.note,
    )


def _result_row(result: failure_pb2.RetryResult) -> tuple[str, ...]:
    failure = result.failure
    return failure.id, _status(failure), failure.entity, failure.object_id, _outcome(result)


def _outcome(result: failure_pb2.RetryResult) -> str:
    if result.version:
        return f"applied at version {result.version}"
    if result.reason:
        return f"{FailureReason.of_number(result.reason)}: {result.message}"
    return ""


def _record_as_data(record: failure_pb2.SynchronizationFailure) -> dict[str, Any]:
    failure = SynchronizationFailure.from_message(record)
    return {
        "id": record.id,
        "status": _status(record),
        "reason": failure.reason.value,
        "code": record.code,
        "message": record.message,
        "entity": record.entity,
        "object_id": record.object_id,
        "user_id": record.user_id,
        "roles": list(record.roles),
        "replica_id": record.replica_id,
        "operation": None if failure.operation is None else operation_as_data(failure.operation),
        "group_operations": [operation_as_data(one) for one in failure.group_operations],
        "version": record.version,
        "time": _iso(record.create_time),
        "cause_failure_id": record.cause_failure_id or None,
        "settled_by": record.settled_by or None,
        "settle_time": _iso(record.settle_time) if record.HasField("settle_time") else None,
        "payload_removed": record.payload_removed,
        "actions": [_action_as_data(one) for one in record.actions],
    }


def _action_as_data(action: failure_pb2.FailureAction) -> dict[str, Any]:
    edited = action.edited_operation
    return {
        "kind": _action(action),
        "user_id": action.user_id or None,
        "acted_as": action.acted_as or None,
        "time": _iso(action.time),
        "outcome": action.outcome,
        "note": action.note,
        "forced": action.forced,
        "edited_operation": operation_as_data(decode_operation(edited)) if edited else None,
    }


def _result_as_data(result: failure_pb2.RetryResult) -> dict[str, Any]:
    return {
        "id": result.failure.id,
        "status": _status(result.failure),
        "entity": result.failure.entity,
        "object_id": result.failure.object_id,
        "version": result.version or None,
        "reason": FailureReason.of_number(result.reason).value if result.reason else None,
        "message": result.message,
    }


def _status(record: failure_pb2.SynchronizationFailure) -> str:
    return _word(failure_pb2.FailureStatus, record.status, "FAILURE_STATUS_")


def _action(action: failure_pb2.FailureAction) -> str:
    return _word(failure_pb2.FailureActionKind, action.kind, "FAILURE_ACTION_KIND_")


def _word(enumeration: Any, number: int, prefix: str) -> str:
    """Return the word for a value; its number, if a newer server knows more values than this program."""
    known = enumeration.DESCRIPTOR.values_by_number.get(number)
    return str(number) if known is None else known.name.removeprefix(prefix).lower()


def _iso(time: Timestamp) -> str:
    moment = moment_of(time)
    return "" if moment is None else moment.isoformat(timespec="microseconds")
