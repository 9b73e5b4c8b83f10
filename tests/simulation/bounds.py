"""What is under way in one session: it does not grow with what there is to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.simulation.promises import promise

from tidelog._limits import PAGE_BYTES_MAX
from tidelog._operation import decode_operation
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import sync_pb2
from tidelog_server import _download


class Bounds:
    """
    Counts what both sides of a session have not taken in yet.

    Args:
        limits: Returns what the server said that it takes.
    """

    def __init__(self, limits: Callable[[], sync_pb2.Limits]) -> None:
        self._limits = limits
        self._unanswered = 0

    @promise("Bounded: a replica has no more under way than the server takes at once")
    def check_sent(self, message: bytes) -> Iterator[str]:
        """Look at a message of the replica's."""
        batch = splice_pb2.SynchronizeRequestSplice.FromString(message).batch
        if not batch.operations:
            return
        limits = self._limits()
        self._unanswered += 1
        if self._unanswered > limits.batches_in_flight:
            yield f"{self._unanswered} batches are unanswered, {limits.batches_in_flight} may be"
        group = decode_operation(batch.operations[0]).group
        group_size = 1 if group is None else group.size
        if len(batch.operations) > max(limits.batch_operation_count, group_size):
            yield f"{len(batch.operations)} operations in a batch, {limits.batch_operation_count} may be"
        if sum(map(len, batch.operations)) > limits.batch_bytes and len(batch.operations) > group_size:
            yield f"{sum(map(len, batch.operations))} bytes in a batch, {limits.batch_bytes} may be"

    def note_taken(self, message: bytes) -> None:
        """Note what the replica has taken in."""
        if splice_pb2.SynchronizeResponseSplice.FromString(message).batch_results:
            self._unanswered -= 1


@promise("Bounded: a page has no more objects and bytes than any other one may have")
def check_page(answer: bytes) -> Iterator[str]:
    """Look at a message of the server's."""
    data = splice_pb2.SynchronizeResponseSplice.FromString(answer).page
    if not data:
        return
    page = sync_pb2.SnapshotPage.FromString(data)
    count = len(page.snapshots) + len(page.confirmations) + len(page.removals)
    if count > (count_max := vars(_download)["PAGE_OBJECTS_MAX"]):  # as the world's settings have it
        yield f"{count} objects in a page, {count_max} may be"
    if count > 1 and len(data) > 2 * PAGE_BYTES_MAX:
        yield f"{count} objects in a page of {len(data)} bytes"
