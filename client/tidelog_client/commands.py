"""What the replica adds to the command `tidelog`: everything that works on a replica directory."""

from __future__ import annotations

import enum
import functools
import json
import math
import operator
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from datetime import UTC
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, NoReturn
from uuid import uuid4

import typer

from tidelog import (
    Constraint,
    Download,
    DownloadMode,
    InvalidConstraint,
    ObjectNotFound,
    SynchronizationFailure,
    attribute,
    parse_constraint,
)
from tidelog._failure import operation_as_data, operation_in_short
from tidelog._values import as_json
from tidelog.cli import (
    TABLE_ROWS_MAX,
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
    checked_address,
    given_tls,
    given_token,
    print_json,
    print_table,
    shared_group,
)
from tidelog.verify_command import add_verifier
from tidelog_client import FileDownload, LoggedOperation, Object, Phase, Progress, Replica, Report
from tidelog_client._report import OnProgress
from tidelog_client._verification import verify_replica

ReplicaOption = Annotated[
    Path,
    typer.Option("--replica", envvar="TIDELOG_REPLICA", metavar="DIR", help="The replica's directory."),
]
EntityArgument = Annotated[str, typer.Argument(metavar="ENTITY", help="Type of the object.")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Id of the object.")]
AttributeArgument = Annotated[str, typer.Argument(metavar="ATTRIBUTE", help="The attribute that is the file.")]
OptionalServerOption = Annotated[
    str | None,
    typer.Option(
        "--server",
        envvar="TIDELOG_SERVER",
        metavar="HOST:PORT",
        callback=checked_address,
        help="The server, for what is not here.",
    ),
]
WhereOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CONSTRAINT|NAME=JSON",
        help="Only objects that it holds for, such as 'n >= 3 and not exists(due)'. NAME=JSON: the attribute "
        "equals the value, in type too; what is no JSON is text; null: it has none. Repeat it to ask for several.",
    ),
]

_MODES_WITHOUT_CONSTRAINT: Final = frozenset(mode.value for mode in DownloadMode) - {DownloadMode.WHERE.value}

# What stands before the sign has nothing of a constraint in it; `==` is one's operator.
_NAME_AND_JSON = re.compile(r"""([^\s"`()<>!=]+)=(?!=)(.*)""", re.DOTALL)

_OPERATION_COLUMNS = (
    Column("SEQ", live_width=6),
    Column("STATUS", live_width=8),
    Column("KIND", live_width=6),
    Column("ENTITY", live_width=8),
    Column("ID", live_width=36),
    Column("CHANGE", fit="shorten"),
)
_FAILURE_COLUMNS = (
    Column("REASON"),
    Column("KIND"),
    Column("ENTITY"),
    Column("ID"),
    Column("MESSAGE", fit="fold"),
)
_SKIPPED_COLUMNS = (Column("SKIPPED"), Column("ENTITY"), Column("ID"), Column("MESSAGE", fit="fold"))
_OBJECT_COLUMNS = (Column("ATTRIBUTE"), Column("VALUE", fit="fold"))


class SyncMode(enum.StrEnum):
    """What `tidelog sync` covers when nothing is selected."""

    ALL = "all"
    UNSYNCHRONIZED = "unsynchronized"


def register(app: typer.Typer) -> None:
    """Add the replica's commands."""
    for command in (sync, log, pending, get, query, count, history, attach, save_file):
        app.command()(command)
    shared_group(app, "failures").callback(invoke_without_command=True)(failures)
    add_verifier(app, "replica", verify_replica, _set_aside)


def sync(
    *,
    replica: ReplicaOption,
    server: ServerOption,
    mode: Annotated[
        SyncMode | None,
        typer.Option(
            help="all: upload what is pending, download what changed. "
            "unsynchronized: upload what is pending, download only what that changed. "
            "Without this option and --select: all.",
        ),
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(metavar="ENTITY/ID", help="Synchronize this object only. Repeat it to select several."),
    ] = None,
    download: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENTITY=MODE|CONSTRAINT",
            help="How much of an entity the replica wants when everything is synchronized: all, nothing_clear, "
            "nothing_preserve, never, or the objects that match. Repeat it for several entities; "
            "give the same each time.",
        ),
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENTITY=MODE[:BYTES]",
            help="Which contents of files come: eager (all, or up to so many bytes), lazy (when they are saved) or "
            "never. Repeat it for several entities; give the same each time.",
        ),
    ] = None,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", min=0, help="When to give up.")] = None,
    create: Annotated[bool, typer.Option("--create", help="Make the replica if it is not there.")] = False,
    token_file: TokenFileOption = None,
    tls: TlsOption = False,
    tls_ca: TlsCaOption = None,
    tls_certificate: TlsCertificateOption = None,
    tls_key: TlsKeyOption = None,
    accept_foreign_server: Annotated[
        bool, typer.Option("--accept-foreign-server", help="Let the replica become one of another server.")
    ] = False,
    accept_mass_removal: Annotated[
        bool,
        typer.Option("--accept-mass-removal", help="Remove most of an entity although the server does not say why."),
    ] = False,
    json_: JsonOption = False,
) -> None:
    """
    Synchronize a replica with its server and print the report.

    Exit code 1: it is done, but the server refused operations; see `tidelog failures`.
    """
    if mode is not None and select:
        raise typer.BadParameter("give --mode or --select, not both", param_hint="--select")
    if (accept_foreign_server or accept_mass_removal) and (select or mode is SyncMode.UNSYNCHRONIZED):
        raise typer.BadParameter("consent is given when all is synchronized", param_hint="--accept-...")
    if timeout is not None and not math.isfinite(timeout):
        raise typer.BadParameter("expected a number of seconds", param_hint="--timeout")
    keys = [_key(one) for one in select or ()]
    downloads = dict(_download(one) for one in download or ())
    file_wishes = dict(_file_wish(one) for one in files or ())
    token = given_token(token_file)
    tls_given = given_tls(tls=tls, ca=tls_ca, certificate=tls_certificate, key=tls_key)
    if not create and not _is_replica(replica):
        raise CommandFailed(f"there is no replica in {replica}: --create makes one", ExitCode.STORAGE)
    with Replica(
        replica, server=server, token=token, tls=tls_given or False, download=downloads, files=file_wishes
    ) as opened:
        with _progress_bar() as on_progress:
            if keys:
                report = opened.synchronize_selected(keys, timeout=timeout, on_progress=on_progress)
            elif mode is SyncMode.UNSYNCHRONIZED:
                report = opened.synchronize_unsynchronized(timeout=timeout, on_progress=on_progress)
            else:
                report = opened.synchronize_all(
                    timeout=timeout,
                    on_progress=on_progress,
                    accept_foreign_server=accept_foreign_server,
                    accept_mass_removal=accept_mass_removal,
                )
        # Still open: the report reads large failures from the replica.
        if json_:
            print_json(_report_as_data(report))
        else:
            _print_report(report)
    if report.rejected:
        raise typer.Exit(ExitCode.REJECTED)


def log(
    replica: ReplicaOption,
    after: Annotated[int, typer.Option(metavar="SEQ", min=0, help="Begin behind this position.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for new operations.")] = False,
    json_: JsonOption = False,
) -> None:
    """Show the operation log, and what became of each operation."""
    with _opened(replica) as opened:
        found = opened.tail(after=after) if follow else opened.log(after=after)
        _print_operations(found, json_=json_, live=follow)


def pending(replica: ReplicaOption, json_: JsonOption = False) -> None:
    """Show the operations that the server has not settled yet."""
    with _opened(replica) as opened:
        _print_operations(opened.pending(), json_=json_)


def history(replica: ReplicaOption, entity: EntityArgument, id: IdArgument, json_: JsonOption = False) -> None:
    """Show this replica's operations on one object."""
    with _opened(replica) as opened:
        _print_operations(opened.history(entity, id), json_=json_)


def failures(
    context: typer.Context,
    replica: Annotated[
        Path | None,
        typer.Option("--replica", envvar="TIDELOG_REPLICA", metavar="DIR", help="The replica's directory."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """
    Show the operations of a replica that the server refused, and why.

    The commands below work off those that a server has recorded.
    """
    if context.invoked_subcommand is not None:
        _refuse_options(context, "replica", "json_")
        return
    if replica is None:
        raise typer.BadParameter("name a replica, or one of the commands", param_hint="--replica")
    with _opened(replica) as opened:
        if json_:
            for failure in opened.failures():
                print_json(_failure_as_data(failure))
        else:
            print_table(_FAILURE_COLUMNS, map(_failure_row, opened.failures()))


def get(replica: ReplicaOption, entity: EntityArgument, id: IdArgument, json_: JsonOption = False) -> None:
    """
    Show one object.

    Exit code 1: there is none.
    """
    with _opened(replica) as opened:
        found = opened.get(entity, id)
        if found is None:
            raise ObjectNotFound(entity=entity, id=id)
        data = _object_as_data(found)
    if json_:
        print_json(data)
    else:
        print_table(_OBJECT_COLUMNS, ((name, _text(value)) for name, value in data["attributes"].items()))


def query(
    entity: EntityArgument,
    *,
    replica: ReplicaOption,
    where: WhereOption = None,
    order_by: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|-NAME", help="Order by an attribute; with - descending. Repeatable."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=0, metavar="N", help="Show so many at the most.")] = None,
    json_: JsonOption = False,
) -> None:
    """Show the objects of an entity."""
    with _opened(replica) as opened:
        found = _objects_as_data(opened.query(entity, _constraint(where), order_by, limit))
        if json_:
            for data in found:
                print_json(data)
        else:
            _print_objects(found)


def count(
    replica: ReplicaOption, entity: EntityArgument, where: WhereOption = None, json_: JsonOption = False
) -> None:
    """Count the objects of an entity."""
    with _opened(replica) as opened:
        number = opened.count(entity, _constraint(where))
    if json_:
        print_json({"entity": entity, "count": number})
    else:
        print(number)


def attach(
    entity: EntityArgument,
    id: IdArgument,
    attribute: AttributeArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file.")],
    *,
    replica: ReplicaOption,
    name: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What it is called. Without it: as FILE is.")
    ] = None,
    media_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="What it holds, such as image/jpeg. Without it: by its name.")
    ] = None,
) -> None:
    """
    Let an attribute of an object be a file. It goes to the server with the next synchronization.

    Exit code 1: there is no such object.
    """
    with _opened(replica) as opened:
        opened.attach(entity, id, attribute, file, name=name, media_type=media_type)


def save_file(
    entity: EntityArgument,
    id: IdArgument,
    attribute: AttributeArgument,
    target: Annotated[Path, typer.Argument(metavar="FILE", help="Where to. A file that is there is replaced.")],
    *,
    replica: ReplicaOption,
    server: OptionalServerOption = None,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", min=0, help="When to give up.")] = None,
    token_file: TokenFileOption = None,
    tls: TlsOption = False,
    tls_ca: TlsCaOption = None,
    tls_certificate: TlsCertificateOption = None,
    tls_key: TlsKeyOption = None,
) -> None:
    """
    Save the content of a file of an object. One that is not here is fetched from the server.

    Exit code 1: there is no such object.
    """
    token = given_token(token_file)
    tls_given = given_tls(tls=tls, ca=tls_ca, certificate=tls_certificate, key=tls_key)
    with (
        _opened(replica, server=server, token=token, tls=tls_given or False) as opened,
        opened.open_file(entity, id, attribute, timeout=timeout) as content,
        _replacing(target) as file,
    ):
        shutil.copyfileobj(content, file)


@contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of another one once it is whole; what is no regular file is written to."""
    if target.exists() and not target.is_file():
        with target.open("wb") as file:
            yield file
        return
    path = target.resolve()
    draft = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        with draft.open("xb") as file:
            yield file
        if path.exists():
            shutil.copymode(path, draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _opened(path: Path, **options: Any) -> Replica:
    """Open a replica that is there: no command makes one by accident, where a path is mistyped, say."""
    if not _is_replica(path):
        raise CommandFailed(f"there is no replica in {path}", ExitCode.STORAGE)
    return Replica(path, **options)


def _refuse_options(context: typer.Context, *names: str) -> None:
    """Refuse options that stand before a command to which they say nothing."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.rstrip('_')}"
            raise typer.BadParameter(f"{context.invoked_subcommand} does not take it here", param_hint=option)


def _is_replica(path: Path) -> bool:
    return (path / "data.mdb").is_file()


@contextmanager
def _progress_bar() -> Iterator[OnProgress | None]:
    """Show a bar for the present phase on stderr if a person looks at it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description:>8}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[amount]}"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None, amount="")

        def show(now: Progress) -> None:
            amounts = ["?" if one is None else _amount(one, now.phase) for one in (now.done, now.total)]
            bars.update(
                task, description=now.phase.value, completed=now.done, total=now.total, amount="/".join(amounts)
            )

        yield show


def _amount(number: int, phase: Phase) -> str:
    """Return an amount of a phase for people: bytes of files in megabytes."""
    return f"{number / 1e6:.1f} MB" if phase is Phase.FILES else str(number)


def _file_wish(text: str) -> tuple[str, FileDownload]:
    """Read ENTITY=MODE or ENTITY=MODE:BYTES."""
    entity, _, wish = text.partition("=")
    mode, colon, bytes_max = wish.partition(":")
    try:
        return entity, FileDownload(mode, int(bytes_max) if colon else None)
    except ValueError as error:  # InvalidValue is one
        raise typer.BadParameter(
            f"expected ENTITY=MODE[:BYTES], got {text!r}: {error}", param_hint="--files"
        ) from error


def _key(text: str) -> tuple[str, str]:
    entity, slash, id_ = text.partition("/")
    if not slash:
        raise typer.BadParameter(f"expected ENTITY/ID, got {text!r}", param_hint="--select")
    return entity, id_


def _download(text: str) -> tuple[str, Download]:
    """Read ENTITY=MODE or ENTITY=CONSTRAINT."""
    entity, sign, wish = text.partition("=")
    if not sign:
        raise typer.BadParameter(f"expected ENTITY=MODE or ENTITY=CONSTRAINT, got {text!r}", param_hint="--download")
    try:
        if wish in _MODES_WITHOUT_CONSTRAINT:
            return entity, Download(DownloadMode(wish))
        return entity, Download(DownloadMode.WHERE, parse_constraint(wish))
    except InvalidConstraint as error:
        raise typer.BadParameter(
            f"{wish!r} is no mode, and no constraint: {error}", param_hint="--download"
        ) from error


def _constraint(where: Iterable[str] | None) -> Constraint | None:
    """Read conditions, all of which must hold."""
    conditions = [_condition(text) for text in where or ()]
    return functools.reduce(operator.and_, conditions) if conditions else None


def _condition(text: str) -> Constraint:
    """Read NAME=JSON or a constraint."""
    pair = _NAME_AND_JSON.fullmatch(text)
    if pair is None:
        return _parsed(text)
    name, value_text = pair.groups()
    try:
        value = json.loads(value_text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        value = value_text
    # Nothing compares with null, so that it can stand for an attribute that is missing.
    return ~attribute(name).exists() if value is None else attribute(name) == value


def _parsed(text: str) -> Constraint:
    try:
        constraint = parse_constraint(text)
    except InvalidConstraint as error:
        raise typer.BadParameter(str(error), param_hint="--where") from error
    if claims := constraint.claims():
        raise typer.BadParameter(
            f"give the value itself in place of claim.{min(claims)}: a replica has nobody's claims",
            param_hint="--where",
        )
    return constraint


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is a word: JSON has no such number")


def _set_aside(path: Path) -> dict[int | str, Path]:
    with _opened(path) as replica:
        done = replica.set_aside_damaged()
    found: dict[int | str, Path] = dict(done.files.items())
    return found | {f"content {sha256.hex()}": file for sha256, file in done.contents.items()}


def _print_operations(found: Iterable[LoggedOperation], *, json_: bool, live: bool = False) -> None:
    if json_:
        for logged in found:
            print_json(_logged_as_data(logged))
            if live:
                sys.stdout.flush()
    else:
        print_table(_OPERATION_COLUMNS, map(_operation_row, found), live=live)


def _print_objects(found: Iterator[dict[str, Any]]) -> None:
    """Print a table with a column for each attribute; a long one in portions, for they may have others."""
    while portion := list(islice(found, TABLE_ROWS_MAX)):
        names = list(dict.fromkeys(name for data in portion for name in data["attributes"]))
        print_table(
            [Column("ID"), *(Column(name, fit="shorten") for name in names)],
            ([data["id"], *_cells(data["attributes"], names)] for data in portion),
        )


def _cells(attributes: dict[str, Any], names: list[str]) -> Iterator[str]:
    return (_text(attributes[name]) if name in attributes else "" for name in names)


def _print_report(report: Report) -> None:
    print(
        f"applied {report.applied}, rejected {report.rejected}, downloaded {report.downloaded}, "
        f"confirmed {report.confirmed}, removed {report.removed} ({report.sent_bytes} bytes sent, "
        f"{report.received_bytes} received, {report.upload_seconds + report.download_seconds:.2f} s)"
    )
    if report.files_uploaded or report.files_downloaded:
        print(
            f"files: uploaded {report.files_uploaded}, downloaded {report.files_downloaded} "
            f"({report.file_bytes_sent} bytes sent, {report.file_bytes_received} received)"
        )
    if report.former_replica_id:
        print(f"the replica was {report.former_replica_id} until now: it is a copy, or was away for too long")
    if report.server_restored or report.reoffered:
        print(
            "the server was put back from a backup, or is another one: "
            f"operations that it had lost and settled anew: {report.reoffered}"
        )
    print_table(_FAILURE_COLUMNS, map(_failure_row, report.failures))
    print_table(_SKIPPED_COLUMNS, ((one.reason.value, one.entity, one.id, one.message) for one in report.skipped))
    print_table((Column("ALSO SYNCHRONIZED"), Column("ID")), report.added)


def _operation_row(logged: LoggedOperation) -> tuple[str, ...]:
    operation = logged.operation
    change = operation_in_short(operation)
    return str(operation.seq), logged.status, operation.kind.name.lower(), operation.entity, operation.id, change


def _failure_row(failure: SynchronizationFailure) -> tuple[str, ...]:
    kind = failure.operation.kind.name.lower() if failure.operation is not None else "?"
    return failure.reason.value, kind, failure.entity, failure.object_id, failure.message


def _text(value: Any) -> str:
    return value if isinstance(value, str) else as_json(value)


def _object_as_data(found: Object) -> dict[str, Any]:
    return {"entity": found.entity, "id": found.id, "attributes": found.to_dict()}


def _objects_as_data(found: Iterable[Object]) -> Iterator[dict[str, Any]]:
    for one in found:
        with suppress(ObjectNotFound):  # a synchronization in another process has just removed it
            yield _object_as_data(one)


def _logged_as_data(logged: LoggedOperation) -> dict[str, Any]:
    data = {**operation_as_data(logged.operation), "status": logged.status}
    if logged.version:
        data["version"] = logged.version
    if logged.failure_id:
        data["failure_id"] = logged.failure_id
    return data


def _failure_as_data(failure: SynchronizationFailure) -> dict[str, Any]:
    return {
        "id": failure.id,
        "reason": failure.reason.value,
        "message": failure.message,
        "entity": failure.entity,
        "object_id": failure.object_id,
        "attributes": failure.attributes,
        "operation": None if failure.operation is None else operation_as_data(failure.operation),
        "group_operations": [operation_as_data(one) for one in failure.group_operations],
        "replica_id": failure.replica_id,
        "version": failure.version,
        "time": None if failure.time is None else failure.time.replace(tzinfo=UTC),
    }


def _report_as_data(report: Report) -> dict[str, Any]:
    data = {field.name: getattr(report, field.name) for field in fields(report) if not field.name.startswith("_")}
    data["failures"] = [_failure_as_data(one) for one in report.failures]
    data["skipped"] = [asdict(one) for one in report.skipped]
    data["added"] = [{"entity": entity, "id": id_} for entity, id_ in report.added]
    return data
