"""Processes are killed at random instants; nothing is lost, nothing happens twice. More: python -m tests.kill."""

from __future__ import annotations

import pytest
from tests.kill.run import SCENES, run

pytestmark = pytest.mark.slow

SEED = 1
ROUNDS = {"load": 10, "photos": 4, "group commit": 10, "publication": 3, "trimming": 5, "migration": 3}


@pytest.mark.parametrize("scene", SCENES)
def test_what_killed_processes_leave_is_whole(scene: str) -> None:
    """After SIGKILL at any moment all that was promised holds, and going on ends as without a kill."""
    kills = run(scene, rounds=ROUNDS[scene], seed=SEED)

    assert kills.total() >= ROUNDS[scene]
