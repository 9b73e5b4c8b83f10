"""The server: a gRPC endpoint over an application and a store, run in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tidelog._address import check_address, host_of, is_loopback
from tidelog._channel import PATIENT_OPTIONS
from tidelog._clock import Clock, system_time_us
from tidelog._errors import InvalidValue, ResourceClosed, StorageError
from tidelog._logging import get_logger
from tidelog._values import check_id
from tidelog.v1 import failure_pb2, file_pb2, object_pb2, schema_pb2, sync_pb2
from tidelog_server._admission import ServerLimits
from tidelog_server._adoption import adopt_schema
from tidelog_server._application import Application
from tidelog_server._authentication import Authenticator, CertificateAuthenticator
from tidelog_server._callers import Callers
from tidelog_server._calls import note_makers
from tidelog_server._content_store import (
    CONTENTS_DIRECTORY,
    CONTENTS_ELSEWHERE,
    CONTENTS_NOTE,
    ContentStore,
    DirectoryContents,
)
from tidelog_server._deadline import is_within
from tidelog_server._errors import AddressUnavailable
from tidelog_server._files import FILE_GRACE_DEFAULT, Files
from tidelog_server._lmdb_backup import backup_store
from tidelog_server._lmdb_store import LmdbStore
from tidelog_server._principal import DEFAULT_TENANT, Principal
from tidelog_server._retention import (
    FAILURE_RETENTION_DEFAULT,
    HISTORY_RETENTION_DEFAULT,
    REPLICA_RETENTION_DEFAULT,
    Collected,
    Periods,
    Retention,
)
from tidelog_server._services import Load, Services
from tidelog_server._store import Store
from tidelog_server._stores import open_store
from tidelog_server._tenant import Tenant
from tidelog_server._tls import ServerTls

STOP_GRACE_SECONDS: Final = 2.0

_SERVICE_NAMES: Final = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (sync_pb2, "SyncService"),
        (failure_pb2, "FailureService"),
        (object_pb2, "ObjectService"),
        (schema_pb2, "SchemaService"),
        (file_pb2, "FileService"),
    )
)

_OPTIONS: Final = (
    *PATIENT_OPTIONS,
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # Devices that have synchronized keep their connection: without an end the open files run out.
    ("grpc.max_connection_idle_ms", 300_000),
    # gRPC cannot end a call whose client reads nothing; it can end the connection. A session that it cuts is resumed.
    ("grpc.max_connection_age_ms", 7_200_000),
    ("grpc.max_connection_age_grace_ms", 600_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)

_log = get_logger("tidelog.server")


class Server:
    """
    Serves an application to replicas.

    Use it as a context manager, or call `start` and `stop`.

    Args:
        application: The rules.
        store: A directory for an embedded store, the URL of a PostgreSQL database, which
            other servers may share ("postgresql://..."), or a store.
        listen: "host:port"; port 0 takes a free one, see `address`.
        authenticator: Tells who is calling. None: nobody is asked, and everybody is the same
            user "anonymous" of the tenant "default". Health checks and reflection, which
            show no data, are answered without credentials in any case.
        tls: How to speak TLS. None: not at all.
        migrate: Change stored objects that do not fit the application's schema, by its
            renames, defaults and migrations.
        history_retention: How long changes, deletions and what became of operations are
            remembered. A replica that was away for longer gets everything anew.
        replica_retention: After what time without an upload a replica is retired: it
            cannot upload any more under its id. Not less than *history_retention*.
        failure_retention: How long the payloads of settled failures are kept.
        limits: How many are served at once. None: as many as `ServerLimits()` says.
        contents: Keeps the contents of files. None: the directory `files` in that of the embedded store.
        file_grace: How long the content of a file is kept that nothing refers to, or not yet.
        clock: Returns the time in microseconds since 1970: what is kept, and for how long, goes by it, and nothing
            else. For tests, see `tidelog.testing.ManualClock`.

    Raises:
        InvalidValue: *listen* is no address, a file of *tls* is not what it should be,
            *authenticator* wants certificates that *tls* does not ask for, the
            retention periods do not fit each other, or nothing says where contents lie.
        ExtraMissing: At the start: *store* is in a database, and the extra is not installed.
        StoreInUse: At the start: another server has the embedded store open.
        StoreUnavailable: At the start: the database cannot be reached now.
        SchemaContradicted: At the start: what the store holds does not fit the application's schema.
        MigrationUnfinished: At the start: a migration was broken off, and this would not finish it.
        AddressUnavailable: At the start: cannot listen there.
    """

    def __init__(
        self,
        application: Application,
        *,
        store: str | Path | Store,
        listen: str = "127.0.0.1:0",
        authenticator: Authenticator | None = None,
        tls: ServerTls | None = None,
        migrate: bool = False,
        history_retention: timedelta = HISTORY_RETENTION_DEFAULT,
        replica_retention: timedelta = REPLICA_RETENTION_DEFAULT,
        failure_retention: timedelta = FAILURE_RETENTION_DEFAULT,
        limits: ServerLimits | None = None,
        contents: ContentStore | None = None,
        file_grace: timedelta = FILE_GRACE_DEFAULT,
        clock: Clock = system_time_us,
    ) -> None:
        asks_for_certificates = tls is not None and tls.client_ca is not None
        if isinstance(authenticator, CertificateAuthenticator) and not asks_for_certificates:
            raise InvalidValue("a CertificateAuthenticator needs client certificates: give tls with a client_ca")
        self._application = application
        self._store_given = store
        self._listen = check_address(listen)
        self._migrate = migrate
        self._periods = Periods(history_retention, replica_retention, failure_retention, file_grace)
        self._periods.check()
        self._authenticator = authenticator
        self._limits = limits or ServerLimits()
        self._contents_given = contents
        self._clock = clock
        self._credentials = tls.credentials() if tls is not None else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._grpc: grpc.aio.Server | None = None
        self._address = ""
        self._pid = os.getpid()

    @property
    def address(self) -> str:
        """Where the server listens, as "host:port"."""
        self._check_running()
        return self._address

    @property
    def load(self) -> Load:
        """What the server has to do now. Raises ResourceClosed if it is not running."""
        self._check_running()
        return self._services.load

    def start(self) -> Self:
        """Open the store and begin to serve. Returns once calls are answered."""
        given = self._store_given
        self._pid = os.getpid()
        self._store = open_store(given) if isinstance(given, str | Path) else given
        try:
            adopt_schema(self._application, self._store, migrate=self._migrate, time_us=self._clock())
            self._callers = Callers(self._authenticator)
            self._files = Files(
                self._application,
                self._store,
                self._contents_of(self._store),
                self._clock,
                bytes_max=self._limits.file_bytes,
                room_bytes=self._limits.file_room_per_user,
                grace=self._periods.files,
            )
            self._files.note_timeline()
            self._look_at_contents()
            self._services = Services(
                self._application, self._store, self._callers, self._limits, self._files, clock=self._clock
            )
            self._loop = asyncio.new_event_loop()
            note_makers(self._loop)
            self._thread = threading.Thread(target=self._loop.run_forever, name="tidelog-server", daemon=True)
            self._thread.start()
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
            self._retention = Retention(self._store, self._periods, self._clock, self._files)
            self._retention.start()
        except BaseException:
            self._end_loop()
            self._close_store()
            raise
        _log.info(
            "serving", address=self._address, epoch=self._store.identity.epoch, tls=self._credentials is not None
        )
        self._warn_of_open_doors()
        return self

    def stop(self, grace_seconds: float = STOP_GRACE_SECONDS) -> None:
        """Stop serving: sessions under way have *grace_seconds* to end. Does nothing if stopped already."""
        if self._loop is None or self._grpc is None or self._pid != os.getpid():
            return  # stopped already; or in a forked child, where there is nothing that could be stopped
        self._store.check_outside_of_jobs()
        try:
            self._services.stop()
            asyncio.run_coroutine_threadsafe(self._grpc.stop(grace_seconds), self._loop).result()
            self._retention.stop()
            self._callers.close()
            self._services.close()
            self._end_loop()
        finally:
            self._grpc = None
            self._address = ""
            self._close_store()
        _log.info("stopped")

    def tenant(self, name: str = DEFAULT_TENANT, *, principal: Principal | None = None) -> Tenant:
        """
        Return a tenant's data, for the service that runs this server to read and change.

        Args:
            name: The tenant.
            principal: On whose behalf, with whose rights. None: the system, which may do everything.

        Raises:
            ResourceClosed: The server is not running.
            InvalidValue: The name is none, or *principal* belongs to another tenant.
        """
        if not is_within():  # a hook comes to its end, whoever stops the server meanwhile
            self._check_running()
        check_id(name, "a tenant")
        if principal is not None and principal.tenant != name:
            raise InvalidValue(f"{principal.user_id!r} belongs to the tenant {principal.tenant!r}, not to {name!r}")
        return Tenant(self._application, self._store, name, principal, self._clock, self._files)

    def collect(self) -> Collected:
        """
        Forget now what is older than it is to be kept, which a running server does every hour.

        Returns once that is done, and how much it was. Nobody else is kept waiting.

        Raises:
            ResourceClosed: The server is not running, or is stopped meanwhile.
            StorageError: The store could not be written. What was not collected is collected later.
        """
        self._check_running()
        self._store.check_outside_of_jobs()
        return self._retention.collect()

    def backup(self, target: str | Path) -> None:
        """
        Copy the embedded store, as of one moment, into a new directory; the server goes on meanwhile.

        Raises:
            ResourceClosed: The server is not running.
            TargetExists: There is something of this name, or another backup makes it just now.
            DiskFull: There is no room for the copy.
            StorageError: It cannot be copied, or the store is another one, with its own means.
        """
        self._check_running()
        if not isinstance(self._store, LmdbStore):
            raise StorageError("only an embedded store is backed up by its server")
        backup_store(self._store.path, target)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    async def _start(self) -> None:
        server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers(self._services.handlers())
        checker = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checker, server)
        for name in ("", *_SERVICE_NAMES):
            await checker.set(name, health_pb2.HealthCheckResponse.SERVING)
        reflection.enable_server_reflection((*_SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        host, _, _port = self._listen.rpartition(":")
        try:
            port = (
                server.add_insecure_port(self._listen)
                if self._credentials is None
                else server.add_secure_port(self._listen, self._credentials)
            )
        except RuntimeError as error:
            raise AddressUnavailable(
                f"cannot listen on {self._listen}: in use, or no address of this machine?"
            ) from error
        if port == 0:
            raise AddressUnavailable(f"cannot listen on {self._listen!r}: expected host:port")
        await server.start()
        self._grpc = server
        self._address = f"{host}:{port}"

    def _check_running(self) -> None:
        if not self._address:
            raise ResourceClosed("the server is not running: call start() or use it in a with statement")

    def _warn_of_open_doors(self) -> None:
        local = is_loopback(host_of(self._listen))
        if self._authenticator is None:
            _log.warning("no authenticator was given: every caller is the user anonymous", address=self._address)
            if not local:
                _log.warning("the network can reach this server: whoever can, reads and changes everything")
        elif self._credentials is None and not local:
            _log.warning("tokens and data travel without TLS: whoever is on the way can read them")

    def _look_at_contents(self) -> None:
        """Warn if contents of files are out of reach. Everything else is served."""
        try:
            self._files.place.look()
        except StorageError as error:
            _log.error("files can be neither uploaded nor downloaded, nor are they collected", detail=str(error))

    def _end_loop(self) -> None:
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            # What is still under way ends here, not in the middle of the interpreter's own end.
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.wait(tasks))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
            self._loop = self._thread = None

    def _contents_of(self, store: Store) -> ContentStore:
        """Return where contents lie, and note in the store whether that is in its own directory."""
        place = CONTENTS_ELSEWHERE if self._contents_given is not None else b""
        if (noted := store.note(CONTENTS_NOTE)) != place:
            if store.tenants():
                _log.warning(
                    "contents of files are to lie in another place than before",
                    before=noted.decode() or CONTENTS_DIRECTORY,
                    now=place.decode() or CONTENTS_DIRECTORY,
                )
            store.set_note(CONTENTS_NOTE, place)
        if self._contents_given is not None:
            return self._contents_given
        if not isinstance(store, LmdbStore):
            raise InvalidValue("only an embedded store has a directory for the contents of files: give `contents`")
        return DirectoryContents(store.path / CONTENTS_DIRECTORY)

    def _close_store(self) -> None:
        if isinstance(self._store_given, str | Path):
            self._store.close()
