"""A client in another language, `examples/node`, against a real server process and beside a Python replica."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import pytest

from tidelog._limits import FILE_CHUNK_BYTES
from tidelog._values import equal
from tidelog.testing import Proxy
from tidelog.v1 import failure_pb2, failure_pb2_grpc, file_pb2, file_pb2_grpc, operation_pb2
from tidelog_client import Replica

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "node"
NODE = shutil.which("node")
RUN_TIMEOUT_SECONDS = 60
STOP_TIMEOUT_SECONDS = 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NODE is None, reason="node was not found"),
    pytest.mark.skipif(
        not (EXAMPLE / "node_modules" / "@grpc" / "grpc-js").is_dir(),
        reason="examples/node/node_modules is not there: run `npm ci` in examples/node, or `make test`",
    ),
]

# Serves until its standard input ends, so that it cannot outlive the test.
SERVER = """
import sys
from tidelog import Entity, Reference, Schema
from tidelog_server import Application, Reject, Server

app = Application(schema=Schema([Entity("OrderLine", {"order": Reference("Order", on_delete="keep")})], open=True))

@app.before_commit("Task")
def needs_a_title(task, context):
    if not task["title"]:
        raise Reject("a task needs a title")

with Server(app, store=sys.argv[1], listen="127.0.0.1:0") as server:
    print(server.address, flush=True)
    sys.stdin.read()
"""

# Every type of value, with those that another language gets wrong most easily.
SAMPLE: dict[str, Any] = {
    "null": None,
    "true": True,
    "false": False,
    "zero": 0,
    "small": 1,
    "beyond_a_double": 2**53 + 1,
    "largest": 2**63 - 1,
    "smallest": -(2**63),
    "whole_float": 1.0,
    "float": 0.1,
    "huge_float": 1.7976931348623157e308,
    "infinite": float("-inf"),
    "no_number": float("nan"),
    "string": "grüß dich, 世界 🌊\n\0",
    "empty": "",
    "bytes": bytes(range(256)),
    "timestamp": datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=UTC),
    "second": datetime(2038, 1, 19, 3, 14, 8, tzinfo=UTC),
    "before_1970": datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    "first_year": datetime(1, 1, 1, tzinfo=UTC),
    "last_year": datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    "decimal": Decimal("12.50"),
    "long_decimal": Decimal("-123456789012345678901234567890.000000001"),
    "exponent": Decimal("1E+30"),
    "list": [1, 1.0, "1", True, None, [], {}, [Decimal("0.1"), b"\0"]],
    "map": {"1": 1, "a": {"b": {"c": [datetime(2000, 1, 1, tzinfo=UTC)]}}, "ключ": "value"},
}

# What the step `edit` of the example creates; its newest timestamp is checked apart.
WRITTEN_IN_NODE: dict[str, Any] = {
    "null": None,
    "bool": True,
    "integer": 2**63 - 1,
    "negative": -(2**63),
    "small": 1,
    "float": 1.0,
    "fraction": 0.1,
    "string": "grüß dich, 世界 🌊",
    "binary": b"\x00\x01\xfe\xff",
    "timestamp": datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=UTC),
    "old": datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    "decimal": Decimal("12.50"),
    "list": [1, 1.0, "1", [None, Decimal("-0.001")]],
}

Event = dict[str, Any]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address of a server in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path / "server-data")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / root) for root in ("changelog", "server"))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line, "the server did not start"
        yield line
        process.communicate(timeout=STOP_TIMEOUT_SECONDS)  # ends its standard input
        assert process.returncode == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def run_node(*arguments: str | Path, exit_code: int = 0) -> list[Event]:
    """Run the example and return what it prints."""
    assert NODE is not None
    result = subprocess.run(
        [NODE, EXAMPLE / "main.mjs", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=RUN_TIMEOUT_SECONDS,
        check=False,
    )
    assert result.returncode == exit_code, result.stdout + result.stderr
    assert result.stderr == ""
    return [json.loads(line, object_hook=typed) for line in result.stdout.splitlines()]


def typed(value: dict[str, Any]) -> Any:
    """Undo what the example does to values that JSON has no form for."""
    if len(value) != 1:
        return value
    match next(iter(value.items())):
        case ("$bytes", str(text)):
            return base64.b64decode(text)
        case ("$decimal", str(text)):
            return Decimal(text)
        case ("$timestamp", str(text)):
            return datetime.fromisoformat(text)
        case ("$float", str(text)):
            return float(text)
    return value


def events(printed: list[Event], name: str) -> list[Event]:
    """The events of one name, without it, in order."""
    return [
        {key: value for key, value in event.items() if key != "event"} for event in printed if event["event"] == name
    ]


def attributes_of(replica: Replica, entity: str, id_: str) -> dict[str, Any]:
    """The attributes of an object that must be there."""
    found = replica.get(entity, id_)
    assert found is not None
    return found.to_dict()


def assert_same(actual: Any, expected: Any) -> None:
    """Compare with types: 1, 1.0 and true differ. Decimals must be written alike too: 12.50 is not 12.5."""
    assert equal(actual, expected)
    assert spelled(actual) == spelled(expected)


def spelled(value: Any) -> Any:
    """A value with each part of it spelled out, whatever the order of maps."""
    match value:
        case dict():
            return {key: spelled(member) for key, member in value.items()}
        case list():
            return [spelled(member) for member in value]
    return repr(value)


def test_node_and_python_share_their_data(address: str, tmp_path: Path) -> None:
    """The example downloads what Python wrote and uploads creations, an update, a deletion and a refused one."""
    with Replica(tmp_path / "device", server=address) as replica:
        sample = replica.create("Sample", SAMPLE)
        changed = replica.create("Task", {"title": "Buy milk", "done": False, "changes": 41})
        deleted = replica.create("Task", {"title": "Buy bread", "done": False})
        assert replica.synchronize_all().applied == 3

        printed = run_node(
            *("--server", address, "--state", tmp_path / "state.json", "--update", changed, "--delete", deleted)
        )

        downloaded = {event["id"]: event for event in events(printed, "downloaded")}
        assert downloaded.keys() == {sample, changed, deleted}
        assert_same(downloaded[sample]["attributes"], SAMPLE)

        outcomes = [(one["kind"], one["entity"]) for one in events(printed, "applied")]
        assert outcomes == [("create", "Task"), ("update", "Task"), ("delete", "Task"), ("create", "Sample")]
        (rejected,) = events(printed, "rejected")
        assert rejected["reason"] == "FAILURE_REASON_HOOK_REJECTED"
        assert rejected["message"] == "a task needs a title"
        (repeated, *others) = events(printed, "repeated")
        assert len(others) == 4
        assert all(one["same"] for one in (repeated, *others))

        report = replica.synchronize_all()

        assert (report.downloaded, report.removed) == (3, 1)
        assert_same(attributes_of(replica, "Task", changed), {"title": "Buy milk", "done": True, "changes": 42})
        assert replica.get("Task", deleted) is None
        titles = {task["title"]: task for task in replica.query("Task")}
        assert titles.keys() == {"Buy milk", "Written in Node"}
        assert_same(titles["Written in Node"].to_dict(), {"title": "Written in Node", "done": False})
        (written,) = (one for one in replica.query("Sample") if one.id != sample)
        attributes = written.to_dict()
        moment = attributes.pop("map")["deep"]["er"][1]
        assert_same(attributes, WRITTEN_IN_NODE)
        assert abs(datetime.now(UTC) - moment) < timedelta(minutes=10)

        # Both have the same objects.
        mine = {(one.entity, one.id): one.to_dict() for entity in ("Sample", "Task") for one in replica.query(entity)}
        theirs = {(one["entity"], one["id"]): one["attributes"] for one in events(printed, "object")}
        assert_same(theirs, mine)


def test_refusal_is_recorded_on_the_server(address: str, tmp_path: Path) -> None:
    """What the example says of its refusal is what `FailureService` has, with the operation as it was sent."""
    printed = run_node("--server", address, "--state", tmp_path / "state.json")

    with grpc.insecure_channel(address) as channel:
        stub = failure_pb2_grpc.FailureServiceStub(channel)
        (failure,) = stub.ListFailures(failure_pb2.ListFailuresRequest()).failures
    (rejected,) = events(printed, "rejected")
    (told,) = events(printed, "failure")
    (opened,) = events(printed, "opened")
    assert failure.id == rejected["failure_id"] == told["id"]
    assert failure.reason == operation_pb2.FAILURE_REASON_HOOK_REJECTED
    assert failure.replica_id == opened["replica_id"]
    assert failure.object_id == rejected["id"]
    operation = operation_pb2.Operation.FromString(failure.operation)
    (committed,) = (one for one in events(printed, "committed") if one["seq"] == rejected["seq"])
    assert (operation.seq, operation.nonce) == (committed["seq"], committed["nonce"])
    assert json.loads(told["operation_json"])["set"] == {"title": "", "done": False}


def test_upload_after_a_crash_gets_the_same_results(address: str, tmp_path: Path) -> None:
    """A client that lost the answers sends the same operations again and learns the same."""
    state, older = tmp_path / "state.json", tmp_path / "older.json"
    committed = events(run_node("--state", state, "edit"), "committed")
    shutil.copy(state, older)
    first = run_node("--server", address, "--state", state, "sync")

    again = run_node("--server", address, "--state", older, "sync", "objects")

    assert len(committed) == 7
    assert events(again, "applied") == events(first, "applied")
    assert events(again, "rejected") == events(first, "rejected")
    assert len(events(again, "rejected")) == 1
    assert events(again, "synchronized")[0]["pending"] == 0
    with Replica(tmp_path / "device", server=address) as replica:
        replica.synchronize_all()
        mine = {one.id for entity in ("Sample", "Task") for one in replica.query(entity)}
        assert {one["id"] for one in events(again, "object")} == mine


def test_two_clients_with_one_log_are_told_apart(address: str, tmp_path: Path) -> None:
    """A copy of the state that goes its own way is refused, and what it did stays pending."""
    state, copy = tmp_path / "state.json", tmp_path / "copy.json"
    run_node("--state", state, "objects")
    shutil.copy(state, copy)
    run_node("--server", address, "--state", state, "edit", "sync")

    printed = run_node("--server", address, "--state", copy, "edit", "sync", exit_code=1)

    (failed,) = events(printed, "failed")
    assert "copy" in failed["message"]
    with Replica(tmp_path / "device", server=address) as replica:
        replica.synchronize_all()
        assert replica.count("Sample") == 1


def test_many_operations_and_held_ones(address: str, tmp_path: Path) -> None:
    """More batches than may be under way, and a commit group whose references come before their target."""
    printed = run_node("--server", address, "--state", tmp_path / "state.json", "bulk", "sync")

    assert len(events(printed, "applied")) == 2_503
    assert events(printed, "synchronized") == [{"attempts": 1, "held": 3, "pending": 0}]
    assert len(events(printed, "confirmed")) == 2_503
    with Replica(tmp_path / "device", server=address) as replica:
        assert replica.synchronize_all().downloaded == 2_503
        (order,) = replica.query("Order")
        assert [line["order"] for line in replica.query("OrderLine")] == [order.id, order.id]


def test_removals_and_foreign_changes_reach_node(address: str, tmp_path: Path) -> None:
    """What Python changes and deletes of the example's objects replaces what the example has."""
    state = tmp_path / "state.json"
    run_node("--server", address, "--state", state, "edit", "sync")
    with Replica(tmp_path / "device", server=address) as replica:
        replica.synchronize_all()
        tasks = {task["title"]: task.id for task in replica.query("Task")}
        replica.update("Task", tasks["Written in Node"], {"done": True}, unset=["nothing"])
        replica.delete("Task", tasks["To be changed"])
        replica.synchronize_all()

        printed = run_node("--server", address, "--state", state, "sync", "objects")

        assert [one["id"] for one in events(printed, "removed")] == [tasks["To be changed"]]
        assert [one["id"] for one in events(printed, "downloaded")] == [tasks["Written in Node"]]
        left = {one["id"]: one["attributes"] for one in events(printed, "object") if one["entity"] == "Task"}
        assert_same(left, {tasks["Written in Node"]: {"title": "Written in Node", "done": True}})


def test_what_came_without_the_cursor_can_go_again(address: str, tmp_path: Path) -> None:
    """An object that the example made after its cursor, and that is deleted before the next one, leaves it."""
    state = tmp_path / "state.json"
    run_node("--server", address, "--state", state, "sync")
    printed = run_node("--server", address, "--state", state, "--mode", "UNSYNCHRONIZED", "edit", "sync")
    made = [one["id"] for one in events(printed, "applied") if one["kind"] == "create"]
    kept = {one["id"] for one in events(printed, "downloaded") + events(printed, "confirmed")}
    assert kept < set(made)
    with Replica(tmp_path / "device", server=address) as replica:
        replica.synchronize_all()
        for task in list(replica.query("Task")):
            replica.delete("Task", task.id)
        replica.synchronize_all()
        (sample,) = replica.query("Sample")

        printed = run_node("--server", address, "--state", state, "sync", "objects")

        assert [one["id"] for one in events(printed, "object")] == [sample.id]


def test_client_that_lost_its_data_gets_them_again(address: str, tmp_path: Path) -> None:
    """A confirmation of what is not there makes the example ask for all states."""
    state = tmp_path / "state.json"
    before = events(run_node("--server", address, "--state", state, "edit", "sync", "objects"), "object")
    stored = json.loads(state.read_text(encoding="utf-8"))
    state.write_text(json.dumps({**stored, "objects": [], "cursor": ""}), encoding="utf-8")

    printed = run_node("--server", address, "--state", state, "sync", "objects")

    assert events(printed, "synchronized") == [{"attempts": 2, "held": 0, "pending": 0}]
    assert events(printed, "confirmed") == []
    after = {one["id"]: one for one in events(printed, "object")}
    assert_same(after, {one["id"]: one for one in before})


def test_lock_names_no_registry() -> None:
    """The example's packages come from whatever registry npm is set up with."""
    lock = json.loads((EXAMPLE / "package-lock.json").read_text(encoding="utf-8"))

    assert not [name for name, package in lock["packages"].items() if "resolved" in package]


def test_files_go_both_ways(address: str, tmp_path: Path) -> None:
    """A photo attached in Node is at the server with what refers to it, and another client of Node gets its bytes."""
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(bytes(range(256)) * 4_000)
    task = "t1"
    with Replica(tmp_path / "device", server=address) as replica:
        replica.create("Task", {"title": "Buy milk"}, task)
        replica.synchronize_all()
    at_home, elsewhere = tmp_path / "home.json", tmp_path / "elsewhere.json"

    run_node("--server", address, "--state", at_home, "--update", task, "--file", photo, "sync", "attach", "sync")
    printed = run_node("--server", address, "--state", elsewhere, "--update", task, "sync", "fetch")

    (fetched,) = events(printed, "fetched")
    assert Path(fetched["path"]).read_bytes() == photo.read_bytes()
    (found,) = (one for one in events(printed, "downloaded") if one["id"] == task)
    reference = found["attributes"]["photo"]
    assert (reference["name"], reference["size"]) == ("photo.jpg", 1_024_000)
    assert reference["sha256"] == hashlib.sha256(photo.read_bytes()).digest()


def test_an_upload_goes_on_where_it_was_cut(address: str, tmp_path: Path) -> None:
    """Bytes of a photo that the server has from an upload that was cut are not sent again."""
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(bytes(range(256)) * 20_000)
    state = tmp_path / "state.json"
    run_node("--server", address, "--state", state, "edit", "sync")
    content = file_pb2.FileContent(sha256=hashlib.sha256(photo.read_bytes()).digest(), size=5_120_000)
    with grpc.insecure_channel(address) as channel:
        stub = file_pb2_grpc.FileServiceStub(channel)
        with pytest.raises(grpc.RpcError):
            stub.UploadFile(_cut_upload(content, photo.read_bytes()[:3_000_000]))
        (status,) = stub.StatFiles(file_pb2.StatFilesRequest(contents=[content])).statuses
        assert status.received_bytes == 3_000_000

    with Proxy(address) as proxy:
        task = next(
            one["id"] for one in events(run_node("--state", state, "objects"), "object") if one["entity"] == "Task"
        )
        run_node(
            *("--server", proxy.address, "--state", state, "--update", task, "--file", photo),
            *("attach", "sync"),
        )
        assert 2_120_000 < proxy.up.byte_count < 2_300_000


def test_a_content_that_vanished_costs_its_operation_only(address: str, tmp_path: Path) -> None:
    """What refers to a content that is nowhere any more is refused for good; everything else is exchanged."""
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"a photo")
    state = tmp_path / "state.json"
    with Replica(tmp_path / "device", server=address) as replica:
        replica.create("Task", {"title": "Buy milk"}, "t1")
        replica.synchronize_all()
    run_node("--server", address, "--state", state, "--update", "t1", "--file", photo, "sync", "attach")
    for content in (tmp_path / "state.json.files").iterdir():
        content.unlink()
    printed = run_node("--server", address, "--state", state, "edit", "sync")
    reasons = {one["id"]: one["reason"] for one in events(printed, "rejected")}
    assert reasons["t1"] == "FAILURE_REASON_FILE_MISSING"
    assert len(events(printed, "applied")) == 6
    assert events(printed, "synchronized")[-1]["pending"] == 0


def test_a_content_that_cannot_go_up_holds_up_nothing_else(address: str, tmp_path: Path) -> None:
    """What refers to a content that the server does not take yet stays pending; everything else is exchanged."""
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"a photo")
    state = tmp_path / "state.json"
    with Replica(tmp_path / "device", server=address) as replica:
        replica.create("Task", {"title": "Buy milk"}, "t1")
        replica.synchronize_all()
    run_node("--server", address, "--state", state, "--update", "t1", "--file", photo, "sync", "attach")
    (content,) = (tmp_path / "state.json.files").iterdir()
    content.write_bytes(b"damaged")
    printed = run_node("--server", address, "--state", state, "--update", "t1", "edit", "sync")
    assert [one["id"] for one in events(printed, "not_ready")] == ["t1", "t1"]
    assert events(printed, "synchronized")[-1]["pending"] == 2
    assert len(events(printed, "applied")) == 4
    content.write_bytes(b"a photo")
    printed = run_node("--server", address, "--state", state, "sync")
    assert [one["id"] for one in events(printed, "applied")] == ["t1", "t1"]


def _cut_upload(content: file_pb2.FileContent, data: bytes) -> Iterator[file_pb2.UploadFileRequest]:
    """The beginning of an upload: the stream ends before the content does."""
    yield file_pb2.UploadFileRequest(start=file_pb2.UploadFileStart(content=content))
    for at in range(0, len(data), FILE_CHUNK_BYTES):
        yield file_pb2.UploadFileRequest(chunk=data[at : at + FILE_CHUNK_BYTES])
