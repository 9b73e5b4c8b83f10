"""What simulated worlds leave behind is sound: verification is about real histories too."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.builders import quick_folder
from tests.simulation.world import World

from tidelog._finding import Finding
from tidelog_client._verification import verify_replica
from tidelog_server import verify_store

SEEDS = 8


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_worlds_are_sound(seed: int) -> None:
    """After crashes, cut connections and refusals, everything that server and replicas keep agrees with itself."""
    with quick_folder() as folder:
        world = World(seed, folder)
        world.run()

        def is_unexpected(finding: Finding) -> bool:
            return world.witness is None or not world.witness.explains(finding)

        assert list(filter(is_unexpected, verify_store(folder / "server"))) == []
        replicas = [path for path in folder.iterdir() if is_replica(path)]
        assert replicas
        assert [finding for path in replicas for finding in verify_replica(path) if is_unexpected(finding)] == []


def is_replica(path: Path) -> bool:
    """Tell whether a directory holds a replica."""
    mark = path / "FORMAT"
    return mark.exists() and mark.read_text().startswith("tidelog-replica")
