"""The listener notices each thing that it listens for, and nothing else."""

from __future__ import annotations

import pytest
from tests.builders import TENANT, Lab, create, delete, update
from tests.simulation.application import Business
from tests.simulation.privacy import Listener
from tests.simulation.promises import PromiseBroken
from tests.simulation.records import Committed, History, SeenHistory
from tests.simulation.rights import Eyes, Granted

from tidelog import FailureReason, attribute
from tidelog._values import encode
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import operation_pb2, sync_pb2
from tidelog_server import Principal


def listener(*, since: int = 0) -> Listener:
    """Return one who listens for a clerk, who sees Nodes whose n is not negative, and of these the x alone."""
    lab = Lab()
    lab.settle(
        create(1, "hidden", {"n": -1}, entity="Node"),
        create(2, "seen", {"n": 7, "x": 3}, entity="Node"),
        create(3, "gone", {"n": 0}, entity="Node"),
        delete(4, "gone", entity="Node"),
    )
    history = History()
    with lab.store.read(TENANT) as reader:
        history.read_on(reader)
    rule = Granted("clerk", "Node", True, True, frozenset({"x"}), None, attribute("n") >= 0, None)
    eyes = Eyes([rule], {}, Principal("ann", roles=frozenset({"clerk"})), {})
    seen = SeenHistory(history, eyes.readable, eyes.shown, eyes.downloads)
    committed = Committed({1: update(1, "seen", increment={"n": 2}, entity="Node")})
    return Listener(eyes, seen, history, committed, Business().schema(1), None, lambda: since)


def heard(listener: Listener, message: str = "", page: sync_pb2.SnapshotPage | None = None) -> str:
    """Return what the listener objects to in a refusal, or in a page."""
    if page is not None:
        answer = splice_pb2.SynchronizeResponseSplice(page=page.SerializeToString())
    else:
        reason = FailureReason.UNIQUE_VIOLATED.number
        result = operation_pb2.OperationResult(seq=1, reason=reason, message=message)
        results = sync_pb2.BatchResults(results=[result])
        answer = splice_pb2.SynchronizeResponseSplice(batch_results=results.SerializeToString())
    try:
        listener.hear(answer.SerializeToString())
    except PromiseBroken as broken:
        return broken.findings[0]
    return ""


@pytest.mark.parametrize(
    ("message", "finding"),
    [
        ("Node 'seen': n is taken by another object", ""),
        ("Node 'seen' refers to Node 'gone', which is deleted", ""),
        ("Node 'seen' cannot be changed: Node 'hidden' refers to it", "names ('Node', 'hidden')"),
        ("Node 'seen': n 7 is taken by another object", "tells that 'n' is 7"),
        ("Node 'seen': n 9 is taken by another object", "tells that 'n' is 9"),
        ("Node 'seen': x 3 is taken by another object", ""),
    ],
)
def test_words_of_a_refusal(message: str, finding: str) -> None:
    """A refusal must name no object that is hidden, nor what is, or would be, in a hidden attribute."""
    assert finding in heard(listener(), message)
    assert bool(heard(listener(), message)) is bool(finding)


@pytest.mark.parametrize(("id_", "since", "is_news"), [("hidden", 0, True), ("gone", 3, False), ("gone", 4, True)])
def test_removals(id_: str, since: int, *, is_news: bool) -> None:
    """A removal tells of an object: of one that was hidden, or was gone before anything was told, it must not."""
    page = sync_pb2.SnapshotPage()
    page.removals.add(entity="Node", id=id_, version=4)

    assert ("could not know" in heard(listener(since=since), page=page)) is is_news


def test_snapshots_and_confirmations() -> None:
    """What is sent of an object is what may be read of it; what may not be read whole is not confirmed."""
    whole, part, confirming = sync_pb2.SnapshotPage(), sync_pb2.SnapshotPage(), sync_pb2.SnapshotPage()
    whole.snapshots.add(entity="Node", id="seen", version=2, attributes=encode({"n": 7, "x": 3}))
    part.snapshots.add(entity="Node", id="seen", version=2, attributes=encode({"x": 3}))
    confirming.confirmations.add(entity="Node", id="seen", version=2)

    assert "is sent as" in heard(listener(), page=whole)
    assert not heard(listener(), page=part)
    assert "is confirmed" in heard(listener(), page=confirming)
