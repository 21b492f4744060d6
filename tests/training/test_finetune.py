"""Fine-tuning end to end: what moves, what is kept, and that the result can be scored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm4ehr.bundle import Network, load_bundle, load_network
from llm4ehr.calibration import OutputMap, calibration_from_json
from llm4ehr.offline import score_episodes
from llm4ehr.store import EpisodeStore
from training import finetune as module
from training import metrics
from training.calibrate import fit_calibration
from training.config import FinetuneConfig, PretrainConfig, SourceConfig
from training.dataset import LABEL_COLUMNS, build_features
from training.evaluation.evaluate import evaluate, load_scorer
from training.export.run import export
from training.finetune import check_apart, finetune
from training.heads import Targets, predict, selection_score, task_losses
from training.pretrain import pretrain
from training.readout import HOURLY, TaskModule
from training.sources import LeakageError, open_sources
from training.tuning import with_heads

NAN = float("nan")
TASKS = ("mortality", "remaining_los", "decompensation")
Config = Callable[..., FinetuneConfig]


@pytest.fixture(scope="module")
def config(pretrained: Path, store_2012: Path, tmp_path_factory: Any) -> Config:
    """`config(run, **changes)`: three heads; 9 stays to train on, 6 held out, deaths in both."""
    cache = tmp_path_factory.mktemp("features")

    def make(run: Path, **changes: Any) -> FinetuneConfig:
        body = {
            "run": run,
            "pretrained": pretrained,
            "data": {
                "sources": [{"store": store_2012, "splits": ["a", "b"]}],
                "cache": cache,
                "n_folds": 2,
                "validation_fold": 1,
            },
            "tasks": {"mortality": 1.0, "remaining_los": 0.3, "decompensation": 1.0},
            "optim": {"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "checkpoint_every": 2},
        }
        return FinetuneConfig.model_validate(body | changes)

    return make


@pytest.fixture(scope="module")
def tuned(config: Config, tmp_path_factory: Any) -> Path:
    """A finished end-to-end run."""
    run = tmp_path_factory.mktemp("runs") / "finetune"
    finetune(config(run, tuning="end_to_end"))
    return run


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_network(folder).model.state_dict()


def moved(run: Path, pretrained: Path) -> set[str]:
    """Parts of the network (first part of the name) that differ from the pre-trained ones."""
    before, after = weights_of(pretrained), weights_of(run)
    assert {n.partition(".")[0] for n in after.keys() - before.keys()} == {"heads"}
    return {n.partition(".")[0] for n in before if not torch.equal(before[n], after[n])}


# Losses and scores, by hand.


def targets(stay: list[int], phenotypes: list[list[float]] | None = None, **known: Any) -> Targets:
    """Targets of the hours of `stay`, by task; what is not named is unknown."""
    hourly = torch.full((len(stay), 3), NAN)
    for task, values in known.items():
        hourly[:, LABEL_COLUMNS.index(task)] = torch.tensor(values)
    flags = [[NAN, NAN]] * (max(stay) + 1) if phenotypes is None else phenotypes
    return Targets(
        hourly=hourly,
        valid=torch.ones(len(stay), dtype=torch.bool),
        stay=torch.tensor(stay),
        phenotypes=torch.tensor(flags),
    )


def cross_entropy(logit: float, y: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -y * math.log(p) - (1 - y) * math.log(1 - p)


def test_losses_of_hours_are_means_over_the_known_hours() -> None:
    x = torch.tensor([[0.5], [-1.0], [9.0]])
    of = targets(
        [0, 0, 0],
        mortality=[1.0, 0.0, NAN],
        decompensation=[0.25, NAN, NAN],
        remaining_los=[24.0, 72.0, NAN],
    )
    losses = task_losses(dict.fromkeys(TASKS, x), of)
    expected = (cross_entropy(0.5, 1) + cross_entropy(-1, 0)) / 2
    assert losses["mortality"].item() == pytest.approx(expected, rel=1e-5)
    assert losses["decompensation"].item() == pytest.approx(cross_entropy(0.5, 0.25), rel=1e-5)
    los = ((0.5 - math.log(2)) ** 2 + (-1 - math.log(4)) ** 2) / 2
    assert losses["remaining_los"].item() == pytest.approx(los, rel=1e-5)


def test_a_long_stay_counts_as_much_as_a_short_one_where_it_has_one_label() -> None:
    x = torch.tensor([[0.5], [-1.0], [2.0], [3.0], [4.0]])
    stay, y = [0, 0, 0, 1, 2], [1.0, 1.0, NAN, 0.0, NAN]
    losses = task_losses(
        {"mortality": x, "decompensation": x}, targets(stay, mortality=y, decompensation=y)
    )
    first = [cross_entropy(0.5, 1), cross_entropy(-1, 1)]
    second = cross_entropy(3, 0)
    assert losses["mortality"].item() == pytest.approx((sum(first) / 2 + second) / 2, rel=1e-5)
    assert losses["decompensation"].item() == pytest.approx((sum(first) + second) / 3, rel=1e-5)


def test_phenotypes_cost_at_every_hour_they_are_asked_at() -> None:
    x = torch.tensor([[0.5, -1.0], [2.0, 0.0], [9.0, 9.0], [1.0, -2.0], [7.0, 7.0]])
    of = targets([0, 0, 0, 1, 2], phenotypes=[[1.0, 0.0], [0.0, 1.0], [NAN, NAN]])
    of = replace(of, valid=torch.tensor([True, True, False, True, True]))
    loss = task_losses({"phenotyping": x}, of)["phenotyping"]
    first = [cross_entropy(0.5, 1), cross_entropy(-1, 0), cross_entropy(2, 1), cross_entropy(0, 0)]
    second = [cross_entropy(1, 0), cross_entropy(-2, 1)]
    assert loss.item() == pytest.approx((np.mean(first) + np.mean(second)) / 2, rel=1e-5)


def test_a_task_without_known_hours_costs_nothing() -> None:
    x = torch.randn(6, 1, requires_grad=True)
    outputs: dict[Any, torch.Tensor] = dict.fromkeys(TASKS, x)
    losses = task_losses(outputs | {"phenotyping": x.expand(6, 2)}, targets([0, 0, 0, 1, 1, 1]))
    assert [loss.item() for loss in losses.values()] == [0, 0, 0, 0]
    torch.stack(list(losses.values())).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_targets_are_the_hours_of_a_batch_stay_by_stay(
    icu_store: Path, preprocessing: Any, vocabulary: Any, tmp_path: Path
) -> None:
    sources = open_sources([SourceConfig(store=icu_store, splits=("pretrain",))], training=True)
    features = build_features(sources, preprocessing, vocabulary, tmp_path, max_hours=20)
    batch = features.batch(np.array([5, 0, 7]))
    of = Targets.of(batch)
    lengths = np.minimum(features.lengths[[5, 0, 7]], 20)
    assert torch.bincount(of.stay).tolist() == lengths.tolist()
    assert of.last.tolist() == (np.cumsum(lengths) - 1).tolist()
    rows = np.flatnonzero((of.stay == 2).numpy())
    np.testing.assert_array_equal(of.hourly[rows], features.labels[features.hours(7)][:20])
    np.testing.assert_array_equal(of.valid[rows], features.valid[features.hours(7)][:20])
    np.testing.assert_array_equal(of.phenotypes[2], features.phenotypes[7])


def test_epochs_are_chosen_by_certain_hours_of_the_task() -> None:
    x = torch.tensor([1.0, 2.0, 9.0, 0.0, 9.0])[:, None]
    of = targets(
        [0, 0, 1, 1, 1],
        phenotypes=[[1.0, 0.0], [0.0, 0.0]],
        decompensation=[0, 1, 0.5, 0, NAN],
        remaining_los=[24, 72, NAN, 0, NAN],
    )
    outputs: dict[Any, torch.Tensor] = {"decompensation": x, "remaining_los": x}
    assert selection_score("decompensation", outputs, of, {}) == 1
    errors = [abs(1 - math.log(2)), abs(2 - math.log(4)), 0]
    assert selection_score("remaining_los", outputs, of, {}) == pytest.approx(-np.mean(errors))
    # The last hours of the two stays are 2 and 9; the second phenotype has one class only.
    pair = {"phenotyping": torch.cat([-x, x], 1)}
    assert selection_score("phenotyping", pair, of, {}) == 1
    weights = {"decompensation": 1.0, "remaining_los": 0.3}
    losses = task_losses(outputs, of)
    expected = -(losses["decompensation"] + 0.3 * losses["remaining_los"]).item()
    assert selection_score("loss", outputs, of, weights) == pytest.approx(expected)


def test_no_patient_is_on_both_sides() -> None:
    check_apart(["a/1", "a/2"], ["b/1"])
    with pytest.raises(LeakageError, match="1 patients are both trained on and held out"):
        check_apart(["a/1", "a/2"], ["a/2", "b/1"])


def test_a_falling_calibration_line_is_not_taken(config: Config) -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(200, 1)))
    y = (rng.random(200) < 1 / (1 + np.exp(-2 * x[:, 0].numpy()))).astype(float)
    stay = list(range(200))
    chosen = config(Path("run"))
    fitted = fit_calibration(chosen, {"mortality": x}, targets(stay, mortality=y.tolist()))
    assert fitted["calibration"]["mortality"]["a"] > 1
    fitted = fit_calibration(chosen, {"mortality": -x}, targets(stay, mortality=y.tolist()))
    assert fitted["calibration"] == {"mortality": asdict(OutputMap(kind="platt"))}
    assert 0 < fitted["thresholds"]["mortality"] < 1


# What may move.


def test_heads_are_added_and_the_rest_is_carried_over(pretrained: Path, config: Config) -> None:
    old = load_network(pretrained)
    for tuning in ("linear", "end_to_end"):
        network = with_heads(old, config(pretrained, tuning=tuning))
        assert set(network.model.config.heads) == set(TASKS)
        for name, value in old.model.state_dict().items():
            assert torch.equal(network.model.state_dict()[name], value)
        free = {n.split(".")[0] for n, p in network.model.named_parameters() if p.requires_grad}
        everything = {"heads"} | ({"backbone", "series_encoder"} if tuning != "linear" else set())
        assert free == everything
        assert network.preprocessing == old.preprocessing


@pytest.mark.parametrize(
    ("family", "key"),
    [("gpt2", "resid_pdrop"), ("opt", "dropout"), ("bert", "hidden_dropout_prob")],
)
def test_dropout_replaces_that_of_pretraining(
    family: str, key: str, tiny_network: Callable[..., Network], config: Config, tmp_path: Path
) -> None:
    old = tiny_network(family, frozen=False, heads={})
    network = with_heads(old, config(tmp_path, tuning="end_to_end", dropout=0.3))
    assert getattr(network.model.backbone.model.config, key) == 0.3
    unchanged = with_heads(old, config(tmp_path, tuning="end_to_end"))
    assert getattr(unchanged.model.backbone.model.config, key) == 0.1


@pytest.mark.parametrize("ts_norm", ["layer", "batch"])
def test_linear_tuning_leaves_the_encoder_bit_equal(
    ts_norm: str, pretrained: Path, config: Config, pretrain_body: Any, tmp_path: Path
) -> None:
    if ts_norm == "batch":
        body = pretrain_body(tmp_path / "pretrained")
        body["model"] = body["model"] | {"ts_norm": "batch"}
        pretrained = tmp_path / "pretrained"
        pretrain(PretrainConfig.model_validate(body))
    finetune(config(tmp_path / "run", pretrained=pretrained, tuning="linear"))
    assert moved(tmp_path / "run", pretrained) == set()


def test_end_to_end_tuning_moves_the_encoder_alone(tuned: Path, pretrained: Path) -> None:
    assert moved(tuned, pretrained) == {"backbone", "series_encoder"}
    words = "backbone.model.wte.weight"
    assert torch.equal(weights_of(tuned)[words], weights_of(pretrained)[words])


# A whole run.


def test_a_run_leaves_everything_behind(tuned: Path) -> None:
    names = {p.name for p in tuned.iterdir()}
    assert names >= {
        "finetune.json", "pretrained.json", "environment.json", "metrics.jsonl", "result.json",
        "config.json", "model.safetensors", "preprocessing.json", "vocabulary.json",
    }  # fmt: skip
    result = json.loads((tuned / "result.json").read_text())
    assert (result["episodes"], result["validation_episodes"]) == (9, 6)
    assert len(result["validation_scores"]) == 2
    assert set(result["thresholds"]) == {"mortality", "decompensation"}
    maps = calibration_from_json(result["calibration"])
    assert set(maps) == set(TASKS)
    assert maps["mortality"] == OutputMap(kind="platt")  # the line of six stays falls
    assert maps["remaining_los"] == OutputMap(kind="log_days")  # six stays give no interval
    log = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert len(log) == result["steps"] == 6
    assert log[0].keys() >= {"loss", *TASKS}
    weighted = log[0]["mortality"] + 0.3 * log[0]["remaining_los"] + log[0]["decompensation"]
    assert log[0]["loss"] == pytest.approx(weighted, rel=1e-5)


def test_the_best_epoch_is_kept_and_patience_ends_the_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.4, 0.9, 0.5, 0.6, 0.7, 0.8])
    kept: list[dict[str, torch.Tensor]] = []

    def score(*_: Any) -> float:
        made = next(scores)
        kept.append({n: t.clone() for n, t in models[0].state_dict().items()})
        return made

    models: list[Any] = []
    heads = with_heads

    def remember(*arguments: Any) -> Network:
        made = heads(*arguments)
        models.append(made.model)
        return made

    monkeypatch.setattr(module, "selection_score", score)
    monkeypatch.setattr(module, "with_heads", remember)
    optim = {"epochs": 9, "batch_size": 10, "learning_rate": 0.01}
    finetune(config(tmp_path, tuning="end_to_end", patience=2, optim=optim))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["validation_scores"] == [0.4, 0.9, 0.5, 0.6]
    after = weights_of(tmp_path)
    assert all(torch.equal(after[n], kept[1][n]) for n in after)
    assert not all(torch.equal(after[n], kept[3][n]) for n in after)
    # What learns, without the tokens and the decoder that fine-tuning leaves alone.
    best = {name.removeprefix("model.") for name in load_file(tmp_path / "best.safetensors")}
    assert best <= after.keys()
    assert "decoder.weight" not in best


def test_a_killed_run_ends_with_the_same_network(
    tuned: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def killed(*arguments: Any) -> dict[str, torch.Tensor]:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt
        return task_losses(*arguments)

    chosen = config(tmp_path / "run", tuning="end_to_end")
    with monkeypatch.context() as patch:
        patch.setattr(module, "task_losses", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(chosen)
    finetune(chosen)
    for file in ("model.safetensors", "metrics.jsonl", "result.json"):
        assert (tmp_path / "run" / file).read_bytes() == (tuned / file).read_bytes(), file


def test_without_a_held_out_fold_the_last_epoch_is_kept(config: Config, tmp_path: Path) -> None:
    chosen = config(tmp_path)
    data = chosen.data.model_copy(update={"validation_fold": None})
    finetune(chosen.model_copy(update={"data": data}))
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["episodes"], result["validation_episodes"]) == (15, 0)
    # Uncalibrated, but it can be scored.
    calibration = load_scorer(tmp_path).calibration
    assert {t: (m.a, m.b) for t, m in calibration.items()} == dict.fromkeys(TASKS, (1.0, 0.0))


def test_the_evaluation_set_is_refused(config: Config, store_2012: Path, tmp_path: Path) -> None:
    sources = {"sources": [{"store": store_2012, "splits": ["c"]}]}
    with pytest.raises(LeakageError, match="evaluation only"):
        finetune(config(tmp_path, data=sources))


def test_predictions_are_those_of_offline_scoring(
    tuned: Path, config: Config, store_2012: Path, tmp_path: Path
) -> None:
    network = load_network(tuned)
    chosen = config(tmp_path)
    sources = open_sources(chosen.data.sources, training=True)
    features = build_features(
        sources, network.preprocessing, network.vocabulary, chosen.data.cache, max_hours=30
    )
    index = np.array([7, 2, 11])
    rows, of = predict(
        TaskModule(network.model, HOURLY),
        HOURLY,
        features.batch,
        index,
        "fp32",
    )
    episodes = {r.episode.episode_id: r.episode for r in EpisodeStore.open(store_2012)}
    wanted = [episodes[features.episode_ids[i]] for i in index]
    expected = [s.raw["mortality"][:30] for s in score_episodes(network, wanted)]
    np.testing.assert_allclose(rows["mortality"], np.concatenate(expected), rtol=0, atol=1e-5)
    assert of.hourly.shape == (90, 3)
    assert of.stay.tolist() == [0] * 30 + [1] * 30 + [2] * 30


def test_a_run_is_evaluated_and_exported(
    tuned: Path, store_2012: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap = metrics.bootstrap
    monkeypatch.setattr(
        metrics, "bootstrap", lambda *a, repeats: bootstrap(*a, repeats=min(repeats, 20))
    )
    report = evaluate(tuned, [store_2012], ["b"], tmp_path / "evaluation")
    assert report["episodes"] == 12
    assert report["sources"][0]["patients_trained_on"] == 12
    assert "by_source" not in report
    mortality = report["tasks"]["mortality_at_48h"]
    assert (mortality["rows"], mortality["positives"]) == (12, 4)
    assert {"decompensation", "remaining_los_days"} <= report["tasks"].keys()
    interval = mortality["auroc"]
    assert 0 <= interval["ci95_low"] <= interval["ci95_high"] <= 1
    written = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert written["tasks"].keys() == report["tasks"].keys()
    with pytest.raises(ValueError, match="split 'c' has no episodes"):
        evaluate(tuned, [store_2012], ["c"])

    folder = export(tuned, tmp_path, "tiny", 3, [tmp_path / "evaluation" / "metrics.json"])
    bundle = load_bundle(tmp_path, "tiny", 3)
    assert folder == tmp_path / "tiny" / "3"
    result = json.loads((tuned / "result.json").read_text())
    assert bundle.calibration == calibration_from_json(result["calibration"])
    assert bundle.labels["thresholds"].keys() == {"mortality", "decompensation"}
    again = evaluate(folder, [store_2012], ["b"])
    assert again["tasks"] == report["tasks"]
    assert again["sources"][0]["patients_trained_on"] is None
    assert "SOME PATIENTS OF THEM WERE TRAINED ON" in bundle.card
