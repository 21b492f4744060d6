"""The manifests: valid, and with as few rights as the cluster demands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import Settings
from tests.deploy.gateway import TEMPLATE
from tests.deploy.programs import DEPLOY, check_command, program, run

FOLDER = DEPLOY / "kubernetes"
OVERLAYS = ("cpu", "gpu")
VERSIONS = ("1.31", "1.34")
"""Of Kubernetes: the oldest and the newest that the manifests are meant for."""
KINDS_OF_PODS = ("StatefulSet", "Deployment", "Job")
FOREIGN_KINDS = ("ServiceMonitor", "Kustomization")


def _documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


BASE = [
    document
    for path in sorted((FOLDER / "base").glob("*.yaml"))
    for document in _documents(path.read_text())
]


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """An overlay as it is applied."""
    return _documents(run(program("kubectl"), "kustomize", FOLDER / request.param))


def _pods(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Specifications of pods by the name of what makes them."""
    return {
        d["metadata"]["name"]: d["spec"]["template"]["spec"]
        for d in documents
        if d["kind"] in KINDS_OF_PODS
    }


def _check_schema(documents: list[dict[str, Any]]) -> None:
    for document in documents:
        if document["kind"] not in FOREIGN_KINDS:
            for version in VERSIONS:
                kubernetes_validate.validate(document, version, strict=True)


def _check_restricted(pod: dict[str, Any]) -> None:
    """What the level `restricted` of Kubernetes asks for, and a root that cannot be written."""
    assert pod["automountServiceAccountToken"] is False
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"secret", "configMap", "emptyDir"}
    for container in pod["containers"]:
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert not any("hostPort" in port for port in container.get("ports", ()))
        assert not any("SECRET" in e["name"] and "value" in e and not e["value"].startswith("/run/")
                       for e in container.get("env", ()))  # fmt: skip


def test_the_base_is_valid() -> None:
    _check_schema(BASE)


@pytest.mark.parametrize("name", _pods(BASE))
def test_pods_of_the_base_are_restricted(name: str) -> None:
    _check_restricted(_pods(BASE)[name])


def test_overlays_are_valid_and_restricted(rendered: list[dict[str, Any]]) -> None:
    _check_schema(rendered)
    pods = _pods(rendered)
    assert pods.keys() == {"llm4ehr", "gateway", "migrate"}
    for pod in pods.values():
        _check_restricted(pod)
        for container in pod["containers"]:
            assert {"requests", "limits"} <= container["resources"].keys()
            assert ":" in container["image"], "an image without a tag"
    assert {d["metadata"].get("namespace", "llm4ehr") for d in rendered} == {"llm4ehr"}
    assert not [d for d in rendered if d["kind"] == "Secret"]


def test_a_gpu_is_asked_for_by_its_overlay_alone() -> None:
    kubectl = program("kubectl")
    limits = {
        overlay: _pods(_documents(run(kubectl, "kustomize", FOLDER / overlay)))["llm4ehr"][
            "containers"
        ][0]["resources"]["limits"]
        for overlay in OVERLAYS
    }
    assert "nvidia.com/gpu" not in limits["cpu"]
    assert limits["gpu"]["nvidia.com/gpu"] == 1


def test_every_kustomization_names_files_that_exist() -> None:
    for path in DEPLOY.rglob("kustomization.yaml"):
        for name in yaml.safe_load(path.read_text()).get("resources", []):
            assert (path.parent / name).exists(), f"{path}: {name}"


def _of(kind: str, name: str) -> dict[str, Any]:
    return next(d for d in BASE if d["kind"] == kind and d["metadata"]["name"] == name)


def test_nothing_may_talk_to_anything_unless_it_says_so() -> None:
    deny = _of("NetworkPolicy", "default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    into = _of("NetworkPolicy", "replicas")["spec"]["ingress"]
    assert len(into) == 1
    assert into[0]["ports"] == [{"protocol": "TCP", "port": 8000}]
    assert all("from" in rule for rule in into)


def test_the_gateway_knows_every_replica_that_may_run() -> None:
    container = _pods(BASE)["gateway"]["containers"][0]
    words = {entry["name"]: entry["value"] for entry in container["env"]}
    assert set(re.findall(r"\$\{(GATEWAY_\w+)\}", TEMPLATE.read_text())) == {
        word for word in words if word.startswith("GATEWAY_")
    }
    named = re.findall(r"server llm4ehr-(\d+)\.", words["GATEWAY_REPLICAS"])
    most = _of("HorizontalPodAutoscaler", "llm4ehr")["spec"]["maxReplicas"]
    assert named == [str(n) for n in range(most)]


def test_probes_and_the_time_to_stop() -> None:
    pod = _pods(BASE)["llm4ehr"]
    (container,) = pod["containers"]
    paths = {
        kind: container[f"{kind}Probe"]["httpGet"]["path"]
        for kind in ("startup", "readiness", "liveness")
    }
    live, ready = "/v2/health/live", "/v2/health/ready"
    assert paths == {"startup": live, "readiness": ready, "liveness": live}
    drain = int(_of("ConfigMap", "settings")["data"]["LLM4EHR_DRAIN_TIMEOUT_SECONDS"])
    assert pod["terminationGracePeriodSeconds"] > drain + 5


def test_settings_and_commands_are_the_services_own() -> None:
    known = {f"LLM4EHR_{name.upper()}" for name in Settings.model_fields} | {
        "LLM4EHR_SETTINGS_FILE"
    }
    given = set(_of("ConfigMap", "settings")["data"])
    for path in (Path(FOLDER / overlay / "replicas.yaml") for overlay in OVERLAYS):
        container = _pods(_documents(path.read_text()))["llm4ehr"]["containers"][0]
        given |= {entry["name"] for entry in container["env"]}
    assert given <= known
    check_command(_pods(BASE)["migrate"]["containers"][0]["command"])
