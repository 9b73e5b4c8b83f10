"""pyproject.toml, the lock and the generated stubs say the same."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "changelog" / "tidelog"


def runtime_requirements() -> list[Requirement]:
    """What users of tidelog install with it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(line) for line in project["dependencies"]]


def dev_requirements() -> list[Requirement]:
    """What tests and checks need besides."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    return [Requirement(line) for line in groups["dev"]]


def locked_versions() -> dict[str, list[str]]:
    """Versions of each package in the lock: more than one if Python versions need different ones."""
    lines = (ROOT / "requirements-dev.lock").read_text(encoding="utf-8").splitlines()
    pins = [line.partition(";")[0].strip() for line in lines if line and line[0] not in "# "]
    found: dict[str, list[str]] = {}
    for pin in pins:
        name, _, version = pin.partition("==")
        found.setdefault(name, []).append(version)
    return found


def generator_versions() -> Iterator[tuple[str, str, str]]:
    """For each generated stub: its name, the package whose version it checks, the oldest that it accepts."""
    for path in sorted(STUBS.rglob("*_pb2*.py")):
        text = path.read_text(encoding="utf-8")
        if found := re.search(r"# Protobuf Python Version: (\S+)", text):
            yield path.name, "protobuf", found[1]
        if found := re.search(r"GRPC_GENERATED_VERSION = '(\S+)'", text):
            yield path.name, "grpcio", found[1]


@pytest.mark.parametrize(("stub", "package", "oldest"), list(generator_versions()))
def test_requirements_suit_the_stubs(stub: str, package: str, oldest: str) -> None:
    """No allowed version of grpcio or protobuf is one that a stub refuses when it is imported."""
    (requirement,) = (each for each in runtime_requirements() if each.name == package)
    bounds = [each.version for each in requirement.specifier if each.operator == ">="]

    assert len(bounds) == 1
    assert release(bounds[0]) >= release(oldest), f"{stub} needs {package}>={oldest}"


@pytest.mark.parametrize("requirement", [*runtime_requirements(), *dev_requirements()], ids=str)
def test_lock_satisfies_requirements(requirement: Requirement) -> None:
    """The lock has every package that pyproject.toml asks for, at a version that it allows."""
    versions = locked_versions().get(canonicalize_name(requirement.name), [])

    assert list(requirement.specifier.filter(versions, prereleases=True)), "run `make lock`"


def release(version: str) -> tuple[int, ...]:
    """A version as numbers that compare."""
    return tuple(int(part) for part in version.split("."))
