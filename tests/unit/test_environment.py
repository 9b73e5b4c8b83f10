from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lmdb
import pytest
from tests.builders import quick_folder

from tidelog import DiskFull, FormatUnsupported, ResourceClosed, StorageError
from tidelog._environment import Environment, put_many

SMALL = 128 * 1024


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder."""
    with quick_folder() as path:
        yield path


@pytest.fixture
def environment(folder: Path) -> Iterator[Environment]:
    """Give an environment with a small map."""
    opened = Environment.open(folder / "a", format_name="test", map_bytes=SMALL)
    yield opened
    opened.close()


def put(environment: Environment, key: bytes, value: bytes) -> None:
    """Put an entry in a transaction of its own."""
    database = environment.database("d")
    environment.write(lambda transaction: transaction.put(key, value, db=database))


def get(environment: Environment, key: bytes) -> bytes | None:
    """Get an entry in a transaction of its own."""
    database = environment.database("d")
    with environment.read() as transaction:
        return transaction.get(key, db=database)


class TestTransactions:
    def test_what_is_written_can_be_read(self, environment: Environment) -> None:
        """A write that returned can be read, and yields what its work returned."""
        database = environment.database("d")

        assert environment.write(lambda transaction: transaction.put(b"a", b"1", db=database)) is True
        assert get(environment, b"a") == b"1"

    def test_an_exception_undoes_it(self, environment: Environment) -> None:
        """Work that raises writes nothing, and the next work goes on."""
        database = environment.database("d")

        def breaks(transaction: Any) -> None:
            transaction.put(b"a", b"1", db=database)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            environment.write(breaks)

        assert get(environment, b"a") is None
        put(environment, b"a", b"2")
        assert get(environment, b"a") == b"2"

    def test_a_reader_sees_one_moment(self, environment: Environment) -> None:
        """What is committed while somebody reads is seen by the next reader."""
        put(environment, b"a", b"1")
        database = environment.database("d")

        with environment.read() as transaction, ThreadPoolExecutor(1) as pool:
            pool.submit(put, environment, b"a", b"2").result(10)
            assert transaction.get(b"a", db=database) == b"1"

        assert get(environment, b"a") == b"2"

    def test_transactions_are_numbered(self, environment: Environment) -> None:
        """The number of the newest transaction rises with each one that writes."""
        environment.database("d")
        before = environment.last_transaction_id

        put(environment, b"a", b"1")
        get(environment, b"a")

        assert environment.last_transaction_id == before + 1

    def test_many_entries_at_once(self, environment: Environment) -> None:
        """Many entries can be put in one call; none at all is fine."""
        database = environment.database("d")
        items = [(bytes([n]), b"x" * n) for n in range(1, 100)]

        environment.write(lambda transaction: put_many(transaction, database, items))
        environment.write(lambda transaction: put_many(transaction, database, []))

        with environment.read() as transaction:
            assert list(transaction.cursor(database)) == items

    def test_an_error_of_lmdb(self, environment: Environment) -> None:
        """What LMDB refuses is a typed error that names the directory, with LMDB's own as its cause."""
        database = environment.database("d")

        with pytest.raises(StorageError, match=str(environment.path)) as caught:
            environment.write(lambda transaction: transaction.put(b"x" * 1_000, b"", db=database))

        assert isinstance(caught.value.__cause__, lmdb.Error)

    @pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EFBIG"])
    def test_no_room(self, environment: Environment, number: str) -> None:
        """Every way in which a system says that there is no room is DiskFull."""
        code = getattr(errno, number)

        def of_lmdb(transaction: Any) -> None:
            raise lmdb.Error(f"mdb_txn_commit: {os.strerror(code)}")

        def of_python(transaction: Any) -> None:
            raise OSError(code, os.strerror(code))

        for work in (of_lmdb, of_python):
            with pytest.raises(DiskFull):
                environment.write(work)

    def test_an_error_of_the_disk(self, environment: Environment) -> None:
        """An input/output error on a disk that has room is no DiskFull."""

        def breaks(transaction: Any) -> None:
            raise lmdb.Error("mdb_txn_commit: Input/output error")

        with pytest.raises(StorageError) as caught:
            environment.write(breaks)

        assert not isinstance(caught.value, DiskFull)


class TestGrowing:
    def test_in_one_transaction(self, environment: Environment) -> None:
        """A transaction that does not fit is run again in a larger map, as often as it takes."""
        database = environment.database("d")
        runs: list[int] = []

        def work(transaction: Any) -> None:
            runs.append(1)
            for n in range(40):
                transaction.put(b"%d" % n, b"x" * SMALL, db=database)

        environment.write(work)

        assert len(runs) > 1
        with environment.read() as transaction:
            assert transaction.stat(database)["entries"] == 40

    def test_waits_for_readers(self, environment: Environment) -> None:
        """The map grows when the transactions of the process have ended, and they see nothing of it."""
        put(environment, b"a", b"1")
        database = environment.database("d")
        reading, done = threading.Event(), threading.Event()

        def reads() -> bytes | None:
            with environment.read() as transaction:
                reading.set()
                done.wait(10)
                return transaction.get(b"a", db=database)

        with ThreadPoolExecutor(2) as pool:
            reader = pool.submit(reads)
            assert reading.wait(10)
            writer = pool.submit(put, environment, b"b", b"x" * 10 * SMALL)
            done.set()
            assert reader.result(10) == b"1"
            writer.result(10)

        assert get(environment, b"b") == b"x" * 10 * SMALL

    def test_under_many_threads(self, environment: Environment) -> None:
        """Readers and writers of many threads go on while the map grows under them."""
        database = environment.database("d")

        def work(name: int) -> None:
            for n in range(20):
                put(environment, b"%d-%d" % (name, n), b"x" * 8_000)
                assert get(environment, b"%d-%d" % (name, n)) == b"x" * 8_000

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))

        with environment.read() as transaction:
            assert transaction.stat(database)["entries"] == 160

    @pytest.mark.slow
    def test_by_another_process(self, environment: Environment) -> None:
        """A map that another process has enlarged is taken over, for reading and for writing."""
        put(environment, b"a", b"1")
        script = """
            import sys
            from pathlib import Path
            from tidelog._environment import Environment
            other = Environment.open(Path(sys.argv[1]), format_name="test", map_bytes=131072)
            database = other.database("d")
            for n in range(100):
                other.write(lambda transaction: transaction.put(b"other %d" % n, b"x" * 50_000, db=database))
            other.close()
        """
        for _ in range(2):
            subprocess.run(
                [sys.executable, "-c", textwrap.dedent(script), str(environment.path)], timeout=60, check=True
            )
            assert get(environment, b"other 99") == b"x" * 50_000
            put(environment, b"b", b"x" * 50_000)

        assert get(environment, b"b") == b"x" * 50_000


class TestSharing:
    def test_a_path_is_opened_once(self, folder: Path) -> None:
        """Opening a path again in one process shares what is open; the last one to close it closes it."""
        first = Environment.open(folder / "a", format_name="test")
        second = Environment.open(folder / "." / "a", format_name="test")
        put(first, b"a", b"1")
        assert get(second, b"a") == b"1"

        first.close()
        put(second, b"a", b"2")
        second.close()

        third = Environment.open(folder / "a", format_name="test")
        assert get(third, b"a") == b"2"
        third.close()

    def test_through_a_link(self, folder: Path) -> None:
        """Two names of one directory are one environment."""
        first = Environment.open(folder / "a", format_name="test")
        (folder / "link").symlink_to(folder / "a")
        second = Environment.open(folder / "link", format_name="test")

        put(first, b"a", b"1")

        assert get(second, b"a") == b"1"
        first.close()
        second.close()

    @pytest.mark.slow
    def test_opened_by_many_threads_at_once(self, folder: Path) -> None:
        """Threads that open one directory and its databases at the same moment do not hold each other up."""
        # In a process of its own: where they do, nothing in the process moves any more.
        script = """
            import sys, threading
            from concurrent.futures import ThreadPoolExecutor
            from pathlib import Path
            from tidelog._environment import Environment

            def work(path, start):
                start.wait()
                environment = Environment.open(path, format_name="test")
                for name in ("a", "b", "c", "d"):
                    database = environment.database(name)
                    environment.write(lambda transaction: transaction.put(b"x", b"1", db=database))
                environment.close()

            with ThreadPoolExecutor(8) as pool:
                for number in range(30):
                    start = threading.Barrier(8)
                    path = Path(sys.argv[1]) / str(number)
                    for future in [pool.submit(work, path, start) for _ in range(8)]:
                        future.result()
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(folder)], timeout=60, check=True)

    def test_closing_is_everybodys_own(self, folder: Path) -> None:
        """Who closed it cannot use it, and closing twice takes nothing from others."""
        first, second = (Environment.open(folder / "a", format_name="test") for _ in range(2))
        database = second.database("d")
        first.close()
        first.close()

        for use in (
            lambda: first.write(lambda transaction: None),
            lambda: first.read().__enter__(),
            lambda: first.last_transaction_id,
        ):
            with pytest.raises(ResourceClosed):
                use()
        second.write(lambda transaction: transaction.put(b"a", b"1", db=database))
        second.close()

    def test_closing_waits_for_readers(self, folder: Path) -> None:
        """A reader in another thread ends before the files are closed."""
        environment = Environment.open(folder / "a", format_name="test")
        put(environment, b"a", b"1")
        database = environment.database("d")
        reading, done = threading.Event(), threading.Event()

        def reads() -> bytes | None:
            with environment.read() as transaction:
                reading.set()
                done.wait(10)
                return transaction.get(b"a", db=database)

        with ThreadPoolExecutor(2) as pool:
            reader = pool.submit(reads)
            assert reading.wait(10)
            closing = pool.submit(environment.close)
            done.set()
            assert reader.result(10) == b"1"
            closing.result(10)


class TestFormats:
    def test_are_marked_and_compared(self, folder: Path) -> None:
        """A directory keeps the format that it was made with; another one is refused, open or closed."""
        first = Environment.open(folder / "a", format_name="one-1")
        for _ in range(2):
            with pytest.raises(FormatUnsupported) as caught:
                Environment.open(folder / "a", format_name="two-2")
            assert (caught.value.found, caught.value.supported) == ("one-1", "two-2")
            first.close()
        Environment.open(folder / "a", format_name="one-1").close()

    def test_a_directory_with_other_things(self, folder: Path) -> None:
        """A directory may hold other files; LMDB data without a mark are not touched."""
        (folder / "notes.txt").write_text("x")
        Environment.open(folder, format_name="test").close()
        (folder / "FORMAT").unlink()

        with pytest.raises(FormatUnsupported):
            Environment.open(folder, format_name="test")
