"""
What README.md and docs/ show, runs.

Each `python` block is a script of its own, run in an empty folder. A `text` or
`console` block right below it, if any, is what the script prints. Blocks marked
`python no-run` are compiled only.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = ("changelog", "server", "client")
RUN_TIMEOUT_SECONDS = 120

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>[^`]*)$")


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its info words, its text, the line where it opens and the one after its end."""

    words: tuple[str, ...]
    text: str
    first_line: int
    next_line: int


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A `python` block and what it must print, or None where nothing is said about that."""

    path: Path
    code: Block
    output: str | None

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        return f"{self.path.relative_to(ROOT).as_posix()}:{self.code.first_line}"


def read_blocks(text: str) -> Iterator[Block]:
    """All fenced blocks of a Markdown text, in order."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        first = number + 1
        number += 1
        if opening is None:
            continue
        closing = re.compile(rf" *{opening['fence'][0]}{{{len(opening['fence'])},}} *")
        while number < len(lines) and not closing.fullmatch(lines[number]):
            number += 1
        body = textwrap.dedent("".join(f"{line}\n" for line in lines[first:number]))
        number += 1
        yield Block(tuple(opening["info"].split()), body, first, number + 1)


def read_samples(path: Path) -> list[Sample]:
    """The `python` blocks of a file, each with the output shown right below it."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    blocks = list(read_blocks(text))
    samples = []
    for index, block in enumerate(blocks):
        if block.words[:1] != ("python",):
            continue
        following = blocks[index + 1] if index + 1 < len(blocks) else None
        shown = (
            following is not None
            and following.words[:1] in {("text",), ("console",)}
            and not any(line.strip() for line in lines[block.next_line - 1 : following.first_line - 1])
        )
        samples.append(Sample(path, block, following.text if shown and following else None))
    return samples


README = ROOT / "README.md"
SAMPLES = [
    pytest.param(sample, id=f"{path.relative_to(ROOT).as_posix()}-{index}")
    for path in (README, *sorted((ROOT / "docs").rglob("*.md")))
    for index, sample in enumerate(read_samples(path))
]


@pytest.mark.parametrize("sample", SAMPLES)
def test_sample_does_what_the_page_says(sample: Sample, tmp_path: Path) -> None:
    """A reader who copies a sample into a file and runs it sees what the page shows."""
    # Line numbers in a traceback are those of the page.
    source = "\n" * sample.code.first_line + sample.code.text
    compile(source, sample.name, "exec")
    if sample.code.words[1:] == ("no-run",):
        return
    assert sample.code.words[1:] == (), f"{sample.name}: only `no-run` may follow `python`"

    script = tmp_path / "sample.py"
    script.write_text(source, encoding="utf-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, script],
        cwd=folder,
        env=sample_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=RUN_TIMEOUT_SECONDS,
        check=False,
    )

    assert result.returncode == 0, f"{sample.name} failed:\n{result.stdout}{result.stderr}"
    if sample.output is not None:
        assert result.stdout == sample.output


def test_readme_shows_a_sample_and_what_it_prints() -> None:
    """The first screen has an example that can be copied, and its output."""
    samples = read_samples(README)

    assert samples
    assert samples[0].output


def test_blocks_are_found_as_a_reader_sees_them() -> None:
    """Indented and longer fences are blocks; what is inside another block is not."""
    page = textwrap.dedent(
        """\
        ```python no-run
        a
        ```
        1. In a list:

           ~~~text
           b
             c
           ~~~

        ````markdown
        ```python
        d
        ```
        ````
        """
    )

    assert [(block.words, block.text, block.first_line) for block in read_blocks(page)] == [
        (("python", "no-run"), "a\n", 1),
        (("text",), "b\n  c\n", 6),
        (("markdown",), "```python\nd\n```\n", 11),
    ]


def test_output_is_the_block_right_below(tmp_path: Path) -> None:
    """Prose between a sample and a text block means that the text is not its output."""
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na\n```\n\n```text\n1\n```\n\n```python\nb\n```\nNot:\n```text\n2\n```\n", encoding="utf-8"
    )

    assert [(sample.code.text, sample.output) for sample in read_samples(page)] == [
        ("a\n", "1\n"),
        ("b\n", None),
    ]


def sample_environment() -> dict[str, str]:
    """The environment of a reader who has tidelog installed, from these sources."""
    roots = os.pathsep.join(str(ROOT / root) for root in SOURCE_ROOTS)
    return {**os.environ, "PYTHONPATH": roots, "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"}
