"""Verification of a store in PostgreSQL: what is damaged is named, and nothing else is."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from tests.builders import TENANT, TIME_US
from tests.postgres import Cluster
from tests.unit.test_store_verification import make_history

from tidelog import Finding, FindingKind, FormatUnsupported, StorageError
from tidelog_server import (
    Application,
    DirectoryContents,
    PostgresStore,
    StoreUnavailable,
    Tenant,
    _postgres_records,
    begin_timeline,
    verify_store,
)
from tidelog_server._adoption import adopt_schema
from tidelog_server._files import Files

pytestmark = pytest.mark.slow

# What is done to the tables, the findings that follow, and what one of them says.
DAMAGES = {
    "a change that is lost": (
        "DELETE FROM changes WHERE version = 2",
        ["chain_broken", "change_missing", "change_orphaned", "head_wrong"],
        "change 2",
    ),
    "the first changes, of a store that collected none": (
        "DELETE FROM changes WHERE version <= 5 AND tenant = 1",
        ["chain_broken", "change_missing"],
        "changes 1 to 5",
    ),
    "all changes of a tenant": (
        "DELETE FROM changes WHERE tenant = 1",
        ["chain_broken", "head_wrong"],
        "that of the newest change",
    ),
    "changes that should be collected": (
        "UPDATE tenants SET collected = 6 WHERE number = 1",
        ["head_wrong"],
        "like all up to version 6",
    ),
    "a head beyond all": (
        "UPDATE tenants SET version = 1::bigint << 62 WHERE number = 1",
        ["head_wrong"],
        "version 4611686018427387904",
    ),
    "all outcomes of a replica": (
        "DELETE FROM settled WHERE replica = repeat('b', 16)::bytea",
        ["failure_wrong", "settled_wrong"],
        "operations 1 to 6",
    ),
    "all refused creations": ("DELETE FROM refused", ["refused_wrong"], "Order 'o4'"),
    "a failure that nothing points to": (
        "DELETE FROM failures WHERE id NOT IN (SELECT failure_id FROM settled)",
        ["failure_wrong"],
        "as they were counted",
    ),
    "a change of no kind": (
        "UPDATE changes SET kind = 77 WHERE version = 5 AND tenant = 1",
        ["chain_broken", "change_missing", "change_orphaned", "entry_unreadable"],
        "row 5",
    ),
    "a change with another patch": (
        "UPDATE changes SET patch = (SELECT patch FROM changes WHERE version = 2 AND tenant = 1) WHERE version = 1",
        ["state_differs"],
        "Order 'o1'",
    ),
    "a head behind the changes": (
        "UPDATE tenants SET version = version - 1 WHERE number = 1",
        ["change_orphaned", "head_wrong", "state_differs"],
        "version 21",
    ),
    "a commit that is lost": (
        "DELETE FROM commits WHERE tenant = 2",
        ["head_wrong", "index_wrong"],
        "version 2, commit",
    ),
    "an object that is lost": (
        "DELETE FROM objects WHERE id = 'o9'",
        ["change_orphaned", "index_wrong"],
        "Order 'o9'",
    ),
    "an object at another version": (
        "UPDATE objects SET version = 1 WHERE id = 'o9'",
        ["chain_broken", "change_orphaned"],
        "Order 'o9'",
    ),
    "two objects at one version": (
        "UPDATE objects SET version = 20 WHERE id = 'o3'",
        ["by_version_wrong", "chain_broken", "change_orphaned", "index_wrong"],
        "version 20",
    ),
    "an object without its attributes": (
        "UPDATE objects SET attributes = '\\x80' WHERE id = 'o9'",
        ["index_wrong", "state_differs"],
        "Order 'o9'",
    ),
    "an index entry that is lost": (
        "DELETE FROM indexes WHERE value = 'o9' AND tenant = 1",
        ["index_wrong"],
        "Order 'o9'",
    ),
    "a replica that is lost": ("DELETE FROM replicas", ["settled_wrong"], "the replica to be known"),
    "a replica with half of a range": (
        "UPDATE replicas SET settled_ranges = '{1}' WHERE replica = repeat('a', 16)::bytea",
        ["entry_unreadable", "settled_wrong"],
        "table replicas",
    ),
    "a replica whose id is none": (
        "UPDATE replicas SET replica = 'a' WHERE replica = repeat('a', 16)::bytea",
        ["entry_unreadable", "settled_wrong"],
        "1 bytes",
    ),
    "an outcome that is lost": (
        "DELETE FROM settled WHERE seq = 6",
        ["failure_wrong", "settled_wrong"],
        "operation 6",
    ),
    "failures that are lost": (
        "DELETE FROM failures",
        ["failure_wrong", "index_wrong", "refused_wrong", "settled_wrong"],
        "the failure",
    ),
    "a refused creation of another failure": (
        "UPDATE refused SET failure = repeat('x', 16)::bytea WHERE id = 'n5'",
        ["refused_wrong"],
        "Note 'n5'",
    ),
    "rows of nobody": (
        "UPDATE commits SET tenant = 77 WHERE tenant = 2",
        ["head_wrong", "index_wrong", "tenant_wrong"],
        "number 77",
    ),
    "an epoch that is none": ("UPDATE store SET epoch = 'x'", ["meta_wrong"], "'x'"),
    "a schema that is none": ("UPDATE notes SET value = 'x' WHERE name = 'adoption'", ["meta_wrong"], "schema"),
}


@pytest.fixture(scope="module")
def history(postgres_cluster: Cluster) -> Iterator[str]:
    """Give the address of a database with a history, to be copied."""
    with postgres_cluster.database() as conninfo:
        with closing(PostgresStore(conninfo)) as store:
            make_history(store)
        yield conninfo


@pytest.fixture
def damaged(postgres_cluster: Cluster, history: str) -> Iterator[str]:
    """Give the address of a copy, to be damaged."""
    with postgres_cluster.database(template=history) as conninfo:
        yield conninfo


def damage(conninfo: str, statement: str) -> None:
    """Change a store behind its back."""
    with psycopg.connect(conninfo, options="-c search_path=tidelog") as connection:
        assert connection.execute(statement.encode()).rowcount > 0


def found(conninfo: str) -> list[Finding]:
    """Verify a store."""
    return list(verify_store(conninfo))


def test_a_rich_history_is_sound(history: str) -> None:
    """A store in which everything has happened that can happen is as it should be, and all of it was looked at."""
    counts: Counter[str] = Counter()

    assert list(verify_store(history, counts=counts)) == []
    assert counts["tenants"] == 2
    assert min(counts[what] for what in ("changes", "objects", "index entries", "replicas", "outcomes", "failures"))


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(damaged: str, name: str) -> None:
    """Whatever is changed behind the server's back is among the findings."""
    statement, kinds, text = DAMAGES[name]
    damage(damaged, statement)

    findings = found(damaged)

    assert sorted({one.kind.value for one in findings}) == kinds
    assert any(text in f"{one.where} {one.expected} {one.found}" for one in findings)


def fill(connection: psycopg.Connection, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Let a table hold these rows, and no others."""
    insert = f"INSERT INTO {table} OVERRIDING SYSTEM VALUE VALUES"
    with connection.transaction():
        connection.execute(f"DELETE FROM {table}".encode())
        for row in rows:
            connection.execute(f"{insert} ({', '.join(['%s'] * len(row))})".encode(), row)


def replaced(value: Any, chosen: random.Random) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chosen.choice([value ^ 1, -1, 1 << 62])
    if isinstance(value, bytes):
        return chosen.choice([b"", value[:-1], value[:-1] + b"\xff", b"\xc1"])
    if isinstance(value, list):
        return value[1:]
    return chosen.choice(["", value[:-1], value + "\u00e9"])


def test_one_row_of_every_table(damaged: str) -> None:
    """Whatever row is lost, and whatever is in one of its columns: verification ends in findings, or in none."""
    chosen = random.Random(4)
    with psycopg.connect(damaged, options="-c search_path=tidelog", autocommit=True) as connection:
        query = "SELECT tablename FROM pg_tables WHERE schemaname = 'tidelog' AND tablename <> 'store' ORDER BY 1"
        for (table,) in connection.execute(query).fetchall():
            rows = connection.execute(f"SELECT * FROM {table}".encode()).fetchall()
            for index in chosen.sample(range(len(rows)), min(3, len(rows))):
                row, column = rows[index], chosen.randrange(len(rows[index]))
                other = (*row[:column], replaced(row[column], chosen), *row[column + 1 :])
                for instead in ([], [other]):
                    with suppress(psycopg.errors.UniqueViolation):
                        fill(connection, table, [*rows[:index], *rows[index + 1 :], *instead])
                    found(damaged)
            fill(connection, table, rows)

    assert found(damaged) == []


def test_findings_name_their_tenant(damaged: str) -> None:
    """What is wrong in one tenant's data is told with its name."""
    damage(damaged, "DELETE FROM commits WHERE tenant = 2")

    assert {one.tenant for one in found(damaged)} == {"other"}


def test_pages_are_read_to_their_end(damaged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pages of two rows as much is looked at, and found, as with large ones."""
    damage(damaged, "DELETE FROM changes WHERE version = 5 AND tenant = 1")
    whole: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    expected = list(verify_store(damaged, counts=whole))
    monkeypatch.setattr(_postgres_records, "PAGE_ROWS", 2)

    assert list(verify_store(damaged, counts=parts)) == expected
    assert parts == whole


def test_contents_of_files(postgres_database: str, tmp_path: Path) -> None:
    """Contents are looked at where they are said to be: one that is lost is named."""
    contents = DirectoryContents(tmp_path)
    with closing(PostgresStore(postgres_database)) as store:
        adopt_schema(Application(), store, migrate=False, time_us=TIME_US)
        files = Files(Application(), store, contents, lambda: TIME_US)
        tenant = Tenant(Application(), store, TENANT, None, lambda: TIME_US, files)
        tenant.create("Task", {"photo": tenant.add_file(b"a photo", name="photo.jpg")}, "t1")
    counts: Counter[str] = Counter()
    assert list(verify_store(postgres_database, contents=contents, counts=counts)) == []
    assert counts["contents"] == 1

    (kept,) = contents.contents(TENANT)
    contents.delete(TENANT, kept.sha256, kept.copy)

    assert found(postgres_database) == []
    assert [(one.kind, one.tenant) for one in verify_store(postgres_database, contents=contents)] == [
        (FindingKind.CONTENT_LOST, TENANT)
    ]


def test_a_store_in_use(postgres_database: str) -> None:
    """A store that a server has open and writes to is found sound, and goes on."""
    with closing(PostgresStore(postgres_database)) as store:
        make_history(store)
        findings = verify_store(postgres_database)
        assert next(findings, None) is None
        assert found(postgres_database) == []


def test_what_is_no_store(postgres_database: str, postgres_cluster: Cluster) -> None:
    """An empty database, one that holds something else, and none at all are told by typed errors; nothing is made."""
    looks: list[Callable[[str], object]] = [found, begin_timeline]
    for look in looks:
        with pytest.raises(StorageError, match="holds no store"):
            look(postgres_database)
    assert postgres_cluster.execute("SELECT to_regnamespace('tidelog')", postgres_database) == [(None,)]

    postgres_cluster.execute("CREATE SCHEMA tidelog CREATE TABLE other (a integer)", postgres_database)
    looks.append(PostgresStore)
    for look in looks:
        with pytest.raises(FormatUnsupported):
            look(postgres_database)
    for look in looks:
        with pytest.raises(StoreUnavailable, match="no_such_database"):
            look(postgres_cluster.conninfo("no_such_database"))
