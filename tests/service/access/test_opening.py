"""Which authenticator the settings give, and which settings contradict themselves."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from service.access.authenticator import Anyone, Credentials, Unauthenticated
from service.access.hosts import is_loopback, is_private_url
from service.access.keys import digest, new_key
from service.access.opening import generated_key_path, open_authenticator
from service.access.principal import Scope
from service.settings import Settings
from tests.service.access.issuer import AUDIENCE, serving

pytestmark = pytest.mark.anyio

OIDC = {"oidc_issuer": "https://issuer.example", "oidc_audience": AUDIENCE}


def sent(authorization: str | None, **more: Any) -> Credentials:
    nothing = {"subject": None, "gateway_secret": None, "peer": "127.0.0.1", "forwarded_for": None}
    return Credentials(authorization=authorization, **(nothing | more))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(log_path=tmp_path / "log.sqlite")


async def test_without_clients_there_is_one_with_a_key_of_its_own(settings: Settings) -> None:
    authenticator = open_authenticator(settings)
    path = generated_key_path(settings)
    assert path.name == "log.sqlite.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = path.read_text().strip()
    principal = await authenticator.recognise(sent(f"Bearer {key}"))
    assert (principal.id, principal.scopes) == ("local", frozenset(Scope))
    assert (principal.units, principal.episodes) == (None, None)
    for wrong in (None, f"Bearer {key}0", f"Bearer {new_key('local')}", "Bearer x.y.z"):
        with pytest.raises(Unauthenticated):
            await authenticator.recognise(sent(wrong))
    again = open_authenticator(settings)
    assert path.read_text().strip() == key
    assert (await again.recognise(sent(f"Bearer {key}"))).id == "local"


def test_the_folder_of_the_log_is_made_for_the_key(tmp_path: Path) -> None:
    settings = Settings(log_path=tmp_path / "new" / "folder" / "log.sqlite")
    open_authenticator(settings)
    assert generated_key_path(settings).exists()


def test_only_the_path_of_the_key_is_told(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    open_authenticator(settings)
    path = generated_key_path(settings)
    assert str(path) in caplog.text
    assert path.read_text().strip() not in caplog.text
    assert path.read_text().strip()[-64:] not in caplog.text


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o700])
def test_a_key_that_others_can_read_is_not_used(settings: Settings, mode: int) -> None:
    open_authenticator(settings)
    generated_key_path(settings).chmod(mode)
    with pytest.raises(ValueError, match="its owner alone"):
        open_authenticator(settings)


def test_a_file_that_is_none_of_ours_is_not_used(settings: Settings, tmp_path: Path) -> None:
    path = generated_key_path(settings)
    path.write_text("")
    path.chmod(0o600)
    with pytest.raises(ValueError, match="holds no key"):
        open_authenticator(settings)
    path.unlink()
    elsewhere = tmp_path / "elsewhere"
    path.symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic"):
        open_authenticator(settings)
    assert not elsewhere.exists()
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(ValueError, match="its owner alone"):
        open_authenticator(settings)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.evil"])
def test_without_clients_nobody_else_is_listened_to(settings: Settings, host: str) -> None:
    with pytest.raises(ValueError, match="loopback"):
        open_authenticator(settings.model_copy(update={"host": host}))
    assert not generated_key_path(settings).exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LOCALHOST"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    ("url", "private"),
    [
        ("https://issuer.example/realms/x", True),
        ("http://127.0.0.1:8080", True),
        ("http://localhost/", True),
        ("http://[::1]:80/", True),
        ("http://issuer.example", False),
        ("http://127.0.0.1.evil.example", False),
        ("http://127.0.0.1@evil.example", False),
        ("https://", False),
        ("file:///etc/passwd", False),
        ("ftp://127.0.0.1/", False),
        ("http://[", False),
        ("", False),
    ],
)
def test_addresses_that_are_asked_for_keys(url: str, private: bool) -> None:
    assert is_private_url(url) is private


async def test_open_is_anyone(tmp_path: Path) -> None:
    authenticator = open_authenticator(Settings(authentication="open"))
    assert isinstance(authenticator, Anyone)
    assert (await authenticator.recognise(sent(None))).method == "open"


async def test_everything_that_is_configured_is_known(tmp_path: Path) -> None:
    key = new_key("feed")
    entry = {"id": "feed", "scopes": ["ingest"], "key_sha256": [digest(key)]}
    narrow = {"id": "etl", "scopes": ["read"], "token_subject": "feed", "units": ["medical"]}
    by_certificate = {"id": "pump", "scopes": ["ingest"], "certificate_subject": "CN=pump"}
    (tmp_path / "clients.yaml").write_text(
        yaml.safe_dump({"clients": [entry, narrow, by_certificate]})
    )
    (tmp_path / "secret").write_text("0123456789abcdef")
    with serving() as issuer:
        authenticator = open_authenticator(
            Settings(
                clients_file=tmp_path / "clients.yaml",
                oidc_issuer=issuer.url,
                oidc_audience=AUDIENCE,
                trusted_gateways=("127.0.0.0/8",),  # type: ignore[arg-type]
                gateway_secret_file=tmp_path / "secret",
                host="0.0.0.0",
            )
        )
        assert (await authenticator.recognise(sent(f"Bearer {key}"))).method == "api-key"
        token = issuer.token(scope="read ingest", sub="feed")
        principal = await authenticator.recognise(sent(f"Bearer {token}"))
        assert (principal.id, principal.method) == ("etl", "bearer")
        assert (principal.scopes, principal.units) == ({Scope.READ}, {"medical"})
        told = {"subject": "CN=pump", "gateway_secret": "0123456789abcdef"}
        assert (await authenticator.recognise(sent(None, **told))).id == "pump"
        through = sent(f"Bearer {token}", **told)
        assert (await authenticator.recognise(through)).id == "etl"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"oidc_issuer": "https://issuer.example"}, "OIDC_AUDIENCE"),
        ({"oidc_audience": "x"}, "OIDC_ISSUER"),
        ({"oidc_jwks_url": "https://issuer.example/keys"}, "OIDC_ISSUER"),
        (OIDC | {"oidc_issuer": "http://issuer.example"}, "https"),
        (OIDC | {"oidc_jwks_url": "http://issuer.example"}, "https"),
        (OIDC | {"oidc_issuer": "file:///x"}, "pattern"),
        (OIDC | {"oidc_algorithms": ["none"]}, "OIDC_ALGORITHMS"),
        (OIDC | {"oidc_algorithms": ["RS256", "HS256"]}, "OIDC_ALGORITHMS"),
        (OIDC | {"oidc_algorithms": []}, "OIDC_ALGORITHMS"),
        ({"trusted_gateways": ["10.0.0.0/8"], "clients_file": "c"}, "GATEWAY_SECRET_FILE"),
        ({"trusted_gateways": ["10.0.0.0/8"], "gateway_secret_file": "s"}, "CLIENTS_FILE"),
        ({"gateway_secret_file": "s"}, "TRUSTED_GATEWAYS"),
        ({"authentication": "open", "clients_file": "c"}, "contradicts"),
        ({"authentication": "open"} | OIDC, "contradicts"),
        ({"authentication": "off"}, "required"),
    ],
)
def test_settings_that_leave_a_hole_or_no_way_in(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Settings(**settings)
