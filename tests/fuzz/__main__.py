"""
Fuzz the decoders with atheris, which follows what code an input reaches.

python -m tests.fuzz --seconds 60                 all targets, a minute each
python -m tests.fuzz values patches --seconds 300
python -m tests.fuzz values --input FILE          run one input, and show what is wrong with it

An input that breaks a target is kept in tests/fuzz/corpus, where the tests find it from then on.
"""

# ruff: noqa: T201 - a program prints

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

CORPUS: Final = Path(__file__).parent / "corpus"
INPUT_BYTES_MAX: Final = 64 * 1024
INPUT_SECONDS_MAX: Final = 10
MEMORY_MEGABYTES_MAX: Final = 2_048


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the decoders.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all of them")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default 60)")
    parser.add_argument("--runs", type=int, default=-1, help="inputs for each target (default: as many as come)")
    parser.add_argument("--seed", type=int, default=0, help="default: another one each time")
    parser.add_argument("--input", type=Path, metavar="FILE", help="run this input, once")
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    options, others = parser.parse_known_args()
    if options.child:
        _fuzz(options.targets[0], [options.child, *others])
    targets = importlib.import_module("tests.fuzz.targets").TARGETS
    if unknown := set(options.targets) - set(targets):
        parser.error(f"no target {', '.join(sorted(unknown))}: there are {', '.join(targets)}")
    if options.input is not None:
        for name in options.targets:
            targets[name].run(options.input.read_bytes())
        return 0
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is not installed: it comes for Linux on x86-64 only")
    names = options.targets or list(targets)
    with TemporaryDirectory(prefix="tidelog-fuzz-") as folder:
        found = [name for name in names if not _run(name, targets[name], Path(folder), options)]
    if found:
        print(f"found something in: {', '.join(found)}; see {CORPUS}")
    return 1 if found else 0


def _run(name: str, target: Any, folder: Path, options: argparse.Namespace) -> bool:
    """Fuzz one target in a process of its own; tell whether it held."""
    working, kept = folder / name, CORPUS / name
    working.mkdir()
    kept.mkdir(exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (working / f"seed-{number}").write_bytes(seed)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz", name, "--child", str(working), str(kept)),
            f"-max_total_time={options.seconds}",
            f"-runs={options.runs}",
            f"-seed={options.seed}",
            f"-max_len={INPUT_BYTES_MAX}",
            f"-timeout={INPUT_SECONDS_MAX}",
            f"-rss_limit_mb={MEMORY_MEGABYTES_MAX}",
            f"-artifact_prefix={kept}/",
            "-print_final_stats=1",
        ],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        # A seed repeats what is drawn only where sets have the same order.
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    counts = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    if not any(kept.iterdir()):
        kept.rmdir()
    print(
        f"{name}: {counts[-1] if counts else '?'} inputs, {covered[-1] if covered else '?'} places reached", flush=True
    )
    if done.returncode:
        print(done.stdout[-6_000:], done.stderr[-3_000:], sep="\n", flush=True)
    return not done.returncode


def _fuzz(name: str, arguments: list[str]) -> None:
    """Fuzz in this process, until its time is up or something is found; does not return."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["tidelog", "tidelog_server", "tidelog_client"]):
        targets = importlib.import_module("tests.fuzz.targets").TARGETS
    atheris.Setup([name, *arguments], targets[name].run)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(_main())
