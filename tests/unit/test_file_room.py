"""Whose turn it is to upload, while nobody says how contents stand."""

from __future__ import annotations

from tidelog_client._file_room import FileRoom
from tidelog_client._files import Needed


def content(number: int, size: int = 1_000) -> Needed:
    """Return a content."""
    return Needed(bytes([number]) * 32, size)


def test_the_first_of_the_log_finds_out() -> None:
    """Of what the server did not answer about one content goes, in the order of the log, whatever it has of bytes."""
    room = FileRoom()
    unasked = {content(1, 3_000): None, content(2): None}

    room.probe(unasked.keys(), set(), unasked)

    assert room.apart == {content(2)}


def test_what_had_its_turn_goes_on() -> None:
    """An answer that does not come holds up nothing that the server had answered about, nor one that comes alone."""
    room = FileRoom()
    large, small, apart = content(1, 10**9), content(2), content(3)
    room.apart = {apart}

    room.probe({large, small, apart}, {large}, [small])

    assert room.apart == {apart}
