from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.builders import make_operation, quick_folder

from tidelog import LogCorrupt
from tidelog._environment import Environment
from tidelog._keys import pack_position
from tidelog._log import OperationLog


@pytest.fixture
def environment() -> Iterator[Environment]:
    """Give an empty environment."""
    with quick_folder() as folder:
        opened = Environment.open(folder / "a", format_name="test")
        yield opened
        opened.close()


@pytest.fixture
def log(environment: Environment) -> OperationLog:
    """Give an empty log."""
    return OperationLog(environment)


def append(environment: Environment, log: OperationLog, *seqs: int) -> None:
    """Append operations in one transaction."""
    entries = [(seq, make_operation(seq=seq, id=f"t{seq}").encode()) for seq in seqs]
    environment.write(lambda transaction: log.append(transaction, entries))


def seqs_of(log: OperationLog, **bounds: Any) -> list[int]:
    """Return the positions that a scan gives."""
    return [operation.seq for operation in log.scan(**bounds)]


class TestAppending:
    def test_what_is_appended_can_be_read(self, environment: Environment, log: OperationLog) -> None:
        """Operations come back byte for byte, in their order."""
        append(environment, log, 1, 2, 5)

        with environment.read() as transaction:
            assert log.get(transaction, 2) == make_operation(seq=2, id="t2").encode()
            assert log.get(transaction, 3) is None
            assert log.last_seq(transaction) == 5
            assert log.entry_count(transaction) == 3
            assert log.first(transaction) == (1, make_operation(seq=1, id="t1").encode())
        assert list(log.scan()) == [make_operation(seq=seq, id=f"t{seq}") for seq in (1, 2, 5)]

    def test_an_empty_log(self, environment: Environment, log: OperationLog) -> None:
        """An empty log has no last position and nothing to read."""
        with environment.read() as transaction:
            assert log.last_seq(transaction) == 0
            assert log.entry_count(transaction) == 0
            assert log.size_bytes(transaction) == 0
            assert log.first(transaction) is None
        assert list(log.scan()) == []

    @pytest.mark.parametrize("seq", [1, 2])
    def test_positions_rise(self, environment: Environment, log: OperationLog, seq: int) -> None:
        """A position that is taken, or lies below the end, is refused, and nothing of the transaction is written."""
        append(environment, log, 1, 2)

        with pytest.raises(LogCorrupt) as caught:
            environment.write(lambda transaction: log.append(transaction, [(9, b"x"), (seq, b"x")]))

        assert caught.value.seq == seq
        assert seqs_of(log) == [1, 2]

    def test_it_takes_room(self, environment: Environment, log: OperationLog) -> None:
        """The size of a log grows with what is in it."""
        append(environment, log, *range(1, 1_001))

        with environment.read() as transaction:
            assert log.size_bytes(transaction) > 50_000


class TestScanning:
    def test_between_positions(self, environment: Environment, log: OperationLog) -> None:
        """A scan starts above a position and ends at one."""
        append(environment, log, *range(1, 11))

        assert seqs_of(log, after=7) == [8, 9, 10]
        assert seqs_of(log, until=3) == [1, 2, 3]
        assert seqs_of(log, after=3, until=5) == [4, 5]
        assert seqs_of(log, after=10) == []
        assert seqs_of(log, after=5, until=5) == []

    def test_sees_what_is_appended_meanwhile(
        self, environment: Environment, log: OperationLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A scan goes from page to page, holds up no writer, and sees what was appended behind its page."""
        monkeypatch.setattr("tidelog._log._SCAN_PAGE_ENTRIES", 2)
        append(environment, log, 1, 2, 3)
        scan = log.scan()

        seen = [next(scan).seq]
        append(environment, log, 4)

        assert seen + [operation.seq for operation in scan] == [1, 2, 3, 4]

    def test_pages_are_bounded_in_bytes(
        self, environment: Environment, log: OperationLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Large entries make short pages; nothing is left out."""
        monkeypatch.setattr("tidelog._log._SCAN_PAGE_BYTES", 1)
        append(environment, log, *range(1, 6))

        assert seqs_of(log) == [1, 2, 3, 4, 5]

    @pytest.mark.parametrize(
        "damage",
        [
            lambda entry: entry[:-1] + bytes([entry[-1] ^ 1]),
            lambda entry: bytes([entry[0] ^ 1]) + entry[1:],
            lambda entry: entry[:3],
            lambda entry: b"",
        ],
        ids=["value", "check sum", "cut short", "emptied"],
    )
    def test_a_damaged_entry(self, environment: Environment, log: OperationLog, damage: Any) -> None:
        """An entry that fails its check sum is named, by scan and by position."""
        append(environment, log, 1, 2, 3)
        database = environment.database("log")
        key = pack_position(2)
        environment.write(
            lambda transaction: transaction.put(key, damage(transaction.get(key, db=database)), db=database)
        )

        with pytest.raises(LogCorrupt) as caught:
            list(log.scan())
        assert caught.value.seq == 2
        with environment.read() as transaction, pytest.raises(LogCorrupt):
            log.get(transaction, 2)
        assert seqs_of(log, after=2) == [3]

    def test_an_entry_that_is_no_operation(self, environment: Environment, log: OperationLog) -> None:
        """Bytes that pass their check sum and are no operation are as corrupt."""
        environment.write(lambda transaction: log.append(transaction, [(1, b"\xff\xff")]))

        with pytest.raises(LogCorrupt) as caught:
            list(log.scan())
        assert caught.value.seq == 1


class TestTrimming:
    def test_from_the_oldest_on(self, environment: Environment, log: OperationLog) -> None:
        """Entries go from the oldest on, until the first that must stay, a number at the most."""
        append(environment, log, *range(1, 11))

        def trim(below: int, count_max: int) -> list[int]:
            trimmed = environment.write(
                lambda transaction: log.trim(transaction, going=lambda seq, _: seq < below, count_max=count_max)
            )
            return [seq for seq, _ in trimmed]

        assert trim(4, 100) == [1, 2, 3]
        assert trim(4, 100) == []
        assert trim(100, 2) == [4, 5]
        assert seqs_of(log) == [6, 7, 8, 9, 10]
        assert trim(100, 100) == [6, 7, 8, 9, 10]
        assert trim(100, 100) == []
        assert seqs_of(log) == []

    def test_what_goes_together(self, environment: Environment, log: OperationLog) -> None:
        """Of entries that go together all go, also beyond the number at the most."""
        append(environment, log, *range(1, 11))

        trimmed = environment.write(lambda transaction: log.trim(transaction, going=lambda *_: 3, count_max=4))

        assert [seq for seq, _ in trimmed] == [1, 2, 3, 4, 5, 6]

    def test_who_decides_sees_the_operation(self, environment: Environment, log: OperationLog) -> None:
        """Whoever decides what may go is asked with position and bytes."""
        append(environment, log, 1, 2)
        asked: list[tuple[int, bytes]] = []

        def going(seq: int, data: bytes) -> int:
            asked.append((seq, data))
            return 0

        environment.write(lambda transaction: log.trim(transaction, going=going, count_max=10))

        assert asked == [(1, make_operation(seq=1, id="t1").encode())]
