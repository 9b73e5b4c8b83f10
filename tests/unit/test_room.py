from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from itertools import permutations
from typing import Any, Final

import pytest

from tidelog._channel import WINDOW_BYTES
from tidelog._limits import PAGE_BYTES_MAX
from tidelog_server._room import PAGE_BYTES_LEAST, HeldPages, PageRoom, QueueRoom

# Of a test that has come to a halt.
HANG_SECONDS: Final = 30.0


async def _begun(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Begin to do something, and let it come as far as it can."""
    task = asyncio.create_task(work)
    await asyncio.sleep(0)
    return task


class TestQueueRoom:
    def test_batches_come_in_by_their_turn(self) -> None:
        """When the queue is full, batches wait, and come in one by one in the order in which they came."""

        async def scenario() -> None:
            room = QueueRoom(batches_max=2, bytes_max=1_000)
            await room.take(1)
            await room.take(1)
            waiting = [await _begun(room.take(1)) for _ in range(3)]
            for number in range(3):
                assert [task.done() for task in waiting] == [place < number for place in range(3)]
                assert (room.count, room.waiting) == (2, 3 - number)
                room.give_back(1)
                await asyncio.sleep(0)
            assert (room.count, room.waiting) == (2, 0)

        asyncio.run(scenario())

    def test_bytes_count_too(self) -> None:
        """A batch that is too large for what is left waits, and small ones behind it do not overtake it."""

        async def scenario() -> None:
            room = QueueRoom(batches_max=10, bytes_max=100)
            await room.take(60)
            large, small = await _begun(room.take(50)), await _begun(room.take(1))
            assert not large.done()
            assert not small.done()
            room.give_back(60)
            await asyncio.gather(large, small)
            assert (room.count, room.bytes) == (2, 51)

        asyncio.run(scenario())

    def test_the_largest_batch_gets_its_turn(self) -> None:
        """A batch that is larger than all the room there is comes in when nothing else is there."""

        async def scenario() -> None:
            room = QueueRoom(batches_max=10, bytes_max=100)
            await room.take(1)
            huge = await _begun(room.take(500))
            assert not huge.done()
            room.give_back(1)
            await huge

        asyncio.run(scenario())

    def test_who_goes_away_leaves_no_gap(self) -> None:
        """A session that ends while its batch waits holds up nobody, even if its turn has just come."""

        async def scenario() -> None:
            room = QueueRoom(batches_max=1, bytes_max=100)
            await room.take(1)
            gone, called, last = [await _begun(room.take(1)) for _ in range(3)]
            gone.cancel()
            await asyncio.sleep(0)
            assert room.waiting == 2
            room.give_back(1)
            called.cancel()  # it was called in, and has not noticed yet
            await last
            assert (room.count, room.bytes, room.waiting) == (1, 1, 0)

        asyncio.run(scenario())

    @pytest.mark.parametrize("steps", sorted(set(permutations(["cancel", "give back", "wake up", "wake up"]))))
    @pytest.mark.parametrize("place", range(3))
    def test_who_goes_away_in_any_order_takes_no_room_along(self, place: int, steps: tuple[str, ...]) -> None:
        """Whether a wait is over before or after room comes free, or in the same instant, no room is lost by it."""

        async def scenario() -> None:
            room = QueueRoom(batches_max=1, bytes_max=100)
            await room.take(10)
            waiting = [await _begun(room.take(20 + number)) for number in range(3)]
            for step in steps:
                if step == "cancel":
                    waiting[place].cancel()
                elif step == "give back":
                    room.give_back(10)
                else:
                    await asyncio.sleep(0)
            for number, task in enumerate(waiting):
                await asyncio.wait((task,))
                if not task.cancelled():
                    task.result()
                    assert (room.count, room.bytes) == (1, 20 + number)
                    room.give_back(20 + number)
            assert (room.count, room.bytes, room.waiting) == (0, 0, 0)

        asyncio.run(asyncio.wait_for(scenario(), HANG_SECONDS))

    def test_a_crowd_that_goes_away_at_once(self) -> None:
        """When all who wait go away and room comes free before one of them notices, the next one finds all of it."""

        async def scenario() -> None:
            room = QueueRoom(batches_max=1, bytes_max=100)
            await room.take(1)
            gone = [await _begun(room.take(1)) for _ in range(5)]
            for task in gone:
                task.cancel()
            room.give_back(1)
            last = asyncio.create_task(room.take(1))
            await asyncio.wait((*gone, last))
            assert all(task.cancelled() for task in gone)
            assert (room.count, room.bytes, room.waiting) == (1, 1, 0)

        asyncio.run(asyncio.wait_for(scenario(), HANG_SECONDS))

    def test_a_large_batch_that_goes_away_frees_those_behind(self) -> None:
        """When the one at the head, for which there is no room, ends, those behind it come in at once."""

        async def scenario() -> None:
            room = QueueRoom(batches_max=10, bytes_max=100)
            await room.take(60)
            large, small = await _begun(room.take(50)), await _begun(room.take(1))
            large.cancel()
            await small

        asyncio.run(scenario())


class TestPageRoom:
    def test_pages_shrink_as_the_room_does(self) -> None:
        """However many sessions hold a page that nobody takes, the sum stays near the bound, and each has one."""
        room = PageRoom(bytes_max=PAGE_BYTES_MAX * 32)
        sizes = []
        for _ in range(2_000):
            held = HeldPages(room)
            sizes.append(held.page_bytes(0))
            held.add(sizes[-1])

        assert sizes[0] == PAGE_BYTES_MAX
        assert sizes[-1] == PAGE_BYTES_LEAST
        assert sizes == sorted(sizes, reverse=True)
        assert room.of_newcomers.bytes <= PAGE_BYTES_MAX * 32
        assert room.bytes == sum(sizes)

    def test_nobody_reads_ahead_in_a_crowd(self) -> None:
        """A second page for a session is read only while there is plenty of room."""
        room = PageRoom(bytes_max=100)
        held = HeldPages(room)
        assert held.may_read_ahead
        room.of_newcomers.add(51)
        assert not held.may_read_ahead

    def test_a_session_leaves_nothing_behind(self) -> None:
        """What a session held is given back at its end, a page that is read too late included."""

        async def scenario() -> None:
            room = PageRoom(bytes_max=1_000_000)
            with HeldPages(room) as held:
                held.add(100_000)
                held.add(200_000)
                held.drop()
                assert room.bytes == 200_000
                held.page_bytes(300_000)
                await held.wait()
                assert room.of_newcomers.bytes > 600_000
            held.add(30)
            assert (room.bytes, room.of_newcomers.bytes, room.of_readers.bytes) == (0, 0, 0)

        asyncio.run(scenario())

    def test_a_least_page_waits_for_nobody(self) -> None:
        """Who needs no more than the least page has it, whoever waits in line; who needs more is told to wait."""

        async def scenario() -> None:
            room = PageRoom(bytes_max=100_000)
            first, second, third = HeldPages(room), HeldPages(room), HeldPages(room)
            first.add(60_000)
            assert second.page_bytes(200_000) < 200_000
            waiting = await _begun(second.wait())

            assert room.waiting == 1
            assert third.page_bytes(PAGE_BYTES_LEAST) == PAGE_BYTES_LEAST
            assert third.needed == 0
            assert third.page_bytes(PAGE_BYTES_LEAST + 1) == PAGE_BYTES_LEAST
            assert third.needed == PAGE_BYTES_LEAST + 1
            first.drop()
            await waiting  # alone, though it is larger than all room
            assert second.page_bytes(200_000) == 200_000

        asyncio.run(scenario())

    def test_newcomers_do_not_wait_for_those_who_did_not_read_before(self) -> None:
        """Who comes back after he was ended because he did not read has room of a kind of its own."""

        async def scenario() -> None:
            room = PageRoom(bytes_max=4_000_000)
            still, again = HeldPages(room, PAGE_BYTES_LEAST), HeldPages(room, PAGE_BYTES_LEAST)
            newcomer = HeldPages(room)
            still.add(WINDOW_BYTES + 1)
            still.drop()  # what a client takes that halts again
            still.add(1_900_000)
            assert again.page_bytes(1_500_000) < 1_500_000
            waiting = await _begun(again.wait())
            assert room.waiting == 1

            assert newcomer.page_bytes(100_000) >= 100_000
            assert newcomer.page_bytes(1_500_000) < 1_500_000
            await newcomer.wait()

            assert newcomer.page_bytes(1_500_000) == 1_500_000
            assert not waiting.done()
            waiting.cancel()

        asyncio.run(scenario())

    def test_who_reads_does_not_wait_for_those_who_do_not(self) -> None:
        """A session that has taken more than a connection holds has room of its own kind."""

        async def scenario() -> None:
            room = PageRoom(bytes_max=4_000_000)
            reader, still, newcomer = HeldPages(room), HeldPages(room), HeldPages(room)
            reader.add(WINDOW_BYTES + 1)
            reader.drop()
            still.add(1_900_000)
            for one in (newcomer, reader):
                assert one.page_bytes(1_500_000) < 1_500_000
            waiting = await _begun(newcomer.wait())

            await reader.wait()

            assert reader.page_bytes(1_500_000) == 1_500_000
            assert not waiting.done()
            waiting.cancel()

        asyncio.run(scenario())
