"""The keys of an issuer: read, rotated, kept while it is away, and never asked for too often."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from jwt.algorithms import ECAlgorithm

from service.access import jwks
from service.access.authenticator import IssuerUnavailable
from service.access.jwks import COOL_DOWN_S, MAX_AGE_S, REFRESH_S, IssuerKeys, fetch
from tests.service.access.issuer import Issuer, Now, jwk, private_key, serving

pytestmark = pytest.mark.anyio

METADATA = "/.well-known/openid-configuration"


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with serving() as issuer:
        yield issuer


@pytest.fixture
def now() -> Now:
    return Now()


def down(issuer: Issuer) -> None:
    issuer.answer["/keys"] = (503, b"", {})


async def known(keys: IssuerKeys, kid: str) -> bool:
    return await keys.get(kid) is not None


async def settled(keys: IssuerKeys) -> None:
    """Until the issuer is not being asked."""
    if keys._asking is not None:
        await asyncio.wait([keys._asking])


async def test_keys_are_found_by_the_metadata_or_by_their_address(issuer: Issuer) -> None:
    assert await known(IssuerKeys(issuer.url, None), "one")
    assert issuer.asked == [METADATA, "/keys"]
    issuer.asked.clear()
    assert await known(IssuerKeys(issuer.url, f"{issuer.url}/keys"), "one")
    assert issuer.asked == ["/keys"]


async def test_a_new_key_is_found_and_an_old_one_forgotten(issuer: Issuer, now: Now) -> None:
    keys = IssuerKeys(issuer.url, None, now)
    assert await known(keys, "one")
    assert keys.generation == 1
    issuer.keys = [jwk("ec-2")]
    now.seconds += COOL_DOWN_S
    assert await known(keys, "ec-2")
    assert not await known(keys, "one")
    assert keys.generation == 2


async def test_keys_are_read_again_in_time_without_anybody_waiting(
    issuer: Issuer, now: Now
) -> None:
    keys = IssuerKeys(issuer.url, None, now)
    await keys.get("one")
    issuer.keys = [jwk("ec-2")]
    now.seconds += REFRESH_S + 1
    assert await known(keys, "one")  # the former keys, at once
    await settled(keys)
    assert await known(keys, "ec-2")
    assert not await known(keys, "one")


async def test_unknown_names_do_not_make_the_issuer_be_asked_again(
    issuer: Issuer, now: Now
) -> None:
    keys = IssuerKeys(issuer.url, f"{issuer.url}/keys", now)
    found = await asyncio.gather(*(keys.get(f"random-{i}") for i in range(200)))
    assert found == [None] * 200
    assert issuer.asked == ["/keys"]
    now.seconds += COOL_DOWN_S / 2
    assert not await known(keys, "random")
    assert await known(keys, "one")
    assert issuer.asked == ["/keys"]
    now.seconds += COOL_DOWN_S
    for i in range(20):
        assert not await known(keys, f"again-{i}")
    assert issuer.asked == ["/keys", "/keys"]


async def test_keys_are_used_while_the_issuer_is_away_until_they_are_too_old(
    issuer: Issuer, now: Now
) -> None:
    keys = IssuerKeys(issuer.url, None, now)
    await keys.get("one")
    down(issuer)
    now.seconds += MAX_AGE_S - 1
    assert await known(keys, "one")
    await settled(keys)
    assert not await known(keys, "random")  # it is no fault of ours that nobody knows it
    now.seconds += COOL_DOWN_S
    with pytest.raises(IssuerUnavailable):
        await keys.get("one")
    issuer.answer.clear()
    now.seconds += COOL_DOWN_S
    assert await known(keys, "one")


async def test_an_issuer_that_is_away_at_the_start_is_not_asked_by_every_request(
    issuer: Issuer, now: Now
) -> None:
    down(issuer)
    keys = IssuerKeys(issuer.url, f"{issuer.url}/keys", now)
    for _ in range(10):
        with pytest.raises(IssuerUnavailable):
            await keys.get("one")
    assert issuer.asked == ["/keys"]
    issuer.answer.clear()
    now.seconds += COOL_DOWN_S
    assert await known(keys, "one")


async def test_who_waits_and_leaves_does_not_end_the_question(issuer: Issuer, now: Now) -> None:
    keys = IssuerKeys(issuer.url, None, now)
    waiting = asyncio.create_task(keys.get("one"))
    await asyncio.sleep(0)
    waiting.cancel()
    assert await known(keys, "one")
    assert issuer.asked == [METADATA, "/keys"]


async def test_a_refused_connection_is_an_issuer_that_is_away() -> None:
    with serving() as issuer:
        url = issuer.url
    with pytest.raises(IssuerUnavailable):
        await IssuerKeys(url, None).get("one")


def answer(issuer: Issuer, path: str, body: Any, status: int = 200, **headers: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    issuer.answer[path] = (status, raw, headers)


@pytest.mark.parametrize("to", ["file:///etc/passwd", "/other", "http://127.0.0.1:1/keys"])
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_nobody_is_sent_elsewhere(issuer: Issuer, to: str, status: int) -> None:
    answer(issuer, "/other", {"keys": [jwk("one")]})
    answer(issuer, "/keys", b"", status, Location=to)
    with pytest.raises(OSError, match=str(status)):
        fetch(issuer.url, None)
    assert "/other" not in issuer.asked


@pytest.mark.parametrize(
    "metadata",
    [
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": "ftp://127.0.0.1/keys"},
        {"jwks_uri": "http://keys.example/keys"},
        {"jwks_uri": "http://[::1"},
        {"jwks_uri": 7},
        {"jwks_uri": None},
        {"issuer": "https://other.example"},
    ],
)
def test_metadata_that_mislead(issuer: Issuer, metadata: dict[str, Any]) -> None:
    good = {"issuer": issuer.url, "jwks_uri": f"{issuer.url}/keys"}
    answer(issuer, METADATA, good)
    assert list(fetch(issuer.url, None)) == ["one"]
    answer(issuer, METADATA, good | metadata)
    with pytest.raises(ValueError, match="metadata"):
        fetch(issuer.url, None)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff", b"[]", b"[" * 5000 + b"]" * 5000, {}, {"keys": {}}, {"keys": []},
        {"keys": [None, 7, "x", {}]}, {"keys": [{"kid": "one"}] * 101},
        b" " * (jwks._MAX_BYTES + 1),
    ],
    ids=range(11),
)  # fmt: skip
def test_answers_without_keys(issuer: Issuer, body: Any) -> None:
    answer(issuer, "/keys", body)
    with pytest.raises((ValueError, RecursionError)):
        fetch(issuer.url, f"{issuer.url}/keys")


def test_only_public_keys_for_signatures_are_taken(issuer: Issuer) -> None:
    good = jwk("one")
    private = ECAlgorithm.to_jwk(private_key("ec-1"), as_dict=True) | {"kid": "private"}
    answer(
        issuer,
        "/keys",
        {
            "keys": [
                {"kid": "shared", "kty": "oct", "k": "c2VjcmV0"},
                jwk("one") | {"kid": "to-encrypt", "use": "enc"},
                private,
                jwk("one") | {"kid": "broken", "n": "!"},
                jwk("one") | {"kid": "odd", "alg": 7},
                jwk("one") | {"kid": 7},
                {k: v for k, v in good.items() if k != "kid"},
                jwk("short"),
                good,
                jwk("ec-1") | {"kid": "one"},
                jwk("ec-1"),
                jwk("ed-1"),
            ]
        },
    )
    found = fetch(issuer.url, f"{issuer.url}/keys")
    assert list(found) == ["one", "ec-1", "ed-1"]
    assert type(found["one"].public).__name__ == "RSAPublicKey"  # the first of that name


def test_an_issuer_that_drips_is_given_up(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(issuer, "/keys", b" " * (jwks._MAX_BYTES // 2))
    monkeypatch.setattr(jwks, "_TIMEOUT_S", 5.0)
    seconds = iter([0.0, 6.0])
    monkeypatch.setattr(jwks.time, "monotonic", lambda: next(seconds, 6.0))
    with pytest.raises(TimeoutError):
        fetch(issuer.url, f"{issuer.url}/keys")
