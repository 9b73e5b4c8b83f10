"""Runs scenes, so many rounds of each, in worlds that do not grow for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Protocol

from tests.builders import quick_folder
from tests.kill.data import STORES, Data
from tests.kill.load import Load
from tests.kill.phases import GroupCommit, Migration, Publication, Trimming
from tests.kill.photos import Photos


class Scene(Protocol):
    """
    Something that is killed again and again.

    Attributes:
        kills: How many kills there were, by kind.
    """

    kills: Counter[str]

    def run(self) -> None:
        """Run a round: kill somebody once at least, and check what is left."""

    def finish(self) -> None:
        """Check that what is left is as it should be in the end."""


SCENES: Mapping[str, Callable[[Path, Random, Data], Scene]] = {
    one.name: one for one in (Load, Photos, GroupCommit, Publication, Trimming, Migration)
}

# Those that are about a server's data; the rest is about replicas.
OF_SERVERS = (Load.name, Photos.name, Migration.name)

# Checks read all that ever was. What is costly to prepare, and does not grow, stays longer.
WORLD_ROUNDS = {
    Load.name: 10,
    Photos.name: 10,
    GroupCommit.name: 10,
    Publication.name: 200,
    Trimming.name: 200,
    Migration.name: 200,
}


def run(
    name: str,
    *,
    rounds: int,
    seed: int,
    store: str = "lmdb",
    on_world: Callable[[int, Counter[str]], None] = lambda *_: None,
) -> Counter[str]:
    """
    Run so many rounds of a scene, and return how many kills there were of each kind.

    *on_world* is told after each world how many rounds and kills that makes.
    """
    kills: Counter[str] = Counter()
    done = 0
    with STORES[store]() as make_data:
        while done < rounds:
            dice = Random(f"{name} {seed} {done}")
            world_rounds = min(WORLD_ROUNDS[name], rounds - done)
            with quick_folder() as folder, make_data(folder) as data:
                scene = SCENES[name](folder, dice, data)
                try:
                    for _ in range(world_rounds):
                        scene.run()
                        done += 1
                    scene.finish()
                except Exception as error:
                    error.add_note(f"{name}, seed {seed}, round {done}; kills so far: {dict(kills + scene.kills)}")
                    raise
                kills += scene.kills
            on_world(done, kills)
    return kills
