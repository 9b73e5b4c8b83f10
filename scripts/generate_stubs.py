"""
Generate the Python stubs in changelog/ from the protos in proto/.

With --check nothing is written: the stubs are generated elsewhere, and a
difference to the committed ones is printed and makes the exit code 1. Run it
with the Python of the environment that has the generators: `make proto`.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "proto"
STUBS = ROOT / "changelog"
PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only tell whether the stubs are fresh")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(fresh)
        if options.check:
            return check(fresh)
        replace(fresh)
    return 0


def generate(target: Path) -> None:
    """Write the stubs of all protos under *target*, in the folders of their packages."""
    descriptors = target / "descriptors.bin"
    binaries = Path(sys.executable).parent
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"-I{PROTOS}",
        f"--descriptor_set_out={descriptors}",
        f"--plugin=protoc-gen-mypy={binaries / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={binaries / 'protoc-gen-mypy_grpc'}",
    ]
    command += [f"--python_out={target}", f"--grpc_python_out={target}"]
    command += [f"--mypy_out=quiet:{target}", f"--mypy_grpc_out=quiet:{target}"]
    command += [str(path.relative_to(PROTOS)) for path in sorted(PROTOS.rglob("*.proto"))]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit("protoc failed")
    # The gRPC generators write a file for every proto, services or not.
    for file in FileDescriptorSet.FromString(descriptors.read_bytes()).file:
        if not file.service:
            stem = file.name.removesuffix(".proto")
            for suffix in ("_pb2_grpc.py", "_pb2_grpc.pyi"):
                (target / f"{stem}{suffix}").unlink(missing_ok=True)


def check(fresh: Path) -> int:
    """Print how the committed stubs differ from *fresh* ones. Returns the exit code."""
    names = stub_names(fresh) | stub_names(STUBS)
    difference = [
        line
        for name in sorted(names)
        for line in difflib.unified_diff(
            lines(STUBS / name), lines(fresh / name), f"changelog/{name}", f"generated/{name}", lineterm=""
        )
    ]
    if difference:
        print("\n".join(difference))
        print("The stubs are stale: run `make proto`, and commit what it changes.", file=sys.stderr)
        return 1
    print(f"The {len(names)} stubs are fresh")
    return 0


def replace(fresh: Path) -> None:
    """Put the *fresh* stubs in the place of the former ones, those of deleted protos included."""
    names = stub_names(fresh)
    for name in stub_names(STUBS) - names:
        (STUBS / name).unlink()
    for name in names:
        (STUBS / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fresh / name, STUBS / name)
    print(f"Wrote {len(names)} stubs")


def stub_names(folder: Path) -> set[str]:
    """Names of the generated files under *folder*, relative to it."""
    return {path.relative_to(folder).as_posix() for pattern in PATTERNS for path in folder.rglob(pattern)}


def lines(path: Path) -> list[str]:
    """Lines of a file, none if it is missing."""
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
