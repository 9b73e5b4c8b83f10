from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from tidelog_server import commands

UNLIMITED = -1


@pytest.mark.parametrize(
    ("before", "allowed", "warned"),
    [
        ((256, 4_096), 1_256, False),
        ((256, UNLIMITED), 1_256, False),
        ((256, 1_000), 1_000, True),
        ((2_000, 4_096), 2_000, False),
        ((UNLIMITED, UNLIMITED), UNLIMITED, False),
    ],
)
def test_a_server_may_open_a_file_for_each_session(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    before: tuple[int, int],
    allowed: int,
    warned: bool,  # noqa: FBT001 - a case
) -> None:
    """The limit of open files is raised to what sessions need, never lowered; a refusal of the system is logged."""
    limits = [before]
    system = SimpleNamespace(
        RLIMIT_NOFILE=7,
        RLIM_INFINITY=UNLIMITED,
        getrlimit=lambda _: limits[-1],
        setrlimit=lambda _, limit: limits.append(limit),
    )
    monkeypatch.setattr(commands, "resource", system)

    with caplog.at_level(logging.WARNING):
        commands.allow_open_files(1_256)

    assert limits[-1] == (allowed, before[1])
    assert bool(caplog.records) is warned
