"""Benchmarks that compute in this process: that they run, agree, and promise what they show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import engine, engine_models
from benchmarks.engine_baselines import PatientCaches, Reference, Restacked, Stateless
from benchmarks.engine_models import Cost, Peak, network_of, tick_cost
from benchmarks.memory import growth, parts, plot
from llm4ehr.offline import TOLERANCE

Run = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _quick_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = Peak(flops_per_s=1e11, bytes_per_s=1e10)
    monkeypatch.setattr(engine, "measured_peak", lambda device: peak)


def test_the_engine_is_compared_with_each_alternative(run_benchmark: Run) -> None:
    results = run_benchmark("engine", "--quick")
    (row,) = results["rows"]
    assert (row["model"], row["stays"], row["context"], row["repeats"]) == ("tiny", 2, 3, 2)
    for way in ("stateless", "loop", "restacked"):
        assert row[f"{way}_ms"] > 0
        assert row[f"times_{way}"] == pytest.approx(row[f"{way}_ms"] / row["ours_ms"], rel=0.02)
    assert row["times_floor"] == pytest.approx(row["ours_ms"] / row["floor_ms"], rel=0.02)
    assert row["difference"] <= engine.TOLERANCE
    assert {"commit", "threads", "gpu", "packages", "backend", "gflops_per_s"} <= set(results)


def test_what_takes_too_long_is_left_out_and_said(run_benchmark: Run) -> None:
    (row,) = run_benchmark("engine", "--quick", "--limit", "0")["rows"]
    assert row["ours_ms"] is None
    assert row["note"].startswith("left out")


def test_ways_that_disagree_are_not_timed(
    run_benchmark: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Restacked, "tick", lambda self, context: np.ones((2, 28), np.float32))
    with pytest.raises(RuntimeError, match="differ"):
        run_benchmark("engine", "--quick")


def test_a_tick_is_counted_as_torch_counts_it() -> None:
    network = network_of("6x384")
    config, stays, context = network.model.config, 2, 30
    series = np.zeros((stays, context + 1, config.n_series), np.float32)
    events = np.zeros((stays, context + 1, config.n_event_channels), np.float32)
    patients = PatientCaches(Reference(network, torch.device("cpu")), series, events)
    patients.extend(context)
    with FlopCounterMode(display=False) as counter:
        Restacked(patients).tick(context)
    cost = tick_cost(network, stays, context)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    one_more = tick_cost(network, stays + 1, context)
    keys_and_values = 4 * 2 * (context + 1) * 6 * 384
    assert one_more.bytes - cost.bytes == keys_and_values
    with FlopCounterMode(display=False) as counter:
        Stateless(patients.reference, series, events).tick(context)
    assert counter.get_total_flops() > 20 * cost.flops


def test_the_floor_is_the_larger_of_multiplying_and_reading() -> None:
    peak = Peak(flops_per_s=10.0, bytes_per_s=1.0)
    assert Cost(flops=20, bytes=1).floor_seconds(peak) == 2
    assert Cost(flops=20, bytes=5).floor_seconds(peak) == 5


def test_the_peak_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_models, "_best", lambda device, work, repeats=8: 0.5)
    peak = engine_models.measured_peak(torch.device("cpu"))
    assert peak.flops_per_s == 2 * 2048**3 / 0.5
    assert peak.bytes_per_s == 2 * (256 << 20) / 0.5


def test_batch_scoring_is_compared_with_the_plain_forward(
    run_benchmark: Run, store_2012: Path
) -> None:
    rows = run_benchmark("batch", "--quick", "--store", str(store_2012))["rows"]
    rows += run_benchmark("batch", "--quick")["rows"]
    assert [row["source"] for row in rows] == ["physionet2012", "synthetic"]
    for row in rows:
        assert row["stays"] == 3
        assert row["hours"] > 0
        assert row["difference"] <= TOLERANCE.hidden
        # Of seconds that are rounded in the table, and in so small a run are next to nothing.
        assert row["times_plain"] > 0
        assert min(row["plain_s"], row["ours_s"]) >= 0


def test_memory_of_a_stay_by_part() -> None:
    kib = {row["what"]: row["kib_a_stay"] for row in parts(hours=6, n=2)}
    more = {row["what"]: row["kib_a_stay"] for row in parts(hours=12, n=2)}
    assert kib["slot"] == more["slot"] == 2 * 4 * 200 * 4 * 128 / 1024
    assert set(kib) == {"entries", "view", "features", "answers", "slot"}
    assert all(0 < kib[name] < more[name] for name in ("entries", "features"))


def test_growth_of_memory_is_that_of_the_second_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [100.0 + min(minute, 30) for minute in range(61)]
    lines = [{"at": 60.0 * i, "memory": {"rss": size}} for i, size in enumerate(sizes)]
    assert "0.0 MiB/h; at the end 130 MiB" in growth(lines)["note"]
    monkeypatch.setattr("benchmarks.report.RESULTS", tmp_path)
    plot(lines, "memory")
    assert "<svg" in (tmp_path / "memory_soak.svg").read_text()
