"""
Authentication: from what a call brings along to the principal who makes it.

An `Authenticator` is a plug-in with one method. Those in here need no library and no
network; `_jwt` has the one for JSON Web Tokens. Nothing in here shows a token: neither
a `repr` nor a message of an error holds one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, Self, runtime_checkable

import msgspec
from cryptography import x509
from cryptography.x509.oid import NameOID

from tidelog._channel import check_token
from tidelog._errors import InvalidValue
from tidelog_server._errors import AuthenticationFailed
from tidelog_server._principal import DEFAULT_TENANT, Principal


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """
    The certificate of a client, which the TLS layer has verified.

    Attributes:
        common_name: The subject's common name (CN); empty if it has none.
        organization: The subject's organization (O); empty if it has none.
        organizational_units: The subject's organizational units (OU).
        alternative_names: Names of hosts, mail addresses, URIs and IP addresses.
        pem: The whole certificate.
    """

    common_name: str
    organization: str
    organizational_units: tuple[str, ...]
    alternative_names: tuple[str, ...]
    pem: bytes = field(repr=False)

    @classmethod
    def from_pem(cls, pem: bytes) -> Self:
        """
        Read a certificate.

        Raises:
            AuthenticationFailed: It cannot be read.
        """
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            common_names = _texts(certificate.subject, NameOID.COMMON_NAME)
            organizations = _texts(certificate.subject, NameOID.ORGANIZATION_NAME)
            units = _texts(certificate.subject, NameOID.ORGANIZATIONAL_UNIT_NAME)
            names = _alternative_names(certificate)
        except ValueError as error:
            raise AuthenticationFailed("the client's certificate cannot be read") from error
        return cls("".join(common_names[:1]), "".join(organizations[:1]), units, names, pem)


@dataclass(frozen=True, slots=True)
class Credentials:
    """
    What a call brings along to say who makes it.

    Attributes:
        token: The bearer token, from the header `authorization: Bearer TOKEN`. None: none.
        metadata: The headers of the call, by lower-case name; of a repeated one the last.
        certificate: The client's certificate if the server asks for one (mutual TLS). None: none.
    """

    token: str | None = field(default=None, repr=False)
    metadata: Mapping[str, str | bytes] = field(default_factory=dict, repr=False)
    certificate: PeerCertificate | None = None


@runtime_checkable
class Authenticator(Protocol):
    """Tells who makes a call. A plug-in: any object with this method."""

    def authenticate(self, credentials: Credentials) -> Principal:
        """
        Return the principal.

        Runs in a thread of a small pool, several at a time, so it may wait for a network;
        after 10 seconds the call is ended as one to be repeated.

        Raises:
            AuthenticationFailed: The credentials are not accepted. The message is told to the
                caller and logged. Anything else that is raised is a failure of the server's,
                and the call one to be repeated.
        """
        ...


class StaticTokens:
    """
    Tokens that are written down: for development, tests, and a handful of devices.

    Args:
        tokens: The principal of each token.

    Raises:
        InvalidValue: A token that no header can carry.
    """

    def __init__(self, tokens: Mapping[str, Principal]) -> None:
        # Digests have one length, and what is not kept cannot be shown.
        self._principals = [(_digest(check_token(token)), principal) for token, principal in tokens.items()]

    def __repr__(self) -> str:
        return f"StaticTokens({len(self._principals)} tokens)"

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """
        Read tokens from a file: JSON if its name ends in .json, else TOML.

        It has a list `tokens`; each member has `token` and `user_id`, and may have `tenant`,
        `roles` (a list) and `claims` (a table).

        Raises:
            InvalidValue: The file cannot be read, is not of this form, or has a token twice.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            data = msgspec.json.decode(text) if path.suffix == ".json" else tomllib.loads(text)
            entries = msgspec.convert(data, _TokensFile).tokens
        except OSError as error:
            raise InvalidValue(f"{path} should hold tokens: {error.strerror}") from error
        except (ValueError, msgspec.MsgspecError) as error:
            # Without its cause, which may quote a name of the file's: some write tokens where names belong.
            raise InvalidValue(f"{path} does not hold tokens as it should: {_complaint(error)}") from None
        tokens: dict[str, Principal] = {}
        for number, entry in enumerate(entries, start=1):
            try:
                if check_token(entry.token) in tokens:
                    raise InvalidValue("the token is there before")
                tokens[entry.token] = Principal(entry.user_id, entry.tenant, frozenset(entry.roles), entry.claims)
            except InvalidValue as error:
                raise InvalidValue(f"{path}, entry {number} of `tokens`: {error}") from error
        return cls(tokens)

    def authenticate(self, credentials: Credentials) -> Principal:
        """Return the token's principal. Raises AuthenticationFailed."""
        digest = _digest(token_of(credentials))
        found = None
        # All of them, so that the time it takes does not tell which one came close.
        for known, principal in self._principals:
            if hmac.compare_digest(known, digest):
                found = principal
        if found is None:
            raise AuthenticationFailed("the token is not known")
        return found


class CertificateAuthenticator:
    """
    Takes the principal from the client's certificate. Needs a server with mutual TLS.

    Args:
        principal_of: Returns the principal of a certificate, or raises AuthenticationFailed.
            None: the user is the common name, or else the first alternative name; the tenant
            is the organization; the roles are the organizational units.
        default_tenant: Tenant of certificates that name no organization. None: they are
            not accepted. Means nothing to a *principal_of*.
    """

    def __init__(
        self,
        principal_of: Callable[[PeerCertificate], Principal] | None = None,
        *,
        default_tenant: str | None = None,
    ) -> None:
        self._principal_of = principal_of or self._by_subject
        self._default_tenant = default_tenant

    def authenticate(self, credentials: Credentials) -> Principal:
        """Return the certificate's principal. Raises AuthenticationFailed."""
        if credentials.certificate is None:
            raise AuthenticationFailed("the call came without a client certificate")
        return self._principal_of(credentials.certificate)

    def _by_subject(self, certificate: PeerCertificate) -> Principal:
        user_id = certificate.common_name or "".join(certificate.alternative_names[:1])
        tenant = certificate.organization or self._default_tenant
        if not user_id:
            raise AuthenticationFailed("the client's certificate names nobody: it has no common name")
        if not tenant:
            raise AuthenticationFailed("the client's certificate names no tenant: it has no organization (O)")
        return Principal(user_id, tenant, frozenset(certificate.organizational_units))


def token_of(credentials: Credentials) -> str:
    """Return the bearer token. Raises AuthenticationFailed if there is none."""
    if credentials.token is None:
        raise AuthenticationFailed("the call came without a token: send it as `authorization: Bearer TOKEN`")
    return credentials.token


class _TokenEntry(msgspec.Struct, forbid_unknown_fields=True):
    token: str
    user_id: str
    tenant: str = DEFAULT_TENANT
    roles: list[str] = []
    claims: dict[str, Any] = {}


class _TokensFile(msgspec.Struct, forbid_unknown_fields=True):
    tokens: list[_TokenEntry]


def _complaint(error: Exception) -> str:
    """Return what a library says of a file, and where, without the names that it quotes."""
    text = str(error)
    if isinstance(error, tomllib.TOMLDecodeError):
        return f"it is no TOML{text[text.rfind(' (') :]}"
    if isinstance(error, msgspec.ValidationError) and "unknown field" in text:
        entry = re.search(r" - at `\$\.tokens\[\d+\]`$", text)
        return f"there is an unknown field{entry[0] if entry else ''}"
    return text


_NAMES: Final = (x509.DNSName, x509.RFC822Name, x509.UniformResourceIdentifier, x509.IPAddress)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _texts(subject: x509.Name, oid: x509.ObjectIdentifier) -> tuple[str, ...]:
    return tuple(str(attribute.value) for attribute in subject.get_attributes_for_oid(oid))


def _alternative_names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in found if isinstance(name, _NAMES))
