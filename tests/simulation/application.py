"""The application that simulated replicas work with: references, and hooks of every kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tests.builders import references_schema
from tests.simulation.model import Attributes, Misfit, patched

from tidelog import FailureReason, Operation, OperationKind
from tidelog_server import Application, HookContext, HookObject, Reject, TransientError

ENTITIES = ("Note", "Task", "Order", "Line", "Node", "Counter", "Audit")
REFERENCES: Final[dict[str, dict[str, str | list[str]]]] = {
    "Line": {"order": "Order", "also": ["Order"]},
    "Node": {"next": "Node", "friends": ["Node"]},
}


@dataclass
class Weather:
    """What hooks depend on besides their data."""

    is_service_down: bool = False


def make_application(weather: Weather, *, schema_version: int) -> Application:
    """
    Return an application whose hooks reject, fail, change the object and write others.

    - Task: without a title rejected; a `tidy` one gets a slug; `boom` breaks the hook; `wait` needs a
      service that may be down; `counted` changes a counter; an `ephemeral` one is deleted by its own hook;
      a `locked` one cannot be deleted.
    - Order: without a title rejected; its deletion deletes its lines and leaves an audit record.
    - Line: touches its order.
    """
    app = Application(schema=references_schema(REFERENCES, schema_version))

    @app.before_commit("Task")
    @app.before_commit("Order")
    def needs_a_title(thing: HookObject, context: HookContext) -> None:
        if thing["title"] == "":
            raise Reject(f"{thing.entity} needs a title")

    @app.before_commit("Task")
    def breaks(task: HookObject, context: HookContext) -> None:
        if task["boom"]:
            raise ValueError("boom")

    @app.before_commit("Task")
    def asks_a_service(task: HookObject, context: HookContext) -> None:
        if task["wait"] and weather.is_service_down:
            raise TransientError("the service is down")

    @app.before_commit("Task")
    def tidies_up(task: HookObject, context: HookContext) -> None:
        if task["tidy"]:
            task["slug"] = str(task["title"]).lower()
            del task["y"]

    @app.after_commit("Task")
    def counts(task: HookObject, context: HookContext) -> None:
        if task["counted"]:
            _count(context, task.id)

    @app.after_commit("Task")
    def vanishes(task: HookObject, context: HookContext) -> None:
        if task["ephemeral"]:
            context.delete("Task", task.id)

    @app.before_delete("Task")
    def is_locked(task: HookObject, context: HookContext) -> None:
        if task["locked"]:
            raise Reject("the task is locked")

    @app.before_delete("Order")
    def deletes_its_lines(order: HookObject, context: HookContext) -> None:
        for id_, _ in context.query("Line", {"order": order.id}):
            context.delete("Line", id_)

    @app.after_delete("Order")
    def leaves_a_record(order: HookObject, context: HookContext) -> None:
        if context.get("Audit", order.id) is None:
            context.create("Audit", order.to_dict(), id=order.id)
        else:
            context.update("Audit", order.id, {"again": context.operation.seq})

    @app.after_commit("Line")
    def touches_its_order(line: HookObject, context: HookContext) -> None:
        order = line["order"]
        if isinstance(order, str) and context.get("Order", order) is not None:
            context.update("Order", order, {"touched": context.operation.seq})

    return app


def may_hooks_refuse(reason: FailureReason, operation: Operation, states: list[Attributes | None]) -> bool:
    """Tell whether the hooks have a reason to refuse an operation on an object that was in one of *states*."""
    entity = operation.entity
    if operation.group is not None:
        # What earlier operations of its commit group had made of the object is gone without a trace.
        return entity in {"Task", "Order"}
    if operation.kind is OperationKind.DELETE:
        return entity == "Task" and any(state is not None and state.get("locked") for state in states)
    results = [result for state in states if (result := _result(operation, state)) is not None]
    if reason is FailureReason.HOOK_REJECTED:
        # An ephemeral task may be locked as well: then it is its hook's deletion that is refused.
        return (entity in {"Task", "Order"} and any(one.get("title") == "" for one in results)) or (
            entity == "Task" and any(one.get("ephemeral") and one.get("locked") for one in results)
        )
    return entity == "Task" and any(one.get("boom") for one in results)


def _result(operation: Operation, state: Attributes | None) -> Attributes | None:
    patch = operation.decoded_patch()
    if operation.kind is OperationKind.CREATE:
        return patch.set
    if state is None:
        return None
    try:
        return patched(state, patch)
    except Misfit:
        return patch.set


def _count(context: HookContext, id_: str) -> None:
    counter = context.get("Counter", id_)
    if counter is None:
        context.create("Counter", {"count": 1}, id=id_)
        return
    count: Any = counter.get("count")
    context.update("Counter", id_, {"count": count + 1 if type(count) is int else 1})
