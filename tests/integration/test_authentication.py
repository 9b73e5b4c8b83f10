"""
Who is calling, over a real connection: tenants that do not see each other, tokens that expire, TLS.

Every RPC is tried without a token and with another tenant's. The RPCs come from the service
descriptors, so a new one without a case here fails.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import pkgutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import jwt
import pytest
import trustme
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from tests.builders import contents, delete, quick_folder, update

import tidelog.v1
from tidelog import (
    PermissionRefused,
    Schema,
    ServerUnavailable,
    SynchronizationError,
    TokenUnavailable,
    Unauthenticated,
)
from tidelog._limits import TOKEN_BYTES_MAX
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import failure_pb2, file_pb2, object_pb2, operation_pb2, schema_pb2, sync_pb2
from tidelog_client import ClientTls, Replica
from tidelog_client import _synchronizer as synchronizer
from tidelog_server import (
    Application,
    Authenticator,
    CertificateAuthenticator,
    Credentials,
    DirectoryContents,
    HookContext,
    HookObject,
    JwtAuthenticator,
    LmdbStore,
    Principal,
    Reject,
    Server,
    ServerTls,
    StaticTokens,
)

# One user with one set of roles in two tenants: nothing but the tenant can keep the two apart.
ACME, BOLT = "acme-token", "bolt-token"
ROLES: Final = frozenset({"clerk", "operator"})
TOKENS: Final = StaticTokens({ACME: Principal("ann", "acme", ROLES), BOLT: Principal("ann", "bolt", ROLES)})

SECRET: Final = "the recipe of acme"

_PACKAGES: Final = [
    importlib.import_module(f"tidelog.v1.{module.name}")
    for module in pkgutil.iter_modules(tidelog.v1.__path__)
    if module.name.endswith("_pb2")
]
METHODS: Final = {
    f"/{service.full_name}/{method.name}": method
    for package in _PACKAGES
    for service in package.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


@dataclass
class Answer:
    """How a call ended: its responses and the status."""

    responses: Sequence[bytes]
    code: grpc.StatusCode
    details: str = ""
    reason: str = ""

    def shows(self, text: str) -> bool:
        """Tell whether any byte of the answer holds a text."""
        return text.encode() in b"\0".join([*self.responses, self.details.encode()])


def call(address: str, method: str, messages: Sequence[bytes], token: str | None) -> Answer:
    """Call any method with raw bytes."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    responses: list[bytes] = []
    streams_in = METHODS[method].client_streaming
    with grpc.insecure_channel(address) as channel:
        open_call: Any = {
            (False, False): channel.unary_unary,
            (False, True): channel.unary_stream,
            (True, False): channel.stream_unary,
            (True, True): channel.stream_stream,
        }[streams_in, METHODS[method].server_streaming](method)
        try:
            answered = open_call(iter(messages) if streams_in else messages[0], timeout=10, metadata=metadata)
            responses.extend([answered] if isinstance(answered, bytes) else answered)
        except grpc.RpcError as error:
            return Answer(responses, error.code(), error.details() or "", reason_of(error))
    return Answer(responses, grpc.StatusCode.OK)


def reason_of(error: grpc.RpcError) -> str:
    """Return the reason that a failed call gives."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # an RpcError of a call is a Call
    info = ErrorInfo()
    return info.reason if status is not None and status.details[0].Unpack(info) else ""


@contextmanager
def serving(
    folder: Path, authenticator: Authenticator | None, application: Application | None = None, **options: Any
) -> Iterator[Server]:
    """Run a server for as long as the block lasts."""
    server = Server(application or Application(), store=folder / "server", authenticator=authenticator, **options)
    server.start()
    try:
        yield server
    finally:
        server.stop(grace_seconds=0)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder for a server and its replicas."""
    with quick_folder() as path:
        yield path


# --- tenants ------------------------------------------------------------------------


@dataclass
class Tenants:
    """A server where one tenant, acme, has an object and a failure, made by one replica."""

    store: LmdbStore
    address: str
    replica_id: str
    cursor: bytes
    failure_id: str

    def state(self) -> tuple[Any, ...]:
        """Return all that the server keeps of acme."""
        replica = bytes.fromhex(self.replica_id.replace("-", ""))
        acme = DirectoryContents(self.store.path / "files").tenant_path("acme")
        with self.store.read("acme") as reader:
            return (
                reader.head(),
                [reader.latest_objects(entity, 0, 1_000, 1 << 20) for entity in reader.entities()],
                reader.changes(0, 1_000, 1 << 20),
                reader.failures(b"", 1_000, 1 << 20),
                reader.replica(replica),
                reader.settled(replica, range(10)),
                reader.index_range(b"", b"", 1_000),
                {path: path.read_bytes() for path in acme.rglob("*") if path.is_file()},
            )


@pytest.fixture
def tenants(folder: Path) -> Iterator[Tenants]:
    """Give a server with the data of acme."""
    application = Application(schema=Schema(open=True))

    @application.before_commit("Task")
    def refuses(task: HookObject, context: HookContext) -> None:
        if task["bad"]:
            raise Reject("bad")

    with ExitStack() as stack:
        store = LmdbStore(folder / "server")
        stack.callback(store.close)
        server = stack.enter_context(Server(application, store=store, authenticator=TOKENS))
        with Replica(folder / "acme", server=server.address, token=ACME) as replica:
            for messages in (upload_of(PHOTO), upload_of(HALF)[:2]):  # one of them ends early
                call(server.address, UPLOAD_FILE, messages, ACME)
            replica.create("Task", {"title": SECRET, "photo": photo_of(PHOTO)}, "t1")
            replica.create("Task", {"title": SECRET, "bad": True}, "t2")
            assert replica.synchronize_all(timeout=10).rejected == 1
            (failure,) = replica.failures()
            session = call(
                server.address, SYNCHRONIZE, session_of(replica.replica_id), ACME
            )  # the replica keeps its cursor to itself
            last = sync_pb2.SynchronizeResponse.FromString(session.responses[-1])
            yield Tenants(store, server.address, replica.replica_id, last.complete.cursor, failure.id)


SYNCHRONIZE: Final = "/tidelog.v1.SyncService/Synchronize"
PAST: Final = {
    "update": update(3, "t1", {"title": "bolt was here"}),
    "delete": delete(4, "t1"),
}


PHOTO: Final = SECRET.encode() * 1000
HALF: Final = b"half of " + PHOTO
UPLOAD_FILE: Final = "/tidelog.v1.FileService/UploadFile"
DOWNLOAD_FILE: Final = "/tidelog.v1.FileService/DownloadFile"


def content_of(data: bytes) -> file_pb2.FileContent:
    """Name a content."""
    return file_pb2.FileContent(sha256=hashlib.sha256(data).digest(), size=len(data))


def photo_of(data: bytes) -> dict[str, Any]:
    """Refer to a content."""
    return {"name": "p", "size": len(data), "media_type": "text/plain", "sha256": hashlib.sha256(data).digest()}


def upload_of(data: bytes, offset: int = 0) -> list[bytes]:
    """Return the messages of an upload: its start, one half, the other half."""
    half = len(data) // 2
    start = file_pb2.UploadFileStart(content=content_of(data), offset=offset)
    messages = [file_pb2.UploadFileRequest(start=start)]
    messages += [file_pb2.UploadFileRequest(chunk=part) for part in (data[offset:half], data[half:]) if part]
    return [message.SerializeToString() for message in messages]


def downloads_photo(tenants: Tenants) -> list[list[bytes]]:
    """Downloads of acme's photo by way of acme's object."""
    key = sync_pb2.ObjectKey(entity="Task", id="t1")
    return [[file_pb2.DownloadFileRequest(sha256=content_of(PHOTO).sha256, object=key).SerializeToString()]]


def session_of(replica_id: str, *operations: bytes, **fields: Any) -> list[bytes]:
    """Return the messages of a session: its start, a batch, the end."""
    start = sync_pb2.SessionStart(
        protocol_version=1,
        replica_id=replica_id,
        mode=fields.pop("mode", sync_pb2.SYNCHRONIZE_MODE_ALL),
        uploading=bool(operations),
        **fields,
    )
    batch = splice_pb2.OperationBatchSplice(operations=operations)
    messages = [splice_pb2.SynchronizeRequestSplice(start=start.SerializeToString())]
    if operations:
        messages.append(splice_pb2.SynchronizeRequestSplice(batch=batch))
    messages.append(splice_pb2.SynchronizeRequestSplice(upload_complete=b""))
    return [message.SerializeToString() for message in messages]


def reads_everything(tenants: Tenants) -> list[list[bytes]]:
    """A session that asks for all there is."""
    return [session_of(tenants.replica_id)]


def synchronizes(tenants: Tenants) -> list[list[bytes]]:
    """Sessions as acme's replica, in every mode, with its cursor, that read, write and delete."""
    keys = sync_pb2.Selection(keys=[sync_pb2.ObjectKey(entity="Task", id="t1")])
    selected = session_of(tenants.replica_id, mode=sync_pb2.SYNCHRONIZE_MODE_SELECTED)
    selected.insert(1, splice_pb2.SynchronizeRequestSplice(selection=keys.SerializeToString()).SerializeToString())
    return [
        *reads_everything(tenants),
        session_of(tenants.replica_id, cursor=tenants.cursor),
        selected,
        session_of(tenants.replica_id, *PAST.values()),
        session_of(tenants.replica_id, *PAST.values(), mode=sync_pb2.SYNCHRONIZE_MODE_UNSYNCHRONIZED),
    ]


def uploads(tenants: Tenants) -> list[list[bytes]]:
    """Batches as acme's replica: what it sent itself, then changes of its object."""
    return [
        [
            splice_pb2.UploadOperationsRequestSplice(
                protocol_version=1, replica_id=tenants.replica_id, operations=operations
            ).SerializeToString()
        ]
        for operations in ([update(1, "t1", {"title": "bolt was here"})], list(PAST.values()))
    ]


def downloads(tenants: Tenants) -> list[list[bytes]]:
    """Downloads of everything, and from acme's cursor."""
    return [
        [sync_pb2.DownloadSnapshotsRequest(protocol_version=1, cursor=cursor).SerializeToString()]
        for cursor in (b"", tenants.cursor)
    ]


def one(message: Callable[[Tenants], Any]) -> Callable[[Tenants], list[list[bytes]]]:
    """Make a case of one unary call."""
    return lambda tenants: [[message(tenants).SerializeToString()]]


# For each RPC the calls by which one tenant might get at another's data.
CASES: Final[dict[str, Callable[[Tenants], list[list[bytes]]]]] = {
    SYNCHRONIZE: synchronizes,
    "/tidelog.v1.SyncService/UploadOperations": uploads,
    "/tidelog.v1.SyncService/DownloadSnapshots": downloads,
    "/tidelog.v1.FailureService/ListFailures": one(
        lambda tenants: failure_pb2.ListFailuresRequest(replica_id=tenants.replica_id)
    ),
    "/tidelog.v1.FailureService/GetFailure": one(lambda tenants: failure_pb2.GetFailureRequest(id=tenants.failure_id)),
    "/tidelog.v1.FailureService/RetryFailure": one(
        lambda tenants: failure_pb2.RetryFailureRequest(id=tenants.failure_id, force=True)
    ),
    "/tidelog.v1.FailureService/DismissFailure": one(
        lambda tenants: failure_pb2.DismissFailureRequest(id=tenants.failure_id)
    ),
    "/tidelog.v1.ObjectService/GetObject": one(lambda _: object_pb2.GetObjectRequest(entity="Task", id="t1")),
    "/tidelog.v1.ObjectService/ListObjects": one(lambda _: object_pb2.ListObjectsRequest(entity="Task")),
    "/tidelog.v1.FileService/StatFiles": one(
        lambda _: file_pb2.StatFilesRequest(contents=[content_of(PHOTO), content_of(HALF)])
    ),
    UPLOAD_FILE: lambda _: [upload_of(PHOTO), upload_of(HALF)],
    DOWNLOAD_FILE: downloads_photo,
    "/tidelog.v1.SchemaService/GetSchema": one(lambda _: schema_pb2.GetSchemaRequest()),
}

# What names one thing of acme's must say that there is none.
BY_NAME: Final = frozenset(
    (
        "/tidelog.v1.FailureService/GetFailure",
        "/tidelog.v1.FailureService/RetryFailure",
        "/tidelog.v1.FailureService/DismissFailure",
        "/tidelog.v1.ObjectService/GetObject",
        DOWNLOAD_FILE,
    )
)

# What shows acme's data to acme: so the test would see it if it were shown to others.
READS: Final = frozenset(
    (
        SYNCHRONIZE,
        "/tidelog.v1.SyncService/DownloadSnapshots",
        "/tidelog.v1.FailureService/ListFailures",
        "/tidelog.v1.FailureService/GetFailure",
        "/tidelog.v1.ObjectService/GetObject",
        "/tidelog.v1.ObjectService/ListObjects",
        DOWNLOAD_FILE,
    )
)


class TestTenants:
    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_do_not_see_or_touch_each_other(self, method: str, tenants: Tenants) -> None:
        """With another tenant's token no RPC shows anything of acme's or changes anything there."""
        assert method in CASES, f"{method} is new: say how one tenant might get at another's data by it"
        before = tenants.state()

        for messages in CASES[method](tenants):
            answer = call(tenants.address, method, messages, BOLT)

            assert not answer.shows(SECRET)
            assert not answer.shows("bolt was here")
            if method in BY_NAME:
                assert answer.code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED)
            else:
                assert answer.code is grpc.StatusCode.OK, answer.details
        assert tenants.state() == before

    @pytest.mark.parametrize("method", sorted(READS))
    def test_see_their_own(self, method: str, tenants: Tenants) -> None:
        """The calls that show nothing to others do show acme's data to acme."""
        calls = reads_everything(tenants) if method == SYNCHRONIZE else CASES[method](tenants)

        assert call(tenants.address, method, calls[0], ACME).shows(SECRET)

    def test_have_contents_of_their_own(self, tenants: Tenants) -> None:
        """What one tenant has uploaded, all of it or a part, is missing to another one, and is there to itself."""
        request = file_pb2.StatFilesRequest(contents=[content_of(PHOTO), content_of(HALF)]).SerializeToString()

        def stat(token: str) -> list[tuple[int, int]]:
            answer = call(tenants.address, "/tidelog.v1.FileService/StatFiles", [request], token)
            response = file_pb2.StatFilesResponse.FromString(answer.responses[0])
            return [(one.state, one.received_bytes) for one in response.statuses]

        assert stat(BOLT) == [(file_pb2.FILE_STATE_MISSING, 0)] * 2
        assert stat(ACME) == [(file_pb2.FILE_STATE_PRESENT, 0), (file_pb2.FILE_STATE_MISSING, len(HALF) // 2)]

    def test_settle_apart(self, tenants: Tenants) -> None:
        """What another tenant sends under acme's replica id is refused there, not answered with acme's outcomes."""
        answer = call(tenants.address, SYNCHRONIZE, session_of(tenants.replica_id, *PAST.values()), BOLT)

        messages = [sync_pb2.SynchronizeResponse.FromString(data) for data in answer.responses]
        assert messages[0].started.settled.newest_seq == 0
        results = [result for message in messages for result in message.batch_results.results]
        assert results[0].reason == operation_pb2.FAILURE_REASON_OBJECT_GONE

    def test_have_versions_of_their_own(self, tenants: Tenants) -> None:
        """The work of one tenant moves no counter of another's."""
        with tenants.store.read("bolt") as reader:
            assert reader.head().version == 0


class TestStrangers:
    @pytest.mark.parametrize("method", sorted(METHODS))
    @pytest.mark.parametrize("token", [None, "forged", "acme-toke", "acme-token1"])
    def test_get_no_answer(self, method: str, token: str | None, tenants: Tenants) -> None:
        """Without a token that is known every RPC is refused as unauthenticated, and nothing is changed."""
        before = tenants.state()

        for messages in CASES[method](tenants):
            answer = call(tenants.address, method, messages, token)

            assert (answer.code, answer.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
            assert not answer.responses
            assert token is None or token not in answer.details
        assert tenants.state() == before

    def test_may_ask_whether_the_server_is_well(self, tenants: Tenants) -> None:
        """Health and reflection, which show no data, need no token."""
        with grpc.insecure_channel(tenants.address) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=10).status == 1
            reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            (answer,) = reflection.ServerReflectionInfo(iter([request]), timeout=10)
            assert "tidelog.v1.SyncService" in {found.name for found in answer.list_services_response.service}

    def test_of_the_same_tenant_do_not_get_the_replica(self, folder: Path) -> None:
        """A replica id belongs to the user who used it first, in the tenant where that was."""
        tokens = StaticTokens({"ann": Principal("ann"), "bob": Principal("bob")})
        with serving(folder, tokens) as server:
            with Replica(folder / "a", server=server.address, token="ann") as replica:
                replica.create("Task", {})
                replica.synchronize_all(timeout=10)
            with (
                Replica(folder / "a", server=server.address, token="bob") as replica,
                pytest.raises(PermissionRefused, match="REPLICA_OWNED"),
            ):
                replica.synchronize_all(timeout=10)


# --- tokens -------------------------------------------------------------------------

KEY: Final = "a secret that has thirty-two bytes or more"


def signed(user: str = "ann", *, seconds: float = 60, key: str = KEY) -> str:
    """Sign a token that lives for so many seconds."""
    return jwt.encode({"sub": user, "tenant": "acme", "exp": time.time() + seconds}, key, "HS256")


@pytest.fixture
def jwt_server(folder: Path) -> Iterator[Server]:
    """Give a server that accepts signed tokens."""
    with serving(folder, JwtAuthenticator(key=KEY, algorithms="HS256", leeway_seconds=0)) as server:
        yield server


class Provider:
    """A token provider that goes through a list and then repeats its last."""

    def __init__(self, *tokens: str | Exception) -> None:
        self._tokens = list(tokens)
        self.asked_count = 0

    def __call__(self) -> str:
        """Return the next token, or raise."""
        token = self._tokens[min(self.asked_count, len(self._tokens) - 1)]
        self.asked_count += 1
        if isinstance(token, Exception):
            raise token
        return token


class TestTokens:
    @pytest.mark.parametrize(
        ("token", "why"),
        [
            (None, "without a token"),
            (signed(seconds=-60), "has expired"),
            (signed(key="not the secret, though it is as long"), "bad signature"),
            ("nonsense", "cannot be read"),
        ],
    )
    @pytest.mark.usefixtures("impatient")
    def test_that_are_refused_lose_nothing(
        self, token: str | None, why: str, jwt_server: Server, folder: Path
    ) -> None:
        """A bad token ends the synchronization at once; all stays pending, nothing fails, and a good one goes on."""
        with Replica(folder / "a", server=jwt_server.address, token=token) as replica:
            replica.create("Task", {"title": "Buy milk"}, "t1")
            with pytest.raises(Unauthenticated, match=why):  # after a first back-off it would be ServerUnavailable
                replica.synchronize_all()
            assert replica.pending_count() == 1
            assert not list(replica.failures())
            assert contents(replica) == {"t1": {"title": "Buy milk"}}
        with Replica(folder / "a", server=jwt_server.address, token=signed()) as replica:
            report = replica.synchronize_all(timeout=10)
            assert (report.applied, report.rejected, replica.pending_count()) == (1, 0, 0)

    def test_of_a_provider_are_asked_for_once_an_attempt(self, jwt_server: Server, folder: Path) -> None:
        """A good token is asked for once a synchronization."""
        provider = Provider(signed())
        with Replica(folder / "a", server=jwt_server.address, token=provider) as replica:
            assert provider.asked_count == 0
            replica.synchronize_all(timeout=10)
            assert provider.asked_count == 1
            replica.synchronize_all(timeout=10)
            assert provider.asked_count == 2

    def test_of_a_provider_are_asked_for_once_more(self, jwt_server: Server, folder: Path) -> None:
        """When the server refuses a token the provider is asked again, and the caller notices nothing."""
        provider = Provider(signed(seconds=-60), signed())
        with Replica(folder / "a", server=jwt_server.address, token=provider) as replica:
            replica.create("Task", {})
            assert replica.synchronize_all(timeout=10).applied == 1
            assert provider.asked_count == 2

    def test_of_a_provider_are_not_asked_for_for_ever(self, jwt_server: Server, folder: Path) -> None:
        """Two refusals in a row end the synchronization; what is pending stays, and the report says what was done."""
        provider = Provider(signed(seconds=-60))
        with Replica(folder / "a", server=jwt_server.address, token=provider) as replica:
            replica.create("Task", {})
            with pytest.raises(Unauthenticated, match="expired") as error:
                replica.synchronize_all(timeout=10)
            assert provider.asked_count == 2
            assert error.value.report.attempts == 2
            assert replica.pending_count() == 1

    def test_of_a_provider_that_fails(self, jwt_server: Server, folder: Path) -> None:
        """What a provider raises ends the synchronization with a typed error, and the next one may go well."""
        provider = Provider(OSError("no network"), signed())
        with Replica(folder / "a", server=jwt_server.address, token=provider) as replica:
            replica.create("Task", {})
            with pytest.raises(TokenUnavailable) as error:
                replica.synchronize_all(timeout=10)
            assert isinstance(error.value, SynchronizationError)
            assert isinstance(error.value.__cause__, OSError)
            assert replica.pending_count() == 1
            assert replica.synchronize_all(timeout=10).applied == 1

    def test_may_be_long(self, folder: Path) -> None:
        """A token at the limit arrives whole."""
        long = "x" * TOKEN_BYTES_MAX
        with (
            serving(folder, StaticTokens({long: Principal("ann")})) as server,
            Replica(folder / "a", server=server.address, token=long) as replica,
        ):
            for _ in range(20):
                replica.synchronize_all(timeout=10)

    @pytest.mark.usefixtures("impatient")
    def test_that_nobody_can_check_are_no_refusal(self, folder: Path) -> None:
        """While the authenticator fails the server is unavailable: nothing is refused, nothing is lost."""

        class Broken:
            down = True

            def authenticate(self, credentials: Credentials) -> Principal:
                if self.down:
                    raise ConnectionError("the directory is down")
                return Principal("ann")

        broken = Broken()
        with serving(folder, broken) as server, Replica(folder / "a", server=server.address) as replica:
            replica.create("Task", {})
            with pytest.raises(ServerUnavailable, match="cannot tell who is calling"):
                replica.synchronize_all()
            broken.down = False
            assert replica.synchronize_all(timeout=10).applied == 1

    def test_are_in_no_log(self, jwt_server: Server, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Whatever becomes of a token, neither it nor its signature is logged at any level, or in any error."""
        caplog.set_level(logging.DEBUG)
        tokens = [signed(), signed(seconds=-60), signed(key="not the secret, though it is as long"), "no-token-at-all"]
        told: list[str] = []
        for number, token in enumerate(tokens):
            for given in (token, lambda token=token: token):
                with Replica(folder / str(number), server=jwt_server.address, token=given) as replica:
                    replica.create("Task", {})
                    try:
                        told.append(str(replica.synchronize_all(timeout=10)))
                    except Unauthenticated as error:
                        told += [str(error), repr(error), str(error.__cause__), repr(error.report)]

        assert sum(record.getMessage() == "call refused" for record in caplog.records) == 9
        written = caplog.text + str([vars(record) for record in caplog.records]) + "".join(told)
        for token in tokens:
            assert token not in written
            assert token.rpartition(".")[2] not in written
        assert KEY not in written


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first back-off exceed any deadline, so that a call gives up at its first transient error."""
    monkeypatch.setattr(synchronizer, "BACKOFF_SECONDS_FIRST", 1_000)


# --- TLS ----------------------------------------------------------------------------


@dataclass
class Files:
    """Certificates on disk: an authority's, a server's, a client's, and those of an authority that nobody trusts."""

    ca: Path
    server: tuple[Path, Path]
    client: tuple[Path, Path]
    other_ca: Path
    other_client: tuple[Path, Path]


@pytest.fixture
def files(folder: Path) -> Files:
    """Give certificates."""
    ca, other = trustme.CA(), trustme.CA()

    def written(name: str, issued: trustme.LeafCert) -> tuple[Path, Path]:
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        issued.cert_chain_pems[0].write_to_path(certificate)
        issued.private_key_pem.write_to_path(key)
        return certificate, key

    ca.cert_pem.write_to_path(folder / "ca.pem")
    other.cert_pem.write_to_path(folder / "other.pem")
    subject = {"common_name": "ann", "organization_name": "acme", "organization_unit_name": "clerk"}
    return Files(
        folder / "ca.pem",
        written("server", ca.issue_cert("127.0.0.1", "tide.example")),
        written("client", ca.issue_cert("ann@acme.example", **subject)),  # type: ignore[arg-type]  # all are text
        folder / "other.pem",
        written("eve", other.issue_cert("eve@acme.example", **subject)),  # type: ignore[arg-type]
    )


def one_sync(folder: Path, server: Server, **options: Any) -> int:
    """Synchronize one new object; return how many operations were applied."""
    with Replica(folder / "replica", server=server.address, **options) as replica:
        replica.create("Task", {})
        try:
            return replica.synchronize_all().applied
        finally:
            assert not list(replica.failures())


class TestTls:
    def test_carries_tokens(self, files: Files, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A replica that trusts the server's authority synchronizes, with its token, and nobody is warned."""
        tls = ServerTls(certificate=files.server[0], key=files.server[1])
        with serving(folder, TOKENS, tls=tls) as server:
            assert one_sync(folder, server, token=ACME, tls=ClientTls(ca=files.ca)) == 1
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    def test_trusts_the_system(self, files: Files, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`tls=True` trusts whom the system trusts."""
        monkeypatch.setenv("SSL_CERT_FILE", str(files.ca))
        with serving(folder, TOKENS, tls=ServerTls(certificate=files.server[0], key=files.server[1])) as server:
            assert one_sync(folder, server, token=ACME, tls=True) == 1

    @pytest.mark.parametrize(
        ("tls", "why"),
        [
            (lambda files: ClientTls(ca=files.other_ca), "the server's certificate cannot be verified"),
            (lambda files: ClientTls(ca=files.ca, server_name="shop.example"), "certificate is for another name"),
        ],
    )
    @pytest.mark.usefixtures("impatient")
    def test_trusts_nobody_else(self, tls: Callable[[Files], ClientTls], why: str, files: Files, folder: Path) -> None:
        """A server that cannot prove who it is gets no token, and the error says so at once, not after retries."""
        asked = Provider(ACME)
        with serving(folder, TOKENS, tls=ServerTls(certificate=files.server[0], key=files.server[1])) as server:
            with pytest.raises(ServerUnavailable, match=why) as caught:
                one_sync(folder, server, token=asked, tls=tls(files))
            assert "could not be reached" not in str(caught.value)  # which is said instead of a back-off
            assert asked.asked_count == 1
            assert one_sync(folder, server, token=ACME, tls=ClientTls(ca=files.ca)) == 2

    def test_may_go_by_another_name(self, files: Files, folder: Path) -> None:
        """A server may be known by a name that is not the host of its address."""
        with serving(folder, TOKENS, tls=ServerTls(certificate=files.server[0], key=files.server[1])) as server:
            assert one_sync(folder, server, token=ACME, tls=ClientTls(ca=files.ca, server_name="tide.example")) == 1

    def test_is_missed_at_once(self, files: Files, folder: Path) -> None:
        """A server without TLS is told from one that is down."""
        with serving(folder, TOKENS) as server, pytest.raises(ServerUnavailable, match="does not speak TLS"):
            one_sync(folder, server, token=ACME, tls=ClientTls(ca=files.ca))

    @pytest.mark.usefixtures("impatient")
    def test_is_hinted_at(self, files: Files, folder: Path) -> None:
        """A server that hangs up on a replica without TLS may want it: the error says so."""
        tls = ServerTls(certificate=files.server[0], key=files.server[1])
        with (
            serving(folder, TOKENS, tls=tls) as server,
            pytest.raises(ServerUnavailable, match="does the server expect TLS"),
        ):
            one_sync(folder, server, token=ACME)


class TestMutualTls:
    @pytest.fixture
    def server(self, files: Files, folder: Path) -> Iterator[Server]:
        """Give a server that asks for client certificates and keeps who called."""
        tls = ServerTls(certificate=files.server[0], key=files.server[1], client_ca=files.ca)
        with serving(folder, CertificateAuthenticator(), self.application, tls=tls) as server:
            yield server

    @pytest.fixture(autouse=True)
    def _application(self) -> None:
        self.seen: list[Principal] = []
        self.application = Application()

        @self.application.before_commit("Task")
        def remembers(task: HookObject, context: HookContext) -> None:
            self.seen.append(context.principal)

    def test_names_the_caller(self, server: Server, files: Files, folder: Path) -> None:
        """The certificate says who is calling."""
        tls = ClientTls(ca=files.ca, certificate=files.client[0], key=files.client[1])

        assert one_sync(folder, server, tls=tls) == 1

        assert self.seen == [Principal("ann", "acme", frozenset({"clerk"}))]

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("which", ["none", "other"])
    def test_lets_nobody_else_in(self, which: str, server: Server, files: Files, folder: Path) -> None:
        """Without a certificate of the right authority nobody gets as far as a call; the error says what may lack."""
        certificate, key = files.other_client if which == "other" else (None, None)

        with pytest.raises(ServerUnavailable, match="client certificate"):
            one_sync(folder, server, tls=ClientTls(ca=files.ca, certificate=certificate, key=key))

        assert not self.seen
