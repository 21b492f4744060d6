"""`python -m service clients`: keys are made, shown once, rotated and removed."""

from __future__ import annotations

import stat
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from service.__main__ import main
from service.access.authenticator import Unauthenticated
from service.access.clients import Client, Clients, read
from service.access.keys import digest
from service.access.principal import Scope
from service.commands import clients as command
from service.commands.clients import _client, _held, _write

KEY = {"key_sha256": ["0" * 64]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "clients.yaml"


class Shell:
    def __init__(self, path: Path, output: pytest.CaptureFixture[str]) -> None:
        self._path = path
        self._output = output

    def __call__(self, *arguments: str) -> str:
        """What the command prints."""
        status = main(["clients", *arguments, "--file", str(self._path)])
        said = self._output.readouterr()
        assert status == 0, said.err
        return said.out

    def fails(self, *arguments: str) -> str:
        assert main(["clients", *arguments, "--file", str(self._path)]) == 1
        return self._output.readouterr().err


@pytest.fixture
def shell(path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(path, capsys)


def test_a_key_is_made_rotated_and_removed(path: Path, shell: Shell) -> None:
    first = shell(
        *("new-key", "--id", "feed", "--scopes", "ingest,read"),
        *("--units", "medical,surgical", "--episodes", "icu-*, b?"),
    ).strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert first not in path.read_text()
    principal = Clients(read(path)).of_key(first)
    assert principal.scopes == {Scope.INGEST, Scope.DELETE, Scope.READ}
    assert principal.units == {"medical", "surgical"}
    assert principal.episodes == ("icu-*", "b?")

    path.chmod(0o640)
    second = shell("new-key", "--id", "feed").strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    for key in (first, second):
        assert Clients(read(path)).of_key(key) == principal
    assert "two" not in shell.fails("new-key", "--id", "feed")  # it has as many as may be

    listed = shell("list")
    assert digest(first)[:12] in listed
    assert "units=medical,surgical" in listed
    assert first not in listed
    assert digest(first) not in listed

    shell("remove-key", "--id", "feed", "--key", digest(first)[:12])
    clients = Clients(read(path))
    assert clients.of_key(second) == principal
    with pytest.raises(Unauthenticated):
        clients.of_key(first)
    shell("remove-key", "--id", "feed", "--key", digest(second)[:12])
    assert read(path) == ()


def test_other_entries_stay_as_they_are(path: Path, shell: Shell) -> None:
    path.write_text(
        "clients:\n"
        "- {id: pump, scopes: [ingest], certificate_subject: 'CN=pump,O=Klinik \u00dc'}\n"
        "- {id: etl, scopes: [read], token_subject: etl, expires: 2030-01-01T00:00:00Z}\n"
    )
    before = read(path)
    key = shell("new-key", "--id", "feed", "--scopes", "read").strip()
    assert read(path)[:2] == before
    shell("new-key", "--id", "pump")
    [pump_key] = next(c for c in read(path) if c.id == "pump").key_sha256
    shell("remove-key", "--id", "pump", "--key", pump_key[:12])
    assert read(path)[:2] == before  # it is known by its certificate still
    assert Clients(read(path)).of_key(key).id == "feed"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("new-key", "--id", "new"), "--scopes"),
        (("new-key", "--id", "new", "--scopes", "everything"), "--scopes"),
        (("new-key", "--id", "new", "--scopes", "read", "--units", "moon"), "--units"),
        (("new-key", "--id", "a_b", "--scopes", "read"), "--id"),
        (("new-key", "--id", "feed", "--scopes", "admin"), "in the file"),
        (("remove-key", "--id", "feed", "--key", "x"), "no such client"),
        (("remove-key", "--id", "nobody", "--key", ""), "no such client"),
        (("remove-key", "--id", "feed", "--key", ""), "not one key"),
    ],
)
def test_mistakes_change_nothing(
    path: Path, shell: Shell, arguments: tuple[str, ...], says: str
) -> None:
    shell("new-key", "--id", "feed", "--scopes", "read")
    shell("new-key", "--id", "feed")
    before = path.read_bytes()
    assert says in shell.fails(*arguments)
    assert path.read_bytes() == before


def test_a_file_has_to_be_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    assert main(["clients", "list"]) == 1
    assert "--file" in capsys.readouterr().err
    monkeypatch.setenv("LLM4EHR_CLIENTS_FILE", str(path))
    assert main(["clients", "new-key", "--id", "feed", "--scopes", "read"]) == 0
    assert main(["clients", "list"]) == 0
    assert "id=feed" in capsys.readouterr().out


def test_keys_that_are_made_at_once_are_all_kept(
    path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another command begins while one has read the file and not written it yet."""
    others: list[threading.Thread] = []

    def add(name: str) -> None:
        with _held(path) as file:
            _write(file, [*read(file), _client({"id": name, "scopes": ["read"], **KEY})])

    def slowly(file: Path, clients: Sequence[Client]) -> None:
        if not others:
            others.append(threading.Thread(target=add, args=("other",)))
            others[0].start()
            others[0].join(0.2)
        _write(file, clients)

    monkeypatch.setattr(command, "_write", slowly)
    shell("new-key", "--id", "first", "--scopes", "read")
    others[0].join(60)
    assert {client.id for client in read(path)} == {"first", "other"}


def test_nothing_is_left_of_a_file_that_cannot_be_written(
    path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell("new-key", "--id", "first", "--scopes", "read")
    before = path.read_text()

    def refuse(*_: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(command.os, "fchown", refuse)
    assert "not yours" in shell.fails("new-key", "--id", "second", "--scopes", "read")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_text() == before
