"""
The simulation, in the normal run of the tests: as many seeds as fit into a few seconds.

`python -m tests.simulation --seeds 0-10000` runs more.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.simulation import promises
from tests.simulation.model import Misfit, patched, same
from tests.simulation.promises import PromiseBroken
from tests.simulation.records import Committed, read_replica, read_server
from tests.simulation.run import run_seed

from tidelog import Patch
from tidelog._environment import LmdbTransaction
from tidelog._patch import decode_patch
from tidelog_client import Replica
from tidelog_server import Application, LmdbStore, Server

SEEDS_PER_TEST = 10
TESTS = 12
LONG_STEPS = 1_500


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS_PER_TEST * TESTS, SEEDS_PER_TEST))
def test_promises_hold(first: int) -> None:
    """Whatever happens to replicas, links and server, every promise holds and in the end all agree."""
    for seed in range(first, first + SEEDS_PER_TEST):
        outcome = run_seed(seed)
        assert not outcome.error, outcome.report


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1_000_001, 1_000_002, 1_000_003])
def test_promises_hold_for_long(seed: int) -> None:
    """A world that lasts ten times as long keeps its promises too."""
    outcome = run_seed(seed, steps=LONG_STEPS)
    assert not outcome.error, outcome.report


@pytest.mark.slow
def test_a_seed_decides_everything() -> None:
    """The same seed makes the same things happen, so that a failure can be seen again."""
    first, second = run_seed(7), run_seed(7)

    assert first.events == second.events
    assert first.events != run_seed(8).events


# --- the checkers find what they look for -----------------------------------------------


@pytest.fixture
def synchronized(tmp_path: Path) -> tuple[Path, Path]:
    """A store and a replica that have synchronized a creation, an update, a deletion and a pending update."""
    store = LmdbStore(tmp_path / "server")
    with (
        Server(Application(), store=store) as server,
        Replica(tmp_path / "replica", server=server.address) as replica,
    ):
        replica.create("Note", {"n": 1}, "a")
        replica.create("Note", {"n": 1}, "b")
        replica.update("Note", "a", {"n": 2})
        replica.delete("Note", "b")
        replica.synchronize_all()
        replica.update("Note", "a", increment={"n": 1})
    store.close()
    return tmp_path / "server", tmp_path / "replica"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "database", "entry", "promise"),
    [
        ("server", "by_version", 0, "By version"),
        ("server", "changes", 1, "Change log"),
        ("server", "commits", -1, "Change log"),
        ("server", "settled", -1, "Settled marks"),
        ("replica", "log", -1, "Durable"),
        ("replica", "outcomes", 0, "Settled once"),
        ("replica", "pending", 0, "Settled once"),
        ("replica", "base", 0, "View"),
        ("replica", "objects", 0, "View"),
        ("replica", "unconfirmed", 0, "View"),
    ],
)
def test_checkers_find_damage(
    synchronized: tuple[Path, Path], where: str, database: str, entry: int, promise: str
) -> None:
    """A checker that never fails checks nothing: an entry that is missing breaks the promise that it stands for."""
    store, replica = LmdbStore(synchronized[0]), Replica(synchronized[1])
    try:
        committed = Committed(read_replica(replica._storage).log)
        environment = store._environment if where == "server" else replica._storage.environment
        damaged = environment.database(database)

        def damage(transaction: LmdbTransaction) -> None:
            keys = list(transaction.cursor(damaged).iternext(keys=True, values=False))
            assert transaction.delete(keys[entry], db=damaged)

        environment.write(damage)
        record = read_replica(replica._storage)
        server = read_server(store, {record.replica_id: record.last_seq})
        with pytest.raises(PromiseBroken, match=f"^promise broken: {promise}"):
            promises.check_everything(server, {record.replica_id: record}, {record.replica_id: committed})
    finally:
        replica.close()
        store.close()


@pytest.mark.slow
def test_a_sound_state_passes(synchronized: tuple[Path, Path]) -> None:
    """The same state without damage breaks no promise."""
    store, replica = LmdbStore(synchronized[0]), Replica(synchronized[1])
    try:
        record = read_replica(replica._storage)
        committed = Committed(record.log)
        server = read_server(store, {record.replica_id: record.last_seq})
        promises.check_everything(server, {record.replica_id: record}, {record.replica_id: committed})
        with pytest.raises(PromiseBroken, match="pending, and not reported"):
            promises.check_converged_when_quiet(server, record, not_ready=())
        promises.check_converged_when_quiet(server, record, not_ready=[5])
    finally:
        replica.close()
        store.close()


# --- the model --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patch",
    [
        Patch({"a": 1}),
        Patch({}, ("a",)),
        Patch(increment={"n": 2, "new": 1}),
        Patch(add={"tags": [1, 1.0, True], "new": [None]}),
        Patch(remove={"tags": [1]}),
        Patch(increment={"text": 1}),
        Patch(increment={"n": 2**63 - 1}),
        Patch(add={"n": [1]}),
    ],
)
def test_model_and_product_agree(patch: Patch) -> None:
    """The checkers' own idea of a patch is the product's."""
    attributes = {"a": 0, "n": 1, "tags": [1, float("nan")], "text": "x"}
    try:
        expected = decode_patch(patch.encode()).apply(attributes)
    except ValueError:
        with pytest.raises(Misfit):
            patched(attributes, patch)
    else:
        assert same(patched(attributes, patch), expected)
