"""API keys: `llm4ehr_<id of the client>_<256 random bits>`. Only their SHA-256 is kept."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable

PREFIX = "llm4ehr_"
"""By which a key is told from a token, and found where it should not be."""

_BYTES = 32

# What a key of an unknown client is compared with, so that it takes as long.
_NOTHING = "0" * 64


def new_key(client_id: str) -> str:
    """A key that nobody has seen before."""
    return f"{PREFIX}{client_id}_{secrets.token_hex(_BYTES)}"


def digest(key: str) -> str:
    """What is kept of a key, in hexadecimal digits. A random key needs no slow hash."""
    return hashlib.sha256(key.encode()).hexdigest()


def client_of(key: str) -> str:
    """The client that a key says it is of; nothing is proved by it."""
    return key.removeprefix(PREFIX).rpartition("_")[0]


def is_one_of(key: str, digests: Iterable[str]) -> bool:
    """Whether a key has one of the digests. Takes no less time for a wrong one."""
    ours = digest(key)
    equal = [hmac.compare_digest(ours, one) for one in (*digests, _NOTHING)]
    return any(equal)
