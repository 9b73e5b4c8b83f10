"""
The command `tidelog verify`: looks for what is wrong in a server's data or in a replica.

The parts that are installed say how, by `add_verifier`. The work is done in a process of
its own: a file that was cut off or damaged can end the process that reads it, and then
that is what is found.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Final, Protocol

import typer

from tidelog._address import without_secrets
from tidelog._finding import Finding, FindingKind
from tidelog.cli import Column, CommandFailed, ExitCode, JsonOption, explained, print_json, print_table

_COLUMNS: Final = (
    Column("FINDING"),
    Column("TENANT"),
    Column("WHERE", fit="fold"),
    Column("EXPECTED", fit="fold"),
    Column("FOUND", fit="fold"),
)


class Verifier(Protocol):
    """Yields what is wrong in a directory, or a database, and counts what it looks at. A function of a module."""

    def __call__(self, place: str, /, *, counts: Counter[str]) -> Iterator[Finding]:
        """Look into one of them."""
        ...


# Takes what is damaged out of a directory; returns the files with what is left: of operations by their positions.
SetAside = Callable[[Path], Mapping[int | str, Path]]

# Returns a verifier that also looks at the contents of files which lie in an object store, by its URL.
WithContents = Callable[[str], Verifier]

_verifiers: dict[str, Verifier] = {}
_with_contents: dict[str, WithContents] = {}
_ways_out: dict[str, SetAside] = {}


def add_verifier(
    app: typer.Typer,
    option: str,
    verifier: Verifier,
    set_aside: SetAside | None = None,
    with_contents: WithContents | None = None,
) -> None:
    """Let `tidelog verify` look into what an option names, "data" or "replica", and set aside what is damaged."""
    _verifiers[option] = verifier
    if with_contents is not None:
        _with_contents[option] = with_contents
    if set_aside is not None:
        _ways_out[option] = set_aside
    if not any(command.callback is verify for command in app.registered_commands):
        app.command()(verify)


def verify(
    *,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|URL",
            help="Directory of a server's data, or a backup, or the PostgreSQL database with the data.",
        ),
    ] = None,
    contents: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The object store with the server's contents of files, if it is given one: they are looked at too.",
        ),
    ] = None,
    replica: Annotated[str | None, typer.Option(metavar="DIR", help="Directory of a replica.")] = None,
    set_aside: Annotated[
        bool,
        typer.Option(
            "--set-aside",
            help="Before, take operations that cannot be read out of the replica's log, into files. "
            "Pending ones become failures, so that the rest can be synchronized. "
            "Damaged contents of files go there too, and come again.",
        ),
    ] = False,
    json_: JsonOption = False,
) -> None:
    """
    Check that what a server or a replica keeps agrees with itself. Without --set-aside nothing is written.

    It may be in use meanwhile. Exit code 5: something is wrong; each thing is named.
    """
    chosen = {option: place for option, place in (("data", data), ("replica", replica)) if place is not None}
    if len(chosen) != 1:
        raise typer.BadParameter("give one of them", param_hint="--data and --replica")
    [(option, place)] = chosen.items()
    if option not in _verifiers:
        raise CommandFailed(f"the part of tidelog that --{option} needs is not installed", ExitCode.USAGE)
    if set_aside:
        if option not in _ways_out:
            raise typer.BadParameter("only operations of a replica can be set aside", param_hint="--set-aside")
        for what, file in _ways_out[option](Path(place)).items():
            if json_:
                print_json({"set_aside": what, "file": str(file)})
            else:
                print(f"set aside {f'operation {what}' if isinstance(what, int) else what}: {file}")
    verifier = _verifiers[option]
    if contents is not None:
        if option not in _with_contents:
            raise typer.BadParameter("only a server's contents lie in an object store", param_hint="--contents")
        verifier = _with_contents[option](contents)
    counts: Counter[str] = Counter()
    findings = _counted(_apart(verifier, place, counts), counts)
    if json_:
        for finding in findings:
            print_json(asdict(finding))
    else:
        print_table(_COLUMNS, ((str(one.kind), one.tenant, one.where, one.expected, one.found) for one in findings))
    count = counts.pop("findings", 0)
    if json_:
        print_json({"findings": count, "checked": dict(counts)})
    else:
        checked = ", ".join(f"{what} {number:,}" for what, number in counts.items())
        print(f"checked: {checked or 'nothing'}")
    if count:
        raise CommandFailed(f"{without_secrets(place)}: {count} finding{'s' if count > 1 else ''}", ExitCode.STORAGE)


def _counted(findings: Iterator[Finding], counts: Counter[str]) -> Iterator[Finding]:
    for finding in findings:
        counts["findings"] += 1
        yield finding


def _apart(verifier: Verifier, place: str, counts: Counter[str]) -> Iterator[Finding]:
    """Run a verifier in a process of its own; what ends that is a finding too."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(verifier, place, sender), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            match receiver.recv():
                case Finding() as finding:
                    yield finding
                case Counter() as counted:
                    counts.update(counted)
                    return
                case exit_code, message:
                    raise CommandFailed(message, ExitCode(exit_code))
    except EOFError:
        process.join()
        yield Finding(
            FindingKind.FILE_DAMAGED, without_secrets(place), "a file that can be read", _end_text(process.exitcode)
        )
    finally:
        process.kill()
        process.join()


def _send(verifier: Verifier, place: str, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the other process's to end both
    counts: Counter[str] = Counter()
    try:
        for finding in verifier(place, counts=counts):
            sender.send(finding)
    except Exception as error:  # noqa: BLE001 - the other process tells of it
        sender.send(explained(error))
    else:
        sender.send(counts)


def _end_text(exit_code: int | None) -> str:
    code = exit_code or 0
    what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"one whose reading ended the process with {what}"
