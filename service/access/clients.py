"""The clients file: who may do what, and by what each client is known.

A file of YAML, `clients:` and a list. It is read once at the start and again when it changed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from llm4ehr.preprocessing import UnitType
from service.access.authenticator import Unauthenticated
from service.access.keys import client_of, is_one_of
from service.access.principal import Principal, Scope, with_implied
from service.access.tokens import Token

_logger = logging.getLogger(__name__)

CLIENT_ID = r"^[A-Za-z0-9][A-Za-z0-9.-]{0,63}$"

MAX_KEYS = 2
"""Of one client at a time: the one in use, and the one that takes its place."""

_LOOK_AGAIN_S = 1.0

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Client(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Annotated[str, Field(pattern=CLIENT_ID)]
    scopes: Annotated[frozenset[Scope], Field(min_length=1)]
    units: Annotated[frozenset[UnitType], Field(min_length=1)] | None = None
    """Types of units whose stays it may touch; None: all."""
    episodes: (
        Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None
    ) = None
    """Patterns of ids of episodes that it may touch; None: all."""
    key_sha256: Annotated[tuple[_Digest, ...], Field(max_length=MAX_KEYS)] = ()
    certificate_subject: Annotated[str, Field(min_length=1)] | None = None
    """RFC 2253, character by character as the gateway tells it."""
    token_subject: Annotated[str, Field(min_length=1)] | None = None
    """`client_id`, `azp` or `sub` of the bearer tokens that this entry lets in."""
    expires: AwareDatetime | None = None

    @model_validator(mode="after")
    def _is_known_by_something(self) -> Self:
        if not (self.key_sha256 or self.certificate_subject or self.token_subject):
            raise ValueError("it has neither key nor certificate nor token")
        return self

    def principal(self, method: str) -> Principal:
        """The client, as it was recognised. Raises Unauthenticated if it has expired."""
        if self.expires is not None and self.expires <= datetime.now(UTC):
            raise Unauthenticated("the client has expired")
        return Principal(
            id=self.id,
            method=method,
            scopes=with_implied(self.scopes),
            units=self.units,
            episodes=self.episodes,
        )


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    clients: tuple[Client, ...]


class Clients:
    """The clients of one reading of the file, by what they are known by."""

    def __init__(self, clients: Iterable[Client], *, any_token: bool = False) -> None:
        """With `any_token` a token that no entry is about is taken as it is.

        Raises ValueError if two share an id, a certificate or the subject of tokens.
        """
        self.entries = tuple(clients)
        self._any_token = any_token
        self._by_id = _index("id", [(c.id, c) for c in self.entries])
        self._by_certificate = _index(
            "certificate_subject", [(c.certificate_subject, c) for c in self.entries]
        )
        self._by_token = _index("token_subject", [(c.token_subject, c) for c in self.entries])

    def of_key(self, key: str) -> Principal:
        """Whose API key this is. Raises Unauthenticated."""
        client = self._by_id.get(client_of(key))
        if not is_one_of(key, () if client is None else client.key_sha256) or client is None:
            raise Unauthenticated("the key is not known")
        return client.principal("api-key")

    def of_certificate(self, subject: str) -> Principal:
        """Whose certificate this is. Raises Unauthenticated."""
        client = self._by_certificate.get(subject)
        if client is None:
            raise Unauthenticated("the certificate is not known")
        return client.principal("certificate")

    def of_token(self, token: Token) -> Principal:
        """Who holds a token: an application, a person behind one, or both.

        An entry takes the place of the name that it is about. Raises Unauthenticated, also if more
        than one entry is about the token, or if none is and one must be.
        """
        names = dict.fromkeys(token.names)
        found = {name: self._by_token[name] for name in names if name in self._by_token}
        if len(found) > 1:
            raise Unauthenticated("the token belongs to more than one client")
        if not found and not self._any_token:
            raise Unauthenticated("the token is of no client that is known")
        id_ = token.who({name: client.id for name, client in found.items()})
        if not found:
            return Principal(id=id_, method="bearer", scopes=token.scopes)
        client = next(iter(found.values())).principal("bearer")
        return replace(client, id=id_, scopes=client.scopes & token.scopes)


class ClientsFile:
    """The clients as the file has them now.

    A new file that cannot be used is reported once, and the former one stays.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises OSError, ValueError."""
        self._path = path
        self._clock = clock
        self._looked_at = clock()
        self._stamp = _stamp(path)
        self._clients = Clients(read(path))

    def __call__(self) -> Clients:
        now = self._clock()
        if now - self._looked_at >= _LOOK_AGAIN_S:
            self._looked_at = now
            self._look()
        return self._clients

    def _look(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._clients = Clients(read(self._path))
        except (OSError, ValueError) as error:
            what = type(error).__name__ if isinstance(error, OSError) else error
            _logger.error("the new clients file is not used, the former one stays: %s", what)
        else:
            _logger.info("the clients file was read again: %d clients", len(self._clients.entries))


def read(path: Path) -> tuple[Client, ...]:
    """All entries of a file.

    Raises OSError, and ValueError that says where the file is wrong and repeats nothing of it.
    """
    return parse(path.read_text(encoding="utf-8"))


def parse(text: str) -> tuple[Client, ...]:
    """All entries of the text of a file. Raises ValueError as `read`."""
    try:
        # Texts, lists and mappings alone: nothing is guessed, and nothing else is made.
        loaded = yaml.load(text, Loader=yaml.BaseLoader)  # noqa: S506
        return _File.model_validate_json(json.dumps(loaded)).clients
    except ValidationError as error:
        wrong = error.errors(include_input=False, include_url=False)[0]
        # A name that the file invents may be anything.
        loc = wrong["loc"][:-1] if wrong["type"] == "extra_forbidden" else wrong["loc"]
        raise ValueError(f"clients file: /{'/'.join(map(str, loc))}: {wrong['msg']}") from None
    except yaml.MarkedYAMLError as error:
        line = "?" if error.problem_mark is None else error.problem_mark.line + 1
        raise ValueError(f"clients file: line {line} is no YAML") from None
    except (yaml.YAMLError, TypeError, ValueError, RecursionError):
        raise ValueError("clients file: it is no YAML of texts, lists and mappings") from None


def _index(field: str, pairs: list[tuple[str | None, Client]]) -> dict[Hashable, Client]:
    index: dict[Hashable, Client] = {}
    for i, (name, client) in enumerate(pairs):
        if name is None:
            continue
        if name in index:
            raise ValueError(f"clients file: /clients/{i}/{field}: another client has the same")
        index[name] = client
    return index


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes when the file does; None if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
