"""Bearer tokens: what is accepted, and everything that is not."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from service.access import tokens as tokens_module
from service.access.authenticator import Unauthenticated
from service.access.jwks import IssuerKeys
from service.access.principal import Scope
from service.access.tokens import MAX_BYTES, Tokens
from tests.service.access.issuer import AUDIENCE, Issuer, Now, jwk, private_key, serving

pytestmark = pytest.mark.anyio

LEEWAY_S = 30


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with serving() as issuer:
        issuer.keys = [jwk("one"), jwk("ec-1"), jwk("ed-1"), jwk("only-384", alg="RS384")]
        yield issuer


def verifier(
    issuer: Issuer, *algorithms: str, clock: Any = None, audience: str = AUDIENCE
) -> Tokens:
    return Tokens(
        IssuerKeys(issuer.url, None, *([] if clock is None else [clock])),
        issuer=issuer.url,
        audience=audience,
        algorithms=algorithms or ("RS256", "RS384", "ES256"),
        leeway_s=LEEWAY_S,
    )


def part(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


async def test_a_valid_token_says_who_and_what(issuer: Issuer) -> None:
    text = issuer.token(scope="ingest other system/RiskAssessment.rs", azp="front")
    token = await verifier(issuer).verify(text)
    assert token.names == ("feed", "front", "s")
    assert token.scopes == {Scope.INGEST, Scope.DELETE, Scope.READ}
    assert token.expires == jwt.decode(text, options={"verify_signature": False})["exp"]


@pytest.mark.parametrize(
    ("claims", "who"),
    [
        ({}, "feed/s"),
        ({"sub": None}, "feed"),
        ({"sub": "feed"}, "feed"),
        ({"client_id": None}, "s"),
        ({"client_id": None, "azp": "front"}, "front/s"),
        ({"azp": "front"}, "feed/s"),
        ({"azp": "front", "sub": "front"}, "feed"),
        ({"client_id": "app/s", "sub": None}, "app%2Fs"),
        ({"client_id": "a", "sub": "p/%2F"}, "a/p%2F%252F"),
        ({"client_id": None, "sub": "known"}, "ours"),
        ({"sub": "known"}, "feed/ours"),
        ({"client_id": "known"}, "ours/s"),
        ({"azp": "known"}, "ours/s"),
        ({"client_id": "known", "sub": "known"}, "ours"),
    ],
)
async def test_the_trail_names_the_application_and_the_person_behind_it(
    issuer: Issuer, claims: dict[str, Any], who: str
) -> None:
    token = await verifier(issuer).verify(issuer.token(**claims))
    assert token.who({"known": "ours"}) == who


async def test_the_name_of_whoever_it_is_is_bounded(issuer: Issuer) -> None:
    token = await verifier(issuer).verify(issuer.token(client_id="%" * 200, sub="/" * 200))
    assert len(token.who({})) == 1201


@pytest.mark.parametrize(
    ("kid", "algorithm", "allowed"),
    [("one", "RS256", True), ("one", "RS384", True), ("ec-1", "ES256", True),
     ("only-384", "RS384", True), ("only-384", "RS256", False), ("one", "RS512", False),
     ("one", "PS256", False), ("ed-1", "EdDSA", False)],
)  # fmt: skip
async def test_only_allowed_algorithms_and_those_of_the_key(
    issuer: Issuer, kid: str, algorithm: str, allowed: bool
) -> None:
    text = issuer.token(kid, algorithm=algorithm)
    if allowed:
        await verifier(issuer).verify(text)
    else:
        with pytest.raises(Unauthenticated):
            await verifier(issuer).verify(text)


async def test_an_algorithm_that_is_allowed_works(issuer: Issuer) -> None:
    token = issuer.token("ed-1", algorithm="EdDSA")
    assert (await verifier(issuer, "EdDSA").verify(token)).names[0] == "feed"


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ({"iss": "https://other.example"}, "not valid"),
        ({"iss": None}, "not valid"),
        ({"aud": "https://other.example"}, "not valid"),
        ({"aud": None}, "not valid"),
        ({"aud": []}, "not valid"),
        ({"exp": 1}, "expired"),
        ({"exp": None}, "not valid"),
        ({"exp": "soon"}, "not valid"),
        ({"exp": 1e400}, "not valid"),
        ({"iat": None}, "not valid"),
        ({"iat": 4102444800}, "not valid yet"),
        ({"nbf": 4102444800}, "not valid yet"),
        ({"nbf": "x"}, "not valid"),
        ({"client_id": None, "sub": None}, "not valid"),
        ({"client_id": "", "sub": ""}, "not valid"),
        ({"client_id": ["feed"]}, "not valid"),
        ({"client_id": "feed\nadmin"}, "not valid"),
        ({"client_id": "f" * 300}, "not valid"),
    ],
)
async def test_claims_that_are_wrong(issuer: Issuer, claims: dict[str, Any], says: str) -> None:
    with pytest.raises(Unauthenticated, match=f"{says}$"):
        await verifier(issuer).verify(issuer.token(**claims))


async def test_clocks_may_differ_a_little(issuer: Issuer) -> None:
    now, margin = int(time.time()), LEEWAY_S // 2
    await verifier(issuer).verify(
        issuer.token(exp=now - margin, nbf=now + margin, iat=now + margin)
    )
    for wrong in ({"exp": now - 2 * LEEWAY_S}, {"nbf": now + 300}, {"iat": now + 300}):
        with pytest.raises(Unauthenticated):
            await verifier(issuer).verify(issuer.token(**wrong))


async def test_an_audience_may_be_one_of_several(issuer: Issuer) -> None:
    await verifier(issuer).verify(issuer.token(aud=["https://other.example", AUDIENCE]))


@pytest.mark.parametrize(
    "head",
    [{"kid": None}, {"kid": "unknown"}, {"kid": 7}, {"kid": ["one"]}, {"typ": "logout+jwt"},
     {"typ": 7}, {"crit": ["exp"]}, {"crit": []}, {"alg": None}, {"alg": ["RS256"]}, {"alg": ""},
     {"b64": False}, {"b64": False, "crit": ["b64"]}, {"b64": True, "crit": ["b64"]}],
)  # fmt: skip
async def test_heads_that_are_wrong(issuer: Issuer, head: dict[str, Any]) -> None:
    """Signed as they stand, so that it is the head alone that is wrong."""
    header = {"alg": "RS256", "typ": "JWT", "kid": "one"} | head
    signed = f"{part({k: v for k, v in header.items() if v is not None})}.{part(issuer.claims())}"
    signature = jwt.algorithms.RSAAlgorithm(jwt.algorithms.RSAAlgorithm.SHA256).sign(
        signed.encode(), private_key("one")
    )
    with pytest.raises(Unauthenticated):
        await verifier(issuer).verify(f"{signed}.{part(signature)}")


@pytest.mark.parametrize("kind", ["JWT", "at+jwt", "AT+JWT", "application/at+jwt"])
async def test_types_of_access_tokens(issuer: Issuer, kind: str) -> None:
    await verifier(issuer).verify(issuer.token(head={"typ": kind}))


@pytest.mark.parametrize("name", ["none", "None", "nOnE"])
@pytest.mark.parametrize("signature", ["", "x"])
async def test_a_token_without_a_signature(issuer: Issuer, name: str, signature: str) -> None:
    head = part({"alg": name, "typ": "JWT", "kid": "one"})
    with pytest.raises(Unauthenticated):
        await verifier(issuer).verify(f"{head}.{part(issuer.claims())}.{signature}")


@pytest.mark.parametrize("form", ["pem", "der", "jwk"])
async def test_the_public_key_is_no_secret_to_sign_with(issuer: Issuer, form: str) -> None:
    public = private_key("one").public_key()
    secret = {
        "pem": public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "der": public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "jwk": json.dumps(jwk("one")).encode(),
    }[form]
    head = part({"alg": "HS256", "typ": "JWT", "kid": "one"})
    signed = f"{head}.{part(issuer.claims())}"
    mac = hmac.new(secret, signed.encode(), hashlib.sha256).digest()
    with pytest.raises(Unauthenticated):
        await verifier(issuer).verify(f"{signed}.{part(mac)}")


async def test_a_key_that_the_token_brings_is_not_used(issuer: Issuer) -> None:
    own = jwk("stranger") | {"kid": "one"}
    text = jwt.encode(
        issuer.claims(),
        private_key("stranger"),
        "RS256",
        headers={"kid": "one", "jwk": own, "jku": "http://127.0.0.1:1/"},
    )
    with pytest.raises(Unauthenticated):
        await verifier(issuer).verify(text)


async def test_a_changed_claim_breaks_the_signature(issuer: Issuer) -> None:
    head, _, signature = issuer.token(scope="read").split(".")
    with pytest.raises(Unauthenticated):
        await verifier(issuer).verify(f"{head}.{part(issuer.claims(scope='admin'))}.{signature}")


async def test_a_huge_token_is_not_even_looked_at(issuer: Issuer) -> None:
    asked = len(issuer.asked)
    with pytest.raises(Unauthenticated, match="too long"):
        await verifier(issuer).verify(issuer.token(more="x" * MAX_BYTES))
    assert len(issuer.asked) == asked


async def test_what_was_verified_is_kept_until_the_token_expires(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = verifier(issuer)
    now = int(time.time())
    text = issuer.token(exp=now + 60)
    token = await tokens.verify(text)
    assert await tokens.verify(text) is token
    monkeypatch.setattr(tokens_module.time, "time", lambda: now + 60 + LEEWAY_S + 1.0)
    # The library has a clock of its own, by which the token is valid still: it is verified anew.
    assert await tokens.verify(text) is not token


async def test_what_is_kept_is_bounded(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "_MAX_KEPT", 3)
    tokens = verifier(issuer)
    for i in range(6):
        await tokens.verify(issuer.token(jti=str(i)))
    assert len(tokens._kept) == 3


async def test_a_kept_token_is_refused_once_its_key_is_gone() -> None:
    clock = Now()
    with serving() as issuer:
        tokens = verifier(issuer, clock=clock)
        text = issuer.token("one")
        await tokens.verify(text)
        issuer.keys = [jwk("ec-1")]
        clock.seconds += 3600
        # Somebody's token of the new key has the keys read again.
        await tokens.verify(issuer.token("ec-1", algorithm="ES256"))
        with pytest.raises(Unauthenticated):
            await tokens.verify(text)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
_PARTS = st.one_of(
    st.text(max_size=40), st.binary(max_size=40).map(part), _JSON.map(part),
    st.dictionaries(
        st.sampled_from(["alg", "kid", "typ", "crit", "b64", "exp", "iss", "aud", "sub"]),
        st.sampled_from(["RS256", "one", "none", "HS256", "JWT"]) | _JSON, max_size=6,
    ).map(part),
)  # fmt: skip


@given(text=st.text(max_size=200) | st.lists(_PARTS, max_size=5).map(".".join))
async def test_whatever_comes_is_refused_and_nothing_breaks(issuer: Issuer, text: str) -> None:
    with pytest.raises(Unauthenticated):
        await verifier(issuer).verify(text)


@given(claims=st.dictionaries(
    st.sampled_from(["exp", "iat", "nbf", "aud", "iss", "sub", "client_id", "scope", "roles"]),
    _JSON, min_size=1,
))  # fmt: skip
async def test_whatever_the_issuer_signs_is_read_or_refused(
    issuer: Issuer, claims: dict[str, Any]
) -> None:
    head = part({"alg": "ES256", "typ": "JWT", "kid": "ec-1"})
    body = f"{head}.{part({**issuer.claims(), **claims})}"
    algorithm = jwt.algorithms.ECAlgorithm(jwt.algorithms.ECAlgorithm.SHA256)
    text = f"{body}.{part(algorithm.sign(body.encode(), private_key('ec-1')))}"
    try:
        token = await verifier(issuer).verify(text)
    except Unauthenticated:
        return
    assert token.names
    assert all(name and name.isprintable() for name in token.names)
