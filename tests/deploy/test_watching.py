"""Rules of Prometheus, dashboards of Grafana and the unit of systemd."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from service.runtime import build_app
from service.settings import Settings
from tests.deploy.programs import DEPLOY, program, run
from tests.end_to_end.server import ROOT

RULES = DEPLOY / "prometheus" / "rules" / "llm4ehr.yml"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
_FOREIGN = {
    "up", "ALERTS", "node_filesystem_avail_bytes", "node_filesystem_size_bytes",
    "node_timex_offset_seconds", "node_timex_sync_status",
}  # fmt: skip
"""Metrics of Prometheus itself and of its exporter of nodes."""


def _rules() -> list[dict[str, Any]]:
    return [r for group in yaml.safe_load(RULES.read_text())["groups"] for r in group["rules"]]


def _expressions(dashboard: Path) -> Iterator[str]:
    for panel in json.loads(dashboard.read_text())["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def _metrics(expression: str) -> set[str]:
    """Names of metrics: words that are followed by a selector, or begin with our prefix."""
    text = re.sub(r'"[^"]*"', '""', expression)
    text = re.sub(r"\b(by|without)\s*\([^)]*\)", "", text)
    return {
        name
        for name in re.findall(r"[A-Za-z_:][A-Za-z0-9_:]*", re.sub(r"\{[^}]*\}", "", text))
        if name.startswith(("llm4ehr", "node_")) or name in ("up", "ALERTS")
    }


@pytest.fixture(scope="module")
def exposed(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What the service shows, by the names that expressions use."""
    settings = Settings(
        model_repository=repository,
        bundle="tiny/1",
        log_path=tmp_path_factory.mktemp("log") / "log.sqlite",
        authentication="open",
        kv_memory_mib=1,
        torch_threads=1,
    )
    app = build_app(settings)
    text = generate_latest(app.state.context.metrics.registry).decode()
    names: set[str] = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        ends = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        names |= {name + end for end in ends}
    return names


def test_rules_and_configuration_are_valid(tmp_path: Path) -> None:
    promtool = program("promtool")
    run(promtool, "check", "rules", RULES)
    key = tmp_path / "metrics-key"
    key.touch()
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    text = text.replace("/run/secrets/metrics-key", str(key))
    text = text.replace("rules/*.yml", str(RULES.parent / "*.yml"))
    (tmp_path / "prometheus.yml").write_text(text)
    said = run(promtool, "check", "config", tmp_path / "prometheus.yml")
    assert f"{len(_rules())} rules found" in said


def test_alerts_fire_when_they_should() -> None:
    tests = DEPLOY / "prometheus" / "tests" / "llm4ehr.yml"
    run(program("promtool"), "test", "rules", tests)
    tested = {
        case["alertname"]
        for test in yaml.safe_load(tests.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert tested == {rule["alert"] for rule in _rules() if "alert" in rule}


def test_every_alert_has_a_playbook() -> None:
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings}
    for rule in _rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("page", "ticket")
            page, _, anchor = rule["annotations"]["runbook"].partition("#")
            assert page == "docs/operations.md"
            assert anchor in anchors, rule["alert"]


def test_rules_ask_for_metrics_that_exist(exposed: set[str]) -> None:
    recorded = {rule["record"] for rule in _rules() if "record" in rule}
    for rule in _rules():
        assert _metrics(rule["expr"])
        assert _metrics(rule["expr"]) <= exposed | recorded | _FOREIGN, rule


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_ask_for_metrics_that_exist(
    dashboard: Path, exposed: set[str], tmp_path: Path
) -> None:
    recorded = {rule["record"] for rule in _rules() if "record" in rule}
    expressions = list(_expressions(dashboard))
    for expression in expressions:
        assert _metrics(expression)
        assert _metrics(expression) <= exposed | recorded | _FOREIGN, expression
    # Prometheus judges their grammar: each as a rule of its own.
    rules = [{"record": f"panel:{n}", "expr": e} for n, e in enumerate(expressions)]
    path = tmp_path / "expressions.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    run(program("promtool"), "check", "rules", path)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_fit_what_is_provisioned(dashboard: Path) -> None:
    grafana = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((grafana / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    board = json.loads(dashboard.read_text())
    panels = board["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert source["url"].removeprefix("http://").partition(":")[0] in compose


def test_the_adapter_makes_the_metric_that_scales() -> None:
    folder = DEPLOY / "kubernetes"
    (rule,) = yaml.safe_load((folder / "monitoring" / "adapter-rules.yaml").read_text())["rules"][
        "custom"
    ]
    made = rule["name"]["as"]
    assert f"name: {made}" in (folder / "base" / "autoscaling.yaml").read_text()


def test_the_unit_is_valid_and_hardened(tmp_path: Path) -> None:
    systemd = program("systemd-analyze")
    text = (DEPLOY / "systemd" / "llm4ehr.service").read_text()
    unit = tmp_path / "llm4ehr.service"
    unit.write_text(text.replace("/opt/llm4ehr/venv/bin/python", "/bin/true"))
    run(systemd, "verify", "--man=no", unit)
    run(systemd, "security", "--offline=true", "--threshold=20", unit)


def test_the_unit_has_settings_of_the_service() -> None:
    folder = DEPLOY / "systemd"
    unit = (folder / "llm4ehr.service").read_text()
    lines = (folder / "llm4ehr.env.example").read_text().splitlines()
    lines += re.findall(r"^Environment=(.+)$", unit, re.MULTILINE)
    given = {line.partition("=")[0] for line in lines if line.startswith("LLM4EHR_")}
    known = {f"LLM4EHR_{name.upper()}" for name in Settings.model_fields}
    assert given <= known | {"LLM4EHR_SETTINGS_FILE"}
    # A credential is a copy of the start: a key that was removed would go on until a restart.
    assert "LLM4EHR_CLIENTS_FILE=/etc/llm4ehr/clients.yaml" in lines
    assert "LoadCredential=clients.yaml" not in unit
