"""
Sealing: what the server hands out to get back says nothing, and cannot be made up.

Where a scan stands tells of what it has passed, also of what the caller may not read.
So such a place travels encrypted, with a key that the store keeps: whoever else serves
the store reads what was handed out before.
"""

from __future__ import annotations

import base64
import secrets
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tidelog_server._errors import RequestInvalid
from tidelog_server._store import Store

KEY_BITS: Final = 256
NONCE_BYTES: Final = 12
# Lengths tell something too: what is sealed is filled up to so many bytes, or a multiple.
BLOCK_BYTES: Final = 256

_NOTE: Final = "seal"
_END: Final = b"\x80"


class Sealer:
    """
    Seals and opens what one purpose needs.

    The first one that is made on a store makes its key.

    Args:
        store: Keeps the key.
        purpose: What is sealed for another one cannot be opened.
    """

    def __init__(self, store: Store, purpose: str) -> None:
        key = store.note(_NOTE)
        if not key:
            made = AESGCM.generate_key(KEY_BITS)
            # Another server may have been faster.
            key = made if store.set_note(_NOTE, made, expected=b"") else store.note(_NOTE)
        self._cipher = AESGCM(key)
        self._purpose = purpose

    def seal(self, data: bytes, *scope: str) -> bytes:
        """Return *data* as only `open` reads it, given the same scope."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        filled_bytes = len(data) // BLOCK_BYTES * BLOCK_BYTES + BLOCK_BYTES
        filled = (data + _END).ljust(filled_bytes, b"\0")
        return nonce + self._cipher.encrypt(nonce, filled, self._bound(scope))

    def open(self, sealed: bytes, *scope: str) -> bytes | None:
        """Return what was sealed, or None if this was not sealed here, or for something else."""
        try:
            filled = self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], self._bound(scope))
        except (InvalidTag, ValueError):  # a nonce that is cut short is a ValueError
            return None
        return filled[: filled.rindex(_END)]

    def _bound(self, scope: tuple[str, ...]) -> bytes:
        return "\0".join((self._purpose, *scope)).encode()


class PageTokens:
    """
    The page tokens of one request: where its scan goes on, sealed.

    Args:
        store: Keeps the key.
        request: The request's name.
    """

    def __init__(self, store: Store, request: str) -> None:
        self._sealer = Sealer(store, request)

    def token(self, position: bytes, *scope: str) -> str:
        """Return the token that asks for what follows a position; an empty one for none."""
        return base64.urlsafe_b64encode(self._sealer.seal(position, *scope)).decode() if position else ""

    def position(self, token: str, *scope: str) -> bytes:
        """Return the position in a token; an empty one for none. Raises RequestInvalid."""
        if not token:
            return b""
        try:
            position = self._sealer.open(base64.b64decode(token, b"-_", validate=True), *scope)
        except ValueError:
            position = None
        if position is None:
            raise RequestInvalid("the page token is none that this server gave for this request")
        return position
