"""
What the server adds to the command `tidelog`.

`serve`, the commands of `failures` that call a server, `backup`, `restore`, and `verify` of a server's data.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import operator
import os
import signal
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer

try:
    import resource
except ImportError:  # not on this system
    resource = None  # type: ignore[assignment]

from tidelog._finding import Finding
from tidelog._logging import get_logger
from tidelog.cli import CommandFailed, ExitCode, checked_address, printable
from tidelog.verify_command import add_verifier
from tidelog_server import (
    AddressUnavailable,
    Application,
    Authenticator,
    CertificateAuthenticator,
    ContentStore,
    JwtAuthenticator,
    ObjectStoreContents,
    SchemaContradicted,
    Server,
    ServerLimits,
    ServerTls,
    StaticTokens,
    backup_commands,
    failure_commands,
    verify_store,
)
from tidelog_server._errors import StoreUnavailable
from tidelog_server._files import FILE_GRACE_DEFAULT
from tidelog_server._jwt import LEEWAY_SECONDS_DEFAULT
from tidelog_server._retention import (
    FAILURE_RETENTION_DEFAULT,
    HISTORY_RETENTION_DEFAULT,
    REPLICA_RETENTION_DEFAULT,
)
from tidelog_server._stores import is_database

LIMITS_DEFAULT: Final = ServerLimits()
# Besides one for each session: the store's, those of libraries, and connections that are on their way in or out.
OTHER_FILES: Final = 256

LOG_LEVELS: Final = ("debug", "info", "warning", "error")

_log = get_logger("tidelog.server")

# What every record has; the rest came as `extra` of whoever logged it.
_RECORD_ATTRIBUTES: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "fields"}


def register(app: typer.Typer) -> None:
    """Add the server's commands."""
    app.command()(serve)
    failure_commands.register(app)
    backup_commands.register(app)
    add_verifier(app, "data", _verify, with_contents=lambda url: partial(_verify_with_contents, url))


def serve(
    application: Annotated[
        str | None,
        typer.Argument(
            metavar="MODULE:APP",
            help="The Application to serve; MODULE is also looked for in the current directory. "
            "None: an open one, which accepts every change.",
        ),
    ] = None,
    *,
    data: Annotated[
        str,
        typer.Option(
            metavar="DIR|URL",
            help="Directory of the data, made if it is not there, or the PostgreSQL database that they are in, "
            "which other servers may share: postgresql://USER@HOST/NAME.",
        ),
    ],
    listen: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", callback=checked_address, help="Where to listen. Port 0 takes a free one."),
    ],
    contents: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Keep the contents of files in an object store: s3://BUCKET/PREFIX, gs://... or az://... "
            "Without it: in the directory of the data. A database needs it.",
        ),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Who may call: a list of tokens, in TOML or JSON.")
    ] = None,
    jwks: Annotated[
        str | None,
        typer.Option(metavar="FILE|URL", help="Accept JSON Web Tokens that are signed with a key of this JWK set."),
    ] = None,
    jwt_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Accept JSON Web Tokens that are signed with this secret or public key."),
    ] = None,
    jwt_algorithm: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="How JSON Web Tokens are signed: RS256, ES256, HS256 ... Repeatable."),
    ] = None,
    jwt_audience: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Whom they must be for. Repeatable.")
    ] = None,
    jwt_issuer: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Whom they must be from. Repeatable.")
    ] = None,
    jwt_leeway: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help=f"By how much clocks may differ. Without it: {LEEWAY_SECONDS_DEFAULT:g} seconds.",
        ),
    ] = None,
    jwt_tenant: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The tenant of those that name none. Without it they are not accepted."),
    ] = None,
    auth: Annotated[
        str | None, typer.Option(metavar="MODULE:AUTHENTICATOR", help="The Authenticator that tells who is calling.")
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Speak TLS, with this certificate and its chain.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Private key of --tls-certificate.")] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Ask for client certificates that these authorities signed. "
            "Unless there are tokens, they say who is calling.",
        ),
    ] = None,
    migrate: Annotated[
        bool,
        typer.Option(
            "--migrate", help="Change stored objects that do not fit the schema, as the application declares it."
        ),
    ] = False,
    history_retention: Annotated[
        float,
        typer.Option(metavar="DAYS", min=0, help="How long changes and deletions are remembered."),
    ] = HISTORY_RETENTION_DEFAULT / timedelta(days=1),
    replica_retention: Annotated[
        float,
        typer.Option(metavar="DAYS", min=0, help="How long replicas are remembered that upload nothing."),
    ] = REPLICA_RETENTION_DEFAULT / timedelta(days=1),
    failure_retention: Annotated[
        float,
        typer.Option(metavar="DAYS", min=0, help="How long the payloads of settled failures are kept."),
    ] = FAILURE_RETENTION_DEFAULT / timedelta(days=1),
    file_grace: Annotated[
        float,
        typer.Option(metavar="DAYS", min=0, help="How long contents of files are kept that nothing refers to."),
    ] = FILE_GRACE_DEFAULT / timedelta(days=1),
    file_bytes_max: Annotated[
        int, typer.Option(metavar="BYTES", min=1, help="How large a file may be.")
    ] = LIMITS_DEFAULT.file_bytes,
    file_transfers_max: Annotated[
        int, typer.Option(metavar="COUNT", min=1, help="Files on their way at once, up or down.")
    ] = LIMITS_DEFAULT.file_transfers,
    file_transfers_per_user_max: Annotated[
        int | None, typer.Option(metavar="COUNT", min=1, help="The same, of one user. Without it: no other limit.")
    ] = LIMITS_DEFAULT.file_transfers_per_user,
    file_room_per_user: Annotated[
        int | None,
        typer.Option(metavar="BYTES", min=1, help="What a user may upload that none of his operations refers to yet."),
    ] = LIMITS_DEFAULT.file_room_per_user,
    sessions_max: Annotated[
        int, typer.Option(metavar="COUNT", min=1, help="Sessions open at once; others are told to come again later.")
    ] = LIMITS_DEFAULT.sessions,
    sessions_per_tenant_max: Annotated[
        int | None, typer.Option(metavar="COUNT", min=1, help="The same, of one tenant. Without it: no other limit.")
    ] = LIMITS_DEFAULT.sessions_per_tenant,
    sessions_per_user_max: Annotated[
        int | None, typer.Option(metavar="COUNT", min=1, help="The same, of one user. Without it: no other limit.")
    ] = LIMITS_DEFAULT.sessions_per_user,
    uploads_max: Annotated[
        int, typer.Option(metavar="COUNT", min=1, help="Sessions that upload at once.")
    ] = LIMITS_DEFAULT.uploads,
    session_idle_seconds: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=1, help="End sessions whose client neither sends nor reads for so long."),
    ] = LIMITS_DEFAULT.idle_seconds,
    log_level: Annotated[str, typer.Option(metavar="|".join(LOG_LEVELS), help="What is logged.")] = "info",
    log_json: Annotated[bool, typer.Option("--log-json", help="Log one JSON object a line.")] = False,
) -> None:
    """
    Serve an application to replicas, until SIGTERM or SIGINT.

    Prints "listening on HOST:PORT" to stdout once calls are answered; the log goes to stderr.
    """
    if log_level not in LOG_LEVELS:
        raise typer.BadParameter(f"choose from {', '.join(LOG_LEVELS)}", param_hint="--log-level")
    _set_up_logging(log_level, as_json=log_json)
    tls = _tls(tls_certificate, tls_key, tls_client_ca)
    jwt_options = {
        "algorithms": jwt_algorithm,
        "audience": jwt_audience,
        "issuer": jwt_issuer,
        "leeway_seconds": jwt_leeway,
        "default_tenant": jwt_tenant,
    }
    authenticator = _authenticator(tokens, jwks, jwt_key_file, jwt_options, auth)
    if authenticator is None and tls_client_ca is not None:
        authenticator = CertificateAuthenticator()
    if is_database(data) and contents is None:
        raise typer.BadParameter("with a database, say where the contents of files are kept", param_hint="--contents")
    served = _load_application(application) if application is not None else None
    object_store = _object_store(contents) if contents is not None else None

    limits = ServerLimits(
        sessions=sessions_max,
        sessions_per_tenant=sessions_per_tenant_max,
        sessions_per_user=sessions_per_user_max,
        uploads=uploads_max,
        idle_seconds=session_idle_seconds,
        file_transfers=file_transfers_max,
        file_transfers_per_user=file_transfers_per_user_max,
        file_bytes=file_bytes_max,
        file_room_per_user=file_room_per_user,
    )
    allow_open_files(limits.sessions + limits.file_transfers + OTHER_FILES)

    spare_the_collector()
    try:
        with (
            _stop_signals() as stopped,
            Server(
                served or Application(),
                store=data,
                listen=listen,
                authenticator=authenticator,
                tls=tls,
                migrate=migrate,
                history_retention=_days(history_retention, "--history-retention"),
                replica_retention=_days(replica_retention, "--replica-retention"),
                failure_retention=_days(failure_retention, "--failure-retention"),
                limits=limits,
                contents=object_store,
                file_grace=_days(file_grace, "--file-grace"),
            ) as server,
        ):
            if served is None:
                _log.warning("no application was given: every change is accepted")
            print(f"listening on {server.address}", flush=True)
            stopped.recv(1)
    except (AddressUnavailable, StoreUnavailable) as error:
        raise CommandFailed(str(error), ExitCode.UNAVAILABLE) from error
    except SchemaContradicted as error:
        # A line for each: programs and people read them one by one.
        for contradiction in error.contradictions:
            print(printable(contradiction), file=sys.stderr)
        raise CommandFailed(error.summary, ExitCode.STORAGE) from error


@contextmanager
def _stop_signals() -> Iterator[socket.socket]:
    """Give a socket on which something comes when the process is told to stop."""
    # A signal that comes right before a thread begins to wait does not wake it; what it writes to a socket does.
    stopped, stop = socket.socketpair()
    stop.setblocking(False)
    with stopped, stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(stop.fileno())
        try:
            yield stopped
        finally:
            signal.set_wakeup_fd(-1)


def _days(count: float, option: str) -> timedelta:
    try:
        return timedelta(days=count)
    except (OverflowError, ValueError) as error:
        raise typer.BadParameter(f"{count:g} days", param_hint=option) from error


def spare_the_collector() -> None:
    """
    Set up the garbage collector of a process that does nothing but serve.

    Under load it would look at all that is loaded, and at each batch many times over:
    that costs a fifth of the throughput, and batches leave no cycles behind.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def allow_open_files(count: int) -> None:
    """Let this process open so many files, as far as the system permits; say so if it does not."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < count:
        _log.warning("fewer files may be open than sessions need: raise the limit", allowed=allowed, needed=count)


def _verify(place: str, *, counts: Counter[str], contents: ContentStore | None = None) -> Iterator[Finding]:
    try:
        yield from verify_store(place, counts=counts, contents=contents)
    except StoreUnavailable as error:
        raise CommandFailed(str(error), ExitCode.UNAVAILABLE) from error


def _verify_with_contents(url: str, place: str, *, counts: Counter[str]) -> Iterator[Finding]:
    return _verify(place, counts=counts, contents=_object_store(url))


def _object_store(url: str) -> ObjectStoreContents:
    """Return the contents in an object store, which is there and may be used."""
    contents = ObjectStoreContents(url)
    contents.check()
    return contents


def _tls(certificate: Path | None, key: Path | None, client_ca: Path | None) -> ServerTls | None:
    if certificate is not None and key is not None:
        return ServerTls(certificate=certificate, key=key, client_ca=client_ca)
    if certificate is not None or key is not None:
        raise typer.BadParameter("one needs the other", param_hint="--tls-certificate and --tls-key")
    if client_ca is not None:
        raise typer.BadParameter("it needs --tls-certificate and --tls-key", param_hint="--tls-client-ca")
    return None


def _authenticator(
    tokens: Path | None, jwks: str | None, jwt_key_file: Path | None, jwt_options: dict[str, Any], auth: str | None
) -> Authenticator | None:
    """Return who tells the callers apart, None if nobody is to."""
    ways = {"--tokens": tokens, "--jwks": jwks, "--jwt-key-file": jwt_key_file, "--auth": auth}
    chosen = [option for option, value in ways.items() if value is not None]
    if len(chosen) > 1:
        raise typer.BadParameter("give one of them", param_hint=" and ".join(chosen))
    given = {name: value for name, value in jwt_options.items() if value not in (None, [])}
    if jwks is None and jwt_key_file is None:
        if given:
            raise typer.BadParameter("they need --jwks or --jwt-key-file", param_hint="--jwt-...")
        if tokens is not None:
            return StaticTokens.load(tokens)
        return _load_authenticator(auth) if auth is not None else None
    if "algorithms" not in given:
        raise typer.BadParameter("say how tokens are signed", param_hint="--jwt-algorithm")
    if jwt_key_file is None:
        return JwtAuthenticator(jwks=jwks, **given)
    try:
        key = jwt_key_file.read_bytes().strip()
    except OSError as error:
        raise typer.BadParameter(f"{jwt_key_file}: {error.strerror}", param_hint="--jwt-key-file") from error
    return JwtAuthenticator(key=key, **given)


def _load_application(name: str) -> Application:
    """Import the application that MODULE:APP names."""
    found = _load(name, "MODULE:APP")
    if not isinstance(found, Application):
        raise CommandFailed(
            f"{name} is a {type(found).__name__}: expected a tidelog_server.Application", ExitCode.USAGE
        )
    return found


def _load_authenticator(name: str) -> Authenticator:
    """Import the authenticator that MODULE:AUTHENTICATOR names."""
    found = _load(name, "MODULE:AUTHENTICATOR")
    if isinstance(found, type) or not isinstance(found, Authenticator):
        raise CommandFailed(
            f"{name} is a {type(found).__name__}: expected an object with a method authenticate", ExitCode.USAGE
        )
    return found


def _load(name: str, form: str) -> Any:
    """Import what MODULE:NAME names."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise CommandFailed(f"expected {form}, got {name!r}", ExitCode.USAGE)
    # The installed command does not look in the current directory by itself.
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - a path for sys.path is text
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}"
        raise CommandFailed(f"cannot import {module_name!r}: {what}{_place(error)}", ExitCode.USAGE) from error
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError:
        raise CommandFailed(f"module {module_name!r} has no {attribute!r}", ExitCode.USAGE) from None


def _place(error: BaseException) -> str:
    """Say in which line an import failed, unless it failed because there is nothing to be imported."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return "" if "importlib" in frame.filename else f" ({frame.filename}, line {frame.lineno})"


class _PlainFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s%(fields)s")

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        record.fields = "".join(f" {name}={value!r}" for name, value in fields.items())
        return super().format(record)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        data: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        data.update(_fields(record))
        if record.exc_info:
            data["exception"] = self.formatException(record.exc_info)
        return json.dumps(data, default=str)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """Return what was logged beside the message."""
    return {name: value for name, value in vars(record).items() if name not in _RECORD_ATTRIBUTES}


def _set_up_logging(level: str, *, as_json: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if as_json else _PlainFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
