"""`tidelog failures` against a server, as operators and scripts run it: a process of its own each time."""

from __future__ import annotations

import json
import shlex
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import trustme
from tests.builders import REPLICA_A, create, make_operation
from tests.integration.test_cli import NO_SERVER, fail, read_json, run, serving, succeed

from tidelog import Entity, Schema, String
from tidelog._channel import open_channel
from tidelog.cli import ExitCode
from tidelog.v1 import sync_pb2, sync_pb2_grpc
from tidelog_client import Replica

pytestmark = pytest.mark.slow

# What a title may be is read each time: a test changes the rules under a running server.
SHOP = """
from pathlib import Path
from tidelog_server import Application, Reject

app = Application()

@app.before_commit("Task")
def needs_a_title(task, context):
    if not task["title"] and not Path("lenient").exists():
        raise Reject("a task needs a title\\x1b[31m")

ruled = Application(operators=["operator"])
ruled.allow("clerk", "Task", create=True, write=["title"])
ruled.allow("operator", "Task", read=["title"])
"""

TOKENS = """
[[tokens]]
token = "ann-token"
user_id = "ann"
roles = ["clerk"]

[[tokens]]
token = "olga-token"
user_id = "olga"
roles = ["operator"]
"""


@dataclass
class Desk:
    """
    A folder, a server that runs in it, and the failures there.

    Attributes:
        folder: The folder.
        address: Where the server is.
    """

    folder: Path
    address: str

    def words(self, command: str) -> list[str]:
        """Return what is typed."""
        return ["failures", *shlex.split(command), "--server", self.address]

    def succeed(self, command: str) -> str:
        """Run a command, which must succeed; return what it prints."""
        return succeed(*self.words(command), cwd=self.folder)

    def fail(self, command: str, code: int) -> str:
        """Run a command, which must fail; return the message."""
        return fail(*self.words(command), cwd=self.folder, code=code)

    def json(self, command: str, code: int = 0) -> list[dict[str, Any]]:
        """Run a command with --json, which must end like this; return what it prints."""
        result = run(*self.words(command), "--json", cwd=self.folder)
        assert (result.returncode, result.stderr) == (code, "")
        return read_json(result.stdout)

    def synchronize(self) -> dict[str, dict[str, Any]]:
        """Synchronize the device; return the tasks that it then has."""
        with Replica(self.folder / "device", server=self.address) as replica:
            replica.synchronize_all()
            return {found.id: found.to_dict() for found in replica.query("Task")}

    def allow(self) -> None:
        """Let the hook take everything."""
        (self.folder / "lenient").touch()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a folder with applications, and a device that was worked on offline."""
    (tmp_path / "shop.py").write_text(SHOP, encoding="utf-8")
    with Replica(tmp_path / "device") as replica:
        replica.create("Task", {"title": "Milk", "n": 1}, id="milk")
        replica.create("Task", {"title": "", "n": 1, "due": None}, id="blank")
        replica.update("Task", "blank", {"m": 1})
        replica.update("Task", "milk", {"title": ""}, unset=["n"], add={"tags": ["x"]})
    return tmp_path


@pytest.fixture
def desk(folder: Path) -> Iterator[Desk]:
    """Give a server that has refused three of the device's operations."""
    with serving("shop:app", cwd=folder) as address:
        found = Desk(folder, address)
        found.synchronize()
        yield found


def test_list_and_show(desk: Desk) -> None:
    """What was refused is listed, filtered, and shown beside the present, with what it caused."""
    found = desk.json("list")
    cause, dependent, edit = found
    assert [(one["object_id"], one["reason"], one["status"]) for one in found] == [
        ("blank", "HOOK_REJECTED", "open"),
        ("blank", "DEPENDENCY_FAILED", "open"),
        ("milk", "HOOK_REJECTED", "open"),
    ]
    assert dependent["cause_failure_id"] == cause["id"]

    filters = {
        "--reason DEPENDENCY_FAILED": [dependent],
        f"--cause {cause['id']}": [dependent],
        "--id milk --entity Task": [edit],
        "--status retried --status dismissed": [],
        "--status open --limit 1": [cause],
        "--limit 0": [],
        "--user nobody": [],
        f"--replica-id {cause['replica_id']} --since 2024-01-01 --before 2999-01-01T00:00:00+01:00": found,
        f"--since {cause['time']} --before {cause['time']}": [],
    }
    assert {options: desk.json(f"list {options}") for options in filters} == filters

    [shown] = desk.json(f"show {edit['id']}")
    assert shown["present"] == {"version": 1, "attributes": {"title": "Milk", "n": 1}}
    assert (shown["dependents"], shown["actions"]) == ([], [])
    [shown] = desk.json(f"show {cause['id']}")
    assert (shown["present"], shown["dependents"]) == (None, [dependent["id"]])


def test_tables_are_for_people(desk: Desk) -> None:
    """Tables show what matters, and no character that would steer the terminal."""
    listed = desk.succeed("list")
    [cause, dependent, edit] = [line.split()[0] for line in listed.splitlines()[1:]]
    assert listed.count("a task needs a title\\x1b[31m") == 2
    shown = desk.succeed(f"show {edit}")
    for line in (
        "operation  update Task milk",
        "ATTRIBUTE  REFUSED UPDATE  PRESENT, VERSION 1",
        'title      ""              "Milk"',
        "n          unset           1",
        'tags       add ["x"]',
    ):
        assert line in shown.splitlines()
    assert f"CAUSED THE FAILURES\n{dependent}\n" in desk.succeed(f"show {cause}")
    assert "\x1b" not in listed + shown


def test_retry(desk: Desk) -> None:
    """A retry that is refused again says so in the exit code; one that is applied reaches the device."""
    cause, dependent, edit = (one["id"] for one in desk.json("list"))
    [refused] = desk.json(f"retry {cause} --note hoping", ExitCode.REJECTED)
    assert (refused["status"], refused["reason"], refused["version"]) == ("open", "HOOK_REJECTED", None)
    desk.allow()

    # The dependent follows its cause; that it is named too is no mistake.
    applied = desk.json(f"retry {cause} {dependent} {edit}")

    assert [(one["id"], one["status"], one["version"]) for one in applied] == [
        (cause, "retried", 2),
        (dependent, "retried", 3),
        (edit, "retried", 4),
    ]
    assert desk.synchronize() == {
        "milk": {"title": "", "tags": ["x"]},
        "blank": {"title": "", "n": 1, "due": None, "m": 1},
    }
    [shown] = desk.json(f"show {cause}")
    assert [(one["kind"], one["note"]) for one in shown["actions"]] == [("refused", "hoping"), ("retried", "")]
    assert "was retried already" in desk.fail(f"retry {cause}", ExitCode.REFUSED)
    assert "was retried already" in desk.fail(f"dismiss {cause}", ExitCode.REFUSED)


def test_edit(desk: Desk) -> None:
    """An edit sets, unsets and leaves out, with values of every type; what it does not name stays."""
    cause, _, edit = (one["id"] for one in desk.json("list"))
    values = ('title="Rent"', "price=12.50d", 'at=t"2026-01-31T12:00:00Z"', 'data=b"AP8="', 'list=[1, {"a": null}]')
    options = " ".join(f"--set {shlex.quote(one)}" for one in values)

    created, followed = desk.json(f"edit {cause} {options} --unset due --omit n")
    [changed] = desk.json(f"edit {edit} --set n=2 --omit title --unset tags --note why")

    assert [one["version"] for one in (created, followed, changed)] == [2, 3, 4]
    assert desk.synchronize() == {
        "milk": {"title": "Milk", "n": 2},
        "blank": {
            "title": "Rent",
            "price": Decimal("12.50"),
            "at": datetime(2026, 1, 31, 12, tzinfo=UTC),
            "data": b"\x00\xff",
            "list": [1, {"a": None}],
            "m": 1,
        },
    }
    [action] = desk.json(f"show {edit}")[0]["actions"]
    assert (action["note"], action["edited_operation"]["set"]) == ("why", {"n": 2})
    assert "retried (edited)" in desk.succeed(f"show {edit}")


def test_edit_refused_again_stays_open(desk: Desk) -> None:
    """An edit that does not help changes nothing but the record."""
    edit = desk.json("list --id milk")[0]["id"]

    [result] = desk.json(f"edit {edit} --set n=5", ExitCode.REJECTED)

    assert result["status"] == "open"
    [shown] = desk.json(f"show {edit}")
    assert shown["operation"]["unset"] == ["n"]
    assert shown["actions"][0]["edited_operation"]["set"] == {"title": "", "n": 5}


def test_stale_is_a_refusal(desk: Desk) -> None:
    """What was changed since is overwritten by force only."""
    edit = desk.json("list --id milk")[0]["id"]
    with Replica(desk.folder / "other", server=desk.address) as other:
        other.synchronize_all()
        other.update("Task", "milk", {"title": "Oat milk"})
        other.synchronize_all()
    desk.allow()

    assert "was changed since it was refused" in desk.fail(f"retry {edit}", ExitCode.REFUSED)
    [forced] = desk.json(f"retry {edit} --force")

    assert forced["status"] == "retried"
    assert "retried (forced)" in desk.succeed(f"show {edit}")
    assert desk.synchronize()["milk"] == {"title": "", "tags": ["x"]}


def test_dismiss(desk: Desk) -> None:
    """Several failures are dismissed at once, one named twice once."""
    cause, dependent, edit = (one["id"] for one in desk.json("list"))

    closed = desk.json(f"dismiss {cause} {edit} {cause} --note 'entered twice'")

    assert [(one["id"], one["status"]) for one in closed] == [(cause, "dismissed"), (edit, "dismissed")]
    assert [one["id"] for one in desk.json("list --status open")] == [dependent]
    assert desk.succeed(f"dismiss {dependent}").splitlines()[1].split() == [dependent, "dismissed", "Task", "blank"]


def test_pages_are_followed(folder: Path) -> None:
    """A list is whole, however many pages it takes."""
    with Replica(folder / "many") as replica:
        for n in range(1_100):
            replica.create("Task", {"title": ""}, id=f"t{n}")
    with serving("shop:app", cwd=folder) as address:
        with Replica(folder / "many", server=address) as replica:
            assert replica.synchronize_all().rejected == 1_100
        desk = Desk(folder, address)
        assert len({one["id"] for one in desk.json("list")}) == 1_100
        assert len(desk.json("list --limit 1050")) == 1_050
        assert len(desk.succeed("list").splitlines()) == 1_101


def test_edit_in_the_names_of_today(folder: Path) -> None:
    """What an operation of an older schema writes is offered for editing in the names that it has now."""
    source = """
from tidelog import Entity, Rename, Schema, String
from tidelog_server import Application
renames = [Rename(entity="Note", attribute="text", to="body", version=2)]
old = Application(schema=Schema([Entity("Note", {"text": String(max_length=3), "by": String()})], version=1))
new = Application(schema=Schema(
    [Entity("Note", {"body": String(max_length=9), "by": String(max_length=3)})], version=2, renames=renames))
"""
    (folder / "notes.py").write_text(source, encoding="utf-8")
    schema = Schema([Entity("Note", {"text": String(), "by": String()})], version=1)
    with (
        serving("notes:old", cwd=folder) as address,
        Replica(folder / "noted", server=address, schema=schema) as replica,
    ):
        replica.create("Note", {"text": "long", "by": "somebody"}, id="n1")
        assert replica.synchronize_all().rejected == 1
    with serving("notes:new", cwd=folder) as address:
        desk = Desk(folder, address)
        [failure] = desk.json("list")
        [applied] = desk.json(f"edit {failure['id']} --set 'by=\"ann\"'")
        [shown] = desk.json(f"show {failure['id']}")
    assert applied["version"] == 1
    assert shown["present"]["attributes"] == {"body": "long", "by": "ann"}


def test_unreadable_operations(folder: Path) -> None:
    """An operation that cannot be read is listed and shown as such; it cannot be edited."""
    with serving("shop:app", cwd=folder) as address:
        with open_channel(address) as channel:
            request = sync_pb2.UploadOperationsRequest(protocol_version=1, replica_id=str(uuid.UUID(bytes=REPLICA_A)))
            request.operations.add().MergeFromString(make_operation(seq=1, entity="").encode())
            request.operations.add().MergeFromString(create(2, patch=b"\xc1"))
            sync_pb2_grpc.SyncServiceStub(channel).UploadOperations(request)
        desk = Desk(folder, address)
        headless, malformed = desk.json("list")
        assert (headless["operation"], malformed["operation"]["id"]) == (None, "t1")
        assert "cannot be read" in desk.succeed(f"show {headless['id']}")
        assert "cannot be read" in desk.fail(f"edit {headless['id']} --set n=1", ExitCode.USAGE)
        [mended] = desk.json(f"edit {malformed['id']} --set 'title=\"x\"'")
        assert mended["version"] == 1


def test_operators_and_authors(folder: Path) -> None:
    """Authors see their own failures, operators work off everybody's; tokens tell them apart."""
    (folder / "tokens.toml").write_text(TOKENS)
    (folder / "ann").write_text("ann-token")
    (folder / "olga").write_text("olga-token")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "server.pem")
    issued.private_key_pem.write_to_path(folder / "server.key")
    served = ("--tokens", "tokens.toml", "--tls-certificate", "server.pem", "--tls-key", "server.key")
    with serving("shop:ruled", *served, cwd=folder) as address:
        device = ("--replica", "device", "--server", address, "--tls-ca", "ca.pem")
        assert run("sync", *device, "--token-file", "ann", cwd=folder).returncode == ExitCode.REJECTED
        desk = Desk(folder, address)
        ann, olga = (f"--tls-ca ca.pem --token-file {name}" for name in ("ann", "olga"))
        mine, all_ = desk.json(f"list {ann}"), desk.json(f"list {olga}")
        assert mine == all_
        assert {one["user_id"] for one in mine} == {"ann"}
        first = mine[0]["id"]
        assert "only an operator" in desk.fail(f"retry {first} {ann}", ExitCode.REFUSED)
        assert "only an operator" in desk.fail(f"dismiss {first} {ann}", ExitCode.REFUSED)
        assert "without a token" in desk.fail("list --tls-ca ca.pem", ExitCode.REFUSED)
        assert desk.json(f"dismiss {first} {olga}")[0]["status"] == "dismissed"
        [shown] = desk.json(f"show {first} {ann}")
        assert shown["settled_by"] == "olga"


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("list", ExitCode.UNAVAILABLE, "127.0.0.1:1: failed to connect"),
        ("list --status closed", ExitCode.USAGE, "Invalid value for '--status'"),
        ("list --reason bad", ExitCode.USAGE, "Invalid value for '--reason'"),
        ("list --since yesterday", ExitCode.USAGE, "Invalid value for --since: 'yesterday' is no time"),
        ("list --limit -1", ExitCode.USAGE, "--limit"),
        ("list --token-file missing", ExitCode.USAGE, "missing: No such file"),
        ("list --tls-key x", ExitCode.USAGE, "one needs the other"),
        ("show", ExitCode.USAGE, "Missing argument 'FAILURE'"),
        ("retry", ExitCode.USAGE, "Missing argument 'FAILURE...'"),
        ("edit x", ExitCode.USAGE, "say what to change"),
        ("edit x --set title", ExitCode.USAGE, "Invalid value for --set: expected NAME=JSON, got 'title'"),
        ("edit x --set title=Milk", ExitCode.USAGE, "title: expected a value"),
        ("edit x --set 'n=1 2'", ExitCode.USAGE, "n: expected the end, at character 3: 2"),
    ],
)
def test_wrong_usage(folder: Path, command: str, code: int, message: str) -> None:
    """What cannot be meant, or cannot be reached, is told in one line."""
    found = fail("failures", *shlex.split(command), "--server", NO_SERVER, cwd=folder, code=code)

    assert message in found


def test_what_the_server_does_not_know(folder: Path) -> None:
    """Ids that are none, or of nothing, are told apart by the exit code."""
    unknown = "019a2f00-0000-7000-8000-000000000001"
    with serving("shop:app", cwd=folder) as address:
        desk = Desk(folder, address)
        for command, code, message in (
            (f"show {unknown}", ExitCode.REJECTED, f"there is no failure {unknown}"),
            (f"retry {unknown}", ExitCode.REJECTED, f"there is no failure {unknown}"),
            ("dismiss nonsense", ExitCode.USAGE, "a failure id is a UUID, got 'nonsense'"),
            ("list --replica-id nonsense", ExitCode.USAGE, "nonsense"),
            ("list --cause nonsense", ExitCode.USAGE, "a failure id is a UUID"),
        ):
            assert message in desk.fail(command, code)


def test_a_replicas_own_failures(desk: Desk) -> None:
    """Without a command a replica's own records are shown; its options say nothing to the commands."""
    own = read_json(succeed("failures", "--replica", "device", "--json", cwd=desk.folder))
    assert [one["id"] for one in own] == [one["id"] for one in desk.json("list")]
    for options in (["--replica", "device"], ["--json"]):
        words = ["failures", *options, "list", "--server", desk.address]
        assert "list does not take it here" in fail(*words, cwd=desk.folder, code=ExitCode.USAGE)
    succeed("failures", "list", "--server", desk.address, cwd=desk.folder, TIDELOG_REPLICA="device")
    assert "name a replica" in fail("failures", cwd=desk.folder, code=ExitCode.USAGE)


def test_script_works_off_what_a_failure_caused(desk: Desk) -> None:
    """What one command prints another takes."""
    cause = desk.json("list --reason HOOK_REJECTED --id blank")[0]["id"]
    output = desk.succeed(f"list --cause {cause} --json")

    ids = " ".join(json.loads(line)["id"] for line in output.splitlines())

    assert [one["status"] for one in desk.json(f"dismiss {ids}")] == ["dismissed"]
