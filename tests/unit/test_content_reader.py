"""Contents as open files."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tidelog_server import ContentLost
from tidelog_server._content_reader import open_content


def test_a_content_that_ends_early() -> None:
    """Whoever reads a content that has lost its end is told so, and does not take the rest for all of it."""

    def read(offset: int) -> Generator[bytes, None, None]:
        yield b"the beginning"[offset:]

    with open_content(read, 20) as file:
        assert file.read(10) == b"the beginn"
        with pytest.raises(ContentLost, match="13 of 20"):
            file.read()
    with open_content(read, 13) as file:
        assert file.read() == b"the beginning"
