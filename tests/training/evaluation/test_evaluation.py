"""Evaluation: which rows a metric is taken at, read-outs, held-out thresholds, what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from llm4ehr.calibration import Interval
from training import metrics
from training.config import FinetuneConfig, SourceConfig
from training.evaluation.evaluate import evaluate, load_scorer
from training.evaluation.facts import weights_sha256
from training.evaluation.report import check_variance, scored_rows, task_metrics
from training.evaluation.scorer import Scorer
from training.evaluation.table import hourly_table
from training.evaluation.threshold import with_threshold
from training.finetune import finetune
from training.labels import LabelOptions
from training.readout import ReadoutOptions
from training.sources import LeakageError, Source, open_sources

TASKS = ("mortality", "decompensation", "remaining_los", "phenotyping")


@pytest.fixture(scope="module")
def tuned(pretrained: Path, icu_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with four heads that answer at every hour."""
    folder = tmp_path_factory.mktemp("runs")
    data = {"sources": [{"store": icu_store, "splits": ["pretrain", "finetune"]}]}
    data |= {"cache": folder / "cache", "n_folds": 3, "validation_fold": 1}
    body = {"run": folder / "hourly", "pretrained": pretrained, "data": data}
    body |= {"tasks": dict.fromkeys(TASKS, 1.0), "los_scale": "days"}
    body |= {"optim": {"epochs": 1, "batch_size": 8, "learning_rate": 0.01}}
    finetune(FinetuneConfig.model_validate(body))
    return folder / "hourly"


@pytest.fixture(scope="module")
def scorer(tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return replace(load_scorer(tuned), cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def source(icu_store: Path) -> Source:
    return open_sources([SourceConfig(store=icu_store, splits=("test",))], training=False)[0]


@pytest.fixture(scope="module")
def hourly(scorer: Scorer, source: Source) -> dict[str, Any]:
    return hourly_table(scorer, source)


def read_out(scorer: Scorer, source: Source, **options: Any) -> dict[str, Any]:
    return hourly_table(replace(scorer, readout=ReadoutOptions(**options)), source)


def test_a_stay_that_is_read_at_its_last_hour_answers_as_hour_by_hour(
    scorer: Scorer, source: Source, hourly: dict[str, Any]
) -> None:
    once = read_out(scorer, source, per_stay={"phenotyping": "last_valid"})
    # Other batches and another order of stays: the rows are told by stay and hour.
    one, other = (np.lexsort((t["hour"], t["episode"])) for t in (once, hourly))
    for name in ("hour", "last", "read_mortality", "label_decompensation", "label_mortality"):
        np.testing.assert_array_equal(once[name][one], hourly[name][other], err_msg=name)
    for name in ("decompensation", "mortality", "remaining_los"):
        np.testing.assert_allclose(once[name][one], hourly[name][other], atol=1e-5, rtol=1e-4)
    last = hourly["last"][other]
    np.testing.assert_allclose(
        once["phenotyping"][one][last], hourly["phenotyping"][other][last], atol=1e-5
    )
    assert np.isnan(once["phenotyping"][one][~last]).all()
    report = task_metrics(once, {}, scorer.phenotypes, intervals=False)
    assert "phenotyping_at_24h" not in report
    assert "phenotyping_at_24h" in task_metrics(hourly, {}, scorer.phenotypes, intervals=False)


def test_mortality_once_a_stay_is_asked_of_long_stays_alone(scorer: Scorer, source: Source) -> None:
    options = {"per_stay": {"mortality": "max"}, "max_hours": 20}
    for shortest, stays in ((0.0, 8), (20.0, 6)):
        asked = replace(scorer, label_options=LabelOptions(mortality_min_hours=shortest))
        table = read_out(asked, source, **options)
        assert table["hour"].max() == 19
        at = scored_rows(table, "mortality")
        assert at.sum() == stays
        assert table["last"][at].all()
        assert np.isfinite(table["mortality"][at]).all()
        assert np.isnan(table["mortality"][~table["last"]]).all()


def test_hourly_tasks_by_patch(scorer: Scorer, source: Source, hourly: dict[str, Any]) -> None:
    table = read_out(scorer, source, by_patch=True)
    at, every = scored_rows(table, "remaining_los"), scored_rows(hourly, "remaining_los")
    assert 0 < at.sum() < every.sum() / 3
    assert ((table["hour"][at] % 5 == 4) | table["last"][at]).all()
    # The lowest label of a patch is that of its last hour, which is closest to the end.
    one, other = (
        dict(zip(zip(t["episode"], t["hour"], strict=True), t["label_remaining_los"], strict=True))
        for t in (table, hourly)
    )
    where = [(e, h) for e, h in zip(table["episode"][at], table["hour"][at], strict=True)]
    assert all(one[key] == other[key] for key in where if not np.isnan(other[key]))


def test_a_network_that_looks_ahead_reads_no_further_than_it_was_trained(
    scorer: Scorer, tiny_network: Callable[..., Any], make_episode: Callable[..., Any]
) -> None:
    short = replace(scorer, readout=ReadoutOptions(max_hours=30))
    episode = make_episode(n_hours=48)
    assert short.as_read(episode) is episode
    native = replace(short, network=tiny_network("bert", attention_mode="native"))
    assert native.as_read(episode).n_hours == 30


def test_the_remaining_stay_is_clipped_where_it_is_served_and_nowhere_else() -> None:
    n = 6
    y, raw = np.array([5, 2.5, 1, 0.5, 7.25, 3]) * 24, np.array([4, 3, 1.5, -0.25, 6, 2]) * 24
    table = {
        "subject": np.arange(n), "hour": np.arange(n), "label_remaining_los": y,
        "remaining_los": np.maximum(raw, 0), "remaining_los_unclipped": raw,
    }  # fmt: skip
    report = task_metrics(table, {}, intervals=False)["remaining_los_days"]
    assert report["rmse_unclipped"]["value"] == pytest.approx(0.877971146, abs=1e-9)
    assert report["r2_unclipped"]["value"] == pytest.approx(0.856820381, abs=1e-9)
    assert report["rmse"]["value"] < report["rmse_unclipped"]["value"]
    assert report["target_variance"] == pytest.approx(np.var(y / 24))
    assert report["rmse"]["ci95_low"] is None


def test_intervals_are_judged_where_there_are_some(scorer: Scorer, source: Source) -> None:
    los = scorer.calibration["remaining_los"]
    assert los.interval is None  # eight held-out stays are too few for nine in ten
    interval = Interval(coverage=0.5, first_hours=(0,), half_widths=(1.0,), stays=(5,))
    calibration = {**scorer.calibration, "remaining_los": replace(los, interval=interval)}
    table = hourly_table(replace(scorer, calibration=calibration), source)
    report = task_metrics(table, {}, scorer.phenotypes, intervals=False)["remaining_los_days"]
    at = scored_rows(table, "remaining_los")
    error = np.abs(table["label_remaining_los"] - table["remaining_los_unclipped"])[at]
    # Half a width is a day, on the scale that the head was trained on; below 0 it is cut off.
    assert report["interval_coverage"]["value"] == pytest.approx(np.mean(error <= 24), abs=1e-3)
    assert 1 <= report["interval_width"]["value"] <= 2 + 1e-9


def test_rmse_and_r2_belong_together() -> None:
    check_variance(5.743, 0.129, 5.743**2 / (1 - 0.129))
    check_variance(0.5, None, 1.0)
    with pytest.raises(ValueError, match="not of the same rows"):
        check_variance(8.293, 0.1, 37.9)  # as the paper's Table 16, against the variance of Table 3


def test_h_is_given_before_and_after_calibration() -> None:
    rng = np.random.default_rng(0)
    n = 40
    raw = rng.random(n)
    table = {
        "subject": np.arange(n), "episode": np.arange(n).astype(str), "hour": np.full(n, 47),
        "read_mortality": np.ones(n, bool), "label_mortality": (rng.random(n) < raw).astype(float),
        "mortality": raw**2, "mortality_uncalibrated": raw,
    }  # fmt: skip
    report = task_metrics(table, {"mortality": 0.3}, intervals=False)["mortality_at_48h"]
    y = table["label_mortality"]
    assert report["h"]["value"] == metrics.physionet_h(y, raw**2)
    assert report["h_uncalibrated"]["value"] == metrics.physionet_h(y, raw)
    assert report["s1"]["value"] == metrics.physionet_s1(y, raw**2, 0.3)
    assert report["s1_best_threshold_on_this_split"] >= report["s1"]["value"]
    assert "s1" not in task_metrics(table, {}, intervals=False)["mortality_at_48h"]


def test_a_threshold_comes_from_stays_that_are_not_tested(
    scorer: Scorer, source: Source, icu_store: Path
) -> None:
    (others,) = open_sources([SourceConfig(store=icu_store, splits=("pretrain",))], training=False)
    once = replace(scorer, readout=ReadoutOptions(per_stay={"mortality": "last_valid"}))
    made = with_threshold(once, [others], [source])
    assert made.thresholds["mortality"] != once.thresholds["mortality"]
    table = hourly_table(made, others)
    at = scored_rows(table, "mortality")
    y, p = table["label_mortality"][at], table["mortality"][at]
    best = metrics.physionet_s1(y, p, metrics.s1_threshold(y, p))
    assert metrics.physionet_s1(y, p, made.thresholds["mortality"]) == best
    with pytest.raises(LeakageError, match="8 stays"):
        with_threshold(once, [source], [source])
    dead = open_sources([SourceConfig(store=icu_store, splits=("finetune",))], training=False)
    one = [replace(dead[0], episode_ids=frozenset({"stay-009"}))]
    with pytest.raises(ValueError, match="no deaths or no survivors"):
        with_threshold(once, one, [source])


def test_what_an_evaluation_writes(tuned: Path, icu_store: Path, tmp_path: Path) -> None:
    report = evaluate(tuned, [icu_store], ["test"], tmp_path, intervals=False)
    assert json.loads((tmp_path / "metrics.json").read_text()) == report
    for task in ("decompensation", "phenotyping"):
        for name in (task, f"{task}_calibration"):
            assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    columns = set(pq.read_schema(tmp_path / "predictions.parquet").names)
    assert {"remaining_los_unclipped", "mortality_uncalibrated", "read_mortality"} <= columns
    facts = report["facts"]
    network = load_scorer(tuned).network
    assert facts["backbone_sha256"] == weights_sha256(network.model.backbone)
    assert facts["preprocessing_sha256"] == network.preprocessing_digest
    assert facts["readout"] == dict.fromkeys(TASKS, "hourly")
    assert not facts["uses_later_observations"]
    other = evaluate(tuned, [icu_store], ["finetune"], intervals=False)["facts"]
    assert other["split_sha256"] != facts["split_sha256"]
    assert other["backbone_sha256"] == facts["backbone_sha256"]
