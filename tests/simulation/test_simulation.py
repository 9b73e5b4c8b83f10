"""
The simulation, in the normal run of the tests: as many worlds as fit into a few minutes.

`make simulate SEEDS=0-99999` runs more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.simulation import promises
from tests.simulation.faults import Coverage, client_commit, server_commit
from tests.simulation.model import Misfit, patched, same
from tests.simulation.mutations import MUTATIONS, catch
from tests.simulation.promises import PromiseBroken
from tests.simulation.records import Committed, read_replica, read_server
from tests.simulation.run import run_many, run_seed
from tests.simulation.world import QUIET_ROUNDS_MAX

from tidelog import Patch
from tidelog._environment import LmdbTransaction
from tidelog._patch import decode_patch
from tidelog_client import Replica
from tidelog_server import Application, LmdbStore, Server

ROOT = Path(__file__).resolve().parents[2]
# The last one dies as it discards what a download brought in vain: none of the others does.
SEEDS = (*range(2_000), 2_947)
LONG_STEPS = 1_500
# The first two, and some in which something was once found that shorter worlds had not shown.
LONG_SEEDS = (1_000_001, 1_000_002, 1_000_010, 1_000_028, 1_000_036, 1_000_048, 1_000_049, 1_000_053)
TIMEOUT_SECONDS = 1_200

# How many worlds a mistake may take to be found; most take one to five.
MUTATION_SEEDS = range(150)
# Among them worlds in which the order of a set, and the name of a directory, were in the words of an error.
DECIDING_SEEDS = (7, 9023, 9144)
PROMISES = {
    "As said", "Bounded", "By version", "Change log", "Commit group", "Conflict", "Converges", "Cursor",
    "Cursor behind state",
    "Durable", "Files", "Forks and restores", "Fresh", "In order", "Incarnation", "No mass delete", "No poison",
    "Nothing lost on refusal", "One at a time", "Private", "Projection", "References", "Rights", "Rules",
    "Settled marks", "Settled once", "Sole writer", "Verification", "View",
    # What the product itself says of an id that cannot be used any more, and of a backup that contradicts itself.
    "ReplicaForked", "ReplicaRetired", "BackupDamaged",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_promises_hold_whatever_happens(capsys: pytest.CaptureFixture[str]) -> None:
    """Every promise holds in thousands of worlds, in which everything has happened that the simulation can do."""
    coverage = Coverage()
    for outcome in run_many(SEEDS):
        assert not outcome.error, outcome.report
        coverage.add(outcome.coverage)
    with capsys.disabled():
        print("", *coverage.lines(), f"{len(SEEDS):,} worlds", sep="\n")  # noqa: T201 - what was covered is a result

    assert list(coverage.holes()) == []
    assert coverage.rounds_max <= QUIET_ROUNDS_MAX


@pytest.mark.slow
@pytest.mark.parametrize("seed", LONG_SEEDS)
def test_promises_hold_for_long(seed: int) -> None:
    """A world that lasts fifteen times as long keeps its promises too."""
    outcome = run_seed(seed, steps=LONG_STEPS)
    assert not outcome.error, outcome.report


@pytest.mark.slow
def test_a_seed_decides_everything() -> None:
    """The same seed makes the same things happen in any process, down to every byte of the change log."""
    run = f"from tests.simulation.run import run_seed; print(*(run_seed(one).fingerprint for one in {DECIDING_SEEDS}))"
    roots = [str(ROOT / folder) for folder in (".", "changelog", "server", "client")]

    def elsewhere(hash_seed: str) -> list[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "PYTHONHASHSEED": hash_seed}
        return subprocess.run(
            [sys.executable, "-c", run], env=environment, capture_output=True, check=True, text=True
        ).stdout.split()

    first = elsewhere("1")

    assert first == elsewhere("2")
    assert first[0] == run_seed(DECIDING_SEEDS[0]).fingerprint
    assert len(set(first)) == len(DECIDING_SEEDS)


@pytest.mark.slow
def test_a_failure_says_how_to_see_it_again() -> None:
    """What a failing world prints ends with the one command that replays it."""
    with MUTATIONS[0].apply():
        outcome = next(one for one in map(run_seed, MUTATION_SEEDS) if one.error)

    assert outcome.report.endswith(f"replay: python -m tests.simulation --seeds {outcome.seed} --steps 100 --trace")


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(MUTATIONS)), ids=[one.name for one in MUTATIONS])
def test_mistakes_are_found(index: int) -> None:
    """A mistake put into the product breaks a promise in one of the first worlds."""
    caught = catch(index, MUTATION_SEEDS)

    assert caught is not None, f"nothing noticed that {MUTATIONS[index].name}"
    assert caught.promise in PROMISES


def test_a_write_without_a_name_is_noticed() -> None:
    """Whatever begins to write must become a crash point: a name that is not in the list ends the simulation."""

    def work() -> None: ...

    with pytest.raises(AssertionError, match="no crash point"):
        client_commit(work)
    with pytest.raises(AssertionError, match="no crash point"):
        server_commit(work)


def test_coverage_names_its_holes() -> None:
    """Without anything that happened, everything is a hole; what happened is none."""
    coverage = Coverage()
    assert {"fault CUT", "crash SETTLE.BEFORE", "reason CONFLICT", "mode ALL"} <= set(coverage.holes())

    coverage.faults["CUT"] += 1
    coverage.crashes["SETTLE.BEFORE"] += 1
    other = Coverage(rounds_max=3)
    other.add(coverage)

    assert other.rounds_max == 3
    assert not {"fault CUT", "crash SETTLE.BEFORE"} & set(other.holes())


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
