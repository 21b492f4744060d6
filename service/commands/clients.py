"""clients: who may use the service, and their API keys."""

from __future__ import annotations

import argparse
import fcntl
import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from llm4ehr.preprocessing import UnitType
from service.access.clients import MAX_KEYS, Client, Clients, read
from service.access.keys import digest, new_key
from service.access.principal import Scope
from service.commands.parsers import Commands
from service.settings import Settings

_SHOWN = 12
"""Digits of a key's digest by which it is told from the other one."""


def add(commands: Commands) -> None:
    """`clients new-key`, `clients list`, `clients remove-key`."""
    clients = commands.add_parser("clients", help="who may use the service, and their API keys")
    actions = clients.add_subparsers(required=True)

    new = actions.add_parser("new-key", help="make a key for a client, which is added if it is new")
    new.add_argument("--id", required=True, help="name of the client")
    new.add_argument("--scopes", type=_list, help=f"of a new client: {', '.join(Scope)}")
    new.add_argument(
        "--units", type=_list, help=f"of a new client, if not all: {', '.join(get_args(UnitType))}"
    )
    new.add_argument("--episodes", type=_list, help="of a new client, if not all: patterns of ids")
    new.set_defaults(run_command=_new_key)

    remove = actions.add_parser("remove-key", help="make a key useless")
    remove.add_argument("--id", required=True, help="name of the client")
    remove.add_argument("--key", required=True, help="how its digest begins, as the list shows it")
    remove.set_defaults(run_command=_remove_key)

    shown = actions.add_parser("list", help="clients, what they may do, digests of their keys")
    shown.set_defaults(run_command=_show)

    for action in (new, remove, shown):
        action.add_argument("--file", type=Path, help="default: LLM4EHR_CLIENTS_FILE")


def _new_key(a: argparse.Namespace) -> None:
    with _held(_path(a)) as path:
        key = _add_key(a, path)
    print("this key is shown once:", file=sys.stderr)
    print(key)


def _add_key(a: argparse.Namespace, path: Path) -> str:
    clients = list(read(path)) if path.exists() else []
    known = next((c for c in clients if c.id == a.id), None)
    key = new_key(a.id)
    if known is None:
        if a.scopes is None:
            raise ValueError("a new client needs --scopes")
        client = _client(
            {"id": a.id, "scopes": a.scopes, "units": a.units, "episodes": a.episodes}
            | {"key_sha256": [digest(key)]}
        )
        clients.append(client)
    else:
        if a.scopes or a.units or a.episodes:
            raise ValueError("the client is there already: change what it may do in the file")
        if len(known.key_sha256) >= MAX_KEYS:
            raise ValueError(f"it has {MAX_KEYS} keys: remove the one that is not used any more")
        clients = [
            _with_keys(c, (*c.key_sha256, digest(key))) if c is known else c for c in clients
        ]
    _write(path, clients)
    return key


def _remove_key(a: argparse.Namespace) -> None:
    with _held(_path(a)) as path:
        is_known = _take_key(a, path)
    print("the key is removed" if is_known else "the key is removed, and with it the client")


def _take_key(a: argparse.Namespace, path: Path) -> bool:
    """Whether there is anything left by which the client is known."""
    clients = read(path)
    known = next((c for c in clients if c.id == a.id), None)
    found = [] if known is None else [d for d in known.key_sha256 if d.startswith(a.key)]
    if known is None or len(found) != 1:
        raise ValueError("no such client, or not one key of that beginning")
    left = tuple(d for d in known.key_sha256 if d not in found)
    is_known = bool(left or known.certificate_subject or known.token_subject)
    changed = [_with_keys(known, left)] if is_known else []
    _write(path, [other for c in clients for other in (changed if c is known else [c])])
    return is_known


def _show(a: argparse.Namespace) -> None:
    for client in read(_path(a)):
        said = _entry(client)
        if client.key_sha256:
            said["key_sha256"] = [d[:_SHOWN] + "…" for d in client.key_sha256]
        print("  ".join(f"{name}={_text(value)}" for name, value in said.items()))


def _path(a: argparse.Namespace) -> Path:
    path: Path | None = a.file or Settings().clients_file
    if path is None:
        raise ValueError("name the file: --file, or LLM4EHR_CLIENTS_FILE")
    return path


@contextmanager
def _held(path: Path) -> Iterator[Path]:
    """The file itself, which nobody else changes by these commands meanwhile; durable at the end.

    It is the folder that is locked: the file is replaced by another one.
    """
    path = path.resolve()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield path
        os.fsync(folder)
    finally:
        os.close(folder)


def _client(values: dict[str, Any]) -> Client:
    """A client of what was said on the command line. Raises ValueError."""
    try:
        return Client.model_validate(values, strict=False)
    except ValidationError as error:
        wrong = error.errors(include_input=False, include_url=False)[0]
        raise ValueError(f"--{wrong['loc'][0]}: {wrong['msg']}") from None


def _with_keys(client: Client, digests: tuple[str, ...]) -> Client:
    return client.model_copy(update={"key_sha256": digests})


def _write(path: Path, clients: Sequence[Client]) -> None:
    """Put a new file in the place of the old one, at once. Comments in it are lost."""
    Clients(clients)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        try:
            entries = [_entry(client) for client in clients]
            yaml.safe_dump({"clients": entries}, file, sort_keys=False, allow_unicode=True)
            file.flush()
            if path.exists():
                before = path.stat()
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _entry(client: Client) -> dict[str, Any]:
    """As it stands in the file, sets in an order of their own."""
    entry = client.model_dump(mode="json", exclude_defaults=True)
    entry["scopes"] = [scope.value for scope in Scope if scope in client.scopes]
    if client.units is not None:
        entry["units"] = sorted(client.units)
    return entry


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
