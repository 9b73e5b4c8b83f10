"""
The command `tidelog`, as users and scripts run it: a process of its own each time.

No run may leave a traceback; `run` looks.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest
import trustme
from typer.main import get_command

from tidelog.cli import ExitCode, build_app
from tidelog_client import Replica, commands

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "cli.md"
TIDELOG = shutil.which("tidelog", path=str(Path(sys.executable).parent)) or "tidelog"
RUN_TIMEOUT_SECONDS = 60

# For commands that end before they would call a server.
NO_SERVER = "127.0.0.1:1"

SIMULTANEOUS = (
    "Performing simultaneous synchronizations is not supported. "
    "Please try again after the current synchronization is completed."
)

UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

SHOP = """
from tidelog_server import Application, Reject

app = Application()
prices = {}

@app.before_commit("Task")
def needs_a_title(task, context):
    if not task["title"]:
        raise Reject("a task needs a title\\n\\x1b[31mred")
"""


def environment(**changes: str) -> dict[str, str]:
    """The environment of a user who has set nothing that matters here."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TIDELOG_", "COLUMNS"))}
    return {**kept, "PYTHONUNBUFFERED": "", **changes}


def run(*args: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `tidelog` to its end."""
    result = subprocess.run(
        [TIDELOG, *args],
        cwd=cwd,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=RUN_TIMEOUT_SECONDS,
        check=False,
    )
    assert "Traceback" not in result.stdout + result.stderr
    return result


def succeed(*args: str | Path, cwd: Path, **variables: str) -> str:
    """Run `tidelog`, which must succeed and have nothing to complain about; return what it prints."""
    result = run(*args, cwd=cwd, **variables)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def fail(*args: str | Path, cwd: Path, code: int, **variables: str) -> str:
    """Run `tidelog`, which must fail with this exit code; return the message of its one line on stderr."""
    result = run(*args, cwd=cwd, **variables)
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def read_json(output: str) -> list[Any]:
    """Parse one JSON object a line."""
    return [json.loads(line) for line in output.splitlines()]


@contextmanager
def started(*args: str | Path, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """Start `tidelog`; it is killed at the end if it still runs then."""
    with subprocess.Popen(
        [TIDELOG, *args],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_line(process: subprocess.Popen[str]) -> str:
    """Return the next line that a process prints; empty if it has ended."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


@contextmanager
def serving(*args: str | Path, cwd: Path, data: str = "server-data") -> Iterator[str]:
    """Run `tidelog serve` on a free port; give its address."""
    with started("serve", *args, "--data", data, "--listen", "127.0.0.1:0", cwd=cwd) as process:
        line = read_line(process)
        assert line.startswith("listening on 127.0.0.1:"), process.communicate()
        yield line.removeprefix("listening on ")
        process.terminate()
        _, log = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
        assert process.returncode == 0, log
        assert "Traceback" not in log


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an application, `shop:app`, and a replica, `device`, that was worked on offline."""
    (tmp_path / "shop.py").write_text(SHOP, encoding="utf-8")
    with Replica(tmp_path / "device") as replica:
        replica.create("Task", {"title": "Buy milk", "done": False, "price": 1.5}, id="milk")
        replica.create("Task", {"title": "Äpfel\x1b[2J", "done": False, "n": 1}, id="apples")
        replica.create("Task", {"title": ""}, id="blank")
        replica.update("Task", "milk", {"done": True}, unset=["price"])
    return tmp_path


@pytest.mark.parametrize("json_", [True, False])
def test_a_server_that_was_put_back(folder: Path, *, json_: bool) -> None:
    """What is refused when it is offered again is told, and is in the exit code; what is as before is counted."""
    with Replica(folder / "device") as replica:
        replica.create("Task", {"title": "theirs as well"}, id="same")
    with serving(cwd=folder) as address:
        run("sync", "--replica", "device", "--server", address, cwd=folder)
    with serving(cwd=folder, data="other") as address:
        with Replica(folder / "other-device", server=address) as other:
            other.create("Task", {"title": "first"}, id="same")
            other.synchronize_all()
        options = ("--accept-foreign-server", *(["--json"] if json_ else []))
        result = run("sync", "--replica", "device", "--server", address, *options, cwd=folder)

    assert result.returncode == ExitCode.REJECTED
    if json_:
        (report,) = read_json(result.stdout)
        assert not [name for name in report if name.startswith("_")]
        assert (report["server_restored"], report["reoffered"], report["former_replica_id"]) == (True, 5, "")
        assert (report["applied"], report["rejected"]) == (0, 1)
        assert [one["reason"] for one in report["failures"]] == ["SUPERSEDED"]
    else:
        assert result.stdout.startswith("applied 0, rejected 1, ")
        assert "operations that it had lost and settled anew: 5\n" in result.stdout
        assert "\nSUPERSEDED " in result.stdout


def test_synchronize_and_look(folder: Path) -> None:
    """A replica's work reaches another one, the refusal is reported, and every reading command shows it."""
    assert [one["seq"] for one in read_json(succeed("pending", "--replica", "device", "--json", cwd=folder))] == [
        1,
        2,
        3,
        4,
    ]

    with serving("shop:app", cwd=folder) as address:
        first = run("sync", "--replica", "device", "--server", address, "--json", cwd=folder)
        again = succeed("sync", "--replica", "device", "--server", address, "--json", cwd=folder)
        copy = succeed("sync", "--replica", "copy", "--create", "--server", address, "--json", cwd=folder)

    assert (first.returncode, first.stderr) == (ExitCode.REJECTED, "")
    (report,) = read_json(first.stdout)
    assert (report["applied"], report["rejected"]) == (3, 1)
    assert report["failures"][0]["reason"] == "HOOK_REJECTED"
    assert report["failures"][0]["attributes"] == {"title": ""}
    assert [(one["applied"], one["rejected"]) for one in read_json(again)] == [(0, 0)]
    assert [one["downloaded"] for one in read_json(copy)] == [2]

    assert succeed("pending", "--replica", "device", cwd=folder) == ""
    assert read_json(succeed("get", "Task", "milk", "--replica", "copy", "--json", cwd=folder)) == [
        {"entity": "Task", "id": "milk", "attributes": {"title": "Buy milk", "done": True}}
    ]
    (failure,) = read_json(succeed("failures", "--replica", "device", "--json", cwd=folder))
    assert failure == report["failures"][0]
    assert (failure["object_id"], failure["operation"]["seq"]) == ("blank", 3)
    logged = read_json(succeed("log", "--replica", "device", "--json", cwd=folder))
    assert [one["status"] for one in logged] == ["applied", "applied", "failed", "applied"]
    assert [one.get("version") for one in logged] == [1, 2, None, 3]
    assert logged[2]["failure_id"] == failure["id"]
    assert logged[3]["unset"] == ["price"]
    history = succeed("history", "Task", "milk", "--replica", "device", "--json", cwd=folder)
    assert [one["seq"] for one in read_json(history)] == [1, 4]
    tail = succeed("log", "--after", "3", "--replica", "device", "--json", cwd=folder)
    assert [one["seq"] for one in read_json(tail)] == [4]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["apples", "blank", "milk"]),
        (["--where", "done=false"], ["apples"]),
        (["--where", "title=Buy milk"], ["milk"]),
        (["--where", 'title="Buy milk"', "--where", "done=false"], []),
        (["--where", "done=null"], ["blank"]),
        (["--where", "n=1"], ["apples"]),
        (["--where", "n=1.0"], []),
        (["--where", "n=NaN"], []),
        (["--where", "n==1"], ["apples"]),
        (["--where", 'done == false or title contains "milk"'], ["apples", "milk"]),
        (["--where", "not exists(done)", "--where", 'title == ""'], ["blank"]),
        (["--where", "not exists(done)", "--where", "done=true"], []),
        (["--where", '`title` == "Buy milk"'], ["milk"]),
        (["--where", "title=milk == bread"], []),
        (["--order-by", "title"], ["blank", "milk", "apples"]),
        (["--order-by", "-title", "--limit", "2"], ["apples", "milk"]),
        (["--order-by", "done", "--order-by", "title"], ["blank", "apples", "milk"]),
    ],
)
def test_query(folder: Path, options: list[str], expected: list[str]) -> None:
    """A query filters, orders and limits."""
    output = succeed("query", "Task", "--replica", "device", "--json", *options, cwd=folder)

    assert [one["id"] for one in read_json(output)] == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("done", "expected one of == != < <= > >= in contains, at the end"),
        ("done == maybe", "at character 9: maybe"),
        ("not done=true", "at character 9: =true"),
        ("n >= 1 and done=true", "expected one of == != < <= > >= in contains, at character 16: =true"),
        ("(n == 1", "expected 'and', 'or' or ')', at the end"),
        ('title == "\x1b[2J\n', 'at character 10: "\\x1b[2J'),
        ("n == claim.level", "give the value itself in place of claim.level: a replica has nobody's claims"),
    ],
)
def test_query_that_makes_no_sense(folder: Path, where: str, message: str) -> None:
    """A condition that cannot be read is refused with what was expected, and the place."""
    for command in ("query", "count"):
        found = fail(command, "Task", "--replica", "device", "--where", where, cwd=folder, code=ExitCode.USAGE)
        assert message in found
        assert "--where" in found


def test_count(folder: Path) -> None:
    """A count takes the conditions of a query."""
    assert succeed("count", "Task", "--replica", "device", cwd=folder) == "3\n"
    counted = succeed("count", "Task", "--replica", "device", "--where", "done=true", "--json", cwd=folder)
    assert read_json(counted) == [{"entity": "Task", "count": 1}]


def test_modes_and_selection(folder: Path) -> None:
    """A selection uploads what it names, the mode unsynchronized the rest; a deleted object is skipped."""
    with Replica(folder / "device") as replica:
        replica.delete("Task", "blank")
        replica.create("Note", {"text": "a/b"}, id="a/b")

    def report(*options: str) -> Any:
        output = succeed("sync", "--replica", "device", "--server", address, "--json", *options, cwd=folder)
        return read_json(output)[0]

    with serving(cwd=folder) as address:
        selected = report("--select", "Task/blank", "--select", "Note/a/b")
        rest = report("--mode", "unsynchronized", "--timeout", "30")

    assert selected["applied"] == 1
    assert [(one["id"], one["reason"]) for one in selected["skipped"]] == [("blank", "DELETED")]
    assert rest["applied"] == 5


def test_how_much_is_downloaded(folder: Path) -> None:
    """--download takes a mode or a constraint; what is not wanted any more leaves the replica."""
    with serving(cwd=folder) as address:
        succeed("sync", "--replica", "device", "--server", address, cwd=folder)
        wanted = ("--download", "Task=done == true")
        succeed("sync", "--replica", "device", "--server", address, *wanted, cwd=folder)
        matching = succeed("count", "Task", "--replica", "device", cwd=folder)
        succeed("sync", "--replica", "device", "--server", address, "--download", "Task=all", cwd=folder)

    assert matching == succeed("count", "Task", "--replica", "device", "--where", "done=true", cwd=folder)
    assert int(succeed("count", "Task", "--replica", "device", cwd=folder)) > int(matching)


def test_environment_variables_stand_in_for_options(folder: Path) -> None:
    """TIDELOG_REPLICA and TIDELOG_SERVER are the defaults of --replica and --server."""
    with serving(cwd=folder) as address:
        succeed("sync", cwd=folder, TIDELOG_REPLICA="device", TIDELOG_SERVER=address)

    assert succeed("count", "Task", cwd=folder, TIDELOG_REPLICA="device") == "3\n"


def test_what_others_wrote_does_not_steer_the_terminal(folder: Path) -> None:
    """Control characters in values and in messages from the server are escaped, in tables as in JSON."""
    with serving("shop:app", cwd=folder) as address:
        report = run("sync", "--replica", "device", "--server", address, cwd=folder).stdout

    tables = [
        report,
        *(
            succeed(*args, "--replica", "device", cwd=folder)
            for args in (["query", "Task"], ["log"], ["failures"], ["get", "Task", "apples"])
        ),
    ]
    assert not any("\x1b" in table for table in tables)
    assert r"Äpfel\x1b[2J" in tables[1]
    assert r"a task needs a title\n\x1b[31mred" in tables[3]
    assert r"\u001b[2J" in succeed("log", "--replica", "device", "--json", cwd=folder)


def test_follow_shows_what_is_appended(folder: Path) -> None:
    """`tidelog log --follow` prints an operation when another program commits it, until Ctrl-C."""
    with started("log", "--follow", "--after", "3", "--replica", "device", "--json", cwd=folder) as process:
        assert json.loads(read_line(process))["seq"] == 4
        with Replica(folder / "device") as replica:
            replica.delete("Task", "milk")
        assert json.loads(read_line(process))["kind"] == "delete"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=RUN_TIMEOUT_SECONDS)

    assert (process.returncode, errors) == (ExitCode.INTERRUPTED, "")


def test_closed_pipe_ends_the_command_quietly(folder: Path) -> None:
    """`tidelog log | head` leaves neither a message nor an exit code that means something else."""
    for options in ([], ["--json"]):
        with started("log", "--replica", "device", *options, cwd=folder) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            errors = process.stderr.read()
            process.wait(RUN_TIMEOUT_SECONDS)
        assert (process.returncode, errors) == (ExitCode.PIPE_CLOSED, "")


def test_progress_is_for_terminals(folder: Path) -> None:
    """A bar is drawn where stderr is a terminal, and the report still goes to stdout."""
    with serving(cwd=folder) as address:
        terminal, side = pty.openpty()
        with subprocess.Popen(
            [TIDELOG, "sync", "--replica", "device", "--server", address, "--json"],
            cwd=folder,
            env=environment(TERM="xterm"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=side,
        ) as process:
            os.close(side)
            drawn = b"".join(iter(lambda: read_terminal(terminal), b""))
            output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
        os.close(terminal)

    assert process.returncode == 0
    assert read_json(output.decode())[0]["applied"] == 4
    assert b"0:00:0" in drawn


def read_terminal(terminal: int) -> bytes:
    """Return what was written to a terminal; nothing once its last writer is gone."""
    try:
        return os.read(terminal, 100_000)
    except OSError:
        return b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_stops_on_a_signal(folder: Path, number: signal.Signals) -> None:
    """A server ends with exit code 0, having printed one line to stdout; its data can be served again."""
    with started("serve", "shop:app", "--data", "data", "--listen", "127.0.0.1:0", cwd=folder) as process:
        assert re.fullmatch(r"listening on 127\.0\.0\.1:[1-9]\d*", read_line(process))
        process.send_signal(number)
        output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)

    assert (process.returncode, output) == (0, "")
    with serving("shop:app", cwd=folder, data="data"):
        pass


def test_serve_logs_json(folder: Path) -> None:
    """With --log-json every line of the log is a JSON object; an open application is named as one."""
    options = ("--data", "data", "--listen", "127.0.0.1:0", "--log-json", "--log-level", "debug")
    with started("serve", *options, cwd=folder) as process:
        assert read_line(process)
        process.terminate()
        _, log = process.communicate(timeout=RUN_TIMEOUT_SECONDS)

    lines = read_json(log)
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert any(line["level"] == "warning" and "every change is accepted" in line["message"] for line in lines)


@pytest.mark.parametrize(
    ("application", "message"),
    [
        ("nowhere:app", "cannot import 'nowhere': ModuleNotFoundError: No module named 'nowhere'"),
        ("shop:nothing", "module 'shop' has no 'nothing'"),
        ("shop:prices", "shop:prices is a dict: expected a tidelog_server.Application"),
        ("shop", "expected MODULE:APP, got 'shop'"),
        ("broken:app", "cannot import 'broken': ValueError: no stock ({folder}/broken.py, line 2)"),
        ("leaves:app", "cannot import 'leaves': SystemExit: 0 ({folder}/leaves.py, line 1)"),
    ],
)
def test_serve_needs_an_application(folder: Path, application: str, message: str) -> None:
    """What cannot be served is refused with the reason, and nothing is made."""
    (folder / "broken.py").write_text("import os\nraise ValueError('no stock')\n", encoding="utf-8")
    (folder / "leaves.py").write_text("raise SystemExit(0)\n", encoding="utf-8")

    found = fail("serve", application, "--data", "data", "--listen", "127.0.0.1:0", cwd=folder, code=ExitCode.USAGE)

    assert found == message.format(folder=folder.resolve())
    assert not (folder / "data").exists()


def test_serve_refuses_what_is_taken(folder: Path) -> None:
    """An address in use may be free later; a directory in use, or with something else in it, needs a person."""
    with serving(cwd=folder) as address:
        taken = fail("serve", "--data", "other", "--listen", address, cwd=folder, code=ExitCode.UNAVAILABLE)
        in_use = fail("serve", "--data", "server-data", "--listen", "127.0.0.1:0", cwd=folder, code=ExitCode.STORAGE)
    foreign = fail("serve", "--data", "device", "--listen", "127.0.0.1:0", cwd=folder, code=ExitCode.STORAGE)
    no_directory = fail("serve", "--data", "shop.py", "--listen", "127.0.0.1:0", cwd=folder, code=ExitCode.STORAGE)

    assert address in taken
    assert "another server has server-data open" in in_use
    assert "tidelog-replica" in foreign
    assert "shop.py" in no_directory


def test_server_down_means_try_again(folder: Path) -> None:
    """Without a server a synchronization gives up when told to, and everything is still pending."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        options = ("--replica", "device", "--server", f"127.0.0.1:{taken.getsockname()[1]}", "--timeout", "0.2")
        assert "synchronize again" in fail("sync", *options, cwd=folder, code=ExitCode.UNAVAILABLE)

    assert len(read_json(succeed("pending", "--replica", "device", "--json", cwd=folder))) == 4


TOKENS = """
[[tokens]]
token = "ann-token"
user_id = "ann"
roles = ["clerk"]
"""


def test_callers_are_told_apart_by_tokens(folder: Path) -> None:
    """A token from a file or from the environment lets a replica in; without one, or with another, it is refused."""
    (folder / "tokens.toml").write_text(TOKENS)
    (folder / "token").write_text("ann-token\n")
    (folder / "stale").write_text("former-token\n")
    with serving("--tokens", "tokens.toml", cwd=folder) as address:
        sync = ("sync", "--replica", "device", "--server", address)
        assert "without a token" in fail(*sync, cwd=folder, code=ExitCode.REFUSED)
        said = fail(*sync, "--token-file", "stale", cwd=folder, code=ExitCode.REFUSED)
        assert "the token is not known" in said
        assert "former-token" not in said
        assert succeed("pending", "--replica", "device", cwd=folder).count("pending") == 4
        assert succeed(*sync, "--token-file", "token", cwd=folder, TIDELOG_TOKEN="x").startswith("applied 4")
        assert succeed(*sync, cwd=folder, TIDELOG_TOKEN="ann-token").startswith("applied 0")


def test_callers_are_told_apart_by_signed_tokens(folder: Path) -> None:
    """A signed token is checked with a secret from a file; it has to be for this server."""
    secret = "a secret that has thirty-two bytes or more"
    (folder / "secret").write_text(f"{secret}\n")
    options = ("--jwt-key-file", "secret", "--jwt-algorithm", "HS256", "--jwt-audience", "us", "--jwt-tenant", "acme")
    with serving(*options, cwd=folder) as address:
        sync = ("sync", "--replica", "device", "--server", address)
        claims = {"sub": "ann", "exp": 2**31}
        foreign, good = (jwt.encode({**claims, "aud": aud}, secret, "HS256") for aud in ("them", "us"))
        assert "another audience" in fail(*sync, cwd=folder, code=ExitCode.REFUSED, TIDELOG_TOKEN=foreign)
        assert succeed(*sync, cwd=folder, TIDELOG_TOKEN=good).startswith("applied 4")


def test_callers_are_told_apart_by_a_plug_in(folder: Path) -> None:
    """An authenticator of one's own is found as an application is."""
    (folder / "mine.py").write_text(
        "from tidelog_server import AuthenticationFailed, Principal\n"
        "class ByName:\n"
        "    def authenticate(self, credentials):\n"
        "        if credentials.token != 'ann':\n"
        "            raise AuthenticationFailed('only ann')\n"
        "        return Principal('ann')\n"
        "by_name = ByName()\n"
    )
    with serving("--auth", "mine:by_name", cwd=folder) as address:
        sync = ("sync", "--replica", "device", "--server", address)
        assert "only ann" in fail(*sync, cwd=folder, code=ExitCode.REFUSED)
        assert succeed(*sync, cwd=folder, TIDELOG_TOKEN="ann").startswith("applied 4")


def test_both_sides_speak_tls(folder: Path) -> None:
    """With certificates on both sides a replica synchronizes; one that trusts the wrong authority does not."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    trustme.CA().cert_pem.write_to_path(folder / "other.pem")
    server = authority.issue_cert("127.0.0.1")
    client = authority.issue_cert("x", common_name="ann", organization_name="acme")
    for name, issued in (("server", server), ("client", client)):
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
    served = ("--tls-certificate", "server.pem", "--tls-key", "server.key", "--tls-client-ca", "ca.pem")
    with serving(*served, cwd=folder) as address:
        sync = ("sync", "--replica", "device", "--server", address)
        mine = ("--tls-certificate", "client.pem", "--tls-key", "client.key")
        said = fail(*sync, *mine, "--tls-ca", "other.pem", cwd=folder, code=ExitCode.UNAVAILABLE)
        assert "certificate cannot be verified" in said
        assert succeed(*sync, *mine, "--tls-ca", "ca.pem", cwd=folder).startswith("applied 4")
        assert succeed(*sync, *mine, "--tls", cwd=folder, SSL_CERT_FILE="ca.pem").startswith("applied 0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tokens missing.toml", "missing.toml should hold tokens: No such file"),
        ("--tokens shop.py", "shop.py does not hold tokens"),
        ("--tokens shop.py --jwks keys.json", "Invalid value for --tokens and --jwks: give one of them"),
        ("--jwks keys.json", "Invalid value for --jwt-algorithm: say how"),
        ("--jwks missing.json --jwt-algorithm RS256", "missing.json should hold a JWK set: No such file"),
        ("--jwt-key-file missing --jwt-algorithm RS256", "Invalid value for --jwt-key-file: missing: No such file"),
        ("--jwt-key-file shop.py --jwt-algorithm RS256", "the key is none for RS256"),
        ("--jwt-key-file shop.py --jwt-algorithm none", "'none' is no algorithm"),
        ("--jwt-issuer x", "they need --jwks or --jwt-key-file"),
        ("--tokens shop.py --jwt-leeway 0", "they need --jwks or --jwt-key-file"),
        ("--auth shop", "expected MODULE:AUTHENTICATOR, got 'shop'"),
        ("--auth shop:nobody", "module 'shop' has no 'nobody'"),
        ("--auth shop:prices", "shop:prices is a dict: expected an object with a method authenticate"),
        ("--auth tidelog_server:StaticTokens", "expected an object with a method authenticate"),
        ("--tls-certificate x", "Invalid value for --tls-certificate and --tls-key: one needs the other"),
        ("--tls-client-ca x", "Invalid value for --tls-client-ca: it needs --tls-certificate"),
        ("--tls-certificate missing --tls-key x", "missing should hold a certificate: No such file"),
        ("--tls-certificate shop.py --tls-key shop.py", "no certificate and its private key"),
    ],
)
def test_serve_refuses_what_cannot_tell_callers_apart(folder: Path, options: str, message: str) -> None:
    """Options that contradict each other, and files that are not what they should be, end the server's start."""
    words = shlex.split(options)

    assert message in fail("serve", "--data", "d", "--listen", "127.0.0.1:0", *words, cwd=folder, code=ExitCode.USAGE)
    assert not (folder / "d").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--token-file missing", "Invalid value for --token-file: missing: No such file"),
        ("--token-file shop.py", "a header carries visible ASCII only"),
        ("--tls-key x", "Invalid value for --tls-certificate and --tls-key: one needs the other"),
        ("--tls-ca missing", "missing should hold certificates of authorities: No such file"),
        ("--tls-ca shop.py", "shop.py holds no certificates"),
    ],
)
def test_sync_refuses_what_says_nothing(folder: Path, options: str, message: str) -> None:
    """A token that cannot be one, and files that are not what they should be, are wrong usage."""
    words = ("sync", "--replica", "device", "--server", NO_SERVER, *shlex.split(options))

    assert message in fail(*words, cwd=folder, code=ExitCode.USAGE)


def test_synchronization_in_progress_means_try_again(folder: Path) -> None:
    """A second synchronization of a replica, from another process, is refused with the message of the promise."""
    messages: list[str] = []
    with serving(cwd=folder) as address, Replica(folder / "device", server=address) as replica:

        def synchronize_too(_progress: object) -> None:
            if not messages:
                options = ("--replica", "device", "--server", address)
                messages.append(fail("sync", *options, cwd=folder, code=ExitCode.IN_PROGRESS))

        replica.synchronize_all(on_progress=synchronize_too)

    assert messages == [SIMULTANEOUS]


def test_another_store_is_a_refusal(folder: Path) -> None:
    """A replica that belongs to one store is not synchronized with another."""
    options = ("sync", "--replica", "device", "--server")
    with serving(cwd=folder) as address:
        succeed(*options, address, cwd=folder)

    with serving(cwd=folder, data="other") as address:
        assert "this replica belongs to the store" in fail(*options, address, cwd=folder, code=ExitCode.REFUSED)


@pytest.mark.parametrize(
    "command",
    [
        "log",
        "pending",
        "failures",
        "get Task milk",
        "query Task",
        "count Task",
        "history Task milk",
        f"sync --server {NO_SERVER}",
    ],
)
def test_no_replica_is_made_by_accident(folder: Path, command: str) -> None:
    """A directory without a replica is an error, and stays as it is."""
    (folder / "empty").mkdir()

    for place in ("missing", "empty") if command == "log" else ("missing",):
        message = fail(*command.split(), "--replica", place, cwd=folder, code=ExitCode.STORAGE)
        assert message.startswith(f"there is no replica in {place}")
    assert not (folder / "missing").exists()
    assert not list((folder / "empty").iterdir())


def test_object_that_is_not_there(folder: Path) -> None:
    """`tidelog get` says so in its exit code."""
    assert "does not exist" in fail("get", "Task", "none", "--replica", "device", cwd=folder, code=ExitCode.REJECTED)


@pytest.mark.parametrize(
    "command",
    [
        "nonsense",
        "--nonsense",
        "log",
        "log --replica device --after x",
        "get Task --replica device",
        "query Task --replica device --where done",
        "query Task --replica device --where =1",
        "query Task --replica device --where n=99999999999999999999",
        "query Task --replica device --limit -1",
        "sync --replica device",
        "sync --replica device --server nonsense",
        "sync --replica device --server 127.0.0.1:99999",
        f"sync --replica device --server {NO_SERVER} --mode some",
        f"sync --replica device --server {NO_SERVER} --select milk",
        f"sync --replica device --server {NO_SERVER} --download Task",
        f"sync --replica device --server {NO_SERVER} --download Task=sometimes",
        f"sync --replica device --server {NO_SERVER} --select Task/milk --mode all",
        f"sync --replica device --server {NO_SERVER} --timeout -1",
        f"sync --replica device --server {NO_SERVER} --timeout nan",
        "serve",
        "serve --data data --listen 50051",
        "serve --data data --listen 127.0.0.1:0 --log-level loud",
    ],
)
def test_wrong_usage(folder: Path, command: str) -> None:
    """What cannot be meant is refused in one line."""
    fail(*shlex.split(command), cwd=folder, code=ExitCode.USAGE)


def test_help_and_version(tmp_path: Path) -> None:
    """The command introduces itself; called with nothing it says how, which is no success."""
    assert re.fullmatch(r"tidelog \d+\.\d+\S*\n", succeed("--version", cwd=tmp_path))
    page = succeed("--help", cwd=tmp_path)
    assert "Exit codes" in page
    bare = run(cwd=tmp_path)
    assert (bare.returncode, bare.stdout) == (ExitCode.USAGE, "")
    assert bare.stderr == page


def test_page_names_every_command_and_option() -> None:
    """docs/cli.md leaves out nothing that the command can do, nor an exit code."""
    page = PAGE.read_text(encoding="utf-8")
    commands = dict(all_commands(get_command(build_app()), "tidelog"))

    assert not [name for name in commands if name not in page]
    options = {opt for command in commands.values() for parameter in command.params for opt in parameter.opts}
    assert not [opt for opt in options if opt.startswith("--") and opt not in page]
    assert not [code for code in ExitCode if not re.search(rf"\b{code.value}\b", page)]


def all_commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command below a group, with what a user types."""
    for name, command in group.commands.items():
        yield f"{path} {name}", command
        if hasattr(command, "commands"):
            yield from all_commands(command, f"{path} {name}")


def test_page_shows_what_happens(tmp_path: Path) -> None:
    """Whoever types in the examples of docs/cli.md, one after the other, sees what it shows."""
    blocks = re.findall(
        r"^```(python|console)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    shop, work = (text for kind, text in blocks if kind == "python")
    (tmp_path / "shop.py").write_text(shop, encoding="utf-8")
    subprocess.run([sys.executable, "-c", work], cwd=tmp_path, check=True)
    console = "".join(text for kind, text in blocks if kind == "console")
    steps = [step.partition("\n") for step in re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]]

    assert steps[0][0] == "tidelog serve shop:app --data server-data --listen 127.0.0.1:50051"
    with serving("shop:app", cwd=tmp_path) as address:
        variables: dict[str, str] = {}
        ids: dict[str, str] = {}
        code = 0
        for command, _, shown in steps[1:]:
            typed = UUID.sub(lambda found: ids[found[0]], command).replace("127.0.0.1:50051", address)
            words = shlex.split(typed)
            if words[0] == "export":
                name, _, value = words[1].partition("=")
                variables[name] = value
                output = ""
            elif command == "echo $?":
                output = f"{code}\n"
            else:
                assert words[0] == "tidelog"
                result = run(*words[1:], cwd=tmp_path, **variables)
                code, output = result.returncode, result.stdout + result.stderr
            assert without_measures(output) == without_measures(shown), command
            ids.update(zip(UUID.findall(shown), UUID.findall(output), strict=True))


def without_measures(text: str) -> str:
    """Leave out what differs each time: ids, clocks and sizes."""
    text = UUID.sub("UUID", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+", "TIME", text)
    return re.sub(r"\(\d+ bytes sent, \d+ received, [\d.]+ s\)", "(MEASURES)", text)


def test_a_file_that_cannot_be_saved_leaves_the_former_one(tmp_path: Path) -> None:
    """What fails in the middle changes no file, and leaves none; what is no file is written as it comes."""
    target = tmp_path / "saved.jpg"
    target.write_bytes(b"the former one")
    with pytest.raises(RuntimeError), commands._replacing(target) as file:  # noqa: PT012 - all of it is one
        file.write(b"a part")
        raise RuntimeError
    assert [one.name for one in tmp_path.iterdir()] == ["saved.jpg"]
    assert target.read_bytes() == b"the former one"
    with commands._replacing(Path(os.devnull)) as file:
        file.write(b"anything")
    assert not Path(os.devnull).is_file()


def test_files_travel(folder: Path) -> None:
    """A file that was attached to an object of one replica is saved from another one, fetched if need be."""
    (folder / "photo.jpg").write_bytes(b"a photo")
    succeed("attach", "Task", "milk", "photo", "photo.jpg", "--replica", "device", cwd=folder)
    fail("attach", "Task", "none", "photo", "photo.jpg", "--replica", "device", cwd=folder, code=ExitCode.REJECTED)
    fail("attach", "Task", "milk", "photo", "none.jpg", "--replica", "device", cwd=folder, code=ExitCode.USAGE)
    with serving(cwd=folder) as address:
        sent = run("sync", "--replica", "device", "--server", address, cwd=folder)
        assert "files: uploaded 1, downloaded 0 (7 bytes sent, 0 received)" in sent.stdout
        lazy = ("--create", "--files", "Task=lazy", "--json")
        (report,) = read_json(succeed("sync", "--replica", "copy", "--server", address, *lazy, cwd=folder))
        assert (report["downloaded"] > 0, report["files_downloaded"]) == (True, 0)
        save = ("save-file", "Task", "milk", "photo", "saved.jpg", "--replica", "copy")
        fail(*save, cwd=folder, code=ExitCode.UNAVAILABLE)
        assert not (folder / "saved.jpg").exists()
        succeed(*save, "--server", address, cwd=folder)
    assert (folder / "saved.jpg").read_bytes() == b"a photo"
    (folder / "saved.jpg").write_bytes(b"longer than the photo is")
    before = sorted(folder.iterdir())
    succeed(*save, cwd=folder)
    assert (folder / "saved.jpg").read_bytes() == b"a photo"
    assert sorted(folder.iterdir()) == before
    attributes = read_json(succeed("get", "Task", "milk", "--replica", "copy", "--json", cwd=folder))[0]["attributes"]
    assert (attributes["photo"]["name"], attributes["photo"]["media_type"]) == ("photo.jpg", "image/jpeg")
    for wish in ("Task", "Task=sometimes", "Task=eager:many"):
        fail("sync", "--replica", "copy", "--server", NO_SERVER, "--files", wish, cwd=folder, code=ExitCode.USAGE)
