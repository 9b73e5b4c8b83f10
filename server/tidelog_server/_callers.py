"""Callers: who makes a call. The authenticator is asked in a thread, so that it may wait."""

from __future__ import annotations

import asyncio
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeAlias

import grpc

from tidelog._errors import InvalidValue
from tidelog._logging import get_logger
from tidelog_server._authentication import Authenticator, Credentials, PeerCertificate
from tidelog_server._errors import AuthenticationFailed, AuthenticationUnavailable
from tidelog_server._principal import ANONYMOUS, Principal

AUTHENTICATION_THREADS: Final = 4
AUTHENTICATION_SECONDS_MAX: Final = 10.0

_CERTIFICATE: Final = "x509_pem_cert"

_log = get_logger("tidelog.authentication")

_Headers: TypeAlias = list[tuple[str, str | bytes]]


class Callers:
    """Finds the principals of calls. Without an authenticator every caller is the same one."""

    def __init__(self, authenticator: Authenticator | None) -> None:
        self._authenticator = authenticator
        self._pool = ThreadPoolExecutor(AUTHENTICATION_THREADS, thread_name_prefix="tidelog-authenticator")

    def close(self) -> None:
        """Ask nobody any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def principal_of(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> Principal:
        """
        Return the principal who makes a call.

        Raises:
            AuthenticationFailed: The credentials are not accepted.
            AuthenticationUnavailable: Nobody can tell at the moment.
        """
        if self._authenticator is None:
            return ANONYMOUS
        headers = list(context.invocation_metadata() or ())
        certificates = context.auth_context().get(_CERTIFICATE, ())
        asked = asyncio.get_running_loop().run_in_executor(
            self._pool, _authenticated, self._authenticator, headers, next(iter(certificates), None)
        )
        try:
            return await asyncio.wait_for(asked, AUTHENTICATION_SECONDS_MAX)
        except TimeoutError:
            _log.error("the authenticator took too long", limit_seconds=AUTHENTICATION_SECONDS_MAX)
            raise AuthenticationUnavailable("the server cannot tell who is calling now: try again later") from None


def _authenticated(authenticator: Authenticator, headers: _Headers, pem: bytes | None) -> Principal:
    try:
        principal = authenticator.authenticate(
            Credentials(
                token=_bearer_token(headers),
                metadata=dict(headers),
                certificate=PeerCertificate.from_pem(pem) if pem is not None else None,
            )
        )
        if not isinstance(principal, Principal):
            raise TypeError(f"{type(authenticator).__name__} returned a {type(principal).__name__}")
    except (AuthenticationFailed, AuthenticationUnavailable):
        raise
    except InvalidValue as error:
        raise AuthenticationFailed(f"the credentials name nobody who could call: {error}") from error
    except Exception as error:  # noqa: BLE001 - a plug-in may raise anything
        # Its text is not logged: a KeyError, for one, would quote the token.
        where = traceback.extract_tb(error.__traceback__)[-1]
        _log.error("the authenticator failed", error=type(error).__name__, file=where.filename, line=where.lineno)
        raise AuthenticationUnavailable("the server cannot tell who is calling now: try again later") from None
    return principal


def _bearer_token(headers: _Headers) -> str | None:
    found = [value for name, value in headers if name == "authorization"]
    if len(found) > 1:
        raise AuthenticationFailed("the call has several headers `authorization`")
    for value in found:
        scheme, _, token = str(value).partition(" ")
        if scheme.lower() == "bearer" and token.strip():
            return token.strip()
    return None
