"""Who is calling: tokens, certificates, keys, and what none of them tells anybody."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import grpc
import jwt
import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from hypothesis import given
from hypothesis import strategies as st

from tidelog import InvalidValue, TokenUnavailable
from tidelog._address import host_of, is_loopback
from tidelog._channel import check_token
from tidelog._limits import TOKEN_BYTES_MAX
from tidelog_client import ClientTls, Replica
from tidelog_client._connection import Connection
from tidelog_server import (
    Application,
    AuthenticationFailed,
    AuthenticationUnavailable,
    Authenticator,
    CertificateAuthenticator,
    Credentials,
    JwtAuthenticator,
    PeerCertificate,
    Principal,
    Server,
    ServerTls,
    StaticTokens,
)
from tidelog_server import _callers as callers_module
from tidelog_server import _jwt as jwt_module
from tidelog_server._callers import Callers
from tidelog_server._jwt import KeySet
from tidelog_server._principal import ANONYMOUS

ANN: Final = Principal("ann", "acme", frozenset({"clerk"}))
SECRET: Final = "a secret that has thirty-two bytes or more"

RSA: Final = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC: Final = {
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "ES512": ec.generate_private_key(ec.SECP521R1()),
}
ED: Final = ed25519.Ed25519PrivateKey.generate()
PRIVATE: Final[dict[str, Any]] = {
    **{f"HS{bits}": SECRET * 2 for bits in (256, 384, 512)},
    **{f"{family}{bits}": RSA for family in ("RS", "PS") for bits in (256, 384, 512)},
    **EC,
    "EdDSA": ED,
}


def public_pem(private: Any) -> str:
    """Return the public half of a key pair as PEM; a secret as it is."""
    if isinstance(private, str):
        return private
    return str(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())


def jwk(algorithm: str, key_id: str | None = None, **others: str) -> dict[str, Any]:
    """Return the public half of an algorithm's key as a JWK."""
    private = PRIVATE[algorithm]
    found = jwt.get_algorithm_by_name(algorithm).to_jwk(private.public_key(), as_dict=True)
    return {**found, "alg": algorithm, **({} if key_id is None else {"kid": key_id}), **others}


def token(algorithm: str = "HS256", *, kid: str | None = None, key: Any = None, **claims: Any) -> str:
    """Sign a token that lives a minute and names everything, unless a claim says otherwise; None leaves it out."""
    usual: dict[str, Any] = {"sub": "ann", "tenant": "acme", "roles": ["clerk"], "exp": time.time() + 60}
    kept = {name: value for name, value in (usual | claims).items() if value is not None}
    headers = None if kid is None else {"kid": kid}
    return jwt.encode(kept, PRIVATE[algorithm] if key is None else key, algorithm, headers=headers)


def authenticator(**options: Any) -> JwtAuthenticator:
    """Return one that knows the secret."""
    return JwtAuthenticator(**{"key": PRIVATE["HS256"], "algorithms": "HS256"} | options)


def refused(by: Authenticator, credentials: Credentials | str) -> str:
    """Return why credentials are not accepted. No word of a token is in it."""
    given = Credentials(token=credentials) if isinstance(credentials, str) else credentials
    with pytest.raises(AuthenticationFailed) as failed:
        by.authenticate(given)
    for part in (given.token or "").split("."):
        assert len(part) < 8 or part not in str(failed.value)
    return str(failed.value)


class TestPrincipals:
    @pytest.mark.parametrize("name", ["user_id", "tenant"])
    @pytest.mark.parametrize("value", ["", "a\0b", "x" * 129, "ü" * 65, "\ud800", None, 7, b"ann"])
    def test_have_names_that_can_be_stored(self, name: str, value: Any) -> None:
        """User and tenant are 1 to 128 bytes of text: the empty tenant is the server's own."""
        with pytest.raises(InvalidValue, match=r"a user id|a tenant"):
            Principal(**{"user_id": "ann", name: value})

    @pytest.mark.parametrize("roles", ["clerk", ["clerk"], frozenset({""}), frozenset({7})])
    def test_have_roles_that_are_a_set_of_names(self, roles: Any) -> None:
        """A word is not taken for the set of its letters."""
        with pytest.raises(InvalidValue, match="role"):
            Principal("ann", roles=roles)


class TestTokensInHeaders:
    @pytest.mark.parametrize("text", ["a", "~!", "eyJ.eyJ.sig-_=", "x" * TOKEN_BYTES_MAX])
    def test_may_be_visible_ascii(self, text: str) -> None:
        """What a header carries is accepted as it is."""
        assert check_token(text) == text

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("", "empty"),
            ("tok en", r"character 4 of the token is U\+0020"),
            ("token\n", r"character 6 of the token is U\+000A"),
            ("tokén", r"character 4 of the token is U\+00E9"),
            ("x" * (TOKEN_BYTES_MAX + 1), "the limit is 7168"),
            (b"token", "got a bytes"),
        ],
    )
    def test_are_refused_early_and_not_quoted(self, text: Any, why: str, tmp_path: Path) -> None:
        """A token that no header can carry is an error where the replica is opened, which leaves no replica behind."""
        with pytest.raises(InvalidValue, match=why) as error:
            Replica(tmp_path / "a", server="127.0.0.1:1", token=text)

        assert "tok" not in str(error.value).replace("token", "")
        assert not (tmp_path / "a").exists()

    def test_come_from_providers_too(self) -> None:
        """A provider is asked each time; what it gives is checked, what it raises is kept as the cause."""
        given: list[Any] = ["one", "two", "tw o", ConnectionError("offline: password=hunter2")]

        def provider() -> str:
            value = given.pop(0)
            if isinstance(value, Exception):
                raise value
            return str(value)

        connection = Connection("127.0.0.1:1", token=provider)
        assert connection.may_get_another_token
        assert connection.authorization() == (("authorization", "Bearer one"),)
        assert connection.authorization() == (("authorization", "Bearer two"),)
        with pytest.raises(InvalidValue, match="visible ASCII"):
            connection.authorization()
        with pytest.raises(TokenUnavailable, match="the token provider raised ConnectionError") as error:
            connection.authorization()
        assert isinstance(error.value.__cause__, ConnectionError)
        assert "hunter2" not in str(error.value)
        connection.close()

    @pytest.mark.parametrize(
        ("address", "tls", "warned"),
        [("127.0.0.1:1", None, False), ("shop.example:1", ClientTls(), False), ("shop.example:1", None, True)],
    )
    def test_in_the_open_are_worth_a_warning(
        self, address: str, tls: ClientTls | None, *, warned: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A token that leaves the machine without TLS is logged as a danger, and not itself."""
        Connection(address, token="open-sesame", tls=tls).close()

        assert any("without TLS" in record.getMessage() for record in caplog.records) is warned
        assert "open-sesame" not in caplog.text

    @pytest.mark.parametrize(
        ("address", "local"),
        [
            ("127.0.0.1:80", True),
            ("127.9.9.9:80", True),
            ("[::1]:80", True),
            ("localhost:80", True),
            ("0.0.0.0:80", False),
            ("[::]:80", False),
            ("10.0.0.1:80", False),
            ("localhost.example:80", False),
        ],
    )
    def test_know_what_is_this_machine(self, address: str, *, local: bool) -> None:
        """Only what cannot leave the machine counts as local."""
        assert is_loopback(host_of(address)) is local


class TestStaticTokens:
    TOKENS = StaticTokens({"ann-secret": ANN, "bob-secret": Principal("bob")})

    def test_name_their_principals(self) -> None:
        """Each token is its principal's."""
        assert self.TOKENS.authenticate(Credentials(token="ann-secret")) == ANN
        assert self.TOKENS.authenticate(Credentials(token="bob-secret")) == Principal("bob")

    @pytest.mark.parametrize("text", ["ann-secreT", "ann-secret ", "ann-secre", "ann-secret1", "ä"])
    def test_are_compared_whole(self, text: str) -> None:
        """What comes close is not known."""
        assert refused(self.TOKENS, text) == "the token is not known"

    def test_are_asked_for(self) -> None:
        """Without a token the error says how to send one."""
        assert "authorization: Bearer" in refused(self.TOKENS, Credentials())

    def test_are_not_shown(self) -> None:
        """Neither the tokens nor the credentials of a call are in their repr."""
        call = Credentials(token="ann-secret", metadata={"authorization": "Bearer ann-secret"})

        assert "secret" not in f"{self.TOKENS!r} {call!r} {self.TOKENS} {call}"
        assert b"secret" not in repr(vars(self.TOKENS)).encode()

    def test_come_from_files(self, tmp_path: Path) -> None:
        """TOML and JSON hold the same: who each token is."""
        as_toml, as_json = tmp_path / "tokens.toml", tmp_path / "tokens.json"
        as_toml.write_text(
            '[[tokens]]\ntoken = "t1"\nuser_id = "ann"\ntenant = "acme"\n'
            'roles = ["clerk"]\nclaims = { region = "n" }\n'
            '[[tokens]]\ntoken = "t2"\nuser_id = "bob"\n'
        )
        first = {"token": "t1", "user_id": "ann", "tenant": "acme", "roles": ["clerk"], "claims": {"region": "n"}}
        as_json.write_text(json.dumps({"tokens": [first, {"token": "t2", "user_id": "bob"}]}))

        for path in (as_toml, str(as_json)):
            tokens = StaticTokens.load(path)
            assert tokens.authenticate(Credentials(token="t1")) == Principal(
                "ann", "acme", frozenset({"clerk"}), {"region": "n"}
            )
            assert tokens.authenticate(Credentials(token="t2")) == Principal("bob", "default")

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            (None, "No such file"),
            ("[[tokens]", "does not hold tokens"),
            ("", "missing required field `tokens`"),
            ('[[tokens]]\nuser_id = "ann"', "missing required field `token`"),
            (
                '[[tokens]]\ntoken = "hush"\nuser = "ann"',
                r"an unknown field - at `\$\.tokens|missing required field `user_id`",
            ),
            ('[[tokens]]\n"hush` - at `hush" = "ann"', r"an unknown field - at `\$\.tokens\[0\]`$"),
            ('"x - at `hush" = "ann"', "there is an unknown field$"),
            ("[hush]\n[hush]", r"it is no TOML \(at line 2, column 6\)$"),
            ('[[tokens]]\ntoken = "hush"\nuser_id = 7', "Expected `str`, got `int`"),
            ('[[tokens]]\ntoken = "hush"\nuser_id = ""', "entry 1 of `tokens`: a user id"),
            ('[[tokens]]\ntoken = "hush hush"\nuser_id = "ann"', r"entry 1 of `tokens`: character 5"),
            ('[[tokens]]\ntoken = "hush"\nuser_id = "ann"\ntenant = ""', "entry 1 of `tokens`: a tenant"),
            ('tokens = [{token = "hush", user_id = "a"}, {token = "hush", user_id = "b"}]', "entry 2 .* there before"),
        ],
    )
    def test_in_a_bad_file_are_refused(self, text: str | None, why: str, tmp_path: Path) -> None:
        """The error names the file and the place in it, and quotes no token."""
        path = tmp_path / "tokens.toml"
        if text is not None:
            path.write_text(text)

        with pytest.raises(InvalidValue, match=why) as error:
            StaticTokens.load(path)

        assert str(path) in str(error.value)
        assert "hush" not in "".join(traceback.format_exception(error.value))


class TestJsonWebTokens:
    @pytest.mark.parametrize("algorithm", sorted(PRIVATE))
    def test_are_checked_with_a_key(self, algorithm: str) -> None:
        """Each algorithm works with its secret or public key, and gives the claims to the principal."""
        by = JwtAuthenticator(key=public_pem(PRIVATE[algorithm]), algorithms=[algorithm])

        principal = by.authenticate(Credentials(token=token(algorithm, region="north")))

        assert (principal.user_id, principal.tenant, set(principal.roles)) == ("ann", "acme", {"clerk"})
        assert principal.claims["region"] == "north"

    @pytest.mark.parametrize("algorithm", sorted(PRIVATE.keys() - {"HS256", "HS384", "HS512"}))
    def test_are_checked_with_a_key_set(self, algorithm: str, tmp_path: Path) -> None:
        """A JWK set has the key that the token names."""
        path = tmp_path / "keys.json"
        path.write_text(json.dumps({"keys": [jwk("ES384", "other"), jwk(algorithm, "mine")]}))
        by = JwtAuthenticator(jwks=path, algorithms=[algorithm])

        assert by.authenticate(Credentials(token=token(algorithm, kid="mine"))).user_id == "ann"
        assert "not known here" in refused(by, token(algorithm, kid="nobody's"))
        assert "not known here" in refused(by, token(algorithm))

    @pytest.mark.parametrize("algorithm", sorted(PRIVATE.keys() - {"HS256", "HS384", "HS512"}))
    def test_are_checked_with_keys_that_name_no_algorithm(self, algorithm: str, tmp_path: Path) -> None:
        """A key need not say its algorithm: it serves every one of its kind that is accepted, and no other."""
        path = tmp_path / "keys.json"
        key = jwk(algorithm, "mine")
        del key["alg"]
        path.write_text(json.dumps({"keys": [key]}))
        by = JwtAuthenticator(jwks=path, algorithms=[algorithm])

        assert by.authenticate(Credentials(token=token(algorithm, kid="mine"))).user_id == "ann"
        assert "bad signature" in refused(by, token(algorithm, kid="mine")[:-8] + "AAAAAAAA")
        other = "ES256" if algorithm != "ES256" else "RS256"
        assert "algorithm" in refused(by, token(other, kid="mine"))
        assert refused(JwtAuthenticator(jwks=path, algorithms=[algorithm, other]), token(other, kid="mine"))

    def test_are_checked_with_the_algorithm_that_a_key_names(self, tmp_path: Path) -> None:
        """A key that says its algorithm serves no other, though the authenticator accepts it."""
        path = tmp_path / "keys.json"
        path.write_text(json.dumps({"keys": [jwk("RS256", "mine")]}))
        by = JwtAuthenticator(jwks=path, algorithms=["RS256", "RS512", "PS256"])

        assert by.authenticate(Credentials(token=token("RS256", kid="mine"))).user_id == "ann"
        assert "algorithm" in refused(by, token("RS512", kid="mine"))

    @pytest.mark.parametrize("algorithm", ["HS256", "RS256", "ES256"])
    def test_with_a_bad_signature_are_refused(self, algorithm: str) -> None:
        """Claims that somebody else signed, or changed after they were signed, count for nothing."""
        by = JwtAuthenticator(key=public_pem(PRIVATE[algorithm]), algorithms=[algorithm])
        head, claims, signature = token(algorithm).split(".")
        altered = token(algorithm, sub="root").split(".")[1]
        stranger: Any = {
            "HS256": "another secret that has enough bytes in it",
            "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
            "ES256": ec.generate_private_key(ec.SECP256R1()),
        }[algorithm]

        assert "bad signature" in refused(by, f"{head}.{altered}.{signature}")
        assert "bad signature" in refused(by, token(algorithm, key=stranger))
        assert refused(by, f"{head}.{claims}.")

    def test_without_a_signature_are_refused(self, tmp_path: Path) -> None:
        """The algorithm `none` is never accepted, whatever the spelling."""
        path = tmp_path / "keys.json"
        path.write_text(json.dumps({"keys": [jwk("RS256", "k")]}))
        for by in (authenticator(), JwtAuthenticator(jwks=path, algorithms=["RS256"])):
            for name in ("none", "None", "NONE", ""):
                head = unpadded(json.dumps({"alg": name, "kid": "k"}).encode())
                claims = token().split(".")[1]
                assert "algorithm" in refused(by, f"{head}.{claims}.")

    @pytest.mark.parametrize("algorithms", [["RS256"], ["RS256", "ES256"]])
    def test_are_not_signed_with_a_public_key(self, algorithms: list[str], tmp_path: Path) -> None:
        """A public key is no secret: a token signed with it by HS256 is refused."""
        pem = public_pem(RSA)
        path = tmp_path / "keys.json"
        path.write_text(json.dumps({"keys": [jwk("RS256", "k")]}))
        signed = ".".join(
            unpadded(json.dumps(part).encode())
            for part in ({"alg": "HS256", "kid": "k"}, {"sub": "root", "tenant": "acme", "exp": time.time() + 60})
        )
        signature = hmac.new(pem.encode(), signed.encode(), hashlib.sha256).digest()
        forged = f"{signed}.{unpadded(signature)}"

        assert "algorithm" in refused(JwtAuthenticator(jwks=path, algorithms=algorithms), forged)
        if algorithms == ["RS256"]:
            assert "algorithm" in refused(JwtAuthenticator(key=pem, algorithms=algorithms), forged)

    def test_expire(self) -> None:
        """A token lives until `exp`, and a little longer because clocks differ."""
        expired = token(exp=time.time() - 20)

        assert authenticator(leeway_seconds=30).authenticate(Credentials(token=expired)).user_id == "ann"
        assert refused(authenticator(leeway_seconds=5), expired) == "the token has expired"

    def test_begin(self) -> None:
        """A token of the future is not valid yet, but for the leeway."""
        early = token(nbf=time.time() + 20)

        assert authenticator(leeway_seconds=30).authenticate(Credentials(token=early)).user_id == "ann"
        assert refused(authenticator(leeway_seconds=5), early) == "the token is not valid yet"

    def test_say_when_they_expire(self) -> None:
        """A token that lives for ever is refused."""
        assert "lacks a claim" in refused(authenticator(), token(exp=None))

    def test_are_for_an_audience(self) -> None:
        """What was issued for somebody else is refused, also where no audience was named."""
        for_us, for_others = token(aud=["us", "all"]), token(aud="others")

        assert authenticator(audience="us").authenticate(Credentials(token=for_us)).user_id == "ann"
        assert authenticator(audience=["x", "us"]).authenticate(Credentials(token=for_us)).user_id == "ann"
        assert "another audience" in refused(authenticator(audience="us"), for_others)
        assert "another audience" in refused(authenticator(), for_others)
        assert "lacks a claim" in refused(authenticator(audience="us"), token())

    def test_are_from_an_issuer(self) -> None:
        """Where issuers are named, others are refused."""
        by = authenticator(issuer=["https://a.example", "https://b.example"])

        assert by.authenticate(Credentials(token=token(iss="https://b.example"))).user_id == "ann"
        assert "another issuer" in refused(by, token(iss="https://c.example"))
        assert "lacks a claim" in refused(by, token())

    @pytest.mark.parametrize(
        ("claims", "why"),
        [
            ({"sub": None}, "claim 'sub' is missing or no string"),
            ({"tenant": None}, "claim 'tenant' is missing or no string"),
            ({"tenant": 7}, "claim 'tenant' is missing or no string"),
            ({"tenant": ["acme"]}, "claim 'tenant' is missing or no string"),
            ({"roles": 7}, "claim 'roles' is no list of strings"),
            ({"roles": ["clerk", 7]}, "claim 'roles' is no list of strings"),
            ({"roles": {"clerk": True}}, "claim 'roles' is no list of strings"),
        ],
    )
    def test_name_a_principal(self, claims: dict[str, Any], why: str) -> None:
        """A signed token whose claims make no principal is refused with the claim's name."""
        assert why in refused(authenticator(), token(**claims))

    def test_name_it_in_claims_of_the_issuers(self) -> None:
        """The claims' names can be chosen; roles may be text; a tenant may be given."""
        by = authenticator(
            user_claim="email", tenant_claim="org", roles_claim="scope", default_tenant="acme", leeway_seconds=0
        )

        principal = by.authenticate(Credentials(token=token(email="ann@x", scope="read write", tenant=None)))

        assert (principal.user_id, principal.tenant) == ("ann@x", "acme")
        assert principal.roles == {"read", "write"}
        assert by.authenticate(Credentials(token=token(email="a", org="bolt"))).tenant == "bolt"

    @given(st.text(max_size=60) | st.from_regex(r"\A[\w-]{0,20}(\.[\w-]{0,20}){0,4}\Z"))
    def test_that_are_none_are_refused(self, text: str) -> None:
        """Whatever bytes a stranger sends, the answer is a refusal."""
        refused(authenticator(), text)

    def test_that_are_deep_are_refused(self) -> None:
        """Nesting that is too deep to be read is a bad token, not a failure of the server's."""
        head = unpadded(b"[" * 100_000)

        assert "cannot be read" in refused(authenticator(), f"{head}.e30.e30")

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"algorithms": []}, "say which algorithms"),
            ({"algorithms": "none"}, "'none' is no algorithm"),
            ({"algorithms": ["HS256", "RS256"]}, "never both"),
            ({"algorithms": "RS256"}, "the key is none for RS256"),
            ({"algorithms": "ES256", "key": "nonsense"}, "the key is none for ES256"),
            ({"algorithms": "HS256", "key": public_pem(RSA)}, "the key is none for HS256"),
            ({"algorithms": "HS256", "key": "short"}, "too weak for HS256"),
            ({"algorithms": "HS256", "key": ""}, "the key is none for HS256"),
            ({"algorithms": "HS256", "key": None}, "give one of them"),
            ({"jwks": "keys.json"}, "give one of them"),
            ({"key": None, "jwks": "keys.json"}, "a JWK set holds public keys: HS256"),
            ({"leeway_seconds": -1}, "a leeway of -1"),
            ({"leeway_seconds": float("nan")}, "a leeway of nan"),
            ({"leeway_seconds": float("inf")}, "a leeway of inf"),
        ],
    )
    def test_are_configured_wrong_early(self, options: dict[str, Any], why: str) -> None:
        """A combination that cannot work is an error where it is made; no key is quoted."""
        with pytest.raises(InvalidValue, match=why) as error:
            authenticator(**options)

        assert "nonsense" not in str(error.value)
        assert SECRET not in str(error.value)


class Clock:
    """Monotonic time that a test moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(jwt_module, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Give the clock that key sets look at."""
    return Clock(monkeypatch)


class Publisher:
    """Keys as somebody else publishes them, or fails to."""

    def __init__(self, *keys: dict[str, Any]) -> None:
        self.keys = list(keys)
        self.down = False
        self.read_count = 0

    def read(self) -> dict[str, Any]:
        """Read the keys."""
        self.read_count += 1
        if self.down:
            raise ConnectionError("down")
        return {"keys": self.keys}


class TestKeySets:
    def test_are_read_when_needed(self, clock: Clock) -> None:
        """Keys that are fresh are not read again; old ones are, and a key that was taken back is gone."""
        publisher = Publisher(jwk("RS256", "a"))
        keys = KeySet("x", publisher.read, fresh_seconds=300, pause_seconds=15)
        assert publisher.read_count == 0

        for _ in range(3):
            assert keys.find("a").key_id == "a"
        assert publisher.read_count == 1
        publisher.keys = [jwk("ES256", "b")]
        clock.now += 301
        with pytest.raises(AuthenticationFailed):
            keys.find("a")

    def test_learn_a_new_key_at_once(self, clock: Clock) -> None:
        """A token that names a new key makes the set look again, but not more often than the pause allows."""
        publisher = Publisher(jwk("RS256", "a"))
        keys = KeySet("x", publisher.read, fresh_seconds=300, pause_seconds=15)
        keys.find("a")
        publisher.keys.append(jwk("ES256", "b"))

        with pytest.raises(AuthenticationFailed):
            keys.find("b")
        clock.now += 16
        assert keys.find("b").key_id == "b"
        for _ in range(100):
            with pytest.raises(AuthenticationFailed):
                keys.find("invented")
        assert publisher.read_count == 2

    def test_survive_an_outage(self, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
        """While the publisher is down the keys at hand serve, for an hour; then nobody can tell, and soon again."""
        publisher = Publisher(jwk("RS256", "a"))
        keys = KeySet("x", publisher.read, fresh_seconds=300, pause_seconds=15)
        keys.find("a")
        publisher.down = True

        for _ in range(11):
            clock.now += 310
            assert keys.find("a").key_id == "a"
        assert "the keys cannot be read" in caplog.text
        clock.now += 310
        with pytest.raises(AuthenticationUnavailable):
            keys.find("a")
        publisher.down = False
        clock.now += 16
        assert keys.find("a").key_id == "a"

    def test_that_were_never_read_are_an_outage(self, clock: Clock) -> None:
        """Without keys nobody is refused: the call may be repeated."""
        publisher = Publisher()
        keys = KeySet("x", publisher.read, fresh_seconds=300, pause_seconds=15)

        with pytest.raises(AuthenticationUnavailable, match="try again"):
            keys.find("a")
        publisher.keys.append(jwk("RS256", "a"))
        with pytest.raises(AuthenticationUnavailable):
            keys.find("a")
        clock.now += 16
        assert keys.find("a").key_id == "a"

    def test_of_one_need_no_name(self, clock: Clock) -> None:
        """A token that names no key is checked with the only one there is; keys for encryption do not count."""
        keys = KeySet("x", Publisher(jwk("RS256", "a"), jwk("ES256", "b", use="enc")).read, fresh_seconds=1)

        assert keys.find(None).key_id == "a"

    def test_in_files_follow_them(self, tmp_path: Path, clock: Clock) -> None:
        """A key in a file counts as soon as a token names it, and not long after it is gone. Half a file is none."""
        path = tmp_path / "keys.json"
        path.write_text(json.dumps({"keys": [jwk("ES256", "a")]}))
        by = JwtAuthenticator(jwks=str(path), algorithms=["ES256", "ES384"])
        first, second = Credentials(token=token("ES256", kid="a")), Credentials(token=token("ES384", kid="b"))

        assert by.authenticate(first).user_id == "ann"
        path.write_text(json.dumps({"keys": [jwk("ES384", "b")]}))
        assert by.authenticate(second).user_id == "ann"
        assert "not known here" in refused(by, first)
        path.write_text('{"keys": [')
        clock.now += 2
        assert by.authenticate(second).user_id == "ann"

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            (None, "No such file"),
            ("{", "holds no JWK set"),
            ("[]", "holds no JWK set"),
            ("{}", "holds no JWK set"),
            ('{"keys": [{"kty": "RSA"}, 7]}', "no JWK set with public keys for signatures"),
            (json.dumps({"keys": [jwk("RS256", use="enc")]}), "no JWK set with public keys for signatures"),
        ],
    )
    def test_in_bad_files_are_refused(self, text: str | None, why: str, tmp_path: Path) -> None:
        """A file that holds no keys is an error where the authenticator is made."""
        path = tmp_path / "keys.json"
        if text is not None:
            path.write_text(text)

        with pytest.raises(InvalidValue, match=why) as error:
            JwtAuthenticator(jwks=path, algorithms="RS256")

        assert str(path) in str(error.value)

    def test_come_from_urls(self) -> None:
        """A URL is asked when the first token comes; while it does not answer nobody can tell who is calling."""
        answers = {"/keys": json.dumps({"keys": [jwk("ES256", "a")]}).encode(), "/list": b"[]"}
        with publishing(answers) as address:
            by = JwtAuthenticator(jwks=f"http://{address}/keys", algorithms="ES256")
            assert by.authenticate(Credentials(token=token("ES256", kid="a"))).user_id == "ann"
            for path in ("list", "missing"):
                by = JwtAuthenticator(jwks=f"http://{address}/{path}", algorithms="ES256")
                with pytest.raises(AuthenticationUnavailable):
                    by.authenticate(Credentials(token=token("ES256", kid="a")))

    def test_in_the_open_are_worth_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        """Keys that come over a network without TLS are logged as a danger; secrets in a URL are not."""
        JwtAuthenticator(jwks="http://user:hush@keys.example/k?key=hush", algorithms="RS256")

        assert "keys are read without TLS" in caplog.text
        assert "hush" not in caplog.text
        assert not any("hush" in str(vars(record)) for record in caplog.records)


class TestCertificates:
    CA = trustme.CA()

    def certificate(self, *names: str, **subject: Any) -> PeerCertificate:
        """Issue a certificate and read it as the server does."""
        return PeerCertificate.from_pem(self.CA.issue_cert(*names, **subject).cert_chain_pems[0].bytes())

    def test_tell_their_names(self) -> None:
        """Subject and alternative names can be read."""
        found = self.certificate(
            "ann@acme.example",
            "till.acme.example",
            "10.0.0.1",
            common_name="ann",
            organization_name="acme",
            organization_unit_name="clerk",
        )

        assert (found.common_name, found.organization, found.organizational_units) == ("ann", "acme", ("clerk",))
        assert set(found.alternative_names) == {"ann@acme.example", "till.acme.example", "10.0.0.1"}
        assert found.pem.startswith(b"-----BEGIN CERTIFICATE")

    def test_name_principals(self) -> None:
        """Common name, organization and units are user, tenant and roles."""
        found = self.certificate("a@b", common_name="ann", organization_name="acme", organization_unit_name="clerk")

        assert CertificateAuthenticator().authenticate(Credentials(certificate=found)) == ANN

    def test_without_a_common_name_have_others(self) -> None:
        """The first alternative name stands in for a common name, a given tenant for an organization."""
        found = PeerCertificate("", "", (), ("till.acme.example", "x"), b"")

        by = CertificateAuthenticator(default_tenant="acme")

        assert by.authenticate(Credentials(certificate=found)) == Principal("till.acme.example", "acme")

    @pytest.mark.parametrize(
        ("certificate", "why"),
        [
            (None, "without a client certificate"),
            (PeerCertificate("", "acme", (), (), b""), "names nobody"),
            (PeerCertificate("ann", "", (), (), b""), "names no tenant"),
        ],
    )
    def test_that_say_too_little_are_refused(self, certificate: PeerCertificate | None, why: str) -> None:
        """Who names no user or no tenant is told so."""
        assert why in refused(CertificateAuthenticator(), Credentials(certificate=certificate))

    def test_can_be_read_otherwise(self) -> None:
        """A function of the application's own makes the principal."""
        by = CertificateAuthenticator(lambda certificate: Principal(certificate.alternative_names[0], "bolt"))

        found = PeerCertificate("ann", "acme", (), ("till",), b"")
        assert by.authenticate(Credentials(certificate=found)) == Principal("till", "bolt")

    def test_that_are_none_are_refused(self) -> None:
        """Bytes that are no certificate are the caller's fault."""
        with pytest.raises(AuthenticationFailed, match="cannot be read"):
            PeerCertificate.from_pem(b"nonsense")


class TestTlsFiles:
    CA = trustme.CA()

    @pytest.fixture
    def files(self, tmp_path: Path) -> dict[str, Path]:
        """Give a certificate and its key, another's key, the same key with a password, and nonsense."""
        mine, other = self.CA.issue_cert("localhost"), self.CA.issue_cert("localhost")
        pem = mine.private_key_pem.bytes()
        locked = load_pem_private_key(pem, None).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password")
        )
        contents = {
            "certificate": mine.cert_chain_pems[0].bytes(),
            "key": pem,
            "other": other.private_key_pem.bytes(),
            "locked": locked,
            "ca": self.CA.cert_pem.bytes(),
            "nonsense": b"\xff\xfe nonsense",
        }
        for name, data in contents.items():
            (tmp_path / name).write_bytes(data)
        return {name: tmp_path / name for name in (*contents, "missing")}

    def test_serve_both_sides(self, files: dict[str, Path]) -> None:
        """Files that belong together are accepted."""
        ServerTls(certificate=files["certificate"], key=str(files["key"]), client_ca=files["ca"]).credentials()
        ClientTls(certificate=files["certificate"], key=files["key"], ca=files["ca"]).credentials()
        ClientTls().credentials()

    @pytest.mark.parametrize(
        ("certificate", "key", "why"),
        [
            ("missing", "key", "missing should hold a certificate: No such file"),
            ("certificate", "missing", "missing should hold a private key: No such file"),
            ("certificate", "other", "no certificate and its private key"),
            ("certificate", "locked", "without a password"),
            ("nonsense", "key", "no certificate and its private key"),
            ("key", "certificate", "no certificate and its private key"),
        ],
    )
    def test_that_do_not_fit_are_refused(
        self, files: dict[str, Path], certificate: str, key: str, why: str, tmp_path: Path
    ) -> None:
        """Each side names the file and what is wrong with it before anybody connects, and asks at no terminal."""
        with pytest.raises(InvalidValue, match=why):
            Server(Application(), store=tmp_path / "s", tls=ServerTls(certificate=files[certificate], key=files[key]))
        with pytest.raises(InvalidValue, match=why):
            Replica(tmp_path / "r", server="h:1", tls=ClientTls(certificate=files[certificate], key=files[key]))

        assert not (tmp_path / "r").exists()

    @pytest.mark.parametrize(("ca", "why"), [("missing", "No such file"), ("nonsense", "no cert"), ("key", "no cert")])
    def test_of_authorities_are_checked(self, files: dict[str, Path], ca: str, why: str) -> None:
        """What holds no certificate makes no authority."""
        with pytest.raises(InvalidValue, match=why):
            ClientTls(ca=files[ca]).credentials()
        with pytest.raises(InvalidValue, match=why):
            ServerTls(certificate=files["certificate"], key=files["key"], client_ca=files[ca]).credentials()

    def test_come_in_pairs(self, files: dict[str, Path]) -> None:
        """A client's certificate without its key is an error at once, and the other way round."""
        with pytest.raises(InvalidValue, match="needs its private key"):
            ClientTls(certificate=files["certificate"])
        with pytest.raises(InvalidValue, match="needs its private key"):
            ClientTls(key=files["key"])

    def test_of_the_system_are_used(
        self, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """A system that names authorities is believed; where it keeps none, gRPC's own list serves."""
        from tidelog._channel import _system_authorities

        monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
        monkeypatch.setenv("SSL_CERT_FILE", str(files["ca"]))
        assert _system_authorities() == files["ca"].read_bytes()
        monkeypatch.setenv("SSL_CERT_FILE", str(files["missing"]))
        assert _system_authorities() is None

    def test_are_needed_for_certificates(self, files: dict[str, Path], tmp_path: Path) -> None:
        """An authenticator of certificates on a server that asks for none is an error at once."""
        for tls in (None, ServerTls(certificate=files["certificate"], key=files["key"])):
            with pytest.raises(InvalidValue, match="client_ca"):
                Server(Application(), store=tmp_path / "s", authenticator=CertificateAuthenticator(), tls=tls)


class Call:
    """A call, as far as the question is who makes it."""

    def __init__(self, *headers: tuple[str, str | bytes], certificate: bytes | None = None) -> None:
        self._headers = headers
        self._certificate = certificate

    def invocation_metadata(self) -> Any:
        """Return the headers."""
        return self._headers

    def auth_context(self) -> dict[str, Any]:
        """Return what TLS knows."""
        return {} if self._certificate is None else {"x509_pem_cert": [self._certificate]}


class PlugIn:
    """An authenticator that does what a test says, and remembers what it was asked."""

    def __init__(self, does: Callable[[Credentials], Any] = lambda _credentials: ANN) -> None:
        self.does = does
        self.asked: list[Credentials] = []

    def authenticate(self, credentials: Credentials) -> Principal:
        """Do it."""
        self.asked.append(credentials)
        return cast("Principal", self.does(credentials))


def principal_of(call: Call, by: Authenticator | None) -> Principal:
    """Find the principal of a call."""
    callers = Callers(by)
    try:
        return asyncio.run(callers.principal_of(cast("grpc.aio.ServicerContext[bytes, bytes]", call)))
    finally:
        callers.close()


class TestCallers:
    def test_are_all_the_same_without_an_authenticator(self) -> None:
        """Whoever asks nobody knows nobody."""
        assert principal_of(Call(("authorization", "Bearer x")), None) == ANONYMOUS

    @pytest.mark.parametrize(
        ("header", "expected"),
        [
            ("Bearer t0k3n", "t0k3n"),
            ("bearer t0k3n", "t0k3n"),
            ("BEARER  t0k3n ", "t0k3n"),
            ("Bearer", None),
            ("Bearer ", None),
            ("Basic dTpw", None),
            ("t0k3n", None),
            ("", None),
        ],
    )
    def test_send_bearer_tokens(self, header: str, expected: str | None) -> None:
        """The token is what follows `Bearer`; another scheme is for the plug-in to read."""
        by = PlugIn()

        assert principal_of(Call(("authorization", header), ("x-device", "7"), ("x-bin", b"\0")), by) == ANN

        (credentials,) = by.asked
        assert credentials.token == expected
        assert credentials.metadata == {"authorization": header, "x-device": "7", "x-bin": b"\0"}
        assert credentials.certificate is None

    def test_show_certificates(self) -> None:
        """What TLS has verified reaches the authenticator."""
        by = PlugIn()
        issued = TestCertificates.CA.issue_cert("x", common_name="ann").cert_chain_pems[0].bytes()

        principal_of(Call(certificate=issued), by)

        assert by.asked[0].certificate is not None
        assert by.asked[0].certificate.common_name == "ann"

    def test_speak_with_one_voice(self) -> None:
        """Two tokens in one call are refused: one side might check this, the other use that."""
        with pytest.raises(AuthenticationFailed, match="several"):
            principal_of(Call(("authorization", "Bearer a"), ("authorization", "Bearer b")), PlugIn())

    def test_that_cannot_be_are_refused(self) -> None:
        """A plug-in that makes an impossible principal refuses the caller with it."""
        with pytest.raises(AuthenticationFailed, match="a tenant must be a string that is not empty"):
            principal_of(Call(), PlugIn(lambda _credentials: Principal("ann", "")))

    @pytest.mark.parametrize("found", [None, "ann", {"user_id": "ann"}])
    def test_are_principals(self, found: Any) -> None:
        """A plug-in that returns something else lets nobody in."""
        with pytest.raises(AuthenticationUnavailable):
            principal_of(Call(), PlugIn(lambda _credentials: found))

    def test_stay_secret_when_a_plug_in_fails(self, caplog: pytest.LogCaptureFixture) -> None:
        """A failure of the plug-in's is logged with its place and without its text, and the call can be repeated."""
        known: dict[str, Principal] = {}
        caplog.set_level(logging.DEBUG)

        with pytest.raises(AuthenticationUnavailable, match="try again later") as error:
            principal_of(
                Call(("authorization", "Bearer hush-hush")), PlugIn(lambda credentials: known[credentials.token or ""])
            )

        (record,) = [record for record in caplog.records if record.name == "tidelog.authentication"]
        assert record.getMessage() == "the authenticator failed"
        assert vars(record)["error"] == "KeyError"
        assert vars(record)["file"] == __file__
        assert "hush" not in f"{error.value} {vars(record)} {caplog.text}"

    def test_do_not_wait_for_ever(self, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
        """An authenticator that hangs ends the call as one to be repeated."""
        monkeypatch.setattr(callers_module, "AUTHENTICATION_SECONDS_MAX", 0.05)
        over = threading.Event()
        request.addfinalizer(over.set)

        with pytest.raises(AuthenticationUnavailable):
            principal_of(Call(), PlugIn(lambda _credentials: ANN if over.wait(10) else None))

    def test_may_be_told_by_any_object(self) -> None:
        """An authenticator is whatever has the method."""
        assert isinstance(PlugIn(), Authenticator)
        assert isinstance(StaticTokens({}), Authenticator)
        assert isinstance(CertificateAuthenticator(), Authenticator)
        assert isinstance(authenticator(), Authenticator)
        assert not isinstance(Application(), Authenticator)


class TestOpenDoors:
    @pytest.mark.parametrize(
        ("listen", "by", "expected"),
        [
            ("127.0.0.1:0", None, ["every caller is the user anonymous"]),
            ("0.0.0.0:0", None, ["every caller is the user anonymous", "the network can reach this server"]),
            ("127.0.0.1:0", StaticTokens({}), []),
            ("0.0.0.0:0", StaticTokens({}), ["without TLS"]),
        ],
    )
    def test_are_logged(
        self,
        listen: str,
        by: Authenticator | None,
        expected: list[str],
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """A server says at its start what it leaves open, the louder the more can get in."""
        with Server(Application(), store=tmp_path, listen=listen, authenticator=by):
            warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]

        assert len(warned) == len(expected)
        assert all(part in message for part, message in zip(expected, warned, strict=True))


def unpadded(data: bytes) -> str:
    """Encode as tokens do."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@contextmanager
def publishing(answers: dict[str, bytes]) -> Iterator[str]:
    """Answer requests for paths; give the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # http.server's name
            data = answers.get(self.path)
            self.send_response(404 if data is None else 200)
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
