"""Benchmarks that start the service as a process: the whole of each, in small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.deploy.programs import program

pytestmark = pytest.mark.slow

Run = Callable[..., dict[str, Any]]


def test_serving(run_benchmark: Run) -> None:
    results = run_benchmark("serving", "--quick")
    rate, half = results["rows"]
    assert half["note"] == "half the knee"
    assert results["knee_per_s"] in (None, rate["rate_per_s"])
    for row in (rate, half):
        assert row["errors"] == row["refused"] == 0
        assert row["answered"] == row["requests"]
        assert row["post_p99_ms"] > 0
    assert {item["by"] for item in results["overhead"]} >= {"metrics", "samples"}
    assert results["entries_at_the_start"] == 8 * (1 + 2 * 15)


def test_restart(run_benchmark: Run) -> None:
    (row,) = run_benchmark("restart", "--quick")["rows"]
    assert row["entries"] == 8 * (1 + 4 * 15)
    assert row["ready_s"] > 0
    assert row["warm_s"] >= 0  # the few stays may be scored before anybody looks
    assert row["errors"] == row["refused"] == 0
    assert row["readable_n"] > 0


def test_gateway(run_benchmark: Run) -> None:
    for name in ("nginx", "openssl"):
        program(name)
    direct, gateway = run_benchmark("gateway", "--quick")["rows"]
    assert (direct["way"], gateway["way"]) == ("direct", "gateway")
    for row in (direct, gateway):
        assert row["failed"] == 0
        assert row["post_p99_ms"] > 0
        assert row["readable_n"] > 0


def test_soak(run_benchmark: Run) -> None:
    results = run_benchmark("memory", "--quick")
    assert [row["table"] for row in results["rows"]] == ["part"] * 5 + ["soak"]
    loads = results["soak"]["loads"]
    assert len(loads) == 2
    assert sum(load["errors"] + load["refused"] for load in loads) == 0


def test_log(run_benchmark: Run, postgres_url: str) -> None:
    results = run_benchmark("log", "--quick", "--postgres", postgres_url)
    assert [(row["database"], row["clients"]) for row in results["rows"]] == [
        (database, clients) for database in ("sqlite", "postgresql") for clients in (1, 8, 64)
    ]
    for row in results["rows"]:
        assert row["appends_per_s"] > 0
        assert row["verify_per_s"] > 0
    assert 0 < results["hash_us_per_entry"] < results["rows_us_per_entry"]
