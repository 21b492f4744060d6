"""What the gateway costs: the same load through nginx with TLS, and straight to the service.

    python -m benchmarks.gateway [--stays 200] [--history 24] [--rate 50] [--seconds 20]
                                 [--rounds 5] [--quick]

Service and client are those of `benchmarks.serving`, and so are the kinds of requests; latencies
begin when a request was due. The two ways take turns within each round, the first of them changing,
so that whatever else the machine does meets both. The gateway is that of `deploy/gateway`, with one
worker, certificates of `deploy/compose/make-secrets`, and limits that are not reached.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from string import Template
from typing import Any

from benchmarks.report import milliseconds, progress, write
from benchmarks.serving import Stays
from benchmarks.serving_process import Service, admitted_long_ago, build_log

DEPLOY = Path(__file__).parents[1] / "deploy"
KINDS = ("post", "readable", "get", "not_modified")


class Gateway:
    """nginx before the service on that port. As a context: answering, then ended."""

    def __init__(self, service_port: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="llm4ehr-gateway-")
        folder = Path(self._folder.name)
        secrets = folder / "secrets"
        subprocess.run(
            ["env", f"LLM4EHR_SECRETS={secrets}", DEPLOY / "compose" / "make-secrets", "127.0.0.1"],
            check=True,
            capture_output=True,
        )
        self.authority = secrets / "ca.pem"
        self.port = _free_port()
        words = {
            "LISTEN": f"127.0.0.1:{self.port}",
            "HEALTH_LISTEN": f"127.0.0.1:{_free_port()}",
            "REPLICAS": f"server 127.0.0.1:{service_port};",
            "RESOLVER": "",
            "SECRETS": secrets,
            "SCRATCH": folder / "scratch",
            "VERIFY_CLIENT": "optional",
            "REQUESTS_PER_SECOND": 100_000,
            "BURST": 100_000,
            "CONNECTIONS": 10_000,
        }
        text = (DEPLOY / "gateway" / "nginx.conf.template").read_text()
        text = Template(text).safe_substitute({f"GATEWAY_{k}": v for k, v in words.items()})
        text = text.replace("worker_processes auto;", "worker_processes 1;")
        text = text.replace("/dev/stdout", str(folder / "access.log"))
        (folder / "scratch").mkdir()
        (folder / "nginx.conf").write_text(text)
        program = shutil.which("nginx", path="/usr/local/sbin:/usr/sbin:/usr/bin")
        if program is None:
            raise RuntimeError("nginx is not installed")
        configuration = str(folder / "nginx.conf")
        self._command = [program, "-e", "stderr", "-c", configuration, "-g", "daemon off;"]

    def __enter__(self) -> Gateway:
        self._process = subprocess.Popen(self._command)
        while self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return self
            except OSError:
                time.sleep(0.02)
        raise RuntimeError("the gateway did not start")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    a = _arguments()
    admitted = admitted_long_ago()
    with Service(kv_memory_mib=a.kv_memory_mib) as service, progress() as bar:
        task = bar.add_task("gateway", total=2 * a.rounds + 1)
        build_log(service.log_path, a.stays, a.history, admitted)
        service.start()
        service.wait_for(service.is_warm)
        stays = Stays(service, admitted, [a.history] * a.stays)
        with Gateway(service.port) as gateway:
            ways: dict[str, dict[str, Any]] = {
                "direct": {"port": service.port},
                "gateway": {"port": gateway.port, "authority": str(gateway.authority)},
            }
            results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
            for options in ways.values():  # first requests load what later ones find
                stays.run(a.rate, min(a.seconds, 5), **options)
            bar.advance(task)
            for n in range(a.rounds):
                for way in sorted(ways, reverse=n % 2 == 1):
                    stays.run(a.rate, a.seconds, **ways[way])
                    results[way].append(stays.last)
                    bar.advance(task)
    rows = [_row(way, results[way]) for way in ways]
    write(a.name, rows, stays=a.stays, rate_per_s=a.rate, seconds=a.seconds, rounds=a.rounds)


def _row(way: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """All rounds of one way together."""
    statuses = [item for result in results for item in result["statuses"].items()]
    fine = sum(n for name, n in statuses if name.endswith((" 200", " 304")))
    row: dict[str, Any] = {"way": way, "requests": sum(result["requests"] for result in results)}
    row["failed"] = sum(n for _, n in statuses) - fine
    for kind in KINDS:
        names = (kind, "correction") if kind == "post" else (kind,)
        latencies = [x for r in results for name in names for x in r["latencies"].get(name, ())]
        row[f"{kind}_n"] = len(latencies)
        for name, value in milliseconds(latencies, 0.5, 0.99).items():
            row[f"{kind}_{name}"] = value
    lags = [lag for result in results for lag in result["lags"]]
    row["client_lag_p99_ms"] = milliseconds(lags, 0.99)["p99_ms"]
    return row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stays", type=int, default=200)
    parser.add_argument("--history", type=int, default=24, help="hours on record at the start")
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kv-memory-mib", type=int, default=512)
    parser.add_argument("--name", default="gateway", help="results/NAME.json")
    parser.add_argument("--quick", action="store_true", help="a few stays and seconds")
    a = parser.parse_args()
    if a.quick:
        a.stays, a.history, a.rate, a.seconds, a.rounds, a.kv_memory_mib = 8, 2, 10.0, 2.0, 2, 16
    return a


if __name__ == "__main__":
    main()
