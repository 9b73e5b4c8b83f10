"""Processes are killed at random instants; nothing is lost, nothing happens twice. More: python -m tests.kill."""

from __future__ import annotations

import pytest
from tests.kill.run import OF_SERVERS, SCENES, run

pytestmark = pytest.mark.slow

SEED = 1
ROUNDS = {"load": 10, "photos": 4, "group commit": 10, "publication": 3, "trimming": 5, "migration": 3}
ROUNDS_OF_TWO = {"load": 6, "photos": 3, "migration": 2}


@pytest.mark.parametrize("scene", SCENES)
def test_what_killed_processes_leave_is_whole(scene: str) -> None:
    """After SIGKILL at any moment all that was promised holds, and going on ends as without a kill."""
    kills = run(scene, rounds=ROUNDS[scene], seed=SEED)

    assert kills.total() >= ROUNDS[scene]


@pytest.mark.usefixtures("postgres_cluster")  # not used, for the scene runs one of its own; but skipped without it
@pytest.mark.parametrize("scene", OF_SERVERS)
def test_what_killed_servers_over_one_database_leave_is_whole(scene: str) -> None:
    """The same of two servers over one PostgreSQL, whose processes are killed too."""
    kills = run(scene, rounds=ROUNDS_OF_TWO[scene], seed=SEED, store="postgres")

    assert kills.total() >= ROUNDS_OF_TWO[scene]
