"""
The command `tidelog`.

Here is what all commands have in common: how they are found, how they print, and what
their exit codes mean. The commands themselves come from the parts that are installed,
each through an entry point of the group `tidelog.commands`: a function that takes the
typer application and adds to it. So this package knows neither replica nor server.

A command raises a `TidelogError`, or `CommandFailed` where there is none that fits;
`main` turns either into one line on stderr and an exit code.
"""

from __future__ import annotations

import enum
import io
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points, version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup
from typer.main import get_command

from tidelog._address import check_address
from tidelog._errors import (
    FileUnavailable,
    InvalidValue,
    NotConfigured,
    ObjectNotFound,
    ServerUnavailable,
    StorageError,
    SynchronizationError,
    SynchronizationInProgress,
    TidelogError,
)
from tidelog._values import as_json

if TYPE_CHECKING:
    from tidelog._channel import ClientTls

COMMANDS_GROUP: Final = "tidelog.commands"
TABLE_ROWS_MAX: Final = 500
PIPE_WIDTH_COLUMNS: Final = 2_000


class ExitCode(enum.IntEnum):
    """What a script can trust. docs/cli.md explains each."""

    DONE = 0
    REJECTED = 1
    USAGE = 2
    UNAVAILABLE = 3
    IN_PROGRESS = 4
    STORAGE = 5
    REFUSED = 6
    DEFECT = 70
    INTERRUPTED = 130
    PIPE_CLOSED = 141


_EPILOG: Final = (
    "Exit codes: 0 done; 1 done, but operations were refused (sync, failures retry), or there is no such object "
    "(get) or failure; "
    "2 wrong usage; 3 the server, its database, or the content of a file, is unavailable, or the address to serve at "
    "is taken: try again; "
    "4 another synchronization of the replica is running: try again; 5 storage problem; "
    "6 the server refuses for another reason."
)

# The first class that fits counts: put the special before the general.
_EXIT_CODES: Final[tuple[tuple[type[Exception], ExitCode], ...]] = (
    (ObjectNotFound, ExitCode.REJECTED),
    (NotConfigured, ExitCode.USAGE),
    (ServerUnavailable, ExitCode.UNAVAILABLE),
    (FileUnavailable, ExitCode.UNAVAILABLE),
    (SynchronizationInProgress, ExitCode.IN_PROGRESS),
    (SynchronizationError, ExitCode.REFUSED),
    (StorageError, ExitCode.STORAGE),
    (TidelogError, ExitCode.USAGE),
    (OSError, ExitCode.STORAGE),
)


def checked_address(value: str | None) -> str | None:
    """Check an option that names an address. The callback of such options."""
    try:
        return None if value is None else check_address(value)
    except InvalidValue as error:
        raise typer.BadParameter(str(error)) from error


TOKEN_VARIABLE: Final = "TIDELOG_TOKEN"  # noqa: S105 - a name

# What every command takes that calls a server: who is calling, and whom to trust.
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help=f"File with the token that says who is calling. Without it: the variable {TOKEN_VARIABLE}, if it is set.",
    ),
]
TlsOption = Annotated[bool, typer.Option("--tls", help="Speak TLS; trust whom the system trusts.")]
TlsCaOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Speak TLS; trust the authorities whose certificates are in this file."),
]
TlsCertificateOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Speak TLS; show the server this certificate.")
]
TlsKeyOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Private key of --tls-certificate.")]


ServerOption = Annotated[
    str,
    typer.Option(
        "--server",
        envvar="TIDELOG_SERVER",
        metavar="HOST:PORT",
        callback=checked_address,
        help="The server.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]


class Column(NamedTuple):
    """
    A column of a table.

    Attributes:
        name: Its header.
        fit: What happens in a terminal that is too narrow: "keep" the cells whole,
            "shorten" them, or "fold" them into several lines.
        live_width: The least width in characters where rows are printed one by one.
    """

    name: str
    fit: Literal["keep", "shorten", "fold"] = "keep"
    live_width: int = 0


class CommandFailed(Exception):
    """
    Ends a command with a message and an exit code.

    Args:
        message: What happened, in a sentence for people.
        exit_code: What it means for a script.
    """

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def main() -> int:
    """Run the command line and return the exit code."""
    # gRPC writes to stderr on its own account what we report as an error.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        return get_command(build_app()).main(prog_name="tidelog", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        return ExitCode.INTERRUPTED
    except Exception as error:  # noqa: BLE001 - nobody else would tell the user, and not in one line
        exit_code, message = explained(error)
        print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
        return exit_code


def build_app() -> typer.Typer:
    """Return the typer application with the commands of all installed parts."""
    app = typer.Typer(cls=_Group, rich_markup_mode=None, epilog=_EPILOG)
    app.callback(invoke_without_command=True)(_root)
    for entry_point in sorted(entry_points(group=COMMANDS_GROUP), key=lambda one: one.name):
        entry_point.load()(app)
    return app


def shared_group(app: typer.Typer, name: str) -> typer.Typer:
    """Return the group of commands of this name: parts that do not know each other add to the same one."""
    for known in app.registered_groups:
        if known.name == name and known.typer_instance is not None:
            return known.typer_instance
    made = typer.Typer(rich_markup_mode=None)
    app.add_typer(made, name=name)
    return made


def printable(text: str) -> str:
    """Return *text* with what a terminal would not print escaped: what others wrote must not steer it."""
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode() for one in text
    )


def print_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object on a line of its own."""
    print(as_json(data))


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]], *, live: bool = False) -> None:
    """
    Print rows under a header; nothing at all if there are none.

    Rows are taken and printed in portions, so that there may be any number of them.
    A table is fitted to a terminal; a pipe gets up to 2,000 characters a line.

    Args:
        columns: The columns.
        rows: The cells of each row.
        live: Print each row when it comes.
    """
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH_COLUMNS, highlight=False)
    remaining = iter(rows)
    header = True
    while portion := list(islice(remaining, 1 if live else TABLE_ROWS_MAX)):
        table = Table(box=None, pad_edge=False, show_header=header, header_style="bold")
        for column in columns:
            table.add_column(
                Text(printable(column.name)),
                min_width=column.live_width if live else None,
                no_wrap=column.fit == "keep",
            )
        for row in portion:
            table.add_row(*map(_cell, columns, row))
        with console.capture() as captured:
            console.print(table)
        for line in captured.get().splitlines():
            print(line.rstrip())
        sys.stdout.flush()
        header = False


def given_token(token_file: Path | None) -> str | None:
    """Return the token that the user gave, or None."""
    if token_file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        return token_file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise typer.BadParameter(f"{token_file}: {error.strerror}", param_hint="--token-file") from error


def given_tls(*, tls: bool, ca: Path | None, certificate: Path | None, key: Path | None) -> ClientTls | None:
    """Return how to speak TLS as the options say, or None for not at all."""
    from tidelog._channel import ClientTls

    if (certificate is None) != (key is None):
        raise typer.BadParameter("one needs the other", param_hint="--tls-certificate and --tls-key")
    if not tls and ca is None and certificate is None:
        return None
    return ClientTls(ca=ca, certificate=certificate, key=key)


def _cell(column: Column, cell: str) -> Text:
    # Not markup: what others wrote may look like it.
    fold = column.fit == "fold"
    return Text(printable(cell), no_wrap=not fold, overflow="fold" if fold else "ellipsis")


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            # `tidelog log | head`: the reader has seen enough. Python would complain once more at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(ExitCode.PIPE_CLOSED) from None


def _print_version(value: bool) -> None:
    if value:
        print(f"tidelog {version('tidelog')}")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Work on a replica, or serve one: offline-first data that synchronizes without losing a change."""
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(ExitCode.USAGE)


def explained(error: Exception) -> tuple[int, str]:
    """Return the exit code and the message for what ended a command."""
    if isinstance(error, CommandFailed):
        return error.exit_code, str(error)
    # Wrong usage, as typer sees it. The class has moved between typer's versions, the method has not.
    format_message = getattr(error, "format_message", None)
    if format_message is not None:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "tidelog"
        return ExitCode.USAGE, f"{format_message().rstrip('.')}; see {path} --help"
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    for kind, exit_code in _EXIT_CODES:
        if isinstance(error, kind):
            return exit_code, message
    return ExitCode.DEFECT, f"a defect in tidelog, please report it: {type(error).__name__}: {message}"
