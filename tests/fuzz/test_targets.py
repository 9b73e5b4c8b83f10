"""
Every decoder, with what fuzzing found once and with inputs that are drawn here.

Always the same ones, so that a run says the same as the one before. For more there is
`make fuzz`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from tests.fuzz.targets import TARGETS

pytestmark = pytest.mark.slow

CORPUS: Final = Path(__file__).parent / "corpus"
INPUTS: Final = 400
# Each of these opens a replica, or an engine, anew.
INPUTS_OF_SLOW: Final = 60
SLOW: Final = frozenset(("server_messages", "uploads"))
# What decoders trip over: ends of ranges, headers of containers, text that is none.
PIECES: Final = (
    b"\0",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\xc1",
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + bytes(7),
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\0\x0f\xff\xff",
    b"\xc7\x05\x01NaN-1",
    b"\xa1\xff",
    b"\x91" * 40,
    b"\xff" * 9 + b"\x01",
    b"\x80" * 9 + b"\x01",
    "\ud800".encode("utf-8", "surrogatepass"),
    b'"\\ud800"',
    b"1e999",
    b"9" * 40,
    b"(" * 40,
    b"[" * 40,
    b"not ",
    b"-",
    b"",
)


def inputs(name: str) -> Iterator[bytes]:
    """Yield the inputs of a target: well-formed ones, and those with parts changed, dropped, doubled or put in."""
    dice = random.Random(name)
    seeds = list(TARGETS[name].seeds())
    yield from seeds
    for _ in range(INPUTS_OF_SLOW if name in SLOW else INPUTS):
        data = bytearray(dice.choice(seeds))
        for _ in range(dice.randint(1, 4)):
            place, length = dice.randint(0, len(data)), dice.choice((0, 0, 1, 1, 2, 4, 16))
            data[place : place + length] = dice.choice(
                (dice.choice(PIECES), dice.randbytes(dice.randint(0, 4)), bytes(data[place : place + 2 * length]))
            )
        yield bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_drawn_inputs(name: str) -> None:
    """Whatever the bytes, a decoder gives a value that comes back equal, or its documented error."""
    for data in inputs(name):
        try:
            TARGETS[name].run(data)
        except Exception as error:
            raise AssertionError(f"{name}: {data!r}") from error


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_found_inputs(path: Path) -> None:
    """What fuzzing found once does no harm any more."""
    TARGETS[path.parent.name].run(path.read_bytes())


def test_the_corpus_belongs_to_targets() -> None:
    """Each folder of the corpus is that of a target."""
    assert {path.name for path in CORPUS.iterdir()} <= TARGETS.keys()
