"""Verification of what a server keeps of files: what is damaged or lost is named, and nothing else is."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from tests.builders import TENANT, TIME_US, Cabinet, Lab, create, file_value, quick_folder, said
from tests.unit.test_store_verification import Tables, damage, found, kinds

from tidelog import Finding
from tidelog._keys import pack_object_key
from tidelog._values import encode
from tidelog_server import Application, DirectoryContents, HookContext, HookObject, LmdbStore, Reject, verify_store
from tidelog_server._adoption import adopt_schema
from tidelog_server._content_store import CONTENTS_ELSEWHERE, CONTENTS_NOTE
from tidelog_server._file_records import ContentRecord, pack_content, pack_grant
from tidelog_server._records import Writes
from tidelog_server._store import Reader

PHOTO: Final = b"a photo, say"
SHA256: Final = hashlib.sha256(PHOTO).digest()
NOBODY: Final = bytes(32)


def make_store(path: Path) -> None:
    """Make a store with files: one of an object, one of a failure, one that nothing refers to yet."""
    application = Application()

    @application.before_commit("Refused")
    def refuses(task: HookObject, context: HookContext) -> None:
        raise Reject("never")

    store = LmdbStore(path)
    adopt_schema(application, store, migrate=False, time_us=TIME_US)
    cabinet = Cabinet(Lab(application, store), path / "files")
    photo, other, _ = cabinet.upload(PHOTO), cabinet.upload(b"of a failure"), cabinet.upload(b"of nobody yet")
    results = cabinet.lab.settle(create(1, set={"photo": photo}), create(2, entity="Refused", set={"photo": other}))
    assert said(results) == ["APPLIED", "HOOK_REJECTED"]
    store.close()


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """Give a store with files, to be copied."""
    with quick_folder() as folder:
        make_store(folder / "store")
        yield folder / "store"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """Give a store with files, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "store"))


def content_paths(store: Path) -> list[Path]:
    """Return where the photo lies."""
    return [path for path in (store / "files").rglob(f"{SHA256.hex()}*") if path.is_file()]


def index_entry(prefix: bytes) -> Callable[[Tables], bytes]:
    """Return the key of the first entry of the table of indexes that starts with a prefix."""
    return lambda tables: tables.keys("indexes", prefix)[0]


def delete_entry(prefix: bytes) -> Callable[[Tables], None]:
    """Delete an entry."""
    return lambda tables: tables.delete("indexes", index_entry(prefix)(tables))


def put_entry(key: bytes, value: bytes) -> Callable[[Tables], None]:
    """Put an entry."""
    return lambda tables: tables.put("indexes", key, value)


def refer_elsewhere(tables: Tables) -> None:
    """Have an object refer to another content than its changes say."""
    key = pack_object_key("Task", "t1")
    attributes = encode({"photo": file_value(b"another")})
    tables.put("objects", key, tables.get("objects", key)[:33] + attributes)


DAMAGES: Final[dict[str, tuple[Callable[[Tables], object], list[str], str]]] = {
    "a referrer that is not on record": (
        delete_entry(b"f" + SHA256),
        ["index_wrong"],
        f"Task 't1': expected an entry that it refers to {SHA256.hex()}",
    ),
    "a failure that is not on record": (
        lambda tables: tables.delete(
            "indexes", next(key for key in tables.keys("indexes", b"f") if key[33:34] == b"x")
        ),
        ["index_wrong"],
        "expected an entry that it refers to",
    ),
    "a referrer that does not refer": (
        put_entry(b"f" + NOBODY + b"oTask\0t1", b""),
        ["index_wrong"],
        "expected one that refers to this content",
    ),
    "a referrer that is not there": (
        put_entry(b"f" + SHA256 + b"oTask\0gone", b""),
        ["index_wrong"],
        "expected one that refers to this content",
    ),
    "a failure that is not there": (
        put_entry(b"f" + SHA256 + b"x" + bytes(16), b""),
        ["index_wrong"],
        "expected one that refers to this content",
    ),
    "a referrer of no kind": (put_entry(b"f" + SHA256 + b"?", b""), ["index_wrong"], "expected an entry of its table"),
    "a hash that is cut off": (put_entry(b"c" + SHA256[:9], b""), ["index_wrong"], "expected the hash of a content"),
    "a grant to nobody": (put_entry(b"g" + SHA256, pack_grant(1)), ["index_wrong"], "expected a user"),
    "a grant without a time": (put_entry(b"g" + SHA256 + b"ann", b"?"), ["index_wrong"], "an entry of its table"),
    "a record that is cut off": (put_entry(b"c" + SHA256, b"?"), ["index_wrong"], "an entry of its table"),
    "a content without a record": (
        delete_entry(b"c" + SHA256),
        ["file_reference_wrong"],
        f"Task 't1', attribute 'photo': expected the content {SHA256.hex()} of 12 bytes to be on record, found none",
    ),
    "a record of another size": (
        put_entry(b"c" + SHA256, pack_content(ContentRecord(5, 1))),
        ["content_lost", "file_reference_wrong"],
        "of 12 bytes to be on record, found one of 5 bytes",
    ),
    "an object that refers to another content": (
        refer_elsewhere,
        ["file_reference_wrong", "index_wrong", "state_differs"],
        "to be on record, found none",
    ),
}


def test_a_sound_store_has_no_findings(store: Path) -> None:
    """Nothing is found where nothing is wrong; contents are counted."""
    counts: Counter[str] = Counter()
    assert list(verify_store(store, counts=counts)) == []
    assert counts["contents"] == 3


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(store: Path, name: str) -> None:
    """Each kind of damage leads to the findings that follow from it, one of which says what it is."""
    work, expected, text = DAMAGES[name]
    damage(store, work)

    assert kinds(store) == expected
    assert any(text in str(one) for one in found(store)), [str(one) for one in found(store)]


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda path: path.unlink(), "content_lost"),
        (lambda path: path.write_bytes(PHOTO[:-1]), "content_damaged"),
        (lambda path: path.write_bytes(PHOTO[:-1] + b"?"), "content_damaged"),
    ],
    ids=["deleted", "cut off", "other bytes"],
)
def test_contents_that_are_spoiled(store: Path, spoil: Callable[[Path], Any], expected: str) -> None:
    """A content that is gone, or is not what its name says, is named with its tenant."""
    spoil(*content_paths(store))

    (finding,) = found(store)
    assert (finding.kind, finding.tenant, finding.where) == (expected, TENANT, f"content {SHA256.hex()}")


def test_contents_that_lie_elsewhere(store: Path, tmp_path: Path) -> None:
    """Contents that are kept elsewhere are looked at if it is said where."""
    opened = LmdbStore(store)
    opened.set_note(CONTENTS_NOTE, CONTENTS_ELSEWHERE)
    opened.close()
    elsewhere = Path(shutil.move(store / "files", tmp_path / "elsewhere"))

    def verified(path: Path) -> list[Finding]:
        return list(verify_store(store, contents=DirectoryContents(path)))

    assert found(store) == []
    assert verified(elsewhere) == []
    assert [one.kind for one in verified(tmp_path / "nowhere")] == ["content_lost"] * 2


def test_a_store_from_before(store: Path) -> None:
    """A store of which no server has noted yet who refers to what is not found wrong for that."""

    def forget(tables: Tables) -> None:
        for key in tables.keys("indexes", b"f"):
            tables.delete("indexes", key)

    damage(store, forget)
    assert kinds(store) == ["index_wrong"]
    opened = LmdbStore(store)
    opened.set_note("adoption", b"")
    opened.close()
    assert found(store) == []


def test_a_record_that_nothing_refers_to(store: Path) -> None:
    """A content that is lost, and that nothing refers to, is not found wrong: it went while a backup was made, say."""
    damage(store, put_entry(b"c" + NOBODY, pack_content(ContentRecord(5, 1))))
    assert found(store) == []


def test_contents_that_are_collected_meanwhile(store: Path) -> None:
    """A content whose record goes before the content does, while it is verified, is not found wrong."""
    opened = LmdbStore(store)

    def forget(reader: Reader) -> tuple[Writes, None]:
        entries = {b"c" + SHA256: None}
        return Writes({}, [], None, [], [], reader.head().version, entries), None

    class Collected(DirectoryContents):
        """Loses a content right before it is read, its record first."""

        def read(self, tenant: str, sha256: bytes, offset: int = 0, copy: str = "") -> Any:
            if sha256 == SHA256:
                opened.submit(tenant, forget).result()
                self.delete(tenant, sha256, copy)
            return super().read(tenant, sha256, offset, copy)

    assert list(verify_store(store, contents=Collected(store / "files"))) == []
    assert content_paths(store) == []
    opened.close()
