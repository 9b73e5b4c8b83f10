from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status
from tests.builders import Step, World, quick_folder, write_steps

from tidelog import Entity, Integer, Schema, String, attribute
from tidelog._values import decode_map
from tidelog.v1 import object_pb2, object_pb2_grpc, schema_pb2, schema_pb2_grpc, sync_pb2, sync_pb2_grpc
from tidelog_server import Application

SCHEMA = Schema([Entity("Task", {"title": String(), "salary": Integer(), "done": Integer()})], version=3)


def ruled() -> Application:
    """Return an application that shows the titles of open tasks."""
    application = Application(schema=SCHEMA)
    application.allow("*", "Task", read=["title", "done"], where=attribute("done") == 0)
    return application


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder."""
    with quick_folder() as path:
        yield path


@pytest.fixture
def world(folder: Path) -> Iterator[World]:
    """Give a server with two open tasks and one that may not be seen."""
    with World(folder, ruled()) as opened:
        steps = [
            Step(("Task", "a"), {"title": "A", "salary": 1, "done": 0}),
            Step(("Task", "b"), {"title": "B", "salary": 2, "done": 0}),
            Step(("Task", "c"), {"title": "C", "salary": 3, "done": 1}),
        ]
        write_steps(opened.store, steps, schema=SCHEMA)
        yield opened


def reason_of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """Return what a refused call says to programs."""
    status = rpc_status.from_call(cast("grpc.Call", error))
    info = ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    return error.code(), info.reason


def listed(world: World, where: Any = None, **fields: Any) -> list[dict[str, Any]]:
    """List the tasks that match, page by page."""
    stub = object_pb2_grpc.ObjectServiceStub(world.channel())
    request = object_pb2.ListObjectsRequest(entity="Task", **fields)
    if where is not None:
        request.where.CopyFrom(where.to_message())
    found: list[dict[str, Any]] = []
    while True:
        response = stub.ListObjects(request, timeout=10)
        found += [decode_map(one.attributes) for one in response.objects]
        request.page_token = response.next_page_token
        if not request.page_token:
            return found


def test_an_object(world: World) -> None:
    """An object shows what may be read of it; one that may not be seen is not there, like one that never was."""
    stub = object_pb2_grpc.ObjectServiceStub(world.channel())

    found = stub.GetObject(object_pb2.GetObjectRequest(entity="Task", id="a"), timeout=10).object
    assert decode_map(found.attributes) == {"title": "A", "done": 0}
    refusals = []
    for id_ in ("c", "absent"):
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetObject(object_pb2.GetObjectRequest(entity="Task", id=id_), timeout=10)
        assert reason_of(caught.value) == (grpc.StatusCode.NOT_FOUND, "OBJECT_NOT_FOUND")
        refusals.append(str(caught.value.details()).replace(id_, "?"))
    assert refusals[0] == refusals[1]


def test_a_list(world: World) -> None:
    """A list leaves out what may not be seen, and of the rest what may not be read, page by page too."""
    both = [{"title": "A", "done": 0}, {"title": "B", "done": 0}]

    assert listed(world) == both
    assert listed(world, page_size=1) == both
    assert listed(world, attribute("title") == "B") == [{"title": "B", "done": 0}]
    assert listed(world, attribute("done") == 1) == []


def test_a_page_token(world: World) -> None:
    """Where a list goes on does not tell the ids of what may not be seen, and counts in its own list alone."""
    steps = [Step(("Task", f"hidden{number:04}"), {"done": 1}) for number in range(1_001)]
    write_steps(world.store, [*steps, Step(("Task", "last"), {"title": "Z", "done": 0})], schema=SCHEMA)
    stub = object_pb2_grpc.ObjectServiceStub(world.channel())
    token = stub.ListObjects(object_pb2.ListObjectsRequest(entity="Task"), timeout=10).next_page_token

    assert "hidden" not in token
    assert b"hidden" not in base64.urlsafe_b64decode(token)
    assert len(listed(world)) == 3
    for request in (
        object_pb2.ListObjectsRequest(entity="Note", page_token=token),
        object_pb2.ListObjectsRequest(entity="Task", page_token="hidden0000"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListObjects(request, timeout=10)
        assert reason_of(caught.value) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")


@pytest.mark.parametrize("where", [attribute("salary") > 1, attribute("none") == 1, ~attribute("salary").exists()])
def test_a_list_by_what_may_not_be_read(world: World, where: Any) -> None:
    """A constraint cannot ask for what may not be read."""
    with pytest.raises(grpc.RpcError) as caught:
        listed(world, where)

    assert reason_of(caught.value) == (grpc.StatusCode.INVALID_ARGUMENT, "CONSTRAINT_INVALID")


def test_the_schema(world: World) -> None:
    """The schema is served to whoever asks."""
    stub = schema_pb2_grpc.SchemaServiceStub(world.channel())

    assert Schema.from_message(stub.GetSchema(schema_pb2.GetSchemaRequest(), timeout=10).schema) == SCHEMA


def test_no_schema(folder: Path) -> None:
    """An application without a schema says that it has none."""
    with World(folder) as world, pytest.raises(grpc.RpcError) as caught:
        schema_pb2_grpc.SchemaServiceStub(world.channel()).GetSchema(schema_pb2.GetSchemaRequest(), timeout=10)

    assert reason_of(caught.value) == (grpc.StatusCode.NOT_FOUND, "SCHEMA_NOT_FOUND")


def test_a_download_without_a_session(world: World) -> None:
    """A download by itself is held to rules and wishes as well, and names what differs."""
    stub = sync_pb2_grpc.SyncServiceStub(world.channel())
    wish = sync_pb2.EntityDownload(
        entity="Task", mode=sync_pb2.DOWNLOAD_MODE_WHERE, where=(attribute("title") == "A").to_message()
    )
    request = sync_pb2.DownloadSnapshotsRequest(protocol_version=1, downloads=[wish])
    started, page, complete = stub.DownloadSnapshots(request, timeout=10)

    assert [(plan.entity, plan.mode, plan.reconcile) for plan in started.started.entities] == [
        ("Task", sync_pb2.DOWNLOAD_MODE_WHERE, True)
    ]
    assert [decode_map(one.attributes) for one in page.page.snapshots] == [{"title": "A", "done": 0}]
    request.cursor = complete.complete.cursor
    assert [one.WhichOneof("message") for one in stub.DownloadSnapshots(request, timeout=10)] == [
        "started",
        "complete",
    ]
    request.downloads[0].where.CopyFrom((attribute("salary") == 1).to_message())
    answers = stub.DownloadSnapshots(request, timeout=10)
    assert [one.WhichOneof("message") for one in answers] == ["started", "complete"]
    request.downloads[0].where.CopyFrom((attribute("wages") == 1).to_message())
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.DownloadSnapshots(request, timeout=10))
    assert reason_of(caught.value) == (grpc.StatusCode.INVALID_ARGUMENT, "CONSTRAINT_INVALID")
