from __future__ import annotations

import logging
import random
from contextlib import ExitStack
from typing import Any

import pytest

from tidelog import InvalidValue
from tidelog_server import Principal, ServerLimits
from tidelog_server._admission import (
    JITTER,
    LINES_KEPT_MIN,
    LOG_SECONDS,
    RETRY_AFTER_SECONDS_MAX,
    RETRY_AFTER_SECONDS_MIN,
    SECONDS_A_PLACE_FIRST,
    Admission,
)
from tidelog_server._errors import ServerBusy


class Door:
    """Admission with a clock that stands still until it is moved."""

    def __init__(self, **limits: Any) -> None:
        self.now = 1_000.0
        self.admission = Admission(ServerLimits(**limits), clock=lambda: self.now, dice=random.Random(1))

    def put_off(self) -> float:
        """Come while all places are taken; return when to come again."""
        with pytest.raises(ServerBusy) as caught, self.admission.session():
            pass
        return caught.value.retry_after_seconds


def test_places_are_given_back() -> None:
    """As many come in as there are places, the next one does not, and a place that is left is free again."""
    door = Door(sessions=2)
    with door.admission.session():
        with door.admission.session():
            door.put_off()
        with door.admission.session():
            assert door.admission.sessions.taken == 2

    assert door.admission.sessions.taken == 0
    assert door.admission.put_off_count == 1


def test_who_fails_inside_leaves_too() -> None:
    """A session that ends with an error gives its place back."""
    door = Door(sessions=1)
    with pytest.raises(ZeroDivisionError), door.admission.session():
        raise ZeroDivisionError

    assert door.admission.sessions.taken == 0


def test_each_one_who_is_put_off_gets_a_later_moment() -> None:
    """Who comes while many are expected is told to come after them, at the pace at which places become free."""
    door = Door(sessions=10)
    places = [door.admission.session() for _ in range(10)]
    for place in places:
        place.__enter__()

    waits = [door.put_off() for _ in range(100)]

    pace = SECONDS_A_PLACE_FIRST / 10
    for number, wait in enumerate(waits, 1):
        exact = RETRY_AFTER_SECONDS_MIN + number * pace
        assert exact * JITTER[0] <= wait <= exact * JITTER[1]
    assert len(set(waits)) == 100, "chance spreads them"
    assert min(waits[50:]) > max(waits[:5])


def test_the_pace_is_learned() -> None:
    """Where sessions take ten times as long, those who are put off are told to come that much later."""
    quick, slow = Door(sessions=1), Door(sessions=1)
    for door, seconds in ((quick, 0.5), (slow, 5.0)):
        for _ in range(100):
            with door.admission.session():
                door.now += seconds

    def last_wait(door: Door) -> float:
        with door.admission.session():
            return [door.put_off() for _ in range(4)][-1]

    assert last_wait(slow) > 4 * last_wait(quick)


def test_a_wait_has_an_end() -> None:
    """However many come, nobody is sent away for longer than the limit; and the crowd is forgotten in time."""
    door = Door(sessions=1)
    with door.admission.session():
        waits = [door.put_off() for _ in range(500)]
        door.now += RETRY_AFTER_SECONDS_MAX
        after = door.put_off()

    assert max(waits) <= RETRY_AFTER_SECONDS_MAX * JITTER[1]
    assert after < RETRY_AFTER_SECONDS_MAX / 10


def test_one_tenant_does_not_take_all_places() -> None:
    """A tenant, or a user, that has all of its own places leaves those of others alone."""
    door = Door(sessions_per_tenant=2, sessions_per_user=1)
    ann, bob, eve = (Principal(user, tenant) for user, tenant in (("ann", "acme"), ("bob", "acme"), ("ann", "other")))
    with door.admission.session_of(ann):
        with pytest.raises(ServerBusy, match="1 sessions of a user"), door.admission.session_of(ann):
            pass
        with door.admission.session_of(bob), door.admission.session_of(eve):
            carl = Principal("carl", "acme")
            with pytest.raises(ServerBusy, match="2 sessions of a tenant"), door.admission.session_of(carl):
                pass
        # Whoever found a place as a tenant's, and none as a user's, has left the first one again.
        with door.admission.session_of(bob):
            pass


def test_one_user_does_not_take_all_transfers() -> None:
    """A user whose files take all of his own places leaves those of others, and his sessions, alone."""
    door = Door(sessions_per_user=1, file_transfers_per_user=1)
    ann, bob = Principal("ann"), Principal("bob")
    with door.admission.file_transfer_of(ann):
        with pytest.raises(ServerBusy, match="1 transfers of a user"), door.admission.file_transfer_of(ann):
            pass
        with door.admission.file_transfer_of(bob), door.admission.session_of(ann):
            pass
    with door.admission.file_transfer_of(ann):
        pass


def test_one_user_does_not_take_all_questions_about_files() -> None:
    """Who asks about files again and again leaves places to others; transfers and calls have their own."""
    door = Door(file_transfers=4)
    ann, bob = Principal("ann"), Principal("bob")
    with ExitStack() as taken:
        for _ in range(2):
            taken.enter_context(door.admission.file_question())
            taken.enter_context(door.admission.file_question_of(ann))
        with pytest.raises(ServerBusy, match="2 questions of a user"):
            taken.enter_context(door.admission.file_question_of(ann))
        for _ in range(2):
            taken.enter_context(door.admission.file_question())
            taken.enter_context(door.admission.file_question_of(bob))
        with pytest.raises(ServerBusy, match="4 questions about files"):
            taken.enter_context(door.admission.file_question())
        with door.admission.file_transfer(), door.admission.call():
            pass


def test_strangers_are_forgotten() -> None:
    """What is remembered of users does not grow with the number of those who ever came."""
    door = Door(sessions_per_user=1)
    for number in range(5 * LINES_KEPT_MIN):
        with door.admission.session_of(Principal(f"user-{number}", "acme")):
            pass

    assert len(door.admission._of_some) <= LINES_KEPT_MIN


def test_the_log_hears_of_a_crowd_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands who are put off make a few lines in the log, which say how many they are."""
    door = Door(sessions=1)
    with caplog.at_level(logging.WARNING), door.admission.session():
        for _ in range(1_000):
            door.put_off()
        door.now += LOG_SECONDS
        door.put_off()

    told = [getattr(record, "put_off_count", None) for record in caplog.records]
    assert told == [1, 1_000]


@pytest.mark.parametrize(
    "name",
    ["sessions", "sessions_per_tenant", "sessions_per_user", "uploads", "idle_seconds", "file_transfers_per_user"],
)
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_limit_lets_somebody_in(name: str, value: float) -> None:
    """A limit that would let nobody in is refused by name."""
    with pytest.raises(InvalidValue, match=name):
        ServerLimits(**{name: value})  # type: ignore[arg-type]


def test_who_comes_in_is_not_forgotten_by_that() -> None:
    """A tenant's limit holds at the moment, too, at which its user is one too many to be remembered."""
    door = Door(sessions_per_tenant=1, sessions_per_user=1)
    for number in range(LINES_KEPT_MIN - 2):
        with door.admission.session_of(Principal(f"user-{number}", "other")):
            pass
    assert len(door.admission._of_some) == LINES_KEPT_MIN - 1

    with (
        door.admission.session_of(Principal("ann", "acme")),
        pytest.raises(ServerBusy, match="1 sessions of a tenant"),
        door.admission.session_of(Principal("bob", "acme")),
    ):
        pass
