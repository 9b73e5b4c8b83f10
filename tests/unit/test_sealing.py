from __future__ import annotations

import base64

import pytest
from tests.builders import MemoryStore

from tidelog_server._errors import RequestInvalid
from tidelog_server._sealing import PageTokens, Sealer


class TestSealer:
    @pytest.mark.parametrize("data", [b"", b"\x80", b"\0\0", b"x" * 255, b"x" * 256, b"\x80" * 1_000])
    def test_what_was_sealed_comes_out(self, data: bytes) -> None:
        """Any bytes are sealed, twice never alike, and opened as they were."""
        sealer = Sealer(MemoryStore(), "test")
        sealed = sealer.seal(data, "here")

        assert sealer.open(sealed, "here") == data
        assert sealer.seal(data, "here") != sealed

    def test_it_says_nothing(self) -> None:
        """What is sealed shows neither itself nor its length."""
        sealer = Sealer(MemoryStore(), "test")
        sealed = sealer.seal(b"SECRET")

        assert b"SECRET" not in sealed
        assert len(sealed) == len(sealer.seal(b"")) == len(sealer.seal(b"x" * 200))

    def test_what_is_not_opened(self) -> None:
        """Whatever was changed, cut, made up, or sealed for something else, somewhere else, is not opened."""
        store = MemoryStore()
        sealer = Sealer(store, "test")
        sealed = sealer.seal(b"SECRET", "here")

        for position in range(len(sealed)):
            changed = bytearray(sealed)
            changed[position] ^= 1
            assert sealer.open(bytes(changed), "here") is None
            assert sealer.open(sealed[:position], "here") is None
        assert sealer.open(sealed + b"\0", "here") is None
        assert sealer.open(sealed) is None
        assert sealer.open(sealed, "there") is None
        assert Sealer(store, "other").open(sealed, "here") is None
        assert Sealer(MemoryStore(), "test").open(sealed, "here") is None

    def test_servers_that_make_the_key_at_once(self) -> None:
        """Of two servers that find no key, one makes it for both."""
        store = MemoryStore()
        note = store.note
        others: list[Sealer | None] = []

        def note_in_between(name: str) -> bytes:
            found = note(name)
            if not others:
                others.append(None)
                others[:] = [Sealer(store, "test")]
            return found

        store.note = note_in_between  # type: ignore[method-assign]
        sealer = Sealer(store, "test")
        assert others[0] is not None
        assert sealer.open(others[0].seal(b"SECRET")) == b"SECRET"

    def test_the_store_keeps_the_key(self) -> None:
        """What was sealed is opened by the next server on the store."""
        disk: dict[str, object] = {}
        sealed = Sealer(MemoryStore(disk), "test").seal(b"SECRET")

        assert Sealer(MemoryStore(disk), "test").open(sealed) == b"SECRET"


class TestPageTokens:
    def test_where_a_scan_goes_on(self) -> None:
        """A token brings its position back; neither the first page nor the end has one."""
        tokens = PageTokens(MemoryStore(), "ListThings")
        token = tokens.token(b"SECRET", "default")

        assert tokens.position(token, "default") == b"SECRET"
        assert tokens.token(b"", "default") == ""
        assert tokens.position("", "default") == b""

    def test_tokens_that_are_none(self) -> None:
        """A token of another request, tenant or server, or of no sense, is a clear error."""
        store = MemoryStore()
        tokens = PageTokens(store, "ListThings")
        good = tokens.token(b"SECRET", "default")
        bad = [
            tokens.token(b"SECRET", "other"),
            PageTokens(store, "ListOthers").token(b"SECRET", "default"),
            PageTokens(MemoryStore(), "ListThings").token(b"SECRET", "default"),
            good[:-4],
            good + "!",
            base64.urlsafe_b64encode(b"SECRET").decode(),
            "SECRET",
            "é",
        ]

        for token in bad:
            with pytest.raises(RequestInvalid, match="none that this server gave for this request"):
                tokens.position(token, "default")
