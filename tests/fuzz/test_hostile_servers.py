"""
A replica among hostile servers.

Whatever a server says, in whatever order, a session is complete or ends with an error that
the replica raises on purpose, and the replica is none the worse for it.
"""

from __future__ import annotations

from typing import Any, Final

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.fuzz.replicas import MODES, SELECTED, good_messages, run_session
from tests.property.strategies import attributes, mutated
from tests.sessions import EPOCH

from tidelog import ProtocolViolated
from tidelog._limits import BATCHES_IN_FLIGHT_MAX
from tidelog._values import encode
from tidelog.v1 import operation_pb2, schema_pb2, sync_pb2
from tidelog_client._answers import batch_limits

pytestmark = pytest.mark.slow

numbers = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1, 1_000, 2**31 - 1, 2**63 - 1, -(2**63)])
small_numbers = st.sampled_from([0, 1, 2, 500, -1, 2**31 - 1, -(2**31)])
texts = st.sampled_from(["", "Task", "a\0b", "é" * 40, "x" * 600, "default", "ann"])
keys = st.sampled_from([*SELECTED, ("Task", "deleted"), ("Task", "applied"), ("Task", "more"), ("Other", "a")])
odd_keys = keys | keys | keys | st.tuples(texts, texts)
bodies = (
    attributes.map(encode)
    | attributes.map(encode)
    | st.sampled_from([b"", b"\xc0", b"\x01", b"\x81\xa1a\xc1", b"\x91" * 40, b"\x81\xa1a" + b"\x91" * 200 + b"\x01"])
    | st.sampled_from([b"\xdf\xff\xff\xff\xff", b"\x81\xa1a\xa1\xff", b"\x81\xa1a\xcf" + b"\xff" * 8, b"\x80\x80"])
    | mutated(attributes.map(encode))
)
# For the most part what a server that knows the replica says: its pending operations are 3 to 8.
applied = st.builds(
    operation_pb2.OperationResult,
    seq=numbers,
    status=st.sampled_from([1, 1, 1, 2, 2, 3, 4, 0, 9, -1]),
    version=numbers,
    failure_id=texts | st.just("failure"),
    reason=small_numbers,
    message=texts,
)
batches_of_two = st.tuples(st.sampled_from([(3, 4), (5, 6), (6, 7), (8,)]), st.lists(applied, min_size=2, max_size=2))


def _placed(drawn: tuple[tuple[int, ...], list[operation_pb2.OperationResult]]) -> sync_pb2.BatchResults:
    """Return results that are those of a batch, at least by their positions."""
    places, results = drawn
    for place, result in zip(places, results, strict=False):
        result.seq = place
    return sync_pb2.BatchResults(results=results[: len(places)])


def _object(kind: Any, **fields: Any) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda key, version, others: kind(entity=key[0], id=key[1], version=version, **others),
        odd_keys,
        numbers,
        st.fixed_dictionaries(fields),
    )


pages = st.builds(
    sync_pb2.SnapshotPage,
    snapshots=st.lists(
        _object(operation_pb2.Snapshot, attributes=bodies, outside_projection=st.booleans()), max_size=4
    ),
    removals=st.lists(_object(operation_pb2.Removal), max_size=2),
    confirmations=st.lists(_object(operation_pb2.Confirmation), max_size=2),
    resume_token=st.sampled_from([b"", b"token"]),
)
starts = st.builds(
    sync_pb2.SessionStarted,
    protocol_version=st.sampled_from([1] * 8 + [0, 2]),
    settled=st.builds(
        sync_pb2.SettledOperations,
        newest_seq=st.sampled_from([0, 0, 0, 2, 3, -1, 2**62]),
        newest_nonce=small_numbers.map(abs),
    ),
    limits=st.builds(
        sync_pb2.Limits,
        batch_operation_count=st.just(2) | small_numbers,
        batch_bytes=st.just(10_000) | small_numbers,
        batches_in_flight=st.just(2) | small_numbers,
    ),
    version=numbers,
    epoch=st.sampled_from([EPOCH] * 8 + ["", "another"]),
    resumed=st.booleans(),
    reconcile=st.booleans(),
    schema=st.none() | st.just(schema_pb2.Schema(version=-1)) | st.just(schema_pb2.Schema(version=3)),
    entities=st.lists(
        st.builds(
            sync_pb2.EntityPlan,
            entity=texts | st.sampled_from(["Task", "Note"]),
            mode=st.integers(0, 6),
            upload_excluded=st.booleans(),
            reconcile=st.booleans(),
        ),
        max_size=2,
    ),
    tenant=st.sampled_from(["default"] * 8 + ["", "another"]),
    user_id=st.sampled_from(["ann"] * 8 + ["", "bob"]),
    former_settled=st.lists(
        st.builds(
            sync_pb2.FormerSettled,
            replica_id=texts,
            ranges=st.lists(st.builds(sync_pb2.SeqRange, first=small_numbers, last=small_numbers), max_size=2),
            common_seq=numbers,
        ),
        max_size=2,
    ),
)


def _response(**message: Any) -> bytes:
    return sync_pb2.SynchronizeResponse(**message).SerializeToString()


responses = st.one_of(
    batches_of_two.map(lambda drawn: _response(batch_results=_placed(drawn))),
    pages.map(lambda one: _response(page=one)),
    st.builds(
        lambda results, more: _response(upload_settled=sync_pb2.UploadSettled(results=results, more_follow=more)),
        st.just([]) | st.lists(applied, max_size=2),
        st.sampled_from([False, False, True]),
    ),
    st.builds(
        lambda cursor, version: _response(complete=sync_pb2.SessionComplete(cursor=cursor, version=version)),
        st.sampled_from([b"cursor", b"cursor", b""]),
        numbers,
    ),
    starts.map(lambda one: _response(started=one)),
    st.binary(max_size=12),
)
GOOD: Final = {mode: good_messages(mode) for mode in MODES}


@st.composite
def sessions(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    """Draw what a server says: from nonsense to what a good one would say but for one message."""
    mode = draw(st.sampled_from(MODES))
    good = GOOD[mode]
    kind = draw(
        st.sampled_from(["nonsense", "behind a good start", "behind a good upload", "one changed", "one more"])
    )
    if kind == "nonsense":
        return mode, draw(st.lists(starts.map(lambda one: _response(started=one)), max_size=1)) + draw(
            st.lists(responses, max_size=6)
        )
    if kind == "behind a good start":
        return mode, [good[0], *draw(st.lists(responses, max_size=6))]
    if kind == "behind a good upload":
        settled = next(place for place, one in enumerate(good) if _is_settled(one))
        last = _response(complete=sync_pb2.SessionComplete(cursor=b"cursor", version=draw(numbers)))
        return mode, [
            *good[: settled + 1],
            *draw(st.lists(pages.map(lambda one: _response(page=one)), max_size=4)),
            last,
        ]
    place = draw(st.integers(0, len(good) - 1))
    put = draw(st.sampled_from(good) | responses | mutated(st.just(good[place])))
    return mode, [*good[:place], put, *good[place + (kind == "one changed") :]]


def _is_settled(data: bytes) -> bool:
    return sync_pb2.SynchronizeResponse.FromString(data).WhichOneof("message") == "upload_settled"


class TestHostileServers:
    @settings(derandomize=True, database=None, deadline=None, max_examples=250, phases=[Phase.generate])
    @given(sessions())
    def test_any_messages(self, session: tuple[str, list[bytes]]) -> None:
        """Any messages end in a complete session or a typed error; nothing pending is lost, a good server goes on."""
        run_session(*session)

    @pytest.mark.parametrize("mode", MODES)
    def test_good_messages(self, mode: str) -> None:
        """What a good server says completes a session."""
        assert run_session(mode, GOOD[mode]) is None

    @pytest.mark.parametrize(
        "page",
        [
            sync_pb2.SnapshotPage(
                snapshots=[operation_pb2.Snapshot(entity="Task", id="a", version=-1, attributes=b"\x80")]
            ),
            sync_pb2.SnapshotPage(
                snapshots=[operation_pb2.Snapshot(entity="Task", id="a" * 600, version=1, attributes=b"\x80")]
            ),
            sync_pb2.SnapshotPage(
                snapshots=[operation_pb2.Snapshot(entity="", id="a", version=1, attributes=b"\x80")]
            ),
            sync_pb2.SnapshotPage(
                snapshots=[operation_pb2.Snapshot(entity="Task", id="a", version=1, attributes=b"\xc1")]
            ),
            sync_pb2.SnapshotPage(
                snapshots=[operation_pb2.Snapshot(entity="Task", id="a", version=1, attributes=b"\x90")]
            ),
            sync_pb2.SnapshotPage(removals=[operation_pb2.Removal(entity="T\0", id="a", version=1)]),
            sync_pb2.SnapshotPage(confirmations=[operation_pb2.Confirmation(entity="Task", id="", version=1)]),
        ],
    )
    def test_pages_that_no_file_could_hold(self, page: sync_pb2.SnapshotPage) -> None:
        """A page with a name, a position or a state that cannot be ends the session before any of it is kept."""
        good = GOOD["all"]
        error = run_session("all", [*good[:-2], _response(page=page), good[-1]])

        assert isinstance(error, ProtocolViolated)

    @pytest.mark.parametrize(
        "result",
        [
            operation_pb2.OperationResult(seq=3, status=1, version=0),  # type: ignore[arg-type]
            operation_pb2.OperationResult(seq=3, status=1, version=-1),  # type: ignore[arg-type]
            operation_pb2.OperationResult(seq=3, status=2),  # type: ignore[arg-type]
            operation_pb2.OperationResult(seq=3, status=2, failure_id="x" * 600),  # type: ignore[arg-type]
            operation_pb2.OperationResult(seq=3, status=9),  # type: ignore[arg-type]
        ],
    )
    def test_results_that_settle_nothing(self, result: operation_pb2.OperationResult) -> None:
        """A result without a version, a failure or a known status ends the session; its operation stays pending."""
        good = GOOD["all"]
        other = operation_pb2.OperationResult(seq=4, status=1, version=7)  # type: ignore[arg-type]
        error = run_session("all", [good[0], _response(batch_results=sync_pb2.BatchResults(results=[result, other]))])

        assert isinstance(error, ProtocolViolated)

    @pytest.mark.parametrize("count", [2**31 - 1, 0, -1])
    def test_limits_beyond_reason(self, count: int) -> None:
        """A server that takes anything, or nothing, gets batches as they are always sent."""
        limits = batch_limits(sync_pb2.Limits(batch_operation_count=count, batch_bytes=count, batches_in_flight=count))

        assert limits.batch_operation_count <= 500
        assert limits.batch_bytes <= 1024 * 1024
        assert 1 <= limits.batches_in_flight <= BATCHES_IN_FLIGHT_MAX
