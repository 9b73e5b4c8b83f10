"""The example application does what its pages say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.test_readme import sample_environment

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "field_service"
RUN_TIMEOUT_SECONDS = 120


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with the example's directory as the current one."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=EXAMPLE,
        env=sample_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=RUN_TIMEOUT_SECONDS,
        check=False,
    )


def test_the_day_goes_as_told() -> None:
    """The walkthrough runs to its end with nothing on stderr, and each of its chapters has checks that held."""
    result = run(sys.executable, "-W", "error", "walkthrough.py")

    assert (result.returncode, result.stderr) == (0, ""), result.stdout + result.stderr
    *chapters, end = result.stdout.strip().split("\n\n")
    assert end == "Everything was as told."
    assert len(chapters) == 8
    assert all("\n  - " in chapter for chapter in chapters), result.stdout
    assert all(reason in result.stdout for reason in ("HOURS_MISSING", "OBJECT_GONE", "cannot be deleted"))


def test_a_story_that_is_not_true_ends_with_an_error() -> None:
    """Where something is not as told the program says what, and ends with an error."""
    program = "import application, walkthrough; application.HOURLY_RATE *= 2; walkthrough.main()"

    result = run(sys.executable, "-c", program)

    assert result.returncode == 1
    assert result.stderr.startswith("not as told: dora sees what the labour costs: 217.50"), result.stderr


def test_the_application_is_served_as_its_page_says(tmp_path: Path) -> None:
    """The command that the page shows serves the application to whoever has one of the tokens."""
    [command] = re.findall(
        r"^\$ tidelog (serve .*)$", (EXAMPLE / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    command = command.replace("/tmp/field-service", str(tmp_path)).replace(":8400", ":0")
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("tidelog")), *command.split()],
        cwd=EXAMPLE,
        env=sample_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("listening on 127.0.0.1:")
        finally:
            process.terminate()
    assert process.returncode == 0
