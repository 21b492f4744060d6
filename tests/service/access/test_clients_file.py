"""The clients file: what it may say, and what happens when it changes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from service.access.authenticator import Unauthenticated
from service.access.clients import Clients, ClientsFile, parse, read
from service.access.keys import client_of, digest, is_one_of, new_key
from service.access.principal import Scope
from service.access.tokens import Token
from tests.service.access.issuer import Now

KEY = new_key("feed")
SECRET = "SECRET-0815"


def entry(**more: Any) -> dict[str, Any]:
    return {"id": "feed", "scopes": ["ingest"], "key_sha256": [digest(KEY)]} | more


def text(*entries: dict[str, Any]) -> str:
    return yaml.safe_dump({"clients": list(entries)})


def clients(*entries: dict[str, Any]) -> Clients:
    return Clients(parse(text(*entries)))


def token(client: str, person: str | None = None, scopes: Iterable[Scope] = Scope) -> Token:
    return Token(
        applications=(client,), subject=person, scopes=frozenset(scopes), expires=float("inf")
    )


def test_keys_are_random_and_say_whose_they_are() -> None:
    keys = {new_key("a.b-1") for _ in range(50)}
    assert len(keys) == 50
    for key in keys:
        assert client_of(key) == "a.b-1"
        assert len(key.rpartition("_")[2]) == 64
        assert is_one_of(key, [digest(KEY), digest(key)])
        assert not is_one_of(key, [digest(KEY)])
        assert not is_one_of(key, [])


def test_a_key_is_of_its_client_alone() -> None:
    other = new_key("other")
    known = clients(
        entry(units=["medical"], episodes=["a-*", "b-?"]),
        entry(id="other", scopes=["read", "admin"], key_sha256=[digest(other), digest("x")]),
    )
    feed = known.of_key(KEY)
    # What a name of ours implies is there too.
    assert (feed.id, feed.method) == ("feed", "api-key")
    assert feed.scopes == {Scope.INGEST, Scope.DELETE}
    assert (feed.units, feed.episodes) == ({"medical"}, ("a-*", "b-?"))
    assert known.of_key(other).scopes == {Scope.READ, Scope.ADMIN}
    wrong = (KEY[:-1], KEY + "0", KEY.upper(), KEY.replace("feed", "other"), "llm4ehr_", "", "é")
    for key in (*wrong, new_key("feed"), new_key("nobody")):
        with pytest.raises(Unauthenticated):
            known.of_key(key)


def test_certificates_are_found_as_they_are_written() -> None:
    known = clients(entry(certificate_subject="CN=feed,O=Hospital"))
    assert known.of_certificate("CN=feed,O=Hospital").method == "certificate"
    for subject in (
        "CN=feed",
        "O=Hospital,CN=feed",
        "cn=feed,O=Hospital",
        "",
        "CN=feed,O=Hospital ",
    ):
        with pytest.raises(Unauthenticated):
            known.of_certificate(subject)


def test_tokens_are_narrowed_and_never_widened() -> None:
    known = clients(
        entry(id="a", key_sha256=[], token_subject="feed", scopes=["ingest", "read"],
              units=["medical"]),
        entry(id="b", key_sha256=[], token_subject="user"),
    )  # fmt: skip
    narrowed = known.of_token(token("feed", "feed", scopes={Scope.READ, Scope.ADMIN}))
    assert (narrowed.id, narrowed.scopes, narrowed.units) == ("a", {Scope.READ}, {"medical"})
    # What an entry implies no token has that lacks it.
    assert known.of_token(token("feed", scopes={Scope.INGEST})).scopes == {Scope.INGEST}
    assert known.of_token(token("app", "user")).id == "app/b"
    assert known.of_token(token("feed", "person")).id == "a/person"
    with pytest.raises(Unauthenticated, match="more than one"):
        known.of_token(token("feed", "user"))


def test_a_token_of_whom_no_entry_knows_is_refused() -> None:
    """An entry that is taken out, or lost, must not widen what its token may do."""
    for known in (clients(), clients(entry(token_subject="feed"))):
        with pytest.raises(Unauthenticated, match="no client that is known"):
            known.of_token(token("other", "s"))
    stranger = Clients((), any_token=True).of_token(token("other", scopes={Scope.ADMIN}))
    assert (stranger.id, stranger.scopes, stranger.units) == ("other", {Scope.ADMIN}, None)


@pytest.mark.parametrize(("expires", "valid"), [("2020-01-01T00:00:00Z", False),
                                                ("2999-01-01T00:00:00+01:00", True)])  # fmt: skip
def test_a_client_may_expire(expires: str, valid: bool) -> None:
    known = clients(entry(expires=expires, certificate_subject="CN=f", token_subject="t"))
    for ask in (
        lambda: known.of_key(KEY),
        lambda: known.of_certificate("CN=f"),
        lambda: known.of_token(token("t")),
    ):
        if valid:
            ask()
        else:
            with pytest.raises(Unauthenticated, match="expired"):
                ask()


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        (entry(id="a_b"), "/clients/0/id"),
        (entry(id=""), "/clients/0/id"),
        (entry(scopes=[]), "/clients/0/scopes"),
        (entry(scopes=[SECRET]), "/clients/0/scopes"),
        (entry(scopes="read"), "/clients/0/scopes"),
        (entry(units=[SECRET]), "/clients/0/units"),
        (entry(units=[]), "/clients/0/units"),
        (entry(episodes=[]), "/clients/0/episodes"),
        (entry(episodes=[""]), "/clients/0/episodes/0"),
        (entry(key_sha256=[SECRET]), "/clients/0/key_sha256/0"),
        (entry(key_sha256=[digest("a").upper()]), "/clients/0/key_sha256/0"),
        (entry(key_sha256=[digest(c) for c in "abc"]), "/clients/0/key_sha256"),
        (entry(key_sha256=[]), "/clients/0"),
        (entry(expires="2027-01-01"), "/clients/0/expires"),
        (entry(expires="2027-01-01T00:00:00"), "/clients/0/expires"),
        (entry(certificate_subject=""), "/clients/0/certificate_subject"),
        ({k: v for k, v in entry().items() if k != "scopes"}, "/clients/0/scopes"),
        (entry(**{SECRET: "x"}), "/clients/0:"),
    ],
)
def test_errors_say_where_and_repeat_nothing(wrong: dict[str, Any], place: str) -> None:
    with pytest.raises(ValueError, match=place) as caught:
        clients(wrong)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "field", ["id", "certificate_subject", "token_subject"]
)  # fmt: skip
def test_two_clients_share_nothing(field: str) -> None:
    with pytest.raises(ValueError, match=f"/clients/1/{field}"):
        clients(entry() | {field: "same"}, entry(id="two") | {field: "same"})


@pytest.mark.parametrize(
    "content",
    ["", "clients", "clients: 7", "[]", "{", "clients: [", f"{SECRET}: [}}", "a: &a [*a]",
     "? [a, b]\n: c", "\x00", "clients: !!python/object:os.system [x]", "- " * 3000],
)  # fmt: skip
def test_what_is_no_file_of_clients(content: str) -> None:
    with pytest.raises(ValueError, match="clients file") as caught:
        parse(content)
    assert SECRET not in str(caught.value)


@given(st.text() | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(
        ["clients", "id", "scopes", "units", "key_sha256", "expires", "x"]), x, max_size=4),
).map(yaml.safe_dump))  # fmt: skip
def test_nothing_else_is_raised(content: str) -> None:
    try:
        parse(content)
    except ValueError as error:
        assert str(error).startswith("clients file: ")  # noqa: PT017


class TestReload:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "clients.yaml"
        path.write_text(text(entry()))
        return path

    @pytest.fixture
    def now(self) -> Now:
        return Now()

    def change(self, path: Path, content: str) -> None:
        fresh = path.with_name("new")
        fresh.write_text(content)
        os.replace(fresh, path)

    def ids(self, file: ClientsFile) -> list[str]:
        return [client.id for client in file().entries]

    def test_a_change_is_seen_within_a_second(self, path: Path, now: Now) -> None:
        file = ClientsFile(path, now)
        self.change(path, text(entry(id="two")))
        now.seconds += 0.9
        assert self.ids(file) == ["feed"]
        now.seconds += 0.2
        assert self.ids(file) == ["two"]

    def test_it_is_read_only_when_it_changed(
        self, path: Path, now: Now, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = ClientsFile(path, now)
        readings: list[Path] = []
        monkeypatch.setattr(
            "service.access.clients.read", lambda p: (readings.append(p), read(p))[1]
        )
        for _ in range(5):
            now.seconds += 2
            file()
        assert readings == []
        self.change(path, text(entry(id="two")))
        for _ in range(5):
            now.seconds += 2
            file()
        assert readings == [path]

    @pytest.mark.parametrize("broken", [f"clients: [{SECRET}", "clients: []]", None])
    def test_a_broken_file_is_told_once_and_the_former_stays(
        self, path: Path, now: Now, broken: str | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        file = ClientsFile(path, now)
        if broken is None:
            path.unlink()
        else:
            self.change(path, broken)
        with caplog.at_level(logging.ERROR):
            for _ in range(3):
                now.seconds += 2
                assert self.ids(file) == ["feed"]
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert SECRET not in caplog.text
        self.change(path, text(entry(id="two")))
        now.seconds += 2
        assert self.ids(file) == ["two"]

    def test_a_removed_key_is_worth_nothing(self, path: Path, now: Now) -> None:
        file = ClientsFile(path, now)
        file().of_key(KEY)
        self.change(path, text(entry(key_sha256=[digest("other")])))
        now.seconds += 2
        with pytest.raises(Unauthenticated):
            file().of_key(KEY)

    def test_a_broken_file_stops_the_start(self, path: Path) -> None:
        path.write_text("x")
        with pytest.raises(ValueError, match="clients file"):
            ClientsFile(path)
        with pytest.raises(FileNotFoundError):
            ClientsFile(path.with_name("nowhere"))
