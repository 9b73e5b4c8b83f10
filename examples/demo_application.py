"""The application of the demonstration: a shared task list with one rule."""

from __future__ import annotations

from tidelog_server import Application, HookContext, HookObject, Reject

app = Application()


@app.before_commit("Task")
def needs_a_title(task: HookObject, _context: HookContext) -> None:
    """Refuse a task without a title."""
    if not task["title"]:
        raise Reject("a task needs a title")
