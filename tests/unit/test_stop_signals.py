"""A server that is told to stop stops, whenever that comes."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tidelog_server.commands import _stop_signals

NUMBERS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Put back what is done on signals."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_right_before_the_wait(number: signal.Signals) -> None:
    """A signal that came before anybody waits ends the wait that follows."""
    with _stop_signals() as stopped:
        signal.raise_signal(number)
        stopped.settimeout(10)

        assert stopped.recv(1)
