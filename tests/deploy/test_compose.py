"""The image and the compose file, as far as they can be judged without a container engine."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.__main__ import main
from service.access.clients import Clients, read
from service.access.gateway import read_secrets
from tests.deploy.gateway import TEMPLATE
from tests.deploy.programs import DEPLOY, check_command, program, run
from tests.end_to_end.server import ROOT

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What make-secrets made."""
    program("openssl")
    folder = tmp_path_factory.mktemp("secrets") / "made"
    make = DEPLOY / "compose" / "make-secrets"
    run("env", f"LLM4EHR_SECRETS={folder}", make, "icu.example.org", "10.0.0.1")
    return folder


def test_the_dockerfile_passes_its_linter() -> None:
    run(program("hadolint"), ROOT / "Dockerfile")


def test_the_image_runs_without_rights() -> None:
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    named = {re.match(r".* AS (\S+)", stage).group(1): stage for stage in stages}  # type: ignore[union-attr]
    assert list(named)[-1] == "cpu", "the last stage is what is built by default"
    for name in ("cpu", "gpu"):
        assert re.search(r"^USER \$\{UID\}:\$\{UID\}$", named[name], re.MULTILINE)
    assert "HEALTHCHECK" in named["base"]
    assert "gcc" not in named["cpu"] + named["base"]
    assert "training" not in "".join(stages)


def test_only_what_the_image_needs_is_sent_to_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert {name for names in copied for name in names.split()} == allowed


def test_the_compose_file_follows_the_specification() -> None:
    run(
        *(program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"),
        ROOT / "docker-compose.yml",
    )


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_has_as_few_rights_as_it_can(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"]
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "devices"}
    assert "docker.sock" not in yaml.safe_dump(service)
    for word, value in service.get("environment", {}).items():
        if word.endswith(("PASSWORD", "PASSWORD__FILE", "KEY", "SECRET", "LOG_URL", "_FILE")):
            assert value.startswith(("/run/secrets/", "/run/access/")), word


def test_only_the_gateway_is_reached_from_outside() -> None:
    published = {name: s["ports"] for name, s in SERVICES.items() if "ports" in s}
    assert set(published) == {"gateway", "grafana"}
    assert all(port.startswith("127.0.0.1:") for port in published["grafana"])
    inner = {name for name, network in COMPOSE["networks"].items() if network is not None}
    assert all(COMPOSE["networks"][name]["internal"] for name in inner)
    outer = {name for name, s in SERVICES.items() if set(s["networks"]) - inner}
    assert outer == {"gateway", "grafana"}


def test_each_part_reaches_only_what_it_needs() -> None:
    def meet(a: str, b: str) -> bool:
        return bool(set(SERVICES[a]["networks"]) & set(SERVICES[b]["networks"]))

    assert meet("gateway", "llm4ehr-1")
    assert meet("llm4ehr-2", "postgres")
    assert meet("prometheus", "llm4ehr-2")
    assert not meet("gateway", "postgres")
    assert not meet("gateway", "prometheus")
    assert not meet("prometheus", "postgres")


def test_every_secret_is_made_and_none_is_left_over(secrets: Path) -> None:
    used = {secret for s in SERVICES.values() for secret in s.get("secrets", [])}
    assert used == COMPOSE["secrets"].keys()
    for name, secret in COMPOSE["secrets"].items():
        assert secret == {"file": f"deploy/compose/secrets/{name}"}
        # Read by users of the containers, who are nobody on this machine.
        assert (secrets / name).stat().st_mode & 0o777 == 0o444
    assert secrets.stat().st_mode & 0o777 == 0o700
    for name in ("ca.key", "client-feed.key", "first-key"):
        assert (secrets / name).stat().st_mode & 0o777 == 0o600


def test_a_clients_file_that_is_replaced_is_seen(secrets: Path) -> None:
    """Its folder is mounted: a mount of the file alone would go on showing the one of the start."""
    for name in ("llm4ehr-1", "llm4ehr-2"):
        path = Path(SERVICES[name]["environment"]["LLM4EHR_CLIENTS_FILE"])
        assert SERVICES[name]["volumes"] == [f"./deploy/compose/secrets/access:{path.parent}:ro"]
    made = secrets / "access" / path.name
    before = made.stat()
    with contextlib.redirect_stdout(io.StringIO()):
        main(["clients", "new-key", "--file", str(made), "--id", "ward", "--scopes", "read"])
    after = made.stat()
    assert after.st_ino != before.st_ino
    # Read by a user of the container, who is nobody on this machine; it holds no secret.
    assert (after.st_mode & 0o777, made.parent.stat().st_mode & 0o777) == (0o644, 0o755)


def test_the_secrets_are_what_their_readers_expect(secrets: Path) -> None:
    clients = Clients(read(secrets / "access" / "clients.yaml"))
    first = clients.of_key((secrets / "first-key").read_text())
    assert first.scopes >= {"ingest", "read"}
    assert clients.of_key((secrets / "metrics-key").read_text()).scopes == {"metrics"}
    assert "ingest" in clients.of_certificate("CN=feed,O=LLM4EHR").scopes
    [secret] = read_secrets(secrets / "gateway-secret")
    assert (secrets / "gateway-secret.conf").read_text() == f'set $gateway_secret "{secret}";\n'
    for leaf in ("server.pem", "client-feed.pem"):
        run(program("openssl"), "verify", "-CAfile", secrets / "ca.pem", secrets / leaf)


def test_secrets_are_not_made_over(secrets: Path) -> None:
    before = {path: path.read_bytes() for path in secrets.rglob("*") if path.is_file()}
    again = subprocess.run(
        [DEPLOY / "compose" / "make-secrets", "other"],
        env={"PATH": "/usr/bin:/bin", "LLM4EHR_SECRETS": str(secrets)},
        capture_output=True,
        text=True,
    )
    assert again.returncode == 1
    assert "nothing was changed" in again.stderr
    assert {p: p.read_bytes() for p in secrets.rglob("*") if p.is_file()} == before


def test_a_new_certificate_of_the_server_is_of_the_same_authority(secrets: Path) -> None:
    before = (secrets / "server.pem").read_bytes()
    make = DEPLOY / "compose" / "make-secrets"
    run("env", f"LLM4EHR_SECRETS={secrets}", make, "--server", "icu2.example.org")
    assert (secrets / "server.pem").read_bytes() != before
    verify = (program("openssl"), "verify", "-CAfile", secrets / "ca.pem")
    run(*verify, "-verify_hostname", "icu2.example.org", secrets / "server.pem")


def test_the_bundle_that_is_shipped_is_pinned(capsys: pytest.CaptureFixture[str]) -> None:
    main(["digest", "--repository", str(ROOT / "model_repository")])
    digests = json.loads(capsys.readouterr().out)
    word = "LLM4EHR_BUNDLE_DIGESTS"
    for path in (DEPLOY / "compose" / "bundles.env", DEPLOY / "systemd" / "llm4ehr.env.example"):
        (line,) = re.findall(rf"^{word}='(.+)'$", path.read_text(), re.MULTILINE)
        assert json.loads(line) == digests, path
    settings = yaml.safe_load((DEPLOY / "kubernetes" / "base" / "settings.yaml").read_text())
    assert json.loads(settings["data"][word]) == digests
    for name in ("llm4ehr-1", "llm4ehr-2"):
        # What the hospital sets comes after, and wins.
        files = [entry["path"] for entry in SERVICES[name]["env_file"]]
        assert files == ["deploy/compose/bundles.env", "settings.env"]
        assert word not in SERVICES[name]["environment"]


def test_commands_are_commands_of_the_service() -> None:
    check_command(SERVICES["migrate"]["command"])


def test_the_gateway_gets_every_word_of_its_template() -> None:
    words = set(re.findall(r"\$\{(GATEWAY_\w+)\}", TEMPLATE.read_text()))
    assert words == {name for name in SERVICES["gateway"]["environment"] if name[:8] == "GATEWAY_"}


def test_scripts_can_be_parsed() -> None:
    scripts = [p for p in DEPLOY.rglob("*") if p.is_file() and p.read_bytes()[:2] == b"#!"]
    assert len(scripts) == 2
    for path in (*scripts, ROOT / ".ci" / "run"):
        assert path.stat().st_mode & 0o111, "it cannot be run"
        shell = path.read_text().partition("\n")[0].replace(" ", "/").rpartition("/")[2]
        run(program(shell), "-n", path)
