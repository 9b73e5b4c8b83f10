"""The servers and replicas of a world, which are killed at random instants, and start again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

from tests.balancer import Balancer
from tests.kill.children import Child, kill_at_once
from tests.kill.data import Data
from tests.simulation.processes import Journal, free_port, wait_until

PHASE_SECONDS = 0.6
# So many phases begin once somebody has synchronized; in the others processes are killed that have just started.
STARTS_WATCHED = 0.7
START_SECONDS_MAX = 20.0


class Crew:
    """
    Servers, and replicas that edit and synchronize all the time, in processes of their own.

    Attributes:
        kills: How many kills there were, by kind.
        directories: Where the replicas are.
        journals: What they did.

    Args:
        folder: Where all of that is.
        dice: What chance does.
        data: Where the servers keep their data.
        replica_count: How many replicas there are.
        serve: Serves the data at an address, until it is killed.
        work: Edits and synchronizes a directory with an address, by a seed, and writes a journal, until it is killed.
    """

    def __init__(
        self,
        folder: Path,
        dice: Random,
        data: Data,
        *,
        replica_count: int,
        serve: Callable[..., None],
        work: Callable[..., None],
    ) -> None:
        self.kills: Counter[str] = Counter()
        self.directories = [folder / f"replica-{number}" for number in range(replica_count)]
        self.journals = [Journal(folder / f"journal-{number}") for number in range(replica_count)]
        self._dice = dice
        self._data = data
        self._addresses = [f"127.0.0.1:{free_port()}" for _ in range(data.server_count)]
        self._serve, self._work = serve, work

    def work(self) -> None:
        """Start everybody, kill somebody, and perhaps what the servers need; start those again; kill everybody."""
        first_replica = len(self._addresses)
        replicas = range(first_replica, first_replica + len(self.directories))
        with Balancer(self._addresses) as balancer:

            def start(number: int) -> Child:
                if number in replicas:
                    return self._replica(number - first_replica, balancer.address)
                return self._server(number)

            children = [start(number) for number in range(replicas.stop)]
            try:
                victims = self._dice.choice(
                    [[0], *([one] for one in replicas), [0, first_replica], list(range(len(children)))]
                )
                self._let_work()
                kill_at_once(*(children[victim] for victim in victims))
                kind = "replica" if victims[0] in replicas else "server"
                self.kills["server and replicas" if len(victims) > 1 else kind] += 1
                if struck := self._data.strike(self._dice):
                    self.kills[struck] += 1
                for victim in victims:
                    children[victim] = start(victim)
                self._let_work()
            finally:
                kill_at_once(*children)
        self.kills["server and replicas"] += 1

    def _server(self, number: int) -> Child:
        data = self._data
        return Child(self._serve, data.place, self._addresses[number], data.contents_url, data.endpoint)

    def _replica(self, number: int, address: str) -> Child:
        seed = str(self._dice.random())
        return Child(self._work, str(self.directories[number]), address, seed, str(self.journals[number].path))

    def _let_work(self) -> None:
        """Let everybody work for a while: as a rule from the moment on at which somebody has synchronized."""
        before = self._synchronized_count()
        if self._dice.random() < STARTS_WATCHED:
            with suppress(AssertionError):  # on a busy machine everything may take as long
                wait_until(
                    lambda: self._synchronized_count() > before, "nobody synchronizes", seconds=START_SECONDS_MAX
                )
        time.sleep(self._dice.uniform(0, PHASE_SECONDS))

    def _synchronized_count(self) -> int:
        return sum(journal.lines().count("synchronized") for journal in self.journals)
