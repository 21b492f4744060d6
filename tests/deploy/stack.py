"""All of it as real processes: a gateway with TLS, two replicas, their PostgreSQL, Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx

from service.access.keys import digest, new_key
from tests.deploy.gateway import Gateway
from tests.deploy.programs import DEPLOY, Running, program
from tests.end_to_end.server import PATIENCE_S, Server, free_port

ORGANISATION = "Test Hospital"


class Stack:
    """Replicas on one log, and the gateway before them. As a context: started and ready."""

    def __init__(self, folder: Path, repository: Path, log_url: str) -> None:
        ports = [free_port(), free_port()]
        self.gateway = Gateway(folder, ports)
        self.keys = {name: new_key(name) for name in ("feed", "metrics")}
        clients = [
            {"id": "feed", "scopes": ["ingest", "read"], "key_sha256": [digest(self.keys["feed"])]},
            {"id": "metrics", "scopes": ["metrics"], "key_sha256": [digest(self.keys["metrics"])]},
            {
                "id": "monitor-1",
                "scopes": ["ingest"],
                "certificate_subject": f"CN=monitor-1,O={ORGANISATION}",
            },
        ]
        clients_file = folder / "clients.yaml"
        clients_file.write_text(json.dumps({"clients": clients}))
        self.replicas = []
        for number, port in enumerate(ports, start=1):
            own = folder / f"replica-{number}"
            own.mkdir()
            settings = {
                "log_url": log_url,
                "authentication": "required",
                "clients_file": clients_file,
                "trusted_gateways": '["127.0.0.1/32"]',
                "gateway_secret_file": self.gateway.secret_file,
                "audit_interval_seconds": "none",
                "log_format": "json",
            }
            self.replicas.append(Server(repository, own, port=port, **settings))
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            for replica in self.replicas:
                opening.enter_context(replica)
            opening.enter_context(self.gateway)
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def client(self, **options: Any) -> httpx.Client:
        """Talks to the gateway, with the key of the feed."""
        return self.gateway.client(
            headers={"Authorization": f"Bearer {self.keys['feed']}"} | options
        )

    def answered(self) -> list[float]:
        """How many requests about episodes each replica that runs has answered so far."""
        return [
            sum(v for name, v in self.metrics(replica).items() if 'route="/episodes/{' in name)
            for replica in self.replicas
        ]

    def metrics(self, replica: Server) -> dict[str, float]:
        """Counts of requests, labels as they stand in the text."""
        key = {"Authorization": f"Bearer {self.keys['metrics']}"}
        text = replica.http.get("/metrics", headers=key).raise_for_status().text
        name = "llm4ehr_http_request_duration_seconds_count"
        lines = re.findall(rf"^({name}\S*) (\S+)$", text, re.MULTILINE)
        return {labels: float(value) for labels, value in lines}


class Prometheus(Running):
    """Debian's Prometheus with our rules. As a context: started and ready, ended after."""

    def __init__(self, folder: Path, targets: Sequence[int], key: str) -> None:
        self._folder = folder
        self.output = folder / "prometheus.txt"
        self.port = free_port()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE_S)
        (folder / "metrics-key").write_text(key)
        (folder / "metrics-key").chmod(0o600)
        text = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
        addresses = ", ".join(f'"127.0.0.1:{port}"' for port in targets)
        for old, new in (
            ("/run/secrets/metrics-key", str(folder / "metrics-key")),
            ("rules/*.yml", str(DEPLOY / "prometheus" / "rules" / "*.yml")),
            ("llm4ehr-1:8000, llm4ehr-2:8000", addresses),
            ("_interval: 15s", "_interval: 1s"),
        ):
            assert old in text
            text = text.replace(old, new)
        (folder / "prometheus.yml").write_text(text)

    def command(self) -> list[str]:
        return [
            program("prometheus"),
            f"--config.file={self._folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.http.close()

    def answers(self) -> bool:
        return self.http.get("/-/ready").status_code == 200

    def get(self, path: str) -> Any:
        """`data` of an answer of its API."""
        return self.http.get(f"/api/v1/{path}").raise_for_status().json()["data"]

    def values(self, expression: str) -> list[float]:
        """What an expression is now, series by series."""
        found = self.get(f"query?query={quote(expression)}")["result"]
        return [float(series["value"][1]) for series in found]

    def rules(self) -> list[dict[str, Any]]:
        """Every rule, and how its last evaluation went."""
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]
