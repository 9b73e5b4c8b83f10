"""Cuts of a session between processes, after bytes that dice choose. All of them: python -m tests.cuts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.builders import quick_folder
from tests.cuts import Cut, Cuts, every, impatient, sample

pytestmark = pytest.mark.slow

ONE_IN = 100
SEED = 1


@pytest.fixture
def cuts() -> Iterator[Cuts]:
    """A server process behind a proxy, and no long pauses between attempts."""
    with quick_folder() as folder, impatient(), Cuts(folder) as cuts:
        yield cuts


def test_cuts_lose_and_double_nothing(cuts: Cuts) -> None:
    """Wherever a session is cut, each operation settles once, and the replica ends as the server."""
    chosen = sample(every(cuts.lengths()), ONE_IN, SEED)

    trials = [cuts.make(cut) for cut in chosen]

    cuts.check_all()
    assert sum(trial.was_cut for trial in trials) > len(trials) // 2
    assert {way for cut, trial in zip(chosen, trials, strict=True) if trial.was_cut for way in [cut.way]} == {
        "up",
        "down",
    }


def test_a_cut_is_named_as_it_is_asked_for() -> None:
    """What a finding says to run is read as the same cut."""
    cut = Cut("down", 713, resets=True)

    assert Cut.parse(str(cut)) == cut
