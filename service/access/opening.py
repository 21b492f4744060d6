"""The authenticator that the settings ask for."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

from service.access.authenticator import Anyone, Authenticator, Credentials, Unauthenticated
from service.access.clients import Client, Clients, ClientsFile
from service.access.gateway import Gateways, forwarded, read_secrets
from service.access.hosts import is_loopback
from service.access.jwks import IssuerKeys
from service.access.keys import PREFIX, digest, new_key
from service.access.principal import Principal, Scope
from service.access.tokens import Tokens
from service.settings import Settings

_logger = logging.getLogger(__name__)

LOCAL = "local"
"""Id of the client that has the generated key."""

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_PRIVATE = 0o600
_LONGEST_KEY = 256


class Configured:
    """Knows clients by API key, bearer token or the certificate that a gateway tells of.

    A key or a token decides where there is one: the certificate was of the transport alone.
    """

    def __init__(
        self, clients: Callable[[], Clients], tokens: Tokens | None, gateways: Gateways
    ) -> None:
        self._clients = clients
        self._tokens = tokens
        self._gateways = gateways

    def address(self, credentials: Credentials) -> str:
        try:
            is_told = self._gateways.hears(credentials)
        except Unauthenticated:
            is_told = False
        return forwarded(credentials) if is_told else credentials.peer

    async def recognise(self, credentials: Credentials) -> Principal:
        is_told = self._gateways.hears(credentials)
        if credentials.authorization is not None:
            return await self._bearer(credentials.authorization)
        if is_told and credentials.subject:
            return self._clients().of_certificate(credentials.subject)
        raise Unauthenticated("credentials are missing")

    async def _bearer(self, authorization: str) -> Principal:
        scheme, _, secret = authorization.partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not secret:
            raise Unauthenticated("send Authorization: Bearer with a key or a token")
        if secret.startswith(PREFIX):
            return self._clients().of_key(secret)
        if self._tokens is None:
            raise Unauthenticated("the key is not known")
        token = await self._tokens.verify(secret)
        return self._clients().of_token(token)


def open_authenticator(settings: Settings) -> Authenticator:
    """Who is known to the service. Raises OSError, ValueError."""
    if settings.authentication == "open":
        return Anyone()
    if not settings.knows_clients:
        return _local(settings)
    clients: Callable[[], Clients]
    if settings.clients_file is None:
        nobody = Clients((), any_token=True)
        clients = lambda: nobody  # noqa: E731
    else:
        clients = ClientsFile(settings.clients_file)
    return Configured(clients, _tokens(settings), _gateways(settings))


def generated_key_path(settings: Settings) -> Path:
    """Where the key is of a service that was told of no clients."""
    return settings.log_path.with_name(settings.log_path.name + ".key")


def _tokens(settings: Settings) -> Tokens | None:
    issuer, audience = settings.oidc_issuer, settings.oidc_audience
    if issuer is None or audience is None:
        return None
    return Tokens(
        IssuerKeys(issuer, settings.oidc_jwks_url),
        issuer=issuer,
        audience=audience,
        algorithms=settings.oidc_algorithms,
        leeway_s=settings.oidc_leeway_seconds,
    )


def _gateways(settings: Settings) -> Gateways:
    path = settings.gateway_secret_file
    return Gateways(settings.trusted_gateways, () if path is None else read_secrets(path))


def _local(settings: Settings) -> Authenticator:
    """One client on this machine, with a key that was made for it."""
    if not is_loopback(settings.host):
        raise ValueError(
            "without clients (LLM4EHR_CLIENTS_FILE, LLM4EHR_OIDC_ISSUER or "
            "LLM4EHR_TRUSTED_GATEWAYS) the service listens on a loopback address alone"
        )
    path = generated_key_path(settings)
    client = Client(id=LOCAL, scopes=frozenset(Scope), key_sha256=(digest(_own_key(path)),))
    _logger.warning("no clients are configured: who can read %s may do everything", path)
    clients = Clients((client,))
    return Configured(lambda: clients, None, Gateways((), ()))


def _own_key(path: Path) -> str:
    """The key of an earlier start, or a new one. Raises OSError, ValueError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, _NEW, _PRIVATE)
    except FileExistsError:
        return _read_own(path)
    key = new_key(LOCAL)
    with os.fdopen(descriptor, "w") as file:
        file.write(key + "\n")
        file.flush()
        os.fsync(descriptor)
    return key


def _read_own(path: Path) -> str:
    # A pipe in its place must not be waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if (
            not stat.S_ISREG(found.st_mode)
            or stat.S_IMODE(found.st_mode) & ~_PRIVATE
            or found.st_uid != os.geteuid()
        ):
            raise ValueError(f"{path} must be a file that its owner alone can read")
        key = file.read(_LONGEST_KEY).decode("ascii", "replace").strip()
    if not key.startswith(PREFIX):
        raise ValueError(f"{path} holds no key: remove it and another one is made")
    return key
