"""An issuer of tokens on the loopback interface, whose keys and answers a test decides."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

AUDIENCE = "https://llm4ehr.example"


@cache
def private_key(kid: str) -> Any:
    """A key pair of that name: RSA, or what the name begins with."""
    if kid.startswith("ec"):
        return ec.generate_private_key(ec.SECP256R1())
    if kid.startswith("ed"):
        return ed25519.Ed25519PrivateKey.generate()
    return rsa.generate_private_key(65537, 1024 if kid.startswith("short") else 2048)


def jwk(kid: str, **more: Any) -> dict[str, Any]:
    """The public half, as an issuer publishes it."""
    public = private_key(kid).public_key()
    kinds = {"ec": ECAlgorithm, "ed": OKPAlgorithm}
    found: dict[str, Any] = kinds.get(kid[:2], RSAAlgorithm).to_jwk(public, as_dict=True)
    return {"kid": kid, "use": "sig"} | found | more


class Issuer:
    """`keys` are those it publishes; `answer` replaces what it says, by path."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.keys = [jwk("one")]
        self.answer: dict[str, tuple[int, bytes, dict[str, str]]] = {}
        self.asked: list[str] = []

    def said(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        self.asked.append(path)
        if path in self.answer:
            return self.answer[path]
        documents = {
            "/keys": {"keys": self.keys},
            "/.well-known/openid-configuration": {
                "issuer": self.url,
                "jwks_uri": f"{self.url}/keys",
            },
        }
        if path in documents:
            return 200, json.dumps(documents[path]).encode(), {}
        return 404, b"{}", {}

    def claims(self, **more: Any) -> dict[str, Any]:
        """Of a token that is valid now; what is None is left out."""
        now = int(time.time())
        standard = {"iss": self.url, "aud": AUDIENCE, "sub": "s", "client_id": "feed"}
        all_of_it = standard | {"iat": now, "exp": now + 300, "scope": "ingest"} | more
        return {name: value for name, value in all_of_it.items() if value is not None}

    def token(
        self,
        kid: str = "one",
        *,
        algorithm: str = "RS256",
        head: dict[str, Any] | None = None,
        **claims: Any,
    ) -> str:
        headers = {"kid": kid} | (head or {})
        return jwt.encode(self.claims(**claims), private_key(kid), algorithm, headers=headers)


@contextmanager
def serving() -> Iterator[Issuer]:
    """An issuer that answers; it is gone at the end."""
    issuer: Issuer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body, headers = issuer.said(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body)
            except OSError:
                self.close_connection = True  # the answer was too long to be read

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    issuer = Issuer(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield issuer
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Now:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds
