"""The application's code has a deadline, which ends it without harm to what is around it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from tests.builders import Lab, create, said

from tidelog import InvalidRule
from tidelog_server import Application, HookContext, HookObject, Reject
from tidelog_server import _deadline as deadline

QUICK = 0.15


def lab_with(hook: Callable[[HookObject, HookContext], None], moment: str = "before_commit") -> Lab:
    """Return a lab whose only hook has a short time."""
    application = Application(hook_seconds_max=QUICK)
    getattr(application, moment)("Task")(hook)
    return Lab(application)


def for_ever() -> None:
    """Go on for ever."""
    while True:
        pass


def test_a_hook_without_an_end_is_ended() -> None:
    """It settles its operation as HOOK_ERROR, and the next one, which has no hook, is none the worse."""
    lab = lab_with(lambda task, context: for_ever())

    results = lab.settle(create(1), create(2, "n1", entity="Note"))

    assert said(results) == ["HOOK_ERROR", "APPLIED"]
    assert "longer than 0.15 seconds" in results[0].message


def test_catching_everything_but_the_deadline_is_no_way_out() -> None:
    """`except Exception` does not catch it."""

    def stubborn(task: HookObject, context: HookContext) -> None:
        while True:
            try:
                for_ever()
            except Exception:  # noqa: BLE001 - what is tested
                continue

    assert said(lab_with(stubborn).settle(create(1))) == ["HOOK_ERROR"]


def test_catching_the_deadline_itself_is_no_way_out_either() -> None:
    """It comes again and again, until the hook has left."""
    caught: list[int] = []

    def stubborn(task: HookObject, context: HookContext) -> None:
        while len(caught) < 3:
            try:
                for_ever()
            except:  # noqa: E722 - what is tested
                caught.append(1)

    results = lab_with(stubborn).settle(create(1))

    assert len(caught) == 3
    assert said(results) == ["HOOK_ERROR"]


def test_hooks_that_call_each_other_share_the_time() -> None:
    """What a hook causes counts for it, and leaves nothing behind when the time is over."""

    def spreads(task: HookObject, context: HookContext) -> None:
        time.sleep(QUICK / 5)
        context.create("Task", {})

    lab = lab_with(spreads, "after_commit")

    assert said(lab.settle(create(1))) == ["HOOK_ERROR"]
    assert lab.version() == 0


def test_what_waits_outside_of_python_is_ended_when_it_comes_back() -> None:
    """It is not interrupted, and does not go on afterwards."""
    seen = []

    def sleeps(task: HookObject, context: HookContext) -> None:
        time.sleep(2 * QUICK)
        seen.append("afterwards")

    assert said(lab_with(sleeps).settle(create(1))) == ["HOOK_ERROR"]
    assert not seen


def test_waiting_for_somebody_else_does_not_count() -> None:
    """What the store takes is not the application's time, and is not ended in the middle; the rest still counts."""

    def waits() -> str:
        with deadline.waiting():
            time.sleep(3 * QUICK)
        return "done"

    def waits_and_stays() -> None:
        waits()
        for_ever()

    assert deadline.run(waits, seconds=QUICK) == "done"
    with pytest.raises(deadline.DeadlineExceeded):
        deadline.run(waits_and_stays, seconds=QUICK)


def test_catching_everything_after_a_wait_is_no_way_out() -> None:
    """Whoever catches what tells him, where he comes back from a wait, that his time is over, is told again."""

    def stubborn(task: HookObject, context: HookContext) -> None:
        with suppress(BaseException), deadline.waiting():
            deadline._watches[threading.get_ident()].end = 0.0
        for_ever()

    results = lab_with(stubborn).settle(create(1))

    assert said(results) == ["HOOK_ERROR"]
    assert "longer than 0.15 seconds" in results[0].message


def test_waiting_within_the_engine() -> None:
    """What must be done as a whole is so after it has waited, too."""
    seen = []

    def works() -> None:
        with deadline.paused():
            with deadline.waiting():
                pass
            end = time.monotonic() + 3 * QUICK
            while time.monotonic() < end:
                pass  # here it would strike
            seen.append("as a whole")

    with pytest.raises(deadline.DeadlineExceeded):
        deadline.run(works, seconds=QUICK)
    assert seen == ["as a whole"]


def test_a_verdict_in_time_is_heard() -> None:
    """What a hook says before its time is over counts."""

    def refuses(task: HookObject, context: HookContext) -> None:
        raise Reject("no")

    application = Application(hook_seconds_max=60)
    application.before_commit("Task")(refuses)

    assert said(Lab(application).settle(create(1))) == ["HOOK_REJECTED"]


def test_nothing_arrives_after_the_end() -> None:
    """However close the end of a function is to its deadline, what comes after it is not struck."""
    ended = 0
    for number in range(25):
        seconds = 0.01 + number / 5_000

        def about_as_long(seconds: float = seconds) -> None:
            end = time.monotonic() + deadline.LOOK_SECONDS + seconds / 2
            while time.monotonic() < end:
                pass

        try:
            deadline.run(about_as_long, seconds=seconds)
        except deadline.DeadlineExceeded:
            ended += 1
        end = time.monotonic() + 0.02
        while time.monotonic() < end:
            pass  # here it would strike

    assert ended > 0


def test_threads_have_deadlines_of_their_own() -> None:
    """Each is ended at its own time, the others go on."""
    results: dict[str, Any] = {}

    def work(name: str, seconds: float, function: Callable[[], Any]) -> None:
        try:
            results[name] = deadline.run(function, seconds=seconds)
        except deadline.DeadlineExceeded:
            results[name] = "ended"

    def patient() -> str:
        time.sleep(3 * QUICK)
        return "done"

    threads = [
        threading.Thread(target=work, args=("loop", QUICK, for_ever)),
        threading.Thread(target=work, args=("patient", 60, patient)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert results == {"loop": "ended", "patient": "done"}


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_no_time_is_no_limit(seconds: float) -> None:
    """A limit that no hook could keep is refused when it is declared."""
    with pytest.raises(InvalidRule):
        Application(hook_seconds_max=seconds)
