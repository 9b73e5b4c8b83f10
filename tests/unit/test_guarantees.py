"""What docs/guarantees.md names, exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "guarantees.md").read_text()
COMMANDS = sorted(set(re.findall(r"`python -m ([^`]+)`", TEXT)))


def test_every_promise_has_a_row() -> None:
    """The sixteen promises are there, in order."""
    assert re.findall(r"^\| (\d+) \| \*\*", TEXT, re.MULTILINE) == [str(number) for number in range(1, 17)]


def test_the_count_of_decoders() -> None:
    """The page says of how many decoders each is given hostile bytes."""
    assert re.findall(r"hostile bytes, for each of (\d+) decoders", TEXT) == [str(len(TARGETS))]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page(command: str) -> None:
    """A command runs tests that are there, or an input that is there."""
    module, *arguments = command.split()
    paths = [ROOT / one for one in arguments if one.startswith("tests/")]
    if "-k" in arguments:
        name = arguments[arguments.index("-k") + 1]
        files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
        assert any(re.search(rf"def {name}\b", file.read_text()) for file in files), f"no test {name}"
    assert all(path.exists() for path in paths), command
    assert module == "pytest" or (ROOT / module.replace(".", "/") / "__main__.py").exists()
