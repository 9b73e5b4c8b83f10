"""A server gets a new schema: its store, the replicas that know the old one, and the command."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.builders import contents, quick_folder

from tidelog import Entity, Integer, Rename, Schema, String, attribute
from tidelog.cli import ExitCode
from tidelog_client import Replica
from tidelog_server import Application, SchemaContradicted, Server

TIDELOG = shutil.which("tidelog", path=str(Path(sys.executable).parent)) or "tidelog"
RUN_TIMEOUT_SECONDS = 60

OLD = Schema([Entity("Task", {"title": String(), "n": Integer(), "who": String()})])
RENAMED = Schema(
    [Entity("Task", {"name": String(), "n": Integer(), "who": String()})],
    version=2,
    renames=[Rename(version=2, entity="Task", attribute="title", to="name")],
)
MOVED = Schema(
    [Entity("Job", {"title": String(), "n": Integer(), "who": String()})],
    version=2,
    renames=[Rename(version=2, entity="Task", to="Job")],
)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder for a server and its replicas."""
    with quick_folder() as path:
        yield path


@contextmanager
def serving(folder: Path, application: Application | Schema, *, migrate: bool = False) -> Iterator[Server]:
    """Run a server on the store of the folder."""
    if isinstance(application, Schema):
        application = Application(schema=application)
    with Server(application, store=folder / "server", migrate=migrate) as server:
        yield server


@contextmanager
def replica(folder: Path, name: str, server: Server | None, schema: Schema | None = None) -> Iterator[Replica]:
    """Open a replica of a server."""
    with Replica(folder / name, server=server.address if server is not None else None, schema=schema) as found:
        yield found


class TestReplicas:
    def test_attributes_get_their_new_names(self, folder: Path) -> None:
        """A replica that has nothing pending follows a rename, whatever schema its program has."""
        with serving(folder, OLD) as server, replica(folder, "a", server, OLD) as a:
            server.tenant().create("Task", {"title": "x", "n": 1}, "t1")
            a.synchronize_all()

        with serving(folder, RENAMED, migrate=True) as server, replica(folder, "a", server, OLD) as a:
            a.synchronize_all()
            assert contents(a) == {"t1": {"name": "x", "n": 1}}
            assert server.tenant().get("Task", "t1") == {"name": "x", "n": 1}

    def test_pending_changes_by_the_old_names_are_applied(self, folder: Path) -> None:
        """What a replica did offline with the old schema is applied, and it then shows what the server has."""
        with serving(folder, OLD) as server, replica(folder, "a", server, OLD) as a:
            a.create("Task", {"title": "x", "n": 1}, "t1")
            a.create("Task", {"title": "gone"}, "t2")
            a.synchronize_all()
            a.update("Task", "t1", {"title": "y"}, increment={"n": 1})
            a.delete("Task", "t2")
            a.create("Task", {"title": "new"}, "t3")

        with serving(folder, RENAMED, migrate=True) as server, replica(folder, "a", server, OLD) as a:
            report = a.synchronize_all()

            assert (report.applied, report.rejected) == (3, 0)
            assert contents(a) == {"t1": {"name": "y", "n": 2}, "t3": {"name": "new"}}
            assert {found.id: found.attributes for found in server.tenant().query("Task")} == contents(a)

    def test_pending_changes_by_the_old_entity_name_are_applied(self, folder: Path) -> None:
        """Objects go over to the new name with what was pending on them."""
        with serving(folder, OLD) as server, replica(folder, "a", server, OLD) as a:
            a.create("Task", {"title": "x", "n": 1}, "t1")
            a.create("Task", {"title": "gone"}, "t2")
            a.synchronize_all()
            a.update("Task", "t1", {"title": "y"}, increment={"n": 1})
            a.delete("Task", "t2")
            a.create("Task", {"title": "new"}, "t3")

        with serving(folder, MOVED, migrate=True) as server, replica(folder, "a", server, OLD) as a:
            report = a.synchronize_all()

            assert (report.applied, report.rejected) == (3, 0)
            expected = {"t1": {"title": "y", "n": 2}, "t3": {"title": "new"}}
            assert {found.id: found.attributes for found in server.tenant().query("Job")} == expected
            assert contents(a, "Task") == {}
            assert a.pending_count() == 0
        with replica(folder, "a", server=None, schema=MOVED) as a:
            assert contents(a, "Job") == expected

    def test_what_no_rename_explains_is_a_mismatch(self, folder: Path) -> None:
        """An attribute that is gone for good refuses the old operation and wipes nothing; the others go on."""
        with serving(folder, OLD) as server, replica(folder, "a", server, OLD) as a:
            a.create("Task", {"n": 1}, "t1")
            a.synchronize_all()
            a.update("Task", "t1", {"title": "y"})
            a.update("Task", "t1", {"n": 2})

        without = Schema([Entity("Task", {"n": Integer(), "who": String()})], version=2)
        with serving(folder, without) as server, replica(folder, "a", server, OLD) as a:
            report = a.synchronize_all()

            assert [str(failure.reason) for failure in report.failures] == ["SCHEMA_MISMATCH"]
            assert contents(a) == {"t1": {"n": 2}}

    def test_a_replica_follows_a_download_by_an_index_that_is_added(self, folder: Path) -> None:
        """What left a replica's part of the data before the index was there is removed, once it synchronizes."""

        def application(*indexes: str, version: int) -> Application:
            found = Application(schema=Schema([Entity("Task", {"who": String()}, indexes=indexes)], version=version))
            found.synchronize("Task", attribute("who") == "ann")
            return found

        with serving(folder, application(version=1)) as server, replica(folder, "a", server) as a:
            for id_ in ("t1", "t2", "t3"):
                server.tenant().create("Task", {"who": "ann"}, id_)
            a.synchronize_all()
            server.tenant().update("Task", "t1", {"who": "bob"})
            server.tenant().delete("Task", "t2")

        with serving(folder, application("who", version=2)) as server, replica(folder, "a", server) as a:
            a.synchronize_all()
            assert contents(a) == {"t3": {"who": "ann"}}
            server.tenant().update("Task", "t1", {"who": "ann"})
            server.tenant().update("Task", "t3", {"who": "bob"})
            a.synchronize_all()
            assert contents(a) == {"t1": {"who": "ann"}}

    def test_a_refused_start_leaves_the_store_to_the_old_server(self, folder: Path) -> None:
        """After a refusal the old schema is served as before."""
        with serving(folder, OLD) as server:
            server.tenant().create("Task", {"title": "x"}, "t1")

        with pytest.raises(SchemaContradicted, match="Task 't1'"), serving(folder, RENAMED):
            pass

        with serving(folder, OLD) as server, replica(folder, "a", server) as a:
            a.synchronize_all()
            assert contents(a) == {"t1": {"title": "x"}}


SHOP = """
import os, signal
from tidelog import Entity, Integer, Schema, String
from tidelog_server import Application

old = Application(schema=Schema([Entity("Task", {"price": Integer(), "title": String()})]))
new = Application(schema=Schema([Entity("Task", {"price": Integer(minimum=100), "title": String()})], version=2))
killed = Application(schema=new.schema)

@new.migration("Task", version=2)
def in_cents(task):
    return {**task, "price": task["price"] * 100}

calls = []

@killed.migration("Task", version=2)
def in_cents_until_killed(task):
    calls.append(1)
    if len(calls) == 5_000:  # all were checked, and some are written
        os.kill(os.getpid(), signal.SIGKILL)
    return {**task, "price": task["price"] * 100}
"""


@pytest.mark.slow
class TestCommand:
    @pytest.fixture
    def shop(self, folder: Path) -> Path:
        """Give a folder with applications, and a store with 3,000 tasks of the old one."""
        (folder / "shop.py").write_text(SHOP, encoding="utf-8")
        old = Application(schema=Schema([Entity("Task", {"price": Integer(), "title": String()})]))
        with serving(folder, old) as server, server.tenant().transaction() as transaction:
            for number in range(3_000):
                transaction.create("Task", {"price": 1 + number % 9, "title": "\x1b[31m"}, f"t{number:04}")
        return folder

    def test_a_refused_start_names_the_objects(self, shop: Path) -> None:
        """The first 20 stand on a line each, nothing steers the terminal, and the exit code is that of the storage."""
        result = serve(shop, "shop:new")

        assert result.returncode == ExitCode.STORAGE
        *lines, last = result.stderr.splitlines()
        assert result.stdout == ""
        assert lines == [
            f"tenant 'default': Task 't{number:04}': attribute 'price' is {1 + number % 9}, but must be at least 100"
            for number in range(20)
        ]
        assert last.startswith("error: version 2 of the schema does not fit the store, 3000 contradictions (")

    def test_migrate_works(self, shop: Path) -> None:
        """With --migrate the server starts, and a replica gets what objects have become."""
        with served(shop, "shop:new", "--migrate") as address, Replica(shop / "a", server=address) as a:
            a.synchronize_all()
            assert a.count("Task") == 3_000
            assert {found["price"] for found in a.query("Task")} == {100 * price for price in range(1, 10)}

        with served(shop, "shop:new", "--migrate", "--failure-retention", "0.5"):
            pass

    def test_a_killed_migration_is_finished(self, shop: Path) -> None:
        """A server that dies in the middle is started again: no price is multiplied twice."""
        killed = serve(shop, "shop:killed", "--migrate")
        assert killed.returncode == -signal.SIGKILL
        refused = serve(shop, "shop:old")
        assert refused.returncode == ExitCode.STORAGE
        assert "was broken off" in refused.stderr

        with served(shop, "shop:new", "--migrate") as address, Replica(shop / "a", server=address) as a:
            a.synchronize_all()
            assert {found["price"] for found in a.query("Task")} == {100 * price for price in range(1, 10)}

    @pytest.mark.parametrize(
        ("of", "days"),
        [("failure", "-1"), ("failure", "x"), ("failure", "nan"), ("history", "1e300"), ("replica", "1e300")],
    )
    def test_a_retention_that_makes_no_sense_is_refused(self, shop: Path, of: str, days: str) -> None:
        """A number of days that cannot be is wrong usage."""
        result = serve(shop, "shop:old", f"--{of}-retention", days)

        assert result.returncode == ExitCode.USAGE
        assert result.stderr.startswith("error: ")
        assert f"--{of}-retention" in result.stderr

    def test_retentions_that_do_not_fit_each_other_are_refused(self, shop: Path) -> None:
        """A replica that were retired before history is forgotten is an error at the start."""
        result = serve(shop, "shop:old", "--history-retention", "10", "--replica-retention", "5")

        assert result.returncode == ExitCode.USAGE
        assert "history is kept for 10 days" in result.stderr


def command(folder: Path, *args: str) -> dict[str, Any]:
    """Return how `tidelog serve` is run."""
    return {
        "args": [TIDELOG, "serve", *args, "--data", "server", "--listen", "127.0.0.1:0", "--log-level", "error"],
        "cwd": folder,
        "env": dict(os.environ),
        "stdin": subprocess.DEVNULL,
        "encoding": "utf-8",
    }


def serve(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run `tidelog serve`, which ends by itself."""
    result: subprocess.CompletedProcess[str] = subprocess.run(
        **command(folder, *args), capture_output=True, timeout=RUN_TIMEOUT_SECONDS, check=False
    )
    assert "Traceback" not in result.stderr
    return result


@contextmanager
def served(folder: Path, *args: str) -> Iterator[str]:
    """Run `tidelog serve`; give its address, and end it."""
    with subprocess.Popen(**command(folder, *args), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on "), process.communicate()
            yield line.split()[-1]
        finally:
            process.terminate()
            process.communicate(timeout=RUN_TIMEOUT_SECONDS)
