"""
The main job, as a program that uses tidelog writes it: checked for types, never run.

Without annotations of its own, so that what is checked is what the API says.
"""

from typing import assert_type

import tidelog
from tidelog_client import Replica
from tidelog_server import Application, Reject, Server

app = Application()


@app.before_commit("Task")
def needs_a_title(task, context):
    if not task["title"]:
        raise Reject("a task needs a title")


def main():
    with (
        Server(app, store="server-data", listen="127.0.0.1:0") as server,
        Replica("device-a", server=server.address) as a,
        Replica("device-b", server=server.address) as b,
    ):
        assert_type(server.address, str)
        with a.transaction() as tx:
            milk = tx.create("Task", {"title": "Buy milk", "done": False})
            tx.create("Task", {"title": "", "done": False})
        assert_type(milk, str)
        a.update("Task", milk, {"done": True})
        report = a.synchronize_all()
        assert_type(report.applied, int)
        assert_type(report.rejected, int)
        assert_type(report.downloaded, int)
        assert_type(report.removed, int)
        for failure in report.failures:
            assert_type(failure.object_id, str)
            print(failure.id, failure.entity, failure.reason, failure.message, failure.operation)
        b.synchronize_all(timeout=30.0, on_progress=print)
        task = b.get("Task", milk)
        if task is not None:
            print(task["done"], task.entity, task.id, task.exists)
        b.delete("Task", milk)
        b.synchronize_unsynchronized(timeout=30)
        report = a.synchronize_selected([("Task", milk)])
        print(list(report.skipped))
        assert_type(a.count("Task"), int)


def work_with_handles(replica: Replica) -> None:
    """Uncommitted objects, queries and what they iterate over."""
    task = replica.new("Task", {"title": "Call back"})
    task["done"] = False
    task.rollback()
    task["title"] = "Call back today"
    task.commit()
    assert_type(task.exists, bool)
    assert_type(task.id, str)
    for found in replica.query("Task", order_by="title", limit=10):
        print(found["title"])
    for operation in replica.pending():
        print(operation)
    for failure in replica.failures():
        print(failure.message)
    for entry in replica.history("Task", task.id):
        print(entry)
    replica.synchronize_selected([task])


def handle_errors(replica: Replica) -> None:
    """Every error of the API is a `tidelog.TidelogError`."""
    try:
        replica.synchronize_all()
    except tidelog.SynchronizationInProgress:
        pass
    except tidelog.TidelogError as error:
        print(error)
