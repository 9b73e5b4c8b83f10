"""The commands `tidelog backup`, `tidelog restore` and `tidelog new-timeline`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tidelog._address import without_secrets
from tidelog.cli import Column, CommandFailed, ExitCode, JsonOption, print_json, print_table, printable
from tidelog_server._errors import BackupDamaged, StoreUnavailable
from tidelog_server._lmdb_backup import Restored, backup_store, restore_store
from tidelog_server._stores import begin_timeline, is_database


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(backup)
    app.command()(restore)
    app.command()(new_timeline)


def _directory(place: str) -> str:
    """Check an option that names a directory."""
    if is_database(place):
        raise typer.BadParameter("a database is backed up and put back by PostgreSQL's own tools, such as pg_dump")
    return place


def backup(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Directory to be made.")],
    *,
    data: Annotated[str, typer.Option(metavar="DIR", callback=_directory, help="Directory of the server's data.")],
) -> None:
    """
    Copy a server's data, as of one moment, into a new directory. The server may be running.

    The directory has its name once the copy is on disk and checked.
    """
    backup_store(data, target)
    print(f"backed up {data} to {target}")


def restore(
    backup: Annotated[Path, typer.Argument(metavar="BACKUP", help="Directory that `tidelog backup` made.")],
    *,
    data: Annotated[
        str, typer.Option(metavar="DIR", callback=_directory, help="Directory to be made, for a server to serve from.")
    ],
    move_aside: Annotated[
        bool, typer.Option("--move-aside", help="Give what is in DIR another name before. Nothing is deleted.")
    ] = False,
    accept_findings: Annotated[
        bool, typer.Option("--accept-findings", help="Restore although something is wrong in the backup.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Make a server's data from a backup, and begin a new timeline: replicas offer again what the backup lacks."""
    try:
        restored = restore_store(backup, data, move_aside=move_aside, accept_findings=accept_findings)
    except BackupDamaged as error:
        # A line for each: programs and people read them one by one.
        for finding in error.findings:
            print(printable(str(finding)), file=sys.stderr)
        raise CommandFailed(str(error), ExitCode.STORAGE) from error
    if restored.moved_to is not None and not json_:
        print(f"moved {data} to {restored.moved_to}")
    _tell(restored, f"restored {backup} to {data}", json_=json_)


def new_timeline(
    *,
    data: Annotated[
        str,
        typer.Option(
            metavar="DIR|URL", help="Directory of a server's data, or the PostgreSQL database with the data."
        ),
    ],
    json_: JsonOption = False,
) -> None:
    """
    Say that a server's data were put back from an older state, by other means than `tidelog restore`.

    A new timeline begins: replicas offer again what the data lack.
    """
    try:
        begun = begin_timeline(data)
    except StoreUnavailable as error:
        raise CommandFailed(str(error), ExitCode.UNAVAILABLE) from error
    _tell(begun, f"began a timeline in {without_secrets(data)}", json_=json_)


def _tell(restored: Restored, what: str, *, json_: bool) -> None:
    """Print what has become of the data."""
    if json_:
        moved_to = None if restored.moved_to is None else str(restored.moved_to)
        print_json({**asdict(restored), "moved_to": moved_to})
        return
    print(what)
    print(f"epoch {restored.epoch}")
    print(f"timeline {restored.timeline}, before it {restored.former_timeline}")
    print_table((Column("TENANT"), Column("VERSION")), ((name, str(one)) for name, one in restored.versions.items()))
