"""A directory keeps what every content store promises."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.contract.content_store_contract import DATA, PART, TENANT, ContentStoreContract, put, sha256_of

from tidelog._limits import FILE_CHUNK_BYTES
from tidelog_server._content_store import ContentStore, DirectoryContents


class TestDirectoryContents(ContentStoreContract):
    """The contract, and what a directory promises besides."""

    @pytest.fixture
    def contents(self, tmp_path: Path) -> ContentStore:
        """Open an empty store."""
        return DirectoryContents(tmp_path / "files")

    def test_all_that_came_is_kept(self, contents: ContentStore) -> None:
        """A pause costs no byte."""
        contents.append(TENANT, PART, 0, DATA[:FILE_CHUNK_BYTES])
        contents.append(TENANT, PART, FILE_CHUNK_BYTES, b"one more")
        contents.pause(TENANT, PART)
        assert contents.part_size(TENANT, PART) == FILE_CHUNK_BYTES + 8

    def test_another_process_finds_all_of_it(self, contents: ContentStore, tmp_path: Path) -> None:
        """Contents and parts are found by whoever opens the directory next."""
        put(contents, DATA)
        contents.append(TENANT, PART, 0, b"a part")
        again = DirectoryContents(tmp_path / "files")
        assert again.size(TENANT, sha256_of(DATA)) == len(DATA)
        assert again.part_size(TENANT, PART) == 6
