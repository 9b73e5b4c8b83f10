"""What a batch leaves behind: nothing, without the garbage collector's help."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from tests.builders import Lab, make_operation

from tidelog_server import Application, HookContext, HookObject, Reject
from tidelog_server._engine import _Evaluator
from tidelog_server._overlay import Overlay


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Switch the garbage collector off, after a last round."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
def test_a_batch_leaves_no_cycles() -> None:
    """Applied, refused and hooked operations are gone when their batch is, so that a busy server does not grow."""
    application = Application()

    @application.before_commit("Task")
    def refuses_some(task: HookObject, context: HookContext) -> None:
        if task["title"] == "bad":
            raise Reject("no")
        context.create("Audit", {})

    lab = Lab(application)
    before = [one for one in gc.get_objects() if isinstance(one, _Evaluator | Overlay)]  # of other tests
    for seq in range(1, 21, 2):
        lab.settle(
            make_operation(seq=seq, id=f"t{seq}", set={"title": "good"}).encode(),
            make_operation(seq=seq + 1, id=f"t{seq + 1}", set={"title": "bad"}).encode(),
        )

    left = [one for one in gc.get_objects() if isinstance(one, _Evaluator | Overlay)]
    assert len(left) == len(before)
