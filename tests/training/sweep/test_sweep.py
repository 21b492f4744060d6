"""Every experiment of the paper in small, and what a sweep promises: once, resumed, compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm4ehr.store import EpisodeRecord, EpisodeStore, StoreWriter
from training import run_folder
from training.cli import main
from training.config import ConfigError
from training.evaluation import evaluate as evaluate_module
from training.evaluation.evaluate import evaluate
from training.sweep import run as sweep_module
from training.sweep.config import SweepConfig, load_sweep
from training.sweep.plan import plan
from training.sweep.published import Published, published
from training.sweep.run import sweep
from training.sweep.table import against, markdown, summary

PAPER = Path(__file__).parents[3] / "training" / "configs" / "paper"
TABLES = sorted(PAPER.glob("table*.yaml"), key=lambda path: int(path.stem.removeprefix("table")))


@pytest.fixture(scope="module")
def stores(
    write_icu_store: Callable[..., Path],
    store_2012: Path,
    store_2019: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder to work in, with `stores/` as the experiments name them."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "stores").mkdir()
    (folder / "stores" / "physionet2019").symlink_to(store_2019)
    for seed, name in enumerate(("mimic3", "mimic4", "eicu", "own"), start=3):
        made = EpisodeStore.open(write_icu_store(folder / name, name, seed_of_test=seed))
        with StoreWriter(folder / "stores" / name, made.info, codes=made.codes) as writer:
            for record in made:
                writer.add(two_days_longer(record))
    # The fixture has no stay of set C: copies of its stays stand for all three sets.
    whole = EpisodeStore.open(store_2012)
    with StoreWriter(folder / "stores" / "physionet2012", whole.info, codes=whole.codes) as writer:
        for split in ("a", "b", "c"):
            for r in whole:
                episode = replace(r.episode, episode_id=f"{split}{r.episode.episode_id}")
                subject = f"{split}{r.subject_id}"
                writer.add(replace(r, episode=episode, subject_id=subject, split=split))
    return folder


def two_days_longer(record: EpisodeRecord) -> EpisodeRecord:
    """So that mortality at 48 hours is asked of all stays."""
    outcome = record.outcome
    assert outcome.los_hours is not None
    los = outcome.los_hours + 48
    death = None if outcome.death_hours_low is None else los
    after = None if death is None else math.nextafter(death, math.inf)
    return replace(
        record,
        episode=replace(record.episode, n_hours=math.ceil(los)),
        outcome=replace(outcome, los_hours=los, death_hours_low=death, death_hours_high=after),
    )


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of a run this small."""
    monkeypatch.setattr(evaluate_module, "draw_pictures", lambda *_: None)
    monkeypatch.setattr(run_folder, "loss_curves", lambda *_: None)


@pytest.fixture
def work(stores: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(stores)
    return stores


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_there_is_an_experiment_for_every_table() -> None:
    names = [path.stem for path in TABLES]
    assert names == [f"table{n}" for n in (*range(3, 9), *range(10, 17))]
    for path in TABLES:
        config = load_sweep(path)
        assert config.table == int(path.stem.removeprefix("table"))
        # Every printed row of LLM4EHR has one of ours beside it.
        assert {cell.row for cell in published(config.table)} == {
            row.published for row in config.rows if row.published is not None
        }


def test_the_comparison_of_events_runs_in_small(work: Path) -> None:
    assert main(["sweep", str(PAPER.parent / "comparisons" / "events.yaml"), "--smoke"]) == 0
    table = read(work / "runs" / "events" / "smoke" / "events" / "table.json")
    assert {cell["row"] for cell in table["cells"]} == {"none", "fused", "stream"}
    runs = work / "runs" / "events" / "smoke"
    # With and without the stream heads stand on one encoder.
    assert len(list(runs.glob("pretrain-*"))) == 2
    assert len(list(runs.glob("finetune-*"))) == 6
    of_stream = next(
        read(folder / "config.json")
        for folder in runs.glob("finetune-*")
        if read(folder / "finetune.json")["events"] == "stream"
    )
    assert (of_stream["events"], of_stream["event_window"]) == ("stream", 64)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_experiment_runs_in_small(path: Path, work: Path) -> None:
    assert main(["sweep", str(path), "--smoke"]) == 0
    out = work / "runs" / "paper" / "smoke" / path.stem
    table, config = read(out / "table.json"), load_sweep(path)
    cells = table["cells"]
    seeds = config.seeds[:2]
    assert table["seeds"] == list(seeds)
    for target in config.targets:
        for row in config.rows:
            of = [c for c in cells if (c["row"], c["target"]) == (row.name, target.name)]
            assert {c["task"] for c in of} == set(config.tasks)
            assert all(len(c["values"]) == 2 for c in of)
            for cell in of:
                # The challenge's scores are for its own data set.
                if "physionet" not in cell["metric"] or target.threshold_on:
                    assert all(math.isfinite(v) for v in cell["values"]), cell
    compared = {(c["source"], c["target"], c["task"], c["metric"]) for c in cells if c["published"]}
    assert compared == {
        (p.source, p.target, p.task, p.metric)
        for p in published(config.table)
        if p.target != "PICU"
    }
    text = (out / "table.md").read_text()
    assert "## Against the paper" in text
    assert "the numbers mean nothing" in text
    assert text.count("**") >= 2


def test_what_tables_share_is_the_same_run(work: Path) -> None:
    shared = {(3, "LLM4EHR"), (5, "nce+omega+recon"), (6, "τ = 0.02"), (7, "GPT-2"), (8, "Linear")}
    shared |= {(14, "batch 64")}
    runs: dict[tuple[int | None, str], set[tuple[Path, Path]]] = {}
    for path in TABLES:
        for job in plan(load_sweep(path)):
            if job.finetune is not None:
                assert job.finetune.tasks == dict.fromkeys(job.tasks, 1.0)
                at = runs.setdefault((load_table(path), job.row.name), set())
                at.add((job.pretrain.run, job.finetune.run))
    assert len({frozenset(runs[place]) for place in shared}) == 1
    assert runs[12, "GPT-2 124M"] == runs[14, "batch 16"]
    assert runs[12, "GPT-2 1.5B"] == runs[13, "GPT-2 XL"]
    # Rows of one table differ, and three tasks with ten seeds are thirty runs.
    assert len(runs[3, "LLM4EHR"]) == 30
    in_table_5 = [runs[place] for place in runs if place[0] == 5]
    assert sum(map(len, in_table_5)) == len(set().union(*in_table_5))


def load_table(path: Path) -> int:
    return int(path.stem.removeprefix("table"))


@pytest.fixture
def small(work: Path) -> Callable[..., SweepConfig]:
    """`small(...)`: two rows of one task, in a file of their own."""

    def make(**changes: Any) -> SweepConfig:
        body = {
            "title": "small",
            "table": 3,
            "runs": "runs/small",
            "pretrain": str(PAPER / "pretrain.yaml"),
            "finetune": str(PAPER / "finetune.yaml"),
            "seeds": [0, 1],
            "tasks": ["remaining_los"],
            "targets": [
                {
                    "name": "MIMIC-III",
                    "source": "MIMIC-III",
                    "test": {"store": "stores/mimic3", "splits": ["test"]},
                }
            ],
            "rows": [
                {"name": "LLM4EHR", "published": "LLM4EHR"},
                {"name": "adapted", "finetune": {"tuning": {"strategy": "adapter", "width": 4}}},
            ],
        } | changes
        path = work / "small.yaml"
        path.write_text(yaml.safe_dump(body))
        return load_sweep(path)

    return make


def test_a_stopped_sweep_goes_on_where_it_was(
    small: Callable[..., SweepConfig], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(runs="runs/stopped")
    calls: list[Path] = []

    def counted(run: Path, *rest: Any, **options: Any) -> Any:
        if len(calls) == 2 and run not in calls:
            raise KeyboardInterrupt
        calls.append(run)
        return evaluate(run, *rest, **options)

    monkeypatch.setattr(sweep_module, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep(config, work / "stopped", smoke=True)
    assert not (work / "stopped").exists()
    monkeypatch.setattr(sweep_module, "evaluate", evaluate)
    before = {
        path: path.stat().st_mtime_ns for path in (work / "runs/stopped").rglob("result.json")
    }
    table = sweep(config, work / "stopped", smoke=True)
    after = {path: path.stat().st_mtime_ns for path in before}
    assert before == after
    assert len(before) == 4  # pre-training, and three of the four heads
    assert read(work / "stopped" / "table.json") == table
    # Nothing is left to do.
    monkeypatch.setattr(sweep_module, "pretrain", None)
    monkeypatch.setattr(sweep_module, "finetune", None)
    assert sweep(config, work / "again", smoke=True)["cells"] == table["cells"]


def test_results_say_how_they_came_to_be(small: Callable[..., SweepConfig], work: Path) -> None:
    made = {
        preset: sweep(small(preset=preset), work / preset, smoke=True)["cells"][0]["facts"][0]
        for preset in ("paper", "causal")
    }
    paper, causal = made["paper"], made["causal"]
    assert paper["uses_later_observations"]
    assert not causal["uses_later_observations"]
    assert (paper["attention_mode"], paper["imputation"]) == ("native", "linear")
    assert (causal["attention_mode"], causal["imputation"]) == ("causal", "causal")
    assert (paper["label_align"], causal["label_align"]) == ("bin_start", "bin_end")
    assert paper["seeds"] == {"pretraining": 0, "finetuning": 0}
    assert paper["split_sha256"] == causal["split_sha256"]
    assert "later observations: LLM4EHR, adapted" in (work / "paper" / "table.md").read_text()
    assert "later observations" not in (work / "causal" / "table.md").read_text()


def test_weights_can_be_dropped_and_pretraining_repeated(
    small: Callable[..., SweepConfig], work: Path
) -> None:
    config = small(runs="runs/bare", keep_weights=False, rerun_pretraining=True)
    sweep(config, work / "bare", smoke=True)
    runs = work / "runs" / "bare" / "smoke"
    assert len(list(runs.glob("pretrain-*/model.safetensors"))) == 2
    assert not list(runs.glob("finetune-*/*.safetensors"))
    assert len(list(runs.glob("finetune-*/test-*/metrics.json"))) == 4
    assert sweep(config, work / "bare", smoke=True)["rerun_pretraining"]


def test_all_tasks_at_once(small: Callable[..., SweepConfig], work: Path) -> None:
    config = small(runs="runs/joint", joint=True, tasks=["decompensation", "remaining_los"])
    cells = sweep(config, work / "joint", smoke=True)["cells"]
    assert {c["task"] for c in cells} == {"decompensation", "remaining_los"}
    assert len(list((work / "runs/joint/smoke").glob("finetune-*"))) == 4


def test_an_optional_target_without_a_store_is_left_out(
    small: Callable[..., SweepConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    there = {"name": "MIMIC-III", "source": "MIMIC-III"}
    there["test"] = {"store": "stores/mimic3", "splits": ["test"]}
    absent = there | {"name": "PICU", "optional": True}
    absent |= {"test": {"store": "stores/nowhere", "splits": ["test"]}}
    jobs = plan(small(targets=[there, absent]))
    assert {job.target.name for job in jobs} == {"MIMIC-III"}
    assert "PICU is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows": [{"name": "a"}, {"name": "a"}]}, "two of the rows"),
        ({"rows": [{"name": "a", "published": "nothing"}]}, "no row 'nothing'"),
        ({"table": 9}, "no numbers"),
        ({"seeds": [1, 1]}, "two of the seeds"),
        ({"tasks": ["surprise"]}, "tasks"),
        ({"pretrain": "nowhere.yaml"}, "nowhere.yaml is not there"),
    ],
)
def test_a_wrong_sweep_is_refused(
    small: Callable[..., SweepConfig], changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        small(**({"rows": [{"name": "a", "published": "LLM4EHR"}]} | changes))


def test_both_spreads_and_the_difference() -> None:
    made = summary([1.0, None, 3.0], lower_is_better=True)
    assert (made["mean"], made["std"], made["best"]) == (2.0, 1.0, 1.0)
    assert made["std_ddof1"] == pytest.approx(math.sqrt(2))
    assert made["values"] == [1.0, None, 3.0]
    assert summary([None], lower_is_better=False)["mean"] is None
    cell = Published(
        table=3, source="a", target="a", row="r", task="t", metric="m", mean=4.5, std=0.5
    )
    # 2 sqrt(1 + 0.25) = 2.236
    assert against([1.0, 3.0], cell)["beyond_two_sigma"] is True
    assert against([1.5, 3.5], cell)["beyond_two_sigma"] is False
    assert against([1.0, 3.0], cell)["difference"] == -2.5
    assert against([1.0, 3.0], replace(cell, std=None))["beyond_two_sigma"] is None
    assert against([None], cell)["published"] is None


def test_the_table_shows_best_and_mean_of_physionet() -> None:
    cell = {
        "row": "r", "source": "a", "target": "b", "task": "mortality", "metric": "physionet_h",
        "mean": 30.0, "std": 5.0, "best": 20.0, "bold": True, "facts": [],
        "published": {"mean": 38.733, "std": None, "best": 25.814}, "difference": -8.733,
        "beyond_two_sigma": None,
    }  # fmt: skip
    body = {"title": "t", "preset": "paper", "smoke": False, "seeds": [0], "cells": [cell]}
    text = markdown(body)
    assert "mean nothing" not in text
    assert "**20.000 / 30.000**" in text
    assert "| 20.000 / 30.000 | 25.814 / 38.733 | -8.733 |" in text
    unlabelled = cell | {"mean": None, "best": None, "published": None, "bold": False}
    assert "No stay of the test split has a label." in markdown(body | {"cells": [unlabelled]})
