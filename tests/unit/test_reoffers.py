"""What is offered again to a server that was put back, as the engine judges it."""

from __future__ import annotations

import pytest
from tests.builders import (
    REPLICA_A,
    REPLICA_B,
    TENANT,
    TIME_US,
    USER,
    Lab,
    create,
    delete,
    group,
    make_operation,
    update,
)

from tidelog import FailureReason
from tidelog_server._author import OldBases
from tidelog_server._engine import Evaluation, UploadState, evaluate_batch
from tidelog_server._errors import OperationsOutOfOrder, RequestInvalid
from tidelog_server._outcomes import Result, Status, Uploader
from tidelog_server._records import MAX_POSITION, Writes
from tidelog_server._session import begin_upload
from tidelog_server._store import Reader
from tidelog_server._units import FormerOutcome

FAILURE_ID = b"f" * 16


def offer(
    lab: Lab, *operations: bytes, formers: list[FormerOutcome] | None = None, common_version: int = 0
) -> list[Result]:
    """Offer operations again as replica A, which had been told that they were applied from version 100 on."""
    begun = lab.store.submit(TENANT, lambda reader: begin_upload(reader, REPLICA_A, USER, TIME_US)).result()
    bases = OldBases(MAX_POSITION, common_version, "old")
    uploader = Uploader(REPLICA_A, USER, begun.session_number, leaves_earlier=False, old_bases=bases)
    outcomes = formers or [FormerOutcome(100 + place) for place in range(len(operations))]

    def job(reader: Reader) -> tuple[Writes, Evaluation]:
        evaluation = evaluate_batch(
            operations,
            application=lab.application,
            uploader=uploader,
            reader=reader,
            state=UploadState(),
            time_us=TIME_US,
            former_outcomes=outcomes,
        )
        return evaluation.writes, evaluation

    return lab.store.submit(TENANT, job).result().results


def reasons(results: list[Result]) -> list[FailureReason | None]:
    """Return why each was refused; None: it was not."""
    return [result.reason for result in results]


@pytest.fixture
def lab() -> Lab:
    """Give an application with a task that replica B made."""
    found = Lab()
    found.settle(create(1, "t1", {"title": "x", "n": 0}), replica=REPLICA_B)
    return found


def test_what_nobody_changed_is_applied(lab: Lab) -> None:
    """Creations, edits and deletions come again, in order."""
    results = offer(
        lab, create(1, "a"), update(2, "t1", {"title": "y"}, base_version=1), delete(3, "a"), common_version=1
    )

    assert [result.status for result in results] == [Status.APPLIED] * 3
    assert lab.attributes("t1") == {"title": "y", "n": 0}
    assert lab.attributes("a") is None
    assert [change.former_version for change in lab.changes()[1:]] == [100, 101, 102]


def test_what_others_changed_is_superseded(lab: Lab) -> None:
    """An attribute that somebody changed since stays as it is, and so does an object that was to be deleted."""
    lab.settle(update(2, "t1", {"title": "theirs"}, base_version=1), replica=REPLICA_B)

    results = offer(
        lab,
        update(1, "t1", {"title": "mine"}, base_version=1),
        update(2, "t1", {"n": 5}, base_version=1),
        delete(3, "t1", base_version=1),
        common_version=1,
    )

    assert reasons(results) == [FailureReason.SUPERSEDED, None, FailureReason.SUPERSEDED]
    assert lab.attributes("t1") == {"title": "theirs", "n": 5}


def test_what_is_there_or_gone(lab: Lab) -> None:
    """A creation over an object, and an edit of none, are for a person; a deletion of what is gone changes nothing."""
    results = offer(lab, create(1, "t1"), update(2, "none", {"n": 1}, base_version=1), delete(3, "none"))

    assert reasons(results) == [FailureReason.SUPERSEDED, FailureReason.SUPERSEDED, FailureReason.OBJECT_GONE]


def test_a_later_edit_of_ones_own_stays(lab: Lab) -> None:
    """What is offered again does not overwrite what its author wrote after it."""
    lab.settle(update(2, "t1", {"title": "newer"}, base_version=1))

    assert reasons(offer(lab, update(1, "t1", {"title": "old"}, base_version=1), common_version=1)) == [
        FailureReason.SUPERSEDED
    ]
    assert lab.attributes("t1") == {"title": "newer", "n": 0}


def test_a_former_failure_is_recorded_and_not_executed(lab: Lab) -> None:
    """A refusal comes again under its id, with its words and its payload."""
    former = FormerOutcome(0, FAILURE_ID, FailureReason.HOOK_REJECTED, "no", "CODE")

    [result] = offer(lab, update(1, "t1", {"title": "refused"}), formers=[former])

    assert (result.status, result.failure_id, result.reason) == (Status.REJECTED, FAILURE_ID, former.reason)
    record = lab.failure(result)
    assert (record.message, record.code, record.operation) == ("no", "CODE", update(1, "t1", {"title": "refused"}))
    assert lab.attributes("t1") == {"title": "x", "n": 0}


@pytest.mark.parametrize("kept", [[1, 2], [0, 2], [0, 1]])
def test_what_is_left_of_a_commit_group(lab: Lab, kept: list[int]) -> None:
    """Where a part of a group is lost for good, the rest is one failure with all that is left, for a person."""
    whole = group(*(make_operation("create", seq=place + 1, id=f"g{place}") for place in range(3)))
    left = [whole[place] for place in kept]

    results = offer(lab, *left, create(9, "a"))

    assert reasons(results) == [FailureReason.SUPERSEDED, FailureReason.GROUP_REJECTED, None]
    assert list(lab.failure(results[0]).group_operations) == left
    assert lab.attributes("g2") is None


def test_a_failure_id_that_is_taken(lab: Lab) -> None:
    """A former failure does not overwrite another one that has its id: it gets an id of its own."""
    [other] = lab.settle(update(2, "gone", {"n": 1}), replica=REPLICA_B)
    former = FormerOutcome(0, other.failure_id, FailureReason.HOOK_REJECTED, "no")

    [result] = offer(lab, update(1, "t1", {"title": "refused"}), formers=[former])

    assert result.failure_id != other.failure_id
    assert lab.failure(other).reason == FailureReason.OBJECT_GONE.number


def test_offered_twice(lab: Lab) -> None:
    """What was settled when it was offered before gets that result, and changes nothing more."""
    operation = update(1, "t1", increment={"n": 1}, base_version=1)

    first, second = (offer(lab, operation, common_version=1) for _ in range(2))

    assert first == second
    assert lab.attributes("t1") == {"title": "x", "n": 1}


def test_order_and_number(lab: Lab) -> None:
    """Seqs rise, and each operation has a former outcome."""
    with pytest.raises(OperationsOutOfOrder):
        offer(lab, create(2, "a"), create(1, "b"))
    with pytest.raises(RequestInvalid):
        offer(lab, create(1, "a"), formers=[FormerOutcome(1), FormerOutcome(2)])
