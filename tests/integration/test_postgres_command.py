"""The command `tidelog` with data in PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.test_cli import fail, read_json, run, serving, succeed
from tests.object_stores import Bucket, s3_stand_in
from tests.postgres import Cluster

from tidelog.cli import ExitCode
from tidelog_client import Replica

pytestmark = pytest.mark.slow

NOWHERE = "postgresql://ann:secret@127.0.0.1:1/shop?sslpassword=secret"
MEMORY = ("--contents", "memory:///")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """Give a bucket that the environment says how to reach."""
    with s3_stand_in() as endpoint:
        settings = {"ENDPOINT_URL": endpoint, "ALLOW_HTTP": "true", "REGION": "us-east-1"}
        for name, value in {**settings, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield Bucket(endpoint)


def test_two_servers_share_a_database(postgres_database: str, bucket: Bucket, tmp_path: Path) -> None:
    """What one server took, files too, another one over the same database and object store hands out."""
    options = ("--contents", bucket.url)
    with (
        serving(*options, cwd=tmp_path, data=postgres_database) as one,
        serving(*options, cwd=tmp_path, data=postgres_database) as other,
        Replica(tmp_path / "a", server=one) as a,
        Replica(tmp_path / "b", server=other) as b,
    ):
        a.create("Task", {"photo": a.add_file(b"a photo")}, "t1")
        a.synchronize_all()
        b.synchronize_all()
        with b.open_file("Task", "t1", "photo") as file:
            assert file.read() == b"a photo"
        b.update("Task", "t1", {"done": True})
        b.synchronize_all()
        a.synchronize_all()
        found = a.get("Task", "t1")
        assert found is not None
        assert found["done"]

    checked = succeed("verify", "--data", postgres_database, *options, cwd=tmp_path)
    assert checked.startswith("checked: tenants 1, changes 2, objects 1")
    assert checked.endswith("contents 1\n")


def test_a_database_that_was_put_back(
    postgres_cluster: Cluster, postgres_database: str, bucket: Bucket, tmp_path: Path
) -> None:
    """After a dump of it was restored, `new-timeline` makes replicas offer again what it lacks, files too."""
    options = ("--contents", bucket.url)
    with (
        serving(*options, cwd=tmp_path, data=postgres_database) as address,
        Replica(tmp_path / "a", server=address) as a,
    ):
        a.create("Task", {"n": 1}, "t1")
        a.synchronize_all()
        dump = postgres_cluster.run("pg_dump", "--format=plain", postgres_database).decode()
        a.create("Task", {"n": 2, "photo": a.add_file(b"a photo")}, "t2")
        a.synchronize_all()
    with postgres_cluster.database() as restored:
        postgres_cluster.load(restored, dump)

        # On stderr is that the database of the tests does not wait for its disk.
        [begun] = read_json(run("new-timeline", "--data", restored, "--json", cwd=tmp_path).stdout)
        printed = run("new-timeline", "--data", restored, cwd=tmp_path).stdout.splitlines()

        assert begun["versions"] == {"default": 1}
        assert printed[0] == f"began a timeline in {restored}"
        assert printed[1] == f"epoch {begun['epoch']}"
        assert printed[2].endswith(f", before it {begun['timeline']}")
        with serving(*options, cwd=tmp_path, data=restored) as address, Replica(tmp_path / "a", server=address) as a:
            report = a.synchronize_all()
            assert (report.server_restored, report.reoffered, report.rejected) == (True, 1, 0)
            with Replica(tmp_path / "b", server=address) as b:
                b.synchronize_all()
                with b.open_file("Task", "t2", "photo") as file:
                    assert file.read() == b"a photo"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("serve", "--listen", "127.0.0.1:0", *MEMORY), ExitCode.UNAVAILABLE, "cannot be reached"),
        (("verify",), ExitCode.UNAVAILABLE, "cannot be reached"),
        (("new-timeline",), ExitCode.UNAVAILABLE, "cannot be reached"),
        (("serve", "--listen", "127.0.0.1:0"), ExitCode.USAGE, "where the contents of files are kept"),
        (("backup", "copy"), ExitCode.USAGE, "pg_dump"),
        (("restore", "copy"), ExitCode.USAGE, "pg_dump"),
    ],
)
def test_a_database_out_of_reach(tmp_path: Path, arguments: tuple[str, ...], code: ExitCode, message: str) -> None:
    """Each command says so in a line, with the exit code that it has, and betrays no password."""
    told = fail(*arguments, "--data", NOWHERE, cwd=tmp_path, code=code)

    assert message in told
    assert "secret" not in told


@pytest.mark.parametrize("arguments", [("serve", "--listen", "127.0.0.1:0", *MEMORY), ("verify",), ("new-timeline",)])
class TestWrongDatabases:
    def test_one_that_is_not_there(
        self, postgres_cluster: Cluster, tmp_path: Path, arguments: tuple[str, ...]
    ) -> None:
        """A database that does not exist, yet perhaps, is out of reach."""
        address = postgres_cluster.conninfo("no_such_database")

        assert "no_such_database" in fail(*arguments, "--data", address, cwd=tmp_path, code=ExitCode.UNAVAILABLE)

    def test_one_with_something_else(
        self, postgres_cluster: Cluster, postgres_database: str, tmp_path: Path, arguments: tuple[str, ...]
    ) -> None:
        """A database in which somebody else uses the name is a storage problem."""
        postgres_cluster.execute("CREATE SCHEMA tidelog CREATE TABLE other (a integer)", postgres_database)

        told = fail(*arguments, "--data", postgres_database, cwd=tmp_path, code=ExitCode.STORAGE)
        assert "holds something else" in told

    def test_an_address_that_is_none(self, tmp_path: Path, arguments: tuple[str, ...]) -> None:
        """A URL that PostgreSQL does not take is wrong usage."""
        told = fail(*arguments, "--data", "postgresql://[secret", cwd=tmp_path, code=ExitCode.USAGE)
        assert "secret" not in told


def test_an_empty_database(postgres_database: str, tmp_path: Path) -> None:
    """Only a server makes a store where there is none."""
    for command in ("verify", "new-timeline"):
        told = fail(command, "--data", postgres_database, cwd=tmp_path, code=ExitCode.STORAGE)
        assert "holds no store" in told


def test_findings_name_the_database_without_its_password(
    postgres_cluster: Cluster, postgres_database: str, tmp_path: Path
) -> None:
    """What is wrong is told about a database whose password nobody gets to see."""
    with serving(*MEMORY, cwd=tmp_path, data=postgres_database):
        pass
    postgres_cluster.execute("UPDATE tidelog.store SET epoch = 'x'", postgres_database)

    result = run("verify", "--data", postgres_database.replace("@", ":secret@"), cwd=tmp_path)

    assert result.returncode == ExitCode.STORAGE
    assert result.stderr == f"error: {postgres_database}: 1 finding\n"
    assert "secret" not in result.stdout


@pytest.mark.parametrize(
    "use", ["Server(Application(), store=place).start()", "list(verify_store(place))", "begin_timeline(place)"]
)
def test_without_the_extra(use: str) -> None:
    """Who names a database without having the extra installed is told what to install."""
    program = f"""
import sys
sys.modules["psycopg"] = None
from tidelog_server import Application, ExtraMissing, Server, begin_timeline, verify_store
place = "postgresql://127.0.0.1:1/shop"
try:
    {use}
except ExtraMissing as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert "pip install 'tidelog[postgres]'" in done.stdout
