"""Large downloads that are interrupted: what that costs, what shows meanwhile, and what if the world changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from benchmarks.resume import measure_resume
from tests.builders import REPLICA_B, World, contents, create, quick_folder

from tidelog import attribute
from tidelog_client import Phase, Progress, Replica
from tidelog_client import _publication as publication
from tidelog_client import _synchronization as synchronization
from tidelog_server import Application
from tidelog_server import _download as download

OBJECTS: Final = 40
PAGE_OBJECTS: Final = 5
BROKEN_AFTER: Final = 20

# A million objects are 425 MB in the benchmarks; 20 interruptions may cost a twentieth of that.
LOST_BYTES_MAX: Final = 1_000_000


class Broken(Exception):
    """Breaks a synchronization off."""


def small(first: int, last: int) -> Iterator[dict[str, Any]]:
    """Yield attributes of small objects."""
    return ({"n": number} for number in range(first, last))


@pytest.mark.slow
def test_interruptions_cost_little_and_end_alike(tmp_path: Path) -> None:
    """A download that is cut and killed 20 times, and when it is published, costs a page or two each time."""
    measured = measure_resume(publication.PUBLISH_OBJECTS_MAX + 10_000, folder=tmp_path, attributes=small)

    assert len(measured.interruptions) >= 20
    assert measured.states[0] == measured.states[1]
    assert 0 < measured.lost_bytes < LOST_BYTES_MAX


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A server with some pages of objects; a replica stages each of them, and shows what it has in steps."""
    monkeypatch.setattr(download, "PAGE_OBJECTS_MAX", PAGE_OBJECTS)
    monkeypatch.setattr(synchronization, "STAGE_BYTES", 1)
    monkeypatch.setattr(publication, "PUBLISH_OBJECTS_MAX", 2 * PAGE_OBJECTS)
    monkeypatch.setattr(publication, "PUBLISH_STEP_PAGES", 2)
    with quick_folder() as folder, World(folder, _application()) as world:
        world.lab.settle(
            *[create(n, f"t{n:03}", {"n": n, "secret": "x"}) for n in range(1, OBJECTS + 1)], replica=REPLICA_B
        )
        yield world


def _application(change: Callable[[Application], object] = lambda _: None) -> Application:
    application = Application()
    change(application)
    return application


def _break_off(world: World) -> None:
    """Begin a download, and end the program in its middle."""

    def breaks(progress: Progress) -> None:
        if progress.phase is Phase.DOWNLOAD and progress.done >= BROKEN_AFTER:
            raise Broken

    with Replica(world.folder / "a", server=world.server.address) as a:
        with pytest.raises(Broken):
            a.synchronize_all(on_progress=breaks)
        assert contents(a) == {}
        assert a._storage.meta("resume_token")


def _complete(world: World, **options: Any) -> tuple[dict[str, dict[str, Any]], int]:
    """Synchronize; return what shows then, and how many objects still had to come."""
    told: list[Progress] = []
    with Replica(world.folder / "a", server=world.server.address, **options) as a:
        a.synchronize_all(on_progress=told.append)
        return contents(a), max(progress.done for progress in told if progress.phase is Phase.DOWNLOAD)


def _everything() -> dict[str, dict[str, Any]]:
    return {f"t{n:03}": {"n": n, "secret": "x"} for n in range(1, OBJECTS + 1)}


def test_a_server_that_was_started_again(world: World) -> None:
    """It goes on where the one before it was."""
    _break_off(world)
    world.deploy(_application())

    assert _complete(world) == (_everything(), OBJECTS - BROKEN_AFTER)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda one: one.allow("*", "Task", read=["n"]),
            {id_: {"n": found["n"]} for id_, found in _everything().items()},
        ),
        (
            lambda one: one.allow("*", "Task", where=attribute("n") > 30),
            {id_: found for id_, found in _everything().items() if found["n"] > 30},
        ),
        (
            lambda one: one.synchronize("Task", attribute("n") <= 10),
            {id_: found for id_, found in _everything().items() if found["n"] <= 10},
        ),
        (lambda one: one.synchronize("Task", "nothing_clear"), {}),
        (lambda one: one.synchronize("Task", "never"), {}),
    ],
    ids=["rules hide an attribute", "rules hide objects", "a constraint", "nothing_clear", "never"],
)
def test_a_server_whose_scope_changed(
    world: World, change: Callable[[Application], object], expected: dict[str, dict[str, Any]]
) -> None:
    """What was staged by other rules is thrown away: nothing shows that is hidden by now."""
    _break_off(world)
    world.deploy(_application(change))

    shown, came_count = _complete(world)

    assert shown == expected
    assert came_count == len(expected), "all that may be seen comes again"


def test_a_replica_that_wants_something_else(world: World) -> None:
    """What was staged for another wish is thrown away."""
    _break_off(world)

    shown, came_count = _complete(world, download={"Task": attribute("n") > 10})

    assert shown == {id_: found for id_, found in _everything().items() if found["n"] > 10}
    assert came_count == len(shown)


def test_a_server_of_another_timeline(world: World) -> None:
    """What was staged of a server that was restored since is thrown away: its versions mean something else."""
    _break_off(world)
    world.store.begin_timeline()

    assert _complete(world) == (_everything(), OBJECTS)


def test_a_wish_that_comes_back(world: World) -> None:
    """Staged pages are not taken for those of a later download that happens to begin alike."""
    _break_off(world)
    _complete(world, download={"Task": attribute("n") > 10})

    shown, _ = _complete(world)

    assert shown == _everything()
