"""What a gateway tells is believed if it is one, and refused if it is none."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest

from service.access.authenticator import Credentials, Unauthenticated
from service.access.clients import Clients, parse
from service.access.gateway import Gateways, read_secrets
from service.access.keys import digest, new_key
from service.access.opening import Configured

pytestmark = pytest.mark.anyio

SECRET = "a secret of a gateway"
SUBJECT = "CN=feed,O=Hospital"
KEY = new_key("other")
CLIENTS = Clients(
    parse(
        f"""
clients:
- {{id: feed, scopes: [ingest], certificate_subject: "{SUBJECT}"}}
- {{id: other, scopes: [read], key_sha256: [{digest(KEY)}]}}
"""
    )
)
NETWORKS = [ip_network("10.1.0.0/16"), ip_network("fd00::/8")]


def authenticator(*secrets: str) -> Configured:
    return Configured(lambda: CLIENTS, None, Gateways(NETWORKS, secrets or (SECRET,)))


def sent(
    *,
    peer: str = "10.1.2.3",
    secret: str | None = SECRET,
    subject: str | None = None,
    authorization: str | None = None,
    forwarded_for: str | None = None,
) -> Credentials:
    return Credentials(
        authorization=authorization,
        subject=subject,
        gateway_secret=secret,
        peer=peer,
        forwarded_for=forwarded_for,
    )


async def test_a_certificate_is_known_by_what_the_gateway_tells() -> None:
    for peer in ("10.1.2.3", "fd00::1", "::ffff:10.1.2.3"):
        principal = await authenticator().recognise(sent(peer=peer, subject=SUBJECT))
        assert (principal.id, principal.method) == ("feed", "certificate")
    with pytest.raises(Unauthenticated, match="certificate"):
        await authenticator().recognise(sent(subject="CN=nobody"))


@pytest.mark.parametrize("authorization", [None, f"Bearer {KEY}"], ids=["alone", "with a key"])
@pytest.mark.parametrize(
    "spoofed",
    [
        {"peer": "10.2.0.1", "subject": SUBJECT},
        {"peer": "10.2.0.1"},
        {"peer": "127.0.0.1", "subject": SUBJECT},
        {"peer": "", "subject": SUBJECT},
        {"peer": "testclient", "subject": SUBJECT},
        {"secret": None, "subject": SUBJECT},
        {"secret": None, "subject": ""},
        {"secret": "", "subject": SUBJECT},
        {"secret": SECRET + " ", "subject": SUBJECT},
        {"secret": SECRET[:-1], "subject": SUBJECT},
        {"secret": "é", "subject": SUBJECT},
        {"secret": "wrong"},
    ],
)
async def test_who_passes_for_a_gateway_is_refused_whatever_else_it_has(
    spoofed: dict[str, str | None], authorization: str | None
) -> None:
    credentials = sent(**spoofed, authorization=authorization, forwarded_for="192.0.2.9")  # type: ignore[arg-type]
    with pytest.raises(Unauthenticated, match="gateway"):
        await authenticator().recognise(credentials)
    assert authenticator().address(credentials) == credentials.peer


@pytest.mark.parametrize("secret", [None, "", SECRET])
async def test_without_gateways_nothing_of_them_is_believed(secret: str | None) -> None:
    alone = Configured(lambda: CLIENTS, None, Gateways((), ()))
    with pytest.raises(Unauthenticated, match="gateway"):
        await alone.recognise(sent(peer="127.0.0.1", secret=secret, subject=SUBJECT))


async def test_a_key_decides_where_both_are_there() -> None:
    """The certificate was the gateway's: of the transport alone."""
    both = sent(subject=SUBJECT, authorization=f"bearer {KEY}")
    assert (await authenticator().recognise(both)).id == "other"
    for wrong in (f"Bearer {KEY}x", "Bearer", "Basic Zm9vOmJhcg==", "", "Bearer a.b.c", KEY):
        with pytest.raises(Unauthenticated):
            await authenticator().recognise(sent(subject=SUBJECT, authorization=wrong))


async def test_a_gateway_without_a_certificate_needs_a_key() -> None:
    for subject in (None, ""):
        with pytest.raises(Unauthenticated, match="missing"):
            await authenticator().recognise(sent(subject=subject))
        through = sent(subject=subject, authorization=f"Bearer {KEY}")
        assert (await authenticator().recognise(through)).id == "other"


@pytest.mark.parametrize(
    ("said", "address"),
    [
        ("192.0.2.9", "192.0.2.9"),
        ("198.51.100.1, 192.0.2.9", "192.0.2.9"),  # what came before is the client's own word
        ("192.0.2.9, nonsense", "10.1.2.3"),
        ("2001:DB8::1", "2001:db8::1"),
        ("::ffff:192.0.2.9", "192.0.2.9"),
        ("fe80::1%patient-0815", "10.1.2.3"),
        ("", "10.1.2.3"),
        (None, "10.1.2.3"),
    ],
)
def test_the_address_is_what_the_gateway_added(said: str | None, address: str) -> None:
    assert authenticator().address(sent(forwarded_for=said)) == address
    assert authenticator().address(sent(forwarded_for=said, secret=None)) == "10.1.2.3"


def test_the_secret_is_compared_whoever_sends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One comparison in constant time, with or without a secret, from anywhere."""
    compared: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr(
        "service.access.gateway.hmac.compare_digest",
        lambda a, b: (compared.append((a, b)), a == b)[1],
    )
    for credentials in (sent(), sent(secret="x", peer="192.0.2.1"), sent(secret=None, subject="")):
        try:
            Gateways(NETWORKS, (SECRET,)).hears(credentials)
        except Unauthenticated:
            continue
    assert [len(a) for a, _ in compared] == [32] * 3
    assert len({b for _, b in compared}) == 1


async def test_two_secrets_are_good_while_one_takes_the_place_of_the_other() -> None:
    both = authenticator("the secret of before", SECRET)
    for secret in ("the secret of before", SECRET):
        assert (await both.recognise(sent(secret=secret, subject=SUBJECT))).id == "feed"
    with pytest.raises(Unauthenticated):
        await both.recognise(sent(secret="the secret of never", subject=SUBJECT))


def test_the_file_of_the_secret(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n")
    assert read_secrets(path) == [SECRET]
    path.write_text(f"{SECRET}\r\n\n{SECRET} 2")
    assert read_secrets(path) == [SECRET, f"{SECRET} 2"]
    for bad in ("", "short\n", "a" * 15, " " * 20, f"{SECRET}\nshort", f"{SECRET}\n" * 3):
        path.write_text(bad)
        with pytest.raises(ValueError, match="16 or more"):
            read_secrets(path)
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="ascii"):
        read_secrets(path)
    with pytest.raises(FileNotFoundError):
        read_secrets(tmp_path / "nowhere")
