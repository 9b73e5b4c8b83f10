"""Channels to a server: plain or with TLS, and the token that says who is calling."""

from __future__ import annotations

import _thread
import queue
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar, cast

import grpc

from tidelog._errors import InvalidValue
from tidelog._limits import MESSAGE_BYTES_MAX, TOKEN_BYTES_MAX
from tidelog._tls import read_authorities, read_identity

# How much may be on its way to one that reads: 5 MB/s over a path of 100 ms.
WINDOW_BYTES: Final = 512 * 1024
# The slowest path there is.
SLOWEST_BYTES_PER_SECOND: Final = 10_000

# What both ends do. Pings find a peer that vanished without a word, once nothing was heard for a while; the ping
# timeout is what counts: `grpc.keepalive_timeout_ms` has no effect in this implementation. A ping waits in line
# behind the data: the timeout must be longer than a window takes on the slowest path, or a connection passes for
# dead that is only slow, and a replica begins the same page for ever. For the same reason gRPC must not measure by
# pings how much the path takes, and widen the window accordingly.
PATIENT_OPTIONS: Final = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.ping_timeout_ms", 60_000),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
)

_OPTIONS: Final = (
    *PATIENT_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # This is how long an attempt to connect may take, whatever its name says; else it is twice as long, most of what a
    # replica tries for at all. With TLS a path of 4 s there and back gets through.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    # Two replicas of one program must not share a connection, or one's stall is the other's.
    ("grpc.use_local_subchannel_pool", 1),
)

# How long to wait for a channel to close. It is a matter of milliseconds, or of ever.
CLOSE_SECONDS_MAX: Final = 5.0

_Result = TypeVar("_Result")

Metadata: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """
    How a client speaks TLS. The files are PEM, and read when the replica is opened.

    Attributes:
        ca: Certificates of the authorities that may have signed the server's. None: those
            that the system trusts.
        certificate: The client's own certificate, for a server that asks for one. None: none.
        key: The private key of *certificate*, without a password.
        server_name: The name in the server's certificate, if it is not the host of the address.

    Raises:
        InvalidValue: *certificate* without *key*, or the other way round.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise InvalidValue("a client's certificate needs its private key, and a key its certificate")

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files. Raises InvalidValue if one is not what it should be."""
        authorities = _system_authorities() if self.ca is None else read_authorities(self.ca)
        if self.certificate is None or self.key is None:
            return grpc.ssl_channel_credentials(authorities)
        certificate, key = read_identity(self.certificate, self.key)
        return grpc.ssl_channel_credentials(authorities, key, certificate)


def open_channel(address: str, tls: ClientTls | None = None) -> grpc.Channel:
    """
    Return a channel to "host:port". It connects when it is used.

    Raises:
        InvalidValue: A file of *tls* cannot be read or is not what it should be.
    """
    return channel_opener(address, tls)()


def channel_opener(address: str, tls: ClientTls | None = None) -> Callable[[], grpc.Channel]:
    """
    Return what opens channels to "host:port". The files of *tls* are read now, and not again.

    Raises:
        InvalidValue: A file of *tls* cannot be read or is not what it should be.
    """
    if tls is None:
        return partial(grpc.insecure_channel, address, options=_OPTIONS)
    options: tuple[tuple[str, Any], ...] = _OPTIONS
    if tls.server_name is not None:
        options = (*options, ("grpc.ssl_target_name_override", tls.server_name))
    return partial(grpc.secure_channel, address, tls.credentials(), options=options)


def aside(work: Callable[[], _Result], seconds_max: float | None = None) -> _Result:
    """
    Do something of gRPC's in a thread to which no interrupt (Ctrl-C) comes; return or raise what it returns or raises.

    In the middle of gRPC an interrupt may leave a lock taken that every later call waits for, or end the process. What
    is waited for may be interrupted. No exit waits for the thread; `threading.Thread` will not do: an interrupt while
    it starts may leave it standing.

    Raises:
        TimeoutError: It takes longer, and goes on.
    """
    outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    _thread.start_new_thread(_do, (work, outcome))
    try:
        result, error = outcome.get(timeout=seconds_max)
    except queue.Empty:
        raise TimeoutError(f"it takes longer than {seconds_max} seconds") from None
    if error is not None:
        raise error
    return cast(_Result, result)


def _do(work: Callable[[], object], outcome: queue.SimpleQueue[tuple[Any, BaseException | None]]) -> None:
    try:
        outcome.put((work(), None))
    except BaseException as error:  # noqa: BLE001 - raised where it is waited for
        outcome.put((None, error))


def check_token(token: str) -> str:
    """
    Return *token* if a header can carry it: visible ASCII, at most 7 KiB.

    Raises:
        InvalidValue: It cannot. The message does not quote it.
    """
    if not isinstance(token, str):
        raise InvalidValue(f"a token is a string, got a {type(token).__name__}")
    if not token:
        raise InvalidValue("the token is empty")
    if len(token) > TOKEN_BYTES_MAX:
        raise InvalidValue(f"the token has {len(token)} characters: the limit is {TOKEN_BYTES_MAX}")
    for place, one in enumerate(token):
        if not "!" <= one <= "~":
            raise InvalidValue(
                f"character {place + 1} of the token is U+{ord(one):04X}: a header carries visible ASCII only"
            )
    return token


def authorization(token: str | None) -> Metadata:
    """Return the metadata of a call that sends *token*; without one there is none."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def _system_authorities() -> bytes | None:
    """Return what the system trusts; None where it keeps that in no file: gRPC then has a list of its own."""
    found = ssl.create_default_context().get_ca_certs(binary_form=True)
    return "".join(map(ssl.DER_cert_to_PEM_cert, found)).encode() or None
