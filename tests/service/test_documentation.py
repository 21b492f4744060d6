"""The pages for users name everything there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from service.api.metrics import Metrics
from service.api.problems import PROBLEMS
from service.engine.metrics import EngineMetrics
from service.settings import Settings
from tests.service.fakes import BUNDLE

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("kind", ["metrics", "problems", "settings"])
def test_the_documentation_names_everything(kind: str) -> None:
    registry = CollectorRegistry()
    EngineMetrics(registry)
    Metrics(registry, BUNDLE)
    page, names = {
        "metrics": ("operations.md", {family.name for family in registry.collect()}),
        "problems": ("api.md", {f"`/problems/{name}`" for name in PROBLEMS}),
        "settings": ("operations.md", {f"LLM4EHR_{n.upper()}" for n in Settings.model_fields}),
    }[kind]
    text = (DOCS / page).read_text()
    assert [name for name in sorted(names) if name not in text] == []
