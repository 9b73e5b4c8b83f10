"""
What is fuzzed: one function for each decoder, which takes any bytes.

Each holds the decoder to its word. Either the bytes are what they should be, and then
they come back equal from another round, or the decoder raises the error that it
documents; the function returns. Everything else leaves it as an exception: a finding.

The same functions serve atheris (`python -m tests.fuzz`), the property tests and the
replay of the corpus.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import grpc
import jwt
import typer
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status as RpcStatus
from tests.builders import REPLICA_A, TENANT, USER, Lab, create, delete, group, make_operation, packed, update
from tests.fuzz.replicas import hostile_session, message_seeds

from tidelog import Constraint, InvalidConstraint, InvalidSchema, InvalidValue, Schema, attribute, claim
from tidelog import _attributes as types
from tidelog._address import check_address, host_of, is_loopback
from tidelog._channel import check_token
from tidelog._constraint_text import parse_constraint, parse_value
from tidelog._constraints import constraint_from_message
from tidelog._downloads import Download, download_of
from tidelog._entity import Entity, Rename
from tidelog._errors import StorageError, TidelogError
from tidelog._failure import SynchronizationFailure, operation_as_data, operation_in_short
from tidelog._file_reference import FileReference, encoded_file_references
from tidelog._log import checked
from tidelog._operation import CommitGroup, OperationKind, decode_operation, identity_of
from tidelog._patch import check_attributes, decode_patch, patch_of
from tidelog._schema_document import SchemaParts, format_toml, parse_json, parse_toml
from tidelog._values import (
    as_json,
    check,
    decode,
    decode_flat_map,
    decode_map,
    encode,
    equal,
    identity,
    literal,
    sort_key,
)
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import constraint_pb2, failure_pb2, file_pb2, object_pb2, schema_pb2, sync_pb2
from tidelog_client import _files, _publication, _storage, _view, commands
from tidelog_client._call_errors import error_of
from tidelog_client._plans import Plans
from tidelog_server import Application, Credentials, JwtAuthenticator, StaticTokens, failure_commands
from tidelog_server import _lmdb_store as store
from tidelog_server._callers import _bearer_token
from tidelog_server._content_store import DirectoryContents
from tidelog_server._download import Download as ServerDownload
from tidelog_server._errors import AuthenticationFailed, RequestInvalid
from tidelog_server._failure_service import FailureService
from tidelog_server._file_service import FileService
from tidelog_server._files import Files
from tidelog_server._jwt import _signing_keys
from tidelog_server._object_service import ObjectService
from tidelog_server._outcomes import Status
from tidelog_server._projection import Projection
from tidelog_server._records import Change, ReplicaState, Settled
from tidelog_server._sealing import PageTokens, Sealer
from tidelog_server._session import Session
from tidelog_server._status import status_of
from tidelog_server._units import read_member

if TYPE_CHECKING:
    from tidelog_server._peer import Peer

MOMENT: Final = datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=UTC)
ATTRIBUTES: Final[dict[str, Any]] = {
    "text": "é\n",
    "count": 7,
    "ratio": 0.5,
    "price": Decimal("12.50"),
    "when": MOMENT,
    "raw": b"\x00\xff",
    "tags": ["a", 1, None],
    "nested": {"a": [{"b": True}]},
}


class Target(NamedTuple):
    """
    A decoder to be fuzzed.

    Attributes:
        run: Takes bytes; raises if the decoder breaks its word.
        seeds: Well-formed inputs, from which others are made.
    """

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]


# --- values and operations --------------------------------------------------------


def values(data: bytes) -> None:
    """MessagePack: a value, or InvalidValue."""
    quick = None
    with suppress(InvalidValue):
        quick = decode_flat_map(data)
    try:
        value = decode(data)
    except InvalidValue:
        assert quick is None or not all(type(name) is str for name in quick), (
            "the quick way takes what the full refuses"
        )
        return
    assert quick is None or equal(quick, value), "the quick way reads another value"
    check(value)
    again = encode(value)
    assert equal(decode(again), value), "a value does not come back"
    assert encode(decode(again)) == again, "a value has no stable form"
    assert identity(value) == identity(decode(again))
    assert equal(parse_value(literal(value)), value), "a value is not what its text says"
    assert sort_key(value) <= sort_key(decode(again))
    json.loads(as_json(value), parse_constant=_no_constant)


def patches(data: bytes) -> None:
    """A patch, or InvalidValue; what it makes of attributes can be stored."""
    try:
        patch = decode_patch(data)
    except InvalidValue:
        return
    patch.check()
    again = decode_patch(patch.encode())
    assert equal([*map(list, _as_lists(again))], [*map(list, _as_lists(patch))]), "a patch does not come back"
    for present in ({}, ATTRIBUTES):
        try:
            result = patch.apply(present)
        except InvalidValue:
            continue
        check_attributes(result)
        assert equal(decode_map(encode(result)), result)
        assert present is not ATTRIBUTES or equal(ATTRIBUTES["tags"], ["a", 1, None]), "the argument was changed"


def _as_lists(patch: Any) -> Iterable[Iterable[Any]]:
    return ([*part.items()] and [[*one] for one in part.items()] if isinstance(part, dict) else part for part in patch)


RENAMED: Final = Schema(
    [Entity("Job", {"title": types.String(), "count": types.Integer()})],
    version=3,
    renames=[
        Rename(version=2, entity="Task", to="Job"),
        Rename(version=3, entity="Job", attribute="text", to="title"),
    ],
    open=True,
)


def operations(data: bytes) -> None:
    """An operation, or InvalidValue; one that cannot be read still shows as much of itself as it can."""
    seq, nonce = identity_of(data)
    assert 0 <= seq < 2**63
    assert 0 <= nonce < 2**64
    member = read_member(data, RENAMED)
    assert (member.seq, member.nonce) == (seq, nonce)
    try:
        operation = decode_operation(data)
    except InvalidValue:
        assert member.operation is None
        assert member.error is not None
        return
    assert decode_operation(operation.encode()) == operation, "an operation does not come back"
    json.loads(as_json(operation_as_data(operation)))
    operation_in_short(operation)
    with suppress(InvalidValue):
        operation.decoded_patch()


def uploads(data: bytes) -> None:
    """A batch, however it looks, is settled with one result an operation, or refused whole with RequestInvalid."""
    try:
        batch = list(splice_pb2.OperationBatchSplice.FromString(data).operations)
    except Exception:  # noqa: BLE001 - not what this is about
        return
    lab = Lab(APPLICATION)
    lab.settle(create(1, "seen", {"title": "a", "tags": []}), replica=b"other replica id")
    before = lab.changes()
    try:
        results = lab.settle(*batch)
    except RequestInvalid:
        assert lab.changes() == before, "a refused batch left something behind"
        return
    assert len(results) == len(batch)
    changes, failures = lab.changes(), lab.failures()
    settled = {result.seq for result in results if result.seq and result.status != Status.NOT_READY}
    for result in results:
        assert result.status in (Status.APPLIED, Status.REJECTED, Status.NOT_READY)
        if result.status == Status.REJECTED:
            lab.failure(result)
    for change in changes:
        state = lab.state(change.key[1], change.key[0])
        assert state is not None
        if not state.deleted:
            check_attributes(decode_map(state.attributes))
    repeated = lab.settle(*batch)
    assert [one for one in repeated if one.seq in settled] == [one for one in results if one.seq in settled]
    assert lab.changes()[: len(changes)] == changes
    assert not {one.seq for one in lab.changes()[len(changes) :]} & settled, "an operation was applied twice"
    assert [one.id for one in lab.failures() if one.id in {two.id for two in failures}] == [one.id for one in failures]


APPLICATION: Final = Application(
    schema=Schema(
        [
            Entity(
                "Task",
                {
                    "title": types.String(required=True, max_length=100),
                    "count": types.Integer(minimum=0),
                    "tags": types.List(types.String()),
                    "parent": types.Reference("Task", on_delete="cascade"),
                    "code": types.String(),
                    "extra": types.AnyValue(),
                },
                unique=["code"],
                indexes=["title"],
            )
        ],
        version=2,
        renames=[Rename(version=2, entity="Task", attribute="name", to="title")],
    )
)


# --- constraints --------------------------------------------------------------------


def constraint_messages(data: bytes) -> None:
    """A constraint on the wire, or InvalidConstraint."""
    try:
        message = constraint_pb2.Constraint.FromString(data)
    except Exception:  # noqa: BLE001 - the protobuf library's word, and not what this is about
        return
    try:
        constraint = constraint_from_message(message)
    except InvalidConstraint:
        return
    _check_constraint(constraint)


def constraint_texts(data: bytes) -> None:
    """A constraint as people write it, or InvalidConstraint."""
    text = _text(data)
    with suppress(InvalidConstraint):
        check(parse_value(text))
    try:
        constraint = parse_constraint(text)
    except InvalidConstraint:
        return
    _check_constraint(constraint)


def _check_constraint(constraint: Constraint) -> None:
    message = constraint.to_message()
    assert message.ByteSize() == constraint.facts.size_bytes
    assert constraint_from_message(constraint_pb2.Constraint.FromString(message.SerializeToString())) == constraint
    assert parse_constraint(str(constraint)) == constraint, "a constraint is not what its text says"
    with suppress(InvalidConstraint):
        bound = constraint.bind({"user_id": "ann", "regions": ["a", "b"], "level": 3})
        bound.matches({})
        bound.matches(ATTRIBUTES)
        bound.matches(dict.fromkeys(bound.attributes(), "a"))


# --- schemas ----------------------------------------------------------------------


def schema_json(data: bytes) -> None:
    """A schema as JSON, or InvalidSchema."""
    _check_document(parse_json, data)


def schema_toml(data: bytes) -> None:
    """A schema as TOML, or InvalidSchema."""
    _check_document(parse_toml, data)


def _check_document(parse: Callable[[str], SchemaParts], data: bytes) -> None:
    try:
        schema = Schema._of(parse(_text(data)))
    except InvalidSchema:
        return
    _check_schema(schema)


def schema_messages(data: bytes) -> None:
    """A schema on the wire, or InvalidSchema."""
    try:
        message = schema_pb2.Schema.FromString(data)
    except Exception:  # noqa: BLE001 - the protobuf library's word, and not what this is about
        return
    try:
        schema = Schema.from_message(message)
    except InvalidSchema:
        return
    _check_schema(schema)


def _check_schema(schema: Schema) -> None:
    assert Schema.from_json(schema.to_json()) == schema, "a schema is not what its JSON says"
    assert Schema._of(parse_toml(format_toml(schema._parts()))) == schema, "a schema is not what its TOML says"
    assert Schema.from_message(schema_pb2.Schema.FromString(schema.to_message().SerializeToString())) == schema
    for entity in schema.entities:
        for seen in ({}, ATTRIBUTES):
            with suppress(InvalidValue):
                schema.check_object(entity, schema.with_defaults(entity, seen))
            with suppress(InvalidValue):
                schema.check_patch(*schema.upcast(entity, patch_of(seen), 0))


# --- what a server gets back ------------------------------------------------------


def _scene() -> Lab:
    lab = Lab(APPLICATION)
    lab.settle(
        create(1, "a", {"title": "a", "code": "1"}),
        create(2, "b", {"title": "b", "parent": "a"}),
        update(3, "a", {"title": "c"}),
        create(4, "c", {"title": "d"}),
        delete(5, "c"),
        update(6, "none", {"title": "x"}),
    )
    return lab


SCENE: Final = _scene()
PHOTO: Final = FileReference("photo.jpg", 5, "image/jpeg", bytes(range(32)))
# An upload says one thing only: nothing but the empty content is ever stored.
CONTENTS: Final = TemporaryDirectory(prefix="tidelog-fuzz-")
FILES: Final = Files(SCENE.application, SCENE.store, DirectoryContents(CONTENTS.name), lambda: 0)


def cursors(data: bytes) -> None:
    """A cursor says where a download begins; what it does not know leads to a reconciliation."""
    _check_download(data, b"")


def resume_tokens(data: bytes) -> None:
    """A resume token, as it came or from another version of the server, leads to a download that ends."""
    _check_download(b"", data)
    _check_download(b"", Sealer(SCENE.store, "resume").seal(data, TENANT))
    cursor = _cursor()
    _check_download(cursor, Sealer(SCENE.store, "resume").seal(data, TENANT))


def _check_download(cursor: bytes, token: bytes) -> None:
    download = ServerDownload(SCENE.store, Projection(SCENE.application, USER, {}), replica=REPLICA_A)
    with SCENE.store.read(TENANT) as reader:
        start = download.start_of(reader, cursor, token, confirms=True)
    pages = list(itertools.islice(download.everything_since(start), 10))
    assert len(pages) < 10, "a download does not end"
    assert download.head.version == SCENE.version()
    if start.reconcile and not start.resumed:
        brought = {one.id for page in pages for one in page.snapshots}
        brought |= {one.id for page in pages for one in page.confirmations}
        assert brought == {"a", "b"}, "a reconciliation does not bring all"


def _cursor(version: int = 3) -> bytes:
    identity, projection = SCENE.store.identity, Projection(SCENE.application, USER, {})
    with SCENE.store.read(TENANT) as reader:
        commit_id = reader.commit_id(version) or b""
    return splice_pb2.Cursor(
        epoch=identity.epoch,
        timeline=identity.timeline,
        version=version,
        commit_id=commit_id,
        scope=projection.scope.default,
        entities=projection.scope.entities,
    ).SerializeToString()


def _resume_tokens() -> Iterable[bytes]:
    download = ServerDownload(SCENE.store, Projection(SCENE.application, USER, {}))
    with SCENE.store.read(TENANT) as reader:
        start = download.start_of(reader, b"", b"")
    for page in download.everything_since(start):
        yield page.resume_token
        yield Sealer(SCENE.store, "resume").open(page.resume_token, TENANT) or b""


def page_tokens(data: bytes) -> None:
    """A page token that was not given is RequestInvalid; any position that was sealed leads to a page."""
    objects, failures = ObjectService(SCENE.application, SCENE.store), FailureService(SCENE.application, SCENE.store)
    forged = PageTokens(SCENE.store, "ListFailures").token(data, TENANT)
    for token in (data.decode("utf-8", "replace"), forged):
        with suppress(RequestInvalid):
            failures.list_failures(failure_pb2.ListFailuresRequest(page_token=token).SerializeToString(), USER)
        with suppress(RequestInvalid):
            objects.list_objects(
                object_pb2.ListObjectsRequest(entity="Task", page_token=token).SerializeToString(), USER
            )


def session_starts(data: bytes) -> None:
    """A session begins, or is refused with an error that has a status; whoever is not refused gets to the end."""
    try:
        session = Session(SCENE.application, SCENE.store, USER, sync_pb2.SessionStart.FromString(data))
        started = session.open().result(0)
        session.settle_held().result(0)
        assert sum(1 for _ in itertools.islice(session.pages(), 10)) < 10, "a download does not end"
        session.complete()
        assert started.ByteSize() < 4 * 1024 * 1024
    except Exception as error:
        if not _is_decode_error(error) and status_of(error)[1] == "INTERNAL":
            raise


def requests(data: bytes) -> None:
    """A request of any of the unary services is answered, or refused with an error that has a status."""
    objects, failures = ObjectService(SCENE.application, SCENE.store), FailureService(SCENE.application, SCENE.store)
    for method in (
        objects.get_object,
        objects.list_objects,
        objects.get_schema,
        failures.list_failures,
        failures.get_failure,
    ):
        try:
            method(data, USER).SerializeToString()
        except Exception as error:
            if status_of(error)[1] == "INTERNAL":
                raise


def file_requests(data: bytes) -> None:
    """A request about contents, or a first message of one, is answered, or refused with an error that has a status."""
    service = FileService(FILES)

    async def ask() -> None:
        for asked in (
            service.stat_files(data, USER),
            service.upload_file(cast("Peer", _Said(data)), USER),
            service.download_file(data, cast("Peer", _Said(data)), USER),
        ):
            try:
                await asked
            except Exception as error:
                if status_of(error)[1] == "INTERNAL":
                    raise

    asyncio.run(ask())
    service.close()


class _Said:
    """A client that says one thing, and hears nothing."""

    def __init__(self, data: bytes) -> None:
        self._said = [data]

    async def receive(self) -> bytes | None:
        return self._said.pop() if self._said else None

    async def send(self, _data: bytes) -> None:
        pass


def file_references(data: bytes) -> None:
    """Attributes that a replica takes in refer to files, or not; what does, does so again once it is written anew."""
    try:
        check_attributes(decode_map(data))
    except InvalidValue:
        return
    found = encoded_file_references(data)
    for attribute_name, reference in found.items():
        again = encoded_file_references(encode({attribute_name: reference.to_value()}))
        assert again == {attribute_name: reference}


# --- what is on disk ---------------------------------------------------------------


def log_entries(data: bytes) -> None:
    """An entry of an operation log is the operation at its position, or LogCorrupt; its check sum may be right."""
    for entry in (data, zlib.crc32(data).to_bytes(4, "big") + data):
        with suppress(StorageError, InvalidValue):
            decode_operation(checked(7, entry))


def replica_records(data: bytes) -> None:
    """A record of a replica is read, or a StorageError says that it cannot be."""
    for read in (
        _view._unpack,
        _publication._PublishingEnd.unpack,
        _storage.unpack_outcome,
        _storage._unpack_failure,
        lambda value: _storage.unpack_pending(7, value),
        Plans.decode,
        _files._unpacked,
    ):
        with suppress(StorageError):
            read(data)


def store_records(data: bytes) -> None:
    """A record of a server's store is read, or a StorageError says that it cannot be."""
    for read in (
        store._unpack_object,
        store._unpack_settled,
        store._unpack_replica,
        lambda value: store._unpack_change(7, value),
    ):
        with suppress(StorageError):
            read(data)


# --- what a client gets ------------------------------------------------------------


def server_messages(data: bytes) -> None:
    """A server's messages end in a complete session or a typed error, and the replica is as good as before."""
    hostile_session(data)


def failure_records(data: bytes) -> None:
    """A failure record of a server can be shown, or is refused with a typed error."""
    try:
        record = failure_pb2.SynchronizationFailure.FromString(data)
    except Exception:  # noqa: BLE001 - the protobuf library's word, and not what this is about
        return
    failure = SynchronizationFailure.from_message(record)
    as_json(failure.attributes)
    with suppress(TidelogError):
        json.loads(as_json(failure_commands._record_as_data(record)))
    failure_commands._failure_row(record)
    failure_commands._result_row(failure_pb2.RetryResult(failure=record))
    failure_commands._action_row(record.actions[0] if record.actions else failure_pb2.FailureAction())


def error_details(data: bytes) -> None:
    """Whatever a server says of an error, the client raises one of its own."""
    for code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT):
        error = error_of(_FailedCall(code, data), "here:1")
        pause = getattr(error, "retry_after_seconds", None)
        assert pause is None or 0.0 <= pause < math.inf


class _FailedCall(grpc.RpcError):
    """An error as gRPC raises it."""

    def __init__(self, code: grpc.StatusCode, status: bytes) -> None:
        super().__init__()
        self._code = code
        self._status = status

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "text"

    def trailing_metadata(self) -> Any:
        return (("grpc-status-details-bin", self._status),)


# --- who is calling, and command lines -------------------------------------------------

SECRET: Final = "a secret that is long enough for HS256!"
AUTHENTICATOR: Final = JwtAuthenticator(algorithms="HS256", key=SECRET, default_tenant="default")


def tokens(data: bytes) -> None:
    """A token names a principal, or is refused: whatever its text, whatever an issuer signed."""
    text = data.decode("latin-1")
    with suppress(AuthenticationFailed):
        AUTHENTICATOR.authenticate(Credentials(token=text))
    with suppress(InvalidValue):
        check_token(text)
    with suppress(AuthenticationFailed):
        _bearer_token([("authorization", text)])
    signed = jwt.api_jws.encode(data, SECRET, algorithm="HS256")
    # InvalidValue: claims that name nobody; whoever asks the authenticator tells it as a refusal.
    with suppress(AuthenticationFailed, InvalidValue):
        AUTHENTICATOR.authenticate(Credentials(token=signed))


def key_sets(data: bytes) -> None:
    """A JWK set has keys, or is none."""
    with suppress(ValueError, RecursionError):
        _signing_keys(json.loads(data))


def token_files(data: bytes) -> None:
    """A file of tokens is read, or is refused with InvalidValue."""
    for name in ("tokens.json", "tokens.toml"):
        path = Path(_FOLDER.name) / name
        path.write_bytes(data)
        with suppress(InvalidValue):
            StaticTokens.load(path)


_FOLDER: Final = TemporaryDirectory(prefix="tidelog-fuzz-")


def command_lines(data: bytes) -> None:
    """What people write as an argument is read, or refused with an error that says so."""
    text = _text(data)
    with suppress(InvalidValue):
        is_loopback(host_of(check_address(text)))
    with suppress(InvalidValue, InvalidConstraint):
        download_of(text)
    for read in (
        commands._key,
        commands._download,
        commands._condition,
        failure_commands._name_and_value,
        lambda time: failure_commands._time(time, "--since"),
    ):
        with suppress(typer.BadParameter, TidelogError):
            read(text)


# --- helpers -------------------------------------------------------------------------


def _text(data: bytes) -> str:
    """Return bytes as text; lone surrogates, which a program can hand over, among it."""
    return data.decode("utf-8", "surrogateescape")


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def _is_decode_error(error: Exception) -> bool:
    return type(error).__name__ == "DecodeError"


# --- seeds ---------------------------------------------------------------------------


def _operations() -> list[bytes]:
    return [
        create(1, "a", {"title": "a", "tags": ["x"], "count": 1}),
        update(2, "a", {"title": "b"}, unset=["code"], increment={"count": 2}, add={"tags": ["y"]}),
        update(3, "seen", remove={"tags": ["x"]}, base_version=1, schema_version=1),
        delete(4, "a"),
        *group(
            make_operation("create", seq=5, id="p", set={"title": "p", "parent": "q"}), make_operation(seq=6, id="q")
        ),
        create(7, "z", {"name": "old", "code": "1"}, schema_version=1),
        make_operation(seq=9, group=CommitGroup(8, 1, 3)).encode(),
    ]


def _values() -> Iterable[bytes]:
    yield from (packed([1, -1, 1.5, None, True, "a", b"b", {"a": {}}]), encode(ATTRIBUTES), encode(2**63 - 1))
    yield from (encode(value) for value in ATTRIBUTES.values())
    yield from (b"\xc7\x0c\xff" + bytes(12), b"\xd6\xff" + bytes(4), encode(Decimal("-1E+99")), encode(float("nan")))


def _patches() -> Iterable[bytes]:
    yield encode({"set": ATTRIBUTES})
    yield encode({"increment": {"count": 1, "price": Decimal("0.1"), "ratio": 1.5}, "unset": ["text"]})
    yield encode({"add": {"tags": [1, "b"], "new": []}, "remove": {"tags2": ["a"]}})


def _constraints() -> Iterable[Constraint]:
    yield (attribute("title") == "a") & ((attribute("count") >= 3) | ~attribute("when").exists())
    yield attribute("tags").contains("a") | attribute("count").is_in([1, 2.5, Decimal("1.50"), MOMENT, b"a", None])
    yield attribute("due date") < claim("user_id")
    yield attribute("nested") == {"a": [1, {"b": None}]}


def _schemas() -> Iterable[Schema]:
    yield APPLICATION.schema
    yield RENAMED
    yield Schema(
        [
            Entity(
                "All",
                {
                    "s": types.String(default="x", min_length=1, max_length=9, pattern="[a-z]+"),
                    "i": types.Integer(minimum=-1, maximum=2**40, default=0),
                    "f": types.Float(minimum=0.5, default=1.5),
                    "d": types.DecimalNumber(maximum=Decimal("9.99"), default=Decimal("1.10")),
                    "b": types.Boolean(default=True),
                    "t": types.Timestamp(default=MOMENT),
                    "y": types.Bytes(max_length=3, default=b"ab"),
                    "l": types.List(types.Integer(), default=[1, 2]),
                    "m": types.Map(default={"a": [1.5, "b"]}),
                    "e": types.Enumeration(["one", "two"], default="one"),
                    "r": types.Reference("All", many=True, on_delete="clear"),
                    "p": types.File(),
                    "a": types.AnyValue(),
                },
                unique=["s", ["i", "e"]],
                indexes=["t"],
            )
        ],
        version=7,
    )


def _failure_records() -> Iterable[bytes]:
    for record in SCENE.failures():
        record.actions.add(kind=failure_pb2.FAILURE_ACTION_KIND_REFUSED, edited_operation=record.operation)
        record.settle_time.FromMicroseconds(1)
        yield record.SerializeToString()


def _statuses() -> Iterable[bytes]:
    for message in (
        ErrorInfo(domain="tidelog", reason="REPLICA_FORKED"),
        RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
    ):
        detail = AnyMessage()
        detail.Pack(message)
        yield RpcStatus(code=14, message="text", details=[detail]).SerializeToString()


def _starts() -> Iterable[bytes]:
    for mode in (1, 2, 3):
        yield sync_pb2.SessionStart(
            protocol_version=1,
            replica_id="61616161-6161-6161-6161-616161616161",
            mode=mode,  # type: ignore[arg-type]  # any number
            cursor=_cursor(),
            uploading=mode == 1,
            accepts_confirmations=True,
            downloads=[
                Download().to_message("Note"),
                sync_pb2.EntityDownload(entity="Task", mode=2, where=(attribute("title") == "a").to_message()),  # type: ignore[arg-type]
            ],
            bound_user_id="ann",
            timeline="first",
            checkpoint=b"sealed",
            former_identities=[
                sync_pb2.FormerIdentity(
                    replica_id="62626262-6262-6262-6262-626262626262", last_seq=9, settled_seq=7, settled_nonce=77
                )
            ],
            old_bases=sync_pb2.OldBases(through_seq=9, checkpoint=b"sealed"),
        ).SerializeToString()


def _requests() -> Iterable[bytes]:
    yield object_pb2.GetObjectRequest(entity="Task", id="a").SerializeToString()
    yield object_pb2.ListObjectsRequest(
        entity="Task", page_size=3, where=(attribute("title") == "a").to_message()
    ).SerializeToString()
    yield failure_pb2.ListFailuresRequest(page_size=2, entity="Task", reasons=[1], statuses=[1]).SerializeToString()  # type: ignore[list-item]
    for failure in SCENE.failures():
        yield failure_pb2.GetFailureRequest(id=failure.id).SerializeToString()


def _file_requests() -> Iterable[bytes]:
    content = file_pb2.FileContent(sha256=PHOTO.sha256, size=PHOTO.size)
    yield file_pb2.StatFilesRequest(contents=[content, content]).SerializeToString()
    yield file_pb2.UploadFileRequest(start=file_pb2.UploadFileStart(content=content, offset=0)).SerializeToString()
    yield file_pb2.DownloadFileRequest(
        sha256=PHOTO.sha256, object=sync_pb2.ObjectKey(entity="Task", id="a"), offset=1, length=2
    ).SerializeToString()


_JWKS = (
    b'{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"a","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"},'
    b'{"kty":"RSA","n":"sXchAw","e":"AQAB","use":"sig","alg":"RS256"},{"kty":"EC","crv":"P-256","x":"AA","y":"AA"}]}'
)

TARGETS: Final[dict[str, Target]] = {
    "values": Target(values, _values),
    "patches": Target(patches, _patches),
    "operations": Target(operations, _operations),
    "uploads": Target(
        uploads, lambda: [splice_pb2.OperationBatchSplice(operations=_operations()).SerializeToString()]
    ),
    "constraint_messages": Target(
        constraint_messages, lambda: [one.to_message().SerializeToString() for one in _constraints()]
    ),
    "constraint_texts": Target(
        constraint_texts,
        lambda: [*(str(one).encode() for one in _constraints()), literal(ATTRIBUTES).encode(), b"all(not `a` in [])"],
    ),
    "schema_json": Target(schema_json, lambda: [one.to_json().encode() for one in _schemas()]),
    "schema_toml": Target(schema_toml, lambda: [format_toml(one._parts()).encode() for one in _schemas()]),
    "schema_messages": Target(schema_messages, lambda: [one.to_message().SerializeToString() for one in _schemas()]),
    "cursors": Target(cursors, lambda: [_cursor(), _cursor(5)]),
    "resume_tokens": Target(resume_tokens, _resume_tokens),
    "page_tokens": Target(
        page_tokens, lambda: [PageTokens(SCENE.store, "ListFailures").token(b"a", TENANT).encode(), b"a", bytes(16)]
    ),
    "session_starts": Target(session_starts, _starts),
    "requests": Target(requests, _requests),
    "file_requests": Target(file_requests, _file_requests),
    "file_references": Target(file_references, lambda: [encode({"photo": PHOTO.to_value(), "n": 1})]),
    "log_entries": Target(log_entries, _operations),
    "replica_records": Target(
        replica_records,
        lambda: [
            b"\0" * 9 + encode(ATTRIBUTES),
            b"\0\0\0\0Task\0a",
            b"\x01" + bytes(8),
            _publication._PublishingEnd(b"cu", 3, b"cp", Plans(), track_seen=True, rebases=False).pack(),
        ],
    ),
    "store_records": Target(
        store_records,
        lambda: [
            store._OBJECT.pack(1, 1, REPLICA_A, 0) + encode(ATTRIBUTES),
            store._pack_settled(Settled(1, 0, False, REPLICA_A, True)),
            store._packed(ReplicaState(3, "ann", 9, 77, ((1, 3), (5, 9)))),
            store._pack_change(
                Change(
                    7, ("Task", "a"), OperationKind.UPDATE, b"\x80", b"\x92\x80\x90", 3, REPLICA_A, 1, False, "ann", 0
                )
            ),
        ],
    ),
    "server_messages": Target(server_messages, message_seeds),
    "failure_records": Target(failure_records, _failure_records),
    "error_details": Target(error_details, _statuses),
    "tokens": Target(
        tokens,
        lambda: [
            jwt.encode({"sub": "ann", "exp": 2**40, "roles": ["a"], "tenant": "t"}, SECRET, "HS256").encode(),
            b'{"sub": "ann", "exp": 4000000000, "roles": "a b", "tenant": "t", "n": 1e400}',
            b"Bearer abc",
        ],
    ),
    "key_sets": Target(key_sets, lambda: [_JWKS]),
    "token_files": Target(
        token_files,
        lambda: [
            b'{"tokens": [{"token": "a", "user_id": "ann", "roles": ["r"], "claims": {"a": [1]}}]}',
            b'[[tokens]]\ntoken = "a"\nuser_id = "ann"\nclaims = {a = 2024-01-01T00:00:00Z}\n',
        ],
    ),
    "command_lines": Target(
        command_lines,
        lambda: [
            b"localhost:8080",
            b"[::1]:1",
            b"Task=where title == 'a'",
            b"Task/a",
            b"title=[1, 12.50d]",
            b"2026-01-31T12:00:00+01:00",
            b"nothing_clear",
            b"a == 1 and claim.b != 2",
        ],
    ),
}
