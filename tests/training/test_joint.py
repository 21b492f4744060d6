"""Four heads from several stores: trained together, judged together, exported with their names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from llm4ehr.bundle import load_bundle
from llm4ehr.offline import score_episodes
from llm4ehr.store import EpisodeStore
from training import chain as chain_module
from training import metrics
from training.chain import OPEN_DATA, chain, prepare_stores
from training.config import FinetuneConfig
from training.crossvalidate import crossvalidate
from training.data.phenotypes import PHENOTYPES
from training.evaluation import table
from training.evaluation.evaluate import evaluate, load_scorer
from training.export.card import DataSet
from training.export.run import export
from training.finetune import finetune
from training.metrics import auroc, macro

HOURLY = ("mortality", "decompensation", "remaining_los")
Config = Callable[..., FinetuneConfig]


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = metrics.bootstrap
    monkeypatch.setattr(
        metrics, "bootstrap", lambda *a, repeats: whole(*a, repeats=min(repeats, 10))
    )


@pytest.fixture(scope="module")
def config(
    pretrained: Path, store_2012: Path, icu_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Config:
    """`config(run, **changes)`: two labels from set A of 2012, all four from the other store."""
    cache = tmp_path_factory.mktemp("features")

    def make(run: Path, **changes: Any) -> FinetuneConfig:
        body = {
            "run": run,
            "pretrained": pretrained,
            "data": {
                "sources": [
                    {"store": store_2012, "splits": ["a"], "labels": HOURLY[:2]},
                    {"store": icu_store, "splits": ["pretrain", "finetune"]},
                ],
                "cache": cache,
                "n_folds": 3,
                "validation_fold": 1,
            },
            "tasks": dict.fromkeys((*HOURLY, "phenotyping"), 1.0),
            "tuning": "end_to_end",
            "optim": {"epochs": 2, "batch_size": 4, "learning_rate": 0.01},
        }
        return FinetuneConfig.model_validate(body | changes)

    return make


@pytest.fixture(scope="module")
def tuned(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with four heads."""
    run = tmp_path_factory.mktemp("runs") / "joint"
    finetune(config(run))
    return run


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_run_says_whose_labels_it_learnt_from(tuned: Path) -> None:
    result = read(tuned / "result.json")
    assert set(result["labelled"]) == {*HOURLY, "phenotyping"}
    assert set(result["labelled"]["mortality"]) == {"physionet2012", "mimic3"}
    for task in ("remaining_los", "phenotyping"):
        assert set(result["labelled"][task]) == {"mimic3"}
    coded = result["labelled"]["phenotyping"]["mimic3"]
    assert 0 < coded < result["labelled"]["mortality"]["mimic3"]
    # A store may call its remaining stay by the length of it; a task that is not taken has no note.
    assert result["label_notes"]["mimic3: remaining_los"] == "until discharge"
    assert "physionet2012: mortality" in result["label_notes"]
    assert "physionet2012: remaining_los" not in result["label_notes"]
    assert len(result["vocabulary_digest"]) == len(result["preprocessing_digest"]) == 64
    pretraining = read(tuned / "pretrained.json")["result"]
    for digest in ("vocabulary_digest", "preprocessing_digest"):
        assert pretraining[digest] == result[digest]
    log = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert {*HOURLY, "phenotyping", "loss"} <= log[0].keys()
    assert any(entry["phenotyping"] > 0 for entry in log)


def test_the_patients_of_a_run_are_remembered(tuned: Path, icu_store: Path) -> None:
    subjects = set(read(tuned / "subjects.json"))
    of_icu = {r.subject_id: r.split for r in EpisodeStore.open(icu_store)}
    assert {s for s in subjects if s.startswith("mimic3/")} == {
        f"mimic3/{s}" for s, split in of_icu.items() if split != "test"
    }
    for split, seen in (("test", 0), ("finetune", 4)):
        (source,) = evaluate(tuned, [icu_store], [split])["sources"]
        assert source["patients_trained_on"] == seen


def test_stores_are_judged_together_and_alone(
    tuned: Path, icu_store: Path, write_icu_store: Callable[..., Path], tmp_path: Path
) -> None:
    other = write_icu_store(tmp_path / "other", source="eicu", seed_of_test=1)
    report = evaluate(tuned, [icu_store, other], ["test"], tmp_path / "out")
    assert [s["source"] for s in report["sources"]] == ["mimic3", "eicu"]
    assert report["episodes"] == 16
    assert report["command"].endswith(f"--store {icu_store} --store {other} --split test")
    assert report["by_source"].keys() == {"mimic3", "eicu"}
    alone = evaluate(tuned, [icu_store], ["test"])
    assert report["by_source"]["mimic3"] == alone["tasks"]

    phenotyping = report["tasks"]["phenotyping"]
    assert set(phenotyping["per_label"]) == set(PHENOTYPES)
    table = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pydict()
    label = np.array([table[f"label_phenotype_{name}"] for name in PHENOTYPES]).T
    answer = np.array([table[f"phenotype_{name}"] for name in PHENOTYPES]).T
    at = np.array(table["last"]) & ~np.isnan(label).any(1)
    assert phenotyping["stays"] == at.sum() == 14
    assert phenotyping["auroc_macro"]["value"] == macro(auroc, label[at], answer[at])
    share = label[at].mean(0)
    assert phenotyping["labels_left_out"] == ((share == 0) | (share == 1)).sum()
    hours = np.array(table["hour"])
    for episode in set(table["episode"]):
        rows = np.array(table["episode"]) == episode
        assert hours[rows & np.array(table["last"])] == hours[rows].max()
    # Stays of less than a day have no hour 23.
    assert report["tasks"]["phenotyping_at_24h"]["stays"] < 14
    # Mortality at 48 hours is for stays that reach them.
    stays = [r.outcome for r in EpisodeStore.open(icu_store) if r.split == "test"]
    reach = [o for o in stays if o.los_hours is not None and o.los_hours >= 48]
    assert alone["tasks"]["mortality_at_48h"]["rows"] == len(reach) > 0


def test_only_the_chosen_labels_and_stays_are_judged(tuned: Path, icu_store: Path) -> None:
    report = evaluate(tuned, [icu_store], ["test"], labels=["remaining_los"], max_episodes=3)
    assert report["tasks"].keys() == {"remaining_los_days"}
    assert report["episodes"] == 3
    assert report["command"].endswith("--labels remaining_los --max-episodes 3")
    report = evaluate(tuned, [icu_store], ["train"], split_column="benchmark_split")
    assert report["episodes"] == 12


def test_hours_that_are_not_asked_are_not_judged(
    config: Config, tuned: Path, icu_store: Path, tmp_path: Path
) -> None:
    def judged(run: Path) -> int:
        tasks = evaluate(run, [icu_store], ["test"])["tasks"]
        assert tasks["decompensation"]["rows"] == tasks["remaining_los_days"]["hours"]
        return int(tasks["remaining_los_days"]["hours"])

    records = [r for r in EpisodeStore.open(icu_store) if r.split == "test"]
    whole = [int(r.outcome.los_hours or 0) for r in records]
    assert judged(tuned) == sum(n - 4 for n in whole)  # times 5, 6, ... up to the length of stay
    finetune(config(tmp_path / "run", min_history_hours=12))
    assert judged(tmp_path / "run") == sum(max(n - 12, 0) for n in whole)


def test_a_bundle_knows_its_phenotypes(tuned: Path, icu_store: Path, tmp_path: Path) -> None:
    report = tmp_path / "evaluation"
    evaluate(tuned, [icu_store], ["test"], report)
    folder = export(tuned, tmp_path, "four", 1, [report / "metrics.json"], "make it")
    bundle = load_bundle(tmp_path, "four", 1)
    assert bundle.phenotypes == PHENOTYPES
    assert set(bundle.calibration) == {*HOURLY, "phenotyping"}
    assert bundle.calibration == load_scorer(tuned).calibration
    assert bundle.labels["min_history_hours"] == 4
    record = next(iter(EpisodeStore.open(icu_store)))
    (scores,) = score_episodes(bundle.network, [record.episode])
    assert scores.answers(bundle.calibration)["phenotyping"].shape == (len(scores.hidden), 25)
    assert (
        evaluate(folder, [icu_store], ["test"])["tasks"] == read(report / "metrics.json")["tasks"]
    )
    provenance = bundle.metrics["provenance"]
    assert provenance["preprocessing_digest"] == bundle.network.preprocessing_digest
    card = bundle.card
    for text in (
        "- mimic3: ODbL-1.0", "share-alike", "- Command: `make it`", "Seeds: 0 (pre-training), 0",
        "cores", "no patient of them used in fine-tuning", "| Shock |", "MIMIC-III demo",
        "phenotyping was learnt from", provenance["preprocessing_digest"],
        "physionet2012 (splits a; labels: mortality, decompensation)", "mimic3: remaining_los:",
    ):  # fmt: skip
        assert text in card, text


def card_of(run: Path, tmp_path: Path, version: int) -> str:
    export(run, tmp_path, "four", version)
    return load_bundle(tmp_path, "four", version).card


def test_the_card_cites_the_data_under_their_licences(tuned: Path, tmp_path: Path) -> None:
    card = card_of(tuned, tmp_path, 1)
    section = card.partition("## Licences of the data")[2].partition("##")[0]
    for name, licence, address, author in (
        ("physionet2012", "ODC-By-1.0", "https://opendatacommons.org/licenses/by/1-0/", "Silva I"),
        ("physionet2019", "CC-BY-4.0", "https://creativecommons.org/licenses/by/4.0/", "Reyna MA"),
        ("mimic3", "ODbL-1.0", "https://opendatacommons.org/licenses/odbl/1-0/", "nobody"),
    ):
        assert section.count(f"- {name}: {licence} (<{address}>). {author}") == 1
    assert "Contains information from mimic3, which is made available under the Open" in section
    provenance = load_bundle(tmp_path, "four", 1).metrics["provenance"]
    assert [of["name"] for of in provenance["data_sets"]] == [
        "mimic3", "physionet2012", "physionet2019",
    ]  # fmt: skip
    assert all(of["licence"] and of["citation"] for of in provenance["data_sets"])


def test_terms_of_one_name_do_not_overwrite_each_other(tuned: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tuned, run)
    pretraining = read(run / "pretrained.json")
    pretraining["result"]["licences"]["mimic3"] = "theirs"
    pretraining["result"]["citations"]["mimic3"] = "somebody"
    (run / "pretrained.json").write_text(json.dumps(pretraining))
    card = card_of(run, tmp_path, 1)
    assert "- mimic3: theirs. somebody\n" in card
    assert "/odbl/1-0/>). nobody\n" in card
    assert "Contains information from mimic3," in card


@pytest.mark.parametrize(
    ("licence", "shared"),
    [("ODbL-1.0", True), ("ODBL", True), ("Open Data Commons Open Database Licence v1.0", True),
     ("CC-BY-4.0", False), ("ODC-By-1.0", False), ("not stated", False)],
)  # fmt: skip
def test_the_open_database_license_is_recognised(licence: str, shared: bool) -> None:
    assert DataSet("unit", licence, "").share_alike == shared


# Names.


def test_stores_of_one_name_are_not_evaluated_together(
    tuned: Path, write_icu_store: Callable[..., Path], tmp_path: Path
) -> None:
    stores = [write_icu_store(tmp_path / str(i), source="meds", seed_of_test=i) for i in (0, 1)]
    for pair, reason in ((stores, "one name, 'meds'"), (stores[:1] * 2, "read twice")):
        with pytest.raises(ValueError, match=reason):
            evaluate(tuned, pair, ["test"])


def test_an_encoder_of_another_unnamed_store_is_refused(
    config: Config, pretrained: Path, write_icu_store: Callable[..., Path], tmp_path: Path
) -> None:
    encoder = tmp_path / "pretrained"
    shutil.copytree(pretrained, encoder)
    result = read(encoder / "result.json")
    result["stores"] |= dict.fromkeys(("meds", "unit-7", "mimic3"), "of other stays")
    result["licences"] |= dict.fromkeys(("meds", "unit-7", "mimic3"), "ODbL-1.0")
    (encoder / "result.json").write_text(json.dumps(result))

    def run(source: str) -> Path:
        store = write_icu_store(tmp_path / source, source=source)
        data = {"sources": [{"store": store, "splits": ["pretrain"]}], "cache": tmp_path / "cache"}
        optim = {"epochs": 1, "batch_size": 16}
        path = tmp_path / "runs" / source
        finetune(config(path, pretrained=encoder, data=data, optim=optim, tuning="linear"))
        return path

    with pytest.raises(ValueError, match="called 'meds' like another store"):
        run("meds")
    assert not (tmp_path / "runs" / "meds" / "result.json").exists()
    # A name that was given, or that of a published data set, says that the data are the same.
    for name in ("unit-7", "mimic3"):
        assert list(read(run(name) / "result.json")["stores"]) == [name]


def test_patients_of_another_unnamed_store_are_not_known(
    config: Config, write_icu_store: Callable[..., Path], tmp_path: Path
) -> None:
    def trained_on(name: str) -> list[int | None]:
        one, other = (
            write_icu_store(tmp_path / f"{name}{i}", source=name, seed_of_test=i) for i in (0, 1)
        )
        data = {"sources": [{"store": one, "splits": ["pretrain"]}], "cache": tmp_path / "cache"}
        run = tmp_path / "runs" / name
        optim = {"epochs": 1, "batch_size": 16}
        finetune(config(run, data=data, optim=optim, tuning="linear"))
        return [
            evaluate(run, [store], ["pretrain"])["sources"][0]["patients_trained_on"]
            for store in (one, other)
        ]

    assert trained_on("table") == [12, None]
    assert trained_on("unit-7") == [12, 12]


def test_stays_of_all_stores_are_crossvalidated(
    config: Config, icu_store: Path, store_2012: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    scored: list[str] = []

    def counted(network: Any, episodes: list[Any]) -> Any:
        scored.extend(e.episode_id for e in episodes)
        return score_episodes(network, episodes)

    monkeypatch.setattr(table, "score_episodes", counted)
    optim = {"epochs": 1, "batch_size": 8, "learning_rate": 0.01}
    report = crossvalidate(config(tmp_path, optim=optim))
    chosen = [
        r.episode.episode_id
        for store, splits in ((store_2012, {"a"}), (icu_store, {"pretrain", "finetune"}))
        for r in EpisodeStore.open(store)
        if r.split in splits
    ]
    # Once by the run that held them out, once by the cross-validation.
    assert sorted(scored) == sorted(2 * chosen)
    # Every labelled stay of both stores is scored once; of 16 stays three were not coded.
    assert report["tasks"]["phenotyping"]["stays"] == 13
    assert read(tmp_path / "crossvalidation.json")["folds"] == 3


def test_one_fold_cannot_be_crossvalidated(config: Config, tmp_path: Path) -> None:
    whole = config(tmp_path)
    data = whole.data.model_copy(update={"n_folds": 1, "validation_fold": None})
    with pytest.raises(ValueError, match="at least 2"):
        crossvalidate(whole.model_copy(update={"data": data}))
    assert not (tmp_path / "fold0").exists()


# The chain.


def open_data(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / OPEN_DATA[name].folder).mkdir(parents=True)
    return folder


def test_the_two_large_data_sets_are_required(tmp_path: Path) -> None:
    data = open_data(tmp_path / "data", "physionet2012", "eicu")
    with pytest.raises(FileNotFoundError, match="physionet2019: not found"):
        prepare_stores(data, tmp_path / "stores")
    assert not (tmp_path / "stores").exists()


def test_the_chain_takes_the_demos_that_are_there(
    store_2012: Path, store_2019: Path, write_icu_store: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tiny_config: Callable[..., dict[str, Any]],
) -> None:  # fmt: skip
    prepared: list[str] = []

    def prepare(name: str, source: Path, out: Path) -> None:
        prepared.append(name)
        assert source == data / OPEN_DATA[name].folder
        out.parent.mkdir(exist_ok=True)
        known = {"physionet2012": store_2012, "physionet2019": store_2019}
        if name in known:
            out.symlink_to(known[name])
        else:
            write_icu_store(out, source=name, seed_of_test=len(name))

    monkeypatch.setattr(chain_module, "prepare", prepare)
    small = [f"model.backbone.config={json.dumps(tiny_config('gpt2'))}", "optim.batch_size=8"]
    monkeypatch.setattr(chain_module, "_DEMO_PRETRAIN", [*chain_module._DEMO_PRETRAIN, *small])
    data = open_data(tmp_path / "data", "physionet2012", "physionet2019", "eicu", "mimic3")
    out = tmp_path / "out"
    out.mkdir()
    folder = chain(data, out, "demo")
    assert sorted(prepared) == ["eicu", "mimic3", "physionet2012", "physionet2019"]
    assert "mimic-iv-demo-2.2: not found, mimic4 is left out" in capsys.readouterr().err
    assert folder == out / "model_repository" / "llm4ehr-demo" / "1"

    sources = read(out / "pretrain" / "pretrain.json")["data"]["sources"]
    assert [(Path(s["store"]).name, s["splits"]) for s in sources] == [
        ("physionet2012", ["a"]), ("physionet2019", ["a", "b"]),
        ("eicu", ["pretrain"]), ("mimic3", ["pretrain"]),
    ]  # fmt: skip
    sources = read(out / "finetune" / "finetune.json")["data"]["sources"]
    assert [(Path(s["store"]).name, s["splits"], s["labels"]) for s in sources] == [
        ("physionet2012", ["a"], ["mortality", "decompensation"]),
        ("eicu", ["pretrain", "finetune"], None),
        ("mimic3", ["pretrain", "finetune"], None),
    ]
    bundle = load_bundle(out / "model_repository", "llm4ehr-demo", 1)
    assert bundle.phenotypes == PHENOTYPES
    evaluations = bundle.metrics["evaluations"]
    assert [[s["source"] for s in e["sources"]] for e in evaluations] == [
        ["physionet2012"], ["eicu", "mimic3"],
    ]  # fmt: skip
    assert all(s["patients_trained_on"] == 0 for e in evaluations for s in e["sources"])
    assert not {"remaining_los_days", "phenotyping"} & evaluations[0]["tasks"].keys()
    assert {"remaining_los_days", "phenotyping"} <= evaluations[1]["tasks"].keys()
    assert f"chain --data DATA --out {out} --size demo" in bundle.card
    assert str(data) not in bundle.card

    prepared.clear()
    before = (folder / "manifest.json").read_bytes()
    assert chain(data, out, "demo") == folder  # nothing is done twice
    assert prepared == []
    assert (folder / "manifest.json").read_bytes() == before
