"""JSON Web Tokens: signed claims that say who is calling, checked with keys that others publish."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from tidelog._address import is_loopback
from tidelog._errors import InvalidValue
from tidelog._logging import get_logger
from tidelog_server._authentication import Credentials, token_of
from tidelog_server._errors import AuthenticationFailed, AuthenticationUnavailable
from tidelog_server._principal import Principal

LEEWAY_SECONDS_DEFAULT: Final = 30.0

# How long keys count as fresh; how long they still serve where they cannot be read again.
FILE_KEYS_FRESH_SECONDS: Final = 1.0
URL_KEYS_FRESH_SECONDS: Final = 300.0
KEYS_SECONDS_MAX: Final = 3_600.0
# A token that names an unknown key makes the server ask the URL, so there is a pause in between.
URL_PAUSE_SECONDS: Final = 15.0
URL_TIMEOUT_SECONDS: Final = 5.0

# "none" is not among them, nor what few libraries write.
_SECRET_ALGORITHMS: Final = frozenset(("HS256", "HS384", "HS512"))
_KEY_PAIR_ALGORITHMS: Final = frozenset(
    ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
)

# The first class that fits counts. Nothing of the token itself is told.
_REASONS: Final[tuple[tuple[type[Exception], str], ...]] = (
    (jwt.ExpiredSignatureError, "has expired"),
    (jwt.ImmatureSignatureError, "is not valid yet"),
    (jwt.InvalidAudienceError, "is for another audience"),
    (jwt.InvalidIssuerError, "is from another issuer"),
    (jwt.MissingRequiredClaimError, "lacks a claim that is required: when it expires, from whom or for whom it is"),
    (jwt.InvalidAlgorithmError, "is signed with an algorithm that is not accepted"),
    (jwt.InvalidSignatureError, "has a bad signature"),
)

_log = get_logger("tidelog.authentication")


class JwtAuthenticator:
    """
    Takes the principal from the claims of a JSON Web Token.

    The token must say when it expires (`exp`). Its `aud` must contain an *audience*, its
    `iss` be an *issuer*, where they are given; a token for an audience is not accepted where
    none is given. The principal's claims are those of the token.

    Args:
        algorithms: The algorithms that a token may be signed with: HS256, HS384, HS512, or any of
            RS..., PS..., ES... and EdDSA.
        key: The secret (HS), or the public key in PEM.
        jwks: A file or URL with public keys in JSON (a JWK set), in place of *key*. It is
            read again as it changes; keys from a URL are kept for up to five minutes, an hour
            if it does not answer.
        audience: What `aud` must contain, or one of several.
        issuer: What `iss` must be, or one of several.
        leeway_seconds: By how much the clocks of issuer and server may differ.
        user_claim: The claim with the user's id.
        tenant_claim: The claim with the tenant.
        roles_claim: The claim with the roles: a list, or text with spaces between them.
        default_tenant: Tenant of tokens that name none. None: they are not accepted.

    Raises:
        InvalidValue: A combination that cannot work, or a key or file that is none.
    """

    def __init__(
        self,
        *,
        algorithms: str | Sequence[str],
        key: str | bytes | None = None,
        jwks: str | Path | None = None,
        audience: str | Sequence[str] | None = None,
        issuer: str | Sequence[str] | None = None,
        leeway_seconds: float = LEEWAY_SECONDS_DEFAULT,
        user_claim: str = "sub",
        tenant_claim: str = "tenant",
        roles_claim: str = "roles",
        default_tenant: str | None = None,
    ) -> None:
        self._algorithms = _checked_algorithms([algorithms] if isinstance(algorithms, str) else list(algorithms))
        if not 0 <= leeway_seconds < float("inf"):
            raise InvalidValue(f"a leeway of {leeway_seconds} seconds")
        self._find_key = _key_finder(key, jwks, self._algorithms)
        self._audience = audience
        self._issuer = issuer
        self._leeway_seconds = leeway_seconds
        self._user_claim = user_claim
        self._tenant_claim = tenant_claim
        self._roles_claim = roles_claim
        self._default_tenant = default_tenant

    def authenticate(self, credentials: Credentials) -> Principal:
        """Return the token's principal. Raises AuthenticationFailed, or AuthenticationUnavailable without keys."""
        claims = self._verified(token_of(credentials))
        tenant = claims.get(self._tenant_claim, self._default_tenant)
        for name, value in ((self._user_claim, claims.get(self._user_claim)), (self._tenant_claim, tenant)):
            if not isinstance(value, str):
                raise AuthenticationFailed(f"the token's claim {name!r} is missing or no string")
        return Principal(claims[self._user_claim], str(tenant), self._roles(claims), claims)

    def _verified(self, token: str) -> dict[str, Any]:
        try:
            key_id = jwt.get_unverified_header(token).get("kid")
        except Exception as error:
            raise AuthenticationFailed(_reason(error)) from error
        key = self._find_key(key_id)
        try:
            return jwt.decode(
                token,
                key,
                algorithms=self._algorithms,
                audience=self._audience,
                issuer=self._issuer,
                leeway=self._leeway_seconds,
                options={"require": ["exp"], "enforce_minimum_key_length": True},
            )
        except Exception as error:  # whatever a stranger's bytes lead to is a bad token
            raise AuthenticationFailed(_reason(error)) from error

    def _roles(self, claims: Mapping[str, Any]) -> frozenset[str]:
        roles = claims.get(self._roles_claim, [])
        if isinstance(roles, str):
            roles = roles.split()
        if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
            raise AuthenticationFailed(f"the token's claim {self._roles_claim!r} is no list of strings")
        return frozenset(roles)


# A bare key is used with the algorithm of the token, the other one with its own.
_Key: TypeAlias = jwt.PyJWK | RSAPublicKey


class SigningKey(NamedTuple):
    """
    A public key that others sign with.

    Attributes:
        key_id: How tokens call it; None: not at all.
        key: The key.
    """

    key_id: str | None
    key: _Key


class KeySet:
    """
    Public keys that somebody else publishes, read again as they change.

    A key that is not among them makes it look again, though not all the time. Where looking
    fails, the keys at hand serve for up to an hour: an outage elsewhere locks nobody out.

    Args:
        name: What messages call the keys.
        read: Reads them: a JWK set as JSON has it.
        fresh_seconds: For how long they need not be read again.
        pause_seconds: The least time between two readings.
    """

    def __init__(
        self, name: str, read: Callable[[], Any], *, fresh_seconds: float, pause_seconds: float = 0.0
    ) -> None:
        self._name = name
        self._read = read
        self._fresh_seconds = fresh_seconds
        self._pause_seconds = pause_seconds
        self._lock = threading.Lock()
        self._keys: list[SigningKey] = []
        self._read_at = self._tried_at = float("-inf")

    def find(self, key_id: str | None) -> SigningKey:
        """
        Return the key with an id. Where there is only one key, a token need not name it.

        Raises:
            AuthenticationFailed: There is none.
            AuthenticationUnavailable: The keys cannot be read.
        """
        with self._lock:
            if time.monotonic() - self._read_at > self._fresh_seconds:
                self._refresh()
            found = self._match(key_id)
            if found is None:
                self._refresh()
                found = self._match(key_id)
            if not self._keys:
                raise AuthenticationUnavailable("the server has no keys to check tokens with now: try again later")
        if found is None:
            raise AuthenticationFailed("the token is signed with a key that is not known here")
        return found

    def _match(self, key_id: str | None) -> SigningKey | None:
        if key_id is None:
            return self._keys[0] if len(self._keys) == 1 else None
        return next((key for key in self._keys if key.key_id == key_id), None)

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._tried_at < self._pause_seconds:
            return
        self._tried_at = now
        try:
            self._keys = _signing_keys(self._read())
            self._read_at = now
        except Exception as error:  # noqa: BLE001 - a network, a file, or what is in it
            _log.warning("the keys cannot be read", source=self._name, error=type(error).__name__)
            if now - self._read_at > KEYS_SECONDS_MAX:
                self._keys = []


def _key_finder(
    key: str | bytes | None, jwks: str | Path | None, algorithms: list[str]
) -> Callable[[str | None], _Key | str | bytes]:
    """Return what finds the key for an id."""
    if key is not None and jwks is None:
        _check_key(key, algorithms)
        checked = key
        return lambda _key_id: checked
    if jwks is not None and key is None:
        if not _KEY_PAIR_ALGORITHMS.issuperset(algorithms):
            raise InvalidValue(f"a JWK set holds public keys: {algorithms[0]} needs a secret key")
        keys = _key_set(jwks)
        return lambda key_id: keys.find(key_id).key
    raise InvalidValue("tokens are checked with a key or with a JWK set: give one of them")


def _key_set(source: str | Path) -> KeySet:
    """Return the keys in a file, which must be there, or behind a URL, which may answer later."""
    if isinstance(source, str) and source.lower().startswith(("https://", "http://")):
        host = urlsplit(source).hostname or ""
        if source.lower().startswith("http://") and not is_loopback(host):
            _log.warning("keys are read without TLS: whoever is on the way can replace them", host=host)
        client = jwt.PyJWKClient(source, cache_jwk_set=False, timeout=URL_TIMEOUT_SECONDS)
        return KeySet(host, client.fetch_data, fresh_seconds=URL_KEYS_FRESH_SECONDS, pause_seconds=URL_PAUSE_SECONDS)
    path = Path(source)

    def read() -> Any:
        return json.loads(path.read_text(encoding="utf-8"))

    try:
        keys = _signing_keys(read())
    except OSError as error:
        raise InvalidValue(f"{path} should hold a JWK set: {error.strerror}") from error
    except ValueError as error:
        raise InvalidValue(f"{path} holds no JWK set") from error
    if not keys:
        raise InvalidValue(f"{path} holds no JWK set with public keys for signatures")
    return KeySet(str(path), read, fresh_seconds=FILE_KEYS_FRESH_SECONDS)


def _signing_keys(jwk_set: Any) -> list[SigningKey]:
    """Return the keys of a JWK set that check signatures; what is no such key is passed over. Raises ValueError."""
    if not isinstance(jwk_set, dict) or not isinstance(jwk_set.get("keys"), list):
        raise ValueError("a JWK set has a list of keys")
    found = []
    for jwk in jwk_set["keys"]:
        if not isinstance(jwk, dict) or jwk.get("use") not in (None, "sig"):
            continue
        try:
            key = jwt.PyJWK(jwk)
        except jwt.PyJWTError:
            continue
        # A key need not say its algorithm. Those of other types follow from the key, an RSA key serves several.
        is_any_rsa = key.key_type == "RSA" and not jwk.get("alg")
        found.append(SigningKey(key.key_id, key.key if is_any_rsa else key))
    return found


def _checked_algorithms(algorithms: list[str]) -> list[str]:
    known = _SECRET_ALGORITHMS | _KEY_PAIR_ALGORITHMS
    if not algorithms:
        raise InvalidValue("say which algorithms tokens may be signed with")
    for algorithm in algorithms:
        if algorithm not in known:
            raise InvalidValue(f"{algorithm!r} is no algorithm for tokens: choose from {', '.join(sorted(known))}")
    if not _SECRET_ALGORITHMS.isdisjoint(algorithms) and not _KEY_PAIR_ALGORITHMS.isdisjoint(algorithms):
        # A token could be signed with the public key, taken for a secret.
        raise InvalidValue(f"{', '.join(algorithms)}: a key is a secret (HS) or a public key, never both")
    return algorithms


def _check_key(key: str | bytes, algorithms: list[str]) -> None:
    """Raise InvalidValue unless *key* serves each algorithm. The message does not quote it."""
    for name in algorithms:
        algorithm = jwt.get_algorithm_by_name(name)
        try:
            prepared = algorithm.prepare_key(key)
        except Exception as error:
            raise InvalidValue(f"the key is none for {name}") from error
        if weakness := algorithm.check_key_length(prepared):
            raise InvalidValue(f"the key is too weak for {name}: {weakness}")


def _reason(error: Exception) -> str:
    why = next((reason for kind, reason in _REASONS if isinstance(error, kind)), "cannot be read")
    return f"the token {why}"
