"""nginx with the gateway's template, on free ports of the loopback interface."""

from __future__ import annotations

import os
import secrets
import ssl
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import httpx

from tests.deploy.certificates import Authority
from tests.deploy.programs import DEPLOY, Running, program, run
from tests.end_to_end.server import PATIENCE_S, free_port

TEMPLATE = DEPLOY / "gateway" / "nginx.conf.template"


class Gateway(Running):
    """nginx before replicas on these ports. As a context: started and answering, ended after."""

    def __init__(
        self, folder: Path, replica_ports: Sequence[int], *, max_fails: int = 2, **words: Any
    ) -> None:
        self.folder = folder
        self.output = folder / "nginx.txt"
        self.port, self._health_port = free_port(), free_port()
        self.address = f"https://127.0.0.1:{self.port}"
        self.authority = Authority(folder / "secrets", "ca")
        self.stranger = Authority(folder / "stranger", "other-ca")
        self.authority.server("server")
        (folder / "secrets" / "client-ca.pem").write_bytes(self.authority.path.read_bytes())
        self.secret_file = folder / "gateway-secret"
        self._make_secret()
        options = f"max_fails={max_fails} fail_timeout=5s"
        servers = (f"server 127.0.0.1:{port} {options};" for port in replica_ports)
        self._words = {
            "GATEWAY_LISTEN": f"127.0.0.1:{self.port}",
            "GATEWAY_HEALTH_LISTEN": f"127.0.0.1:{self._health_port}",
            "GATEWAY_REPLICAS": " ".join(servers),
            "GATEWAY_RESOLVER": "",
            "GATEWAY_SECRETS": folder / "secrets",
            "GATEWAY_SCRATCH": folder / "scratch",
            "GATEWAY_VERIFY_CLIENT": "optional",
            "GATEWAY_REQUESTS_PER_SECOND": 1000,
            "GATEWAY_BURST": 1000,
            "GATEWAY_CONNECTIONS": 32,
        } | {f"GATEWAY_{name.upper()}": value for name, value in words.items()}

    def _make_secret(self) -> None:
        secret = secrets.token_hex(32)
        self.secret_file.write_text(secret)
        self.secret_file.chmod(0o600)
        line = f'set $gateway_secret "{secret}";\n'
        (self.folder / "secrets" / "gateway-secret.conf").write_text(line)

    def write(self) -> Path:
        """The configuration with its words replaced."""
        text = Template(TEMPLATE.read_text()).safe_substitute(self._words)
        assert "${" not in text
        (self.folder / "scratch").mkdir(exist_ok=True)
        path = self.folder / "nginx.conf"
        path.write_text(text.replace("/dev/stdout", str(self.folder / "access.log")))
        return path

    def check(self) -> None:
        """Have nginx judge the configuration."""
        run(program("nginx"), "-t", "-q", "-e", "stderr", "-c", self.write())

    def command(self) -> list[str]:
        # Started by root it would write as somebody who cannot enter the folders of tests.
        more = "daemon off;" + (" user root;" if os.geteuid() == 0 else "")
        return [program("nginx"), "-e", "stderr", "-c", str(self.write()), "-g", more]

    def answers(self) -> bool:
        url = f"http://127.0.0.1:{self._health_port}/health"
        return httpx.get(url, timeout=PATIENCE_S).status_code == 204

    def tls(self, certificate: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        """Trusts this gateway, and shows a client's certificate if there is one."""
        context = ssl.create_default_context(cafile=str(self.authority.path))
        if certificate is not None:
            context.load_cert_chain(*certificate)
        return context

    def client(self, certificate: tuple[Path, Path] | None = None, **options: Any) -> httpx.Client:
        """Talks to the gateway."""
        return httpx.Client(
            base_url=self.address, verify=self.tls(certificate), timeout=PATIENCE_S, **options
        )

    @property
    def access_log(self) -> str:
        return (self.folder / "access.log").read_text()
