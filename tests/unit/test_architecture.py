"""
The rules that keep the code base in one shape.

They are read from the sources and from the imported packages, so that nobody
has to remember them in a review.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

import tidelog
import tidelog_client
import tidelog_server

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    "tidelog": ROOT / "changelog" / "tidelog",
    "tidelog_server": ROOT / "server" / "tidelog_server",
    "tidelog_client": ROOT / "client" / "tidelog_client",
}
PACKAGES = (tidelog, tidelog_server, tidelog_client)

# Dependencies point one way: tidelog_server -> tidelog <- tidelog_client.
FORBIDDEN_IMPORTS = {
    "tidelog": {"tidelog_server", "tidelog_client"},
    "tidelog_server": {"tidelog_client"},
    "tidelog_client": {"tidelog_server"},
}

# These decide; others read, write and send for them. They can be driven from a
# test or a simulation because they reach neither a network nor a disk.
CORE_MODULES = (
    "tidelog._constraint_text",
    "tidelog._constraints",
    "tidelog._downloads",
    "tidelog._finding",
    "tidelog._operation",
    "tidelog._patch",
    "tidelog._renames",
    "tidelog._schema",
    "tidelog._validation",
    "tidelog._values",
    "tidelog_client._plans",
    "tidelog_client._synchronization",
    "tidelog_client._upload",
    "tidelog_server._action",
    "tidelog_server._collection",
    "tidelog_server._engine",
    "tidelog_server._failures",
    "tidelog_server._history",
    "tidelog_server._migration",
    "tidelog_server._overlay",
    "tidelog_server._projection",
    "tidelog_server._retelling",
    "tidelog_server._sightings",
    "tidelog_server._verification",
)
INPUT_OUTPUT = {"grpc", "lmdb"}

# Names that mean something only where the project was written or installed from.
# In pieces, so that this file may be searched too.
FORBIDDEN_TEXT = (
    "pypi" + ".org",
    "python" + "hosted.org",
    "npm" + "js.org",
    "npm" + "js.com",
    "yarn" + "pkg.com",
    "proxy.golang" + ".org",
    "crates" + ".io",
    "maven" + ".org",
    "/wo" + "rk/",
    "../sha" + "red",
)


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the three packages, generated stubs included: its name and its file."""
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *parts)).removesuffix(".__init__"), path


def imports(path: Path) -> Iterator[str]:
    """Every absolute name that a module imports, wherever in it, by statement or by `import_module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a module imports."""
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("package", SOURCES)
def test_dependencies_point_one_way(package: str) -> None:
    """Server and client do not know each other, and what they share knows neither."""
    wrong = {
        name: sorted(found)
        for name, path in modules()
        if name.partition(".")[0] == package and (found := imported_packages(path) & FORBIDDEN_IMPORTS[package])
    }

    assert not wrong


@pytest.mark.parametrize("module", CORE_MODULES)
def test_core_reaches_no_network_and_no_disk(module: str) -> None:
    """A module that decides imports neither gRPC nor LMDB."""
    paths = dict(modules())

    assert module in paths, f"there is no module {module}: did it get another name?"
    assert not imported_packages(paths[module]) & INPUT_OUTPUT


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_public_names_are_listed_in_order(package: ModuleType) -> None:
    """`__all__` has exactly the names that a package shows, each once, sorted."""
    visible = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and not is_future(value)
    }
    listed = [name for name in package.__all__ if not re.fullmatch(r"__\w+__", name)]

    assert list(package.__all__) == sorted(set(package.__all__))
    assert set(listed) == visible


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_public_names_are_documented(package: ModuleType) -> None:
    """Every class and function that a user can reach says what it promises, and so do their methods."""
    undocumented = [
        f"{package.__name__}.{name}"
        for exported in package.__all__
        for name, value in documentable(exported, getattr(package, exported))
        if not has_docstring(value)
    ]

    assert not undocumented


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_packages_are_typed(package: ModuleType) -> None:
    """Each package tells type checkers that its annotations count."""
    assert (SOURCES[package.__name__] / "py.typed").is_file()


def test_source_roots_are_no_packages() -> None:
    """`import changelog` must not look as if it worked."""
    assert not [folder for folder in SOURCES.values() if (folder.parent / "__init__.py").exists()]


@pytest.mark.parametrize("path", ["import grpc.aio", "from lmdb import Environment", "if 1:\n import grpc as g"])
def test_imports_are_found_wherever_they_are(path: str, tmp_path: Path) -> None:
    """The reader of imports sees every form of them."""
    module = tmp_path / "module.py"
    module.write_text(path, encoding="utf-8")

    assert imported_packages(module) & INPUT_OUTPUT


def test_text_names_no_registry_and_no_machine() -> None:
    """Nothing in the repository depends on where it was written or installed from."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {word}"
        for path in repository_files()
        if (text := read_text(path)) is not None
        for number, line in enumerate(text.splitlines(), start=1)
        for word in FORBIDDEN_TEXT
        if word in line
    ]

    assert not found


def is_future(value: object) -> bool:
    """Tell whether a value came from `from __future__ import ...`."""
    return type(value).__module__ == "__future__"


def documentable(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A class or function by its name, and the public methods and properties that the class defines."""
    if isinstance(value, FunctionType):
        yield name, value
    if isinstance(value, type) and value.__module__.partition(".")[0] in SOURCES:
        yield name, value
        for attribute, member in vars(value).items():
            if not attribute.startswith("_") and isinstance(
                member, FunctionType | classmethod | staticmethod | property
            ):
                yield f"{name}.{attribute}", member


def has_docstring(value: Any) -> bool:
    """Tell whether somebody wrote what this is; the signature that a dataclass puts there does not count."""
    if isinstance(value, type):
        text = value.__dict__.get("__doc__") or ""
        return bool(text) and not (dataclasses.is_dataclass(value) and text.startswith(f"{value.__name__}("))
    # An override may leave it to what it overrides.
    return bool(inspect.getdoc(value))


def repository_files() -> list[Path]:
    """Files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def read_text(path: Path) -> str | None:
    """Text of a file, or None if it holds something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text
