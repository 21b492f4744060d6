"""Interpretability: the published definitions on known vectors, and a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score, silhouette_score

from training.cli import main
from training.config import SourceConfig
from training.evaluation import interpret as module
from training.evaluation.interpret import Patches, agreement, best_k, interpret, mean_of_patches
from training.sources import open_sources


def test_the_metrics_are_those_of_the_definition() -> None:
    a, b = [0, 0, 1, 1, 2, 2, 2, 0], [1, 1, 0, 0, 0, 2, 2, 1]
    assert adjusted_mutual_info_score(a, b) == pytest.approx(0.659836325, abs=1e-9)
    points = np.array([(0, 0), (0, 1), (5, 5), (5, 6), (9, 0), (9, 1)])
    assert silhouette_score(points, [0, 0, 1, 1, 2, 2]) == pytest.approx(0.848614258, abs=1e-9)


def blobs(seed: int, labels: np.ndarray, width: int) -> np.ndarray:
    centres = 20 * np.eye(width)[: labels.max() + 1]
    return centres[labels] + np.random.default_rng(seed).normal(size=(len(labels), width))


def test_series_that_follow_the_values_have_a_high_si() -> None:
    rng = np.random.default_rng(0)
    by_value, by_event = rng.integers(0, 3, 120), rng.integers(0, 4, 120)
    v, z, f = blobs(1, by_value, 5), blobs(2, by_event, 6), blobs(3, by_value, 4)
    made = agreement(Patches(v=v, z=z, f=f, episodes=np.array(["e"] * 120)), 0)
    assert (made["k_ci"], made["k_si"]) == (4, 3)
    assert made["si_ami"] == pytest.approx(1)
    assert made["ci_ami"] < 0.2
    assert made["silhouette"] == pytest.approx(made["silhouette_by_values"])
    assert made["silhouette"] > made["silhouette_k_ci"]
    swapped = agreement(Patches(v=z, z=z, f=f, episodes=np.array(["e"] * 120)), 0)
    assert swapped["ci_ami"] == pytest.approx(1)


def test_too_few_patches_are_not_clustered() -> None:
    with pytest.raises(ValueError, match="too few"):
        best_k(np.zeros((10, 2)), 0)


def test_values_of_a_patch_are_a_mean_over_its_hours_inside_the_stay() -> None:
    x = torch.arange(14.0).view(2, 7, 1)
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    made = mean_of_patches(x, mask, 5)[..., 0]
    assert made.tolist() == [[2.0, 5.5], [8.0, 0.0]]


def test_patches_of_a_run_are_clustered(
    pretrained: Path, icu_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    arguments = ["interpret", str(pretrained), "--store", str(icu_store), "--split", "test"]
    assert main([*arguments, "--seeds", "2", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert (tmp_path / "tsne.png").read_bytes().startswith(b"\x89PNG")
    assert len(report["by_seed"]) == 2
    for metric in ("ci_ami", "si_ami", "silhouette"):
        values = [of[metric] for of in report["by_seed"]]
        assert report["mean"][metric] == pytest.approx(np.mean(values))
        assert report["std"][metric] == pytest.approx(np.std(values))
    assert report["facts"]["seeds"] == {"pretraining": 0, "clustering": [0, 1]}

    monkeypatch.setattr(module, "MAX_PATCHES", 10)
    source = SourceConfig(store=icu_store, splits=("test",))
    again = interpret(pretrained, source, tmp_path / "few", seeds=(0,))
    assert again["patches"] == 10 < report["patches"]


def test_patches_have_hours_and_events(pretrained: Path, icu_store: Path) -> None:
    from llm4ehr.bundle import load_network

    (source,) = open_sources([SourceConfig(store=icu_store, splits=("test",))], training=False)
    network = load_network(pretrained)
    cache = Path(json.loads((pretrained / "pretrain.json").read_text())["data"]["cache"])
    patches = module.collect(network, source, cache)
    n = len(patches.v)
    assert patches.v.shape == patches.z.shape == (n, network.model.backbone.hidden_size)
    assert patches.f.shape == (n, 11)
    assert set(patches.episodes) <= source.episode_ids
    # No patch is empty on either side.
    assert np.abs(patches.z).sum(1).min() > 0
    assert np.abs(patches.v).sum(1).min() > 0
