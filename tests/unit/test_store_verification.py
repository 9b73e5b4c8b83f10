"""Verification of a server's store: what is damaged is named, and nothing else is."""

from __future__ import annotations

import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import lmdb
import msgpack
import pytest
from tests.builders import (
    REPLICA_A,
    REPLICA_B,
    TENANT,
    TIME_US,
    Lab,
    create,
    delete,
    group,
    make_operation,
    quick_folder,
    said,
    update,
)

from tidelog import Entity, Finding, FormatUnsupported, Integer, Reference, Rename, Schema, StorageError, String
from tidelog._environment import DATABASES_MAX
from tidelog._keys import pack_object_key, pack_position
from tidelog._operation import OperationKind
from tidelog._values import encode
from tidelog.v1 import failure_pb2
from tidelog_client import Replica
from tidelog_server import Application, HookContext, HookObject, LmdbStore, Principal, Reject, Tenant, verify_store
from tidelog_server import _failures as failures
from tidelog_server._adoption import adopt_schema
from tidelog_server._indexes import dependents_prefix

NUMBER: Final = b"\0\0\0\1"  # of the tenant that has most of it
STATES: Final = ("open", "done")


def application(version: int) -> Application:
    """Return an application with rules of every kind, before and after a migration."""
    title = "title" if version == 1 else "name"
    app = Application(
        schema=Schema(
            [
                Entity(
                    "Order",
                    {"number": Integer(), "state": String(), title: String(), "lines": Integer()},
                    unique=["number"],
                    indexes=["state"],
                ),
                Entity("Line", {"order": Reference("Order", on_delete="cascade"), "n": Integer()}),
                Entity("Note", {"about": Reference("Order", on_delete="clear"), "text": String()}),
            ],
            version=version,
            renames=[Rename(entity="Order", attribute="title", to="name", version=2)] if version > 1 else [],
        )
    )

    @app.before_commit("Order")
    def needs_a_title(order: HookObject, context: HookContext) -> None:
        if order[title] == "":
            raise Reject("an order needs a title")

    @app.after_commit("Line")
    def counts(line: HookObject, context: HookContext) -> None:
        context.update("Order", line["order"], {"lines": line["n"]})

    return app


def order(seq: int, id_: str, number: int, *, title: str = "Paint", **others: Any) -> bytes:
    """Return the creation of an order."""
    return create(seq, id_, {"number": number, "state": STATES[number % 2], "title": title}, entity="Order", **others)


def line(seq: int, id_: str, of: str) -> bytes:
    """Return the creation of a line."""
    return create(seq, id_, {"order": of, "n": seq}, entity="Line")


def make_history(path: Path) -> None:
    """Make a store in which everything has happened that can happen."""
    before, after = application(1), application(2)
    store = LmdbStore(path)
    lab = Lab(before, store)
    adopt_schema(before, store, migrate=False, time_us=TIME_US)

    a, b = lab.session(REPLICA_A), lab.session(REPLICA_B)
    assert (
        said(a.batch(order(1, "o1", 1), order(2, "o2", 2), order(3, "o3", 3), line(4, "l1", "o1"))) == ["APPLIED"] * 4
    )
    assert said(b.batch(order(1, "o4", 4, title=""))) == ["HOOK_REJECTED"]
    assert said(b.batch(update(2, "o4", {"state": "done"}, entity="Order"))) == ["DEPENDENCY_FAILED"]
    assert said(b.batch(order(3, "o5", 1))) == ["UNIQUE_VIOLATED"]
    assert said(b.batch(b"\xff\xff", make_operation("update", seq=4, patch=b"\xc1").encode())) == ["MALFORMED"] * 2
    members = [
        make_operation("create", seq=seq, id=f"n{seq}", entity="Note", set={"about": target, "text": "x"})
        for seq, target in ((5, "o2"), (6, "nowhere"))
    ]
    assert said(b.settle(*group(*members))) == ["GROUP_REJECTED", "DANGLING_REFERENCE"]
    assert (
        said(
            a.batch(
                update(5, "o1", {"state": "done"}, entity="Order"),
                update(6, "o3", {"number": 33, "state": "open"}, entity="Order"),
                create(7, "n1", {"about": "o2", "text": "look"}, entity="Note"),
                line(9, "l2", "o2"),
                delete(10, "o2", entity="Order"),
                delete(11, "o2", entity="Order"),
                order(12, "o2", 22),
            )
        )
        == ["APPLIED"] * 7
    )

    data = Tenant(before, store, TENANT, None, lambda: TIME_US)
    with data.transaction() as transaction:
        transaction.update("Order", "o3", {"state": "done"})
        transaction.create("Order", {"number": 9, "title": "Ours"}, "o9")
    with Tenant(before, store, "other", None, lambda: TIME_US).transaction() as transaction:
        transaction.create("Order", {"number": 1, "title": "Theirs", "state": "open"}, "o1")
        transaction.delete("Order", "o1")

    adopt_schema(after, store, migrate=True, time_us=TIME_US)
    decision = failures.Decision(Principal("olga"), TIME_US)
    edited = decision._replace(patch=msgpack.packb({"set": {"number": 4, "state": "open", "name": "Edited"}}))
    id_ = uuid.UUID(next(one.id for one in lab.failures() if one.object_id == "o4" and not one.cause_failure_id)).bytes
    store.submit(TENANT, lambda reader: failures.retry(reader, after, id_, edited)).result()
    dismissed = uuid.UUID(next(one.id for one in lab.failures() if one.object_id == "o5")).bytes
    store.submit(TENANT, lambda reader: (failures.dismiss(reader, dismissed, decision)[0], None)).result()
    store.submit(TENANT, lambda reader: (failures.without_payloads(reader, [dismissed]), None)).result()
    store.close()
