"""Pre-training end to end on a handful of real stays, and the switches that reach the network."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import BertConfig, BertModel, BertTokenizer

from llm4ehr.bundle import Network, load_network, save_network
from llm4ehr.episode import Preprocessing
from llm4ehr.vocabulary import Vocabulary
from training.config import ModelOptions, PretrainConfig, load_config
from training.contrast import PatchEncoder, PretrainStep, usable_patches
from training.dataset import Batch, FeatureSet, build_features
from training.objectives import ObjectiveConfig
from training.pretrain import build_model, pretrain, training_episodes
from training.sources import LeakageError, open_sources

Body = Callable[..., dict[str, Any]]


def config_of(body: dict[str, Any]) -> PretrainConfig:
    return PretrainConfig.model_validate(body)


@pytest.fixture(scope="module")
def network(pretrained: Path) -> Network:
    return load_network(pretrained)


@pytest.fixture(scope="module")
def features(network: Network, pretrain_body: Body, tmp_path_factory: Any) -> FeatureSet:
    config = config_of(pretrain_body(tmp_path_factory.mktemp("unused")))
    sources = open_sources(config.data.sources, training=True)
    return build_features(sources, network.preprocessing, network.vocabulary, config.data.cache)


@pytest.fixture(scope="module")
def batch(features: FeatureSet) -> Batch:
    """Four long stays and a short one."""
    order = np.argsort(features.lengths)
    return features.batch(np.concatenate([order[-4:], order[:1]]), max_tokens=200)


def fresh(network: Network, tiny_config: Body, **options: Any) -> Any:
    torch.manual_seed(0)
    backbone = {"config": tiny_config("gpt2"), "frozen": False}
    chosen = ModelOptions.model_validate({"backbone": backbone, "events": "fused"} | options)
    return build_model(chosen, network.preprocessing, network.vocabulary)


class OneProcess:
    """Gradients of a single process; none where they are switched off."""

    def backward(self, loss: torch.Tensor) -> None:
        if loss.requires_grad:
            loss.backward()

    def unsynced(self) -> Any:
        return nullcontext()


def loss_of(model: Any, batch: Batch, hide: bool = False, **objective: Any) -> dict[str, Any]:
    """The terms of one step; its gradients are in the model."""
    shown = replace(batch, hide_events=torch.full((len(batch.index),), hide))
    encoder = PatchEncoder(model, ObjectiveConfig(**objective))
    return PretrainStep(encoder, encoder.queue, encoder.config)(shown, OneProcess())


# A whole run.


def test_a_run_leaves_everything_behind(
    pretrained: Path, network: Network, features: FeatureSet
) -> None:
    names = {p.name for p in pretrained.iterdir()}
    assert names >= {
        "pretrain.json", "environment.json", "metrics.jsonl", "tensorboard", "result.json",
        "config.json", "model.safetensors", "preprocessing.json", "vocabulary.json",
    }  # fmt: skip
    assert not {n for n in names if n.startswith("checkpoint")}
    result = json.loads((pretrained / "result.json").read_text())
    kept = features.fold(2) != 1
    assert result["episodes"] == int(kept.sum())
    assert result["hours"] == int(features.lengths[kept].sum())
    assert result["preprocessing_digest"] == network.preprocessing_digest
    assert result["licences"] == {"physionet2012": "ODC-By-1.0", "physionet2019": "CC-BY-4.0"}
    assert "Silva I" in result["citations"]["physionet2012"]
    assert "Reyna MA" in result["citations"]["physionet2019"]
    assert {len(digest) for digest in result["stores"].values()} == {64}
    log = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, result["steps"] + 1))
    assert log[0].keys() >= {"loss", "nce", "omega", "recon", "grad_norm", "epoch"}
    assert network.causal
    assert network.model.config.events == "fused"


def test_a_finished_run_may_be_started_again_with_the_same_configuration_only(
    pretrained: Path, pretrain_body: Body
) -> None:
    with pytest.raises(FileExistsError, match="another configuration"):
        pretrain(config_of(pretrain_body(pretrained, seed=1)))


def test_a_killed_run_ends_with_the_same_network(
    pretrained: Path, pretrain_body: Body, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def killed(*arguments: Any) -> dict[str, torch.Tensor]:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    step = PretrainStep.__call__
    config = config_of(pretrain_body(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(PretrainStep, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    assert (tmp_path / "run" / "checkpoint").is_dir()
    pretrain(config)
    for file in ("model.safetensors", "config.json", "metrics.jsonl", "result.json"):
        assert (tmp_path / "run" / file).read_bytes() == (pretrained / file).read_bytes(), file


def test_the_evaluation_set_is_refused(
    store_2012: Path, pretrain_body: Body, tmp_path: Path
) -> None:
    body = pretrain_body(tmp_path / "run")
    body["data"] = body["data"] | {"sources": [{"store": store_2012, "splits": ["b", "c"]}]}
    with pytest.raises(LeakageError, match="evaluation only"):
        pretrain(config_of(body))


def test_the_validation_fold_and_the_limit_on_episodes(
    features: FeatureSet, pretrain_body: Body, tmp_path: Path
) -> None:
    def chosen(**data: Any) -> list[int]:
        body = pretrain_body(tmp_path)
        config = config_of(body | {"data": body["data"] | data})
        return training_episodes(features, config).tolist()

    everyone = list(range(len(features)))
    fold = features.fold(2)
    assert chosen() == [i for i in everyone if fold[i] != 1]
    assert chosen(validation_fold=None) == everyone
    few = chosen(max_episodes=3)
    assert len(few) == 3
    assert few == sorted(few) == chosen(max_episodes=3)
    assert set(few) <= set(chosen())


def test_one_batch_can_be_learnt_by_heart(
    network: Network, batch: Batch, tiny_config: Body
) -> None:
    model = fresh(network, tiny_config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first: dict[str, float] = {}
    for _ in range(60):
        optimiser.zero_grad()
        terms = loss_of(model, batch, tau=0.1)
        first = first or {name: t.item() for name, t in terms.items()}
        optimiser.step()
    last = {name: t.item() for name, t in terms.items()}
    assert last["loss"] < first["loss"] - 1
    assert last["recon"] < 0.7 * first["recon"]
    assert last["nce"] < first["nce"] - 0.5


# The objective on real batches.


def test_the_loss_is_the_weighted_sum(network: Network, batch: Batch) -> None:
    terms = loss_of(network.model, batch, lambda_nce=2.0, lambda_omega=0.5, lambda_recon=3.0)
    total = 2 * terms["nce"] + 0.5 * terms["omega"] + 3 * terms["recon"]
    torch.testing.assert_close(terms["loss"], total)
    alone = loss_of(network.model, batch, lambda_nce=0, lambda_omega=0)
    assert alone.keys() == {"loss", "recon"}  # no event pass at all
    torch.testing.assert_close(alone["loss"], terms["recon"])


def test_usable_patches_have_an_hour_and_a_token(network: Network, batch: Batch) -> None:
    n = -(-batch.series.shape[1] // 5)
    usable = usable_patches(network.model, batch, n)
    for b in range(len(batch.index)):
        length = int(batch.hour_mask[b].sum())
        hours = {int(h) for h in batch.token_hours[b][batch.token_mask[b]]}
        assert usable[b].tolist() == [
            5 * q < length and any(h // 5 == q for h in hours) for q in range(n)
        ]
    assert usable.any()
    assert not usable.all()


def test_a_batch_without_events_is_reconstruction_only(
    network: Network, features: FeatureSet, family: str, tiny_config: Body
) -> None:
    torch.manual_seed(0)
    options = ModelOptions.model_validate(
        {"backbone": {"config": tiny_config(family), "frozen": False}, "events": "fused"}
    )
    model = build_model(options, network.preprocessing, network.vocabulary)
    terms = loss_of(model, features.batch(np.arange(3)))
    assert (terms["nce"].item(), terms["omega"].item()) == (0, 0)
    assert terms["loss"].item() == terms["recon"].item() > 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in gradients)


@torch.no_grad()
def test_hidden_events_leave_the_series_pass_only(network: Network, batch: Batch) -> None:
    seen, hidden = (loss_of(network.model, batch, hide) for hide in (False, True))
    assert seen["recon"] != hidden["recon"]
    without = replace(batch, events=torch.zeros_like(batch.events))
    again = loss_of(network.model, without)
    assert all(torch.equal(again[name], hidden[name]) for name in hidden)


@torch.no_grad()
def test_padded_hours_enter_the_patches_only_when_kept(network: Network, batch: Batch) -> None:
    assert not batch.hour_mask.all()
    masked, kept = (loss_of(network.model, batch, pad_hours=p) for p in ("mask", "keep"))
    assert masked["recon"] != kept["recon"]
    whole = batch.hour_mask.all(1).numpy()
    lengths = batch.hour_mask.sum(1).numpy()
    assert ((lengths % 5 != 0) & ~whole).any(), "no half-filled patch to tell the two apart"
    assert masked["nce"] != kept["nce"]


@pytest.mark.parametrize("train", [True, False])
def test_new_tokens_learn_unless_told_otherwise(
    network: Network, batch: Batch, tiny_config: Body, train: bool
) -> None:
    model = fresh(network, tiny_config, train_new_tokens=train)
    loss_of(model, batch)
    assert (model.tokens.weight.grad is not None) == train
    assert model.decoder.weight.grad.any()


# Presets and pre-trained backbones.


@pytest.mark.parametrize(
    ("preset", "family", "causal"),
    [
        ("causal", "gpt2", True),
        ("causal", "bert", True),
        ("paper", "gpt2", False),
        ("paper", "bert", False),
        ("public_code", "roberta", False),
    ],
)
def test_presets_train_and_say_whether_they_may_be_streamed(
    preset: str, family: str, causal: bool, pretrain_body: Body, tiny_config: Body, tmp_path: Path
) -> None:
    body = pretrain_body(tmp_path / "run", preset=preset)
    body["model"] = {"backbone": {"config": tiny_config(family), "frozen": False}}
    body["data"] = body["data"] | {"max_episodes": 4}
    body["optim"] = body["optim"] | {"epochs": 1}
    plain = json.loads(json.dumps(body, default=str))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    config = load_config(PretrainConfig, tmp_path / "config.yaml")
    made = pretrain(config)
    assert made.causal == causal
    assert made.preprocessing.causal == (preset == "causal")
    assert made.model.config.backbone.causal == (preset == "causal" or family == "gpt2")
    assert load_network(tmp_path / "run").causal == causal
    if preset == "public_code":
        assert isinstance(made.model.series_encoder.norm, torch.nn.BatchNorm1d)
        assert made.model.config.patch_head == "ehr_linear_tanh"


def test_a_frozen_backbone_is_rounded_once_and_stays(
    preprocessing: Preprocessing, vocabulary: Vocabulary, tiny_config: Body, tmp_path: Path
) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "creatinine", "heart", "rate"]
    (tmp_path / "checkpoint").mkdir()
    config = BertConfig(**tiny_config("bert", vocab_size=len(words)))
    BertModel(config).save_pretrained(tmp_path / "checkpoint")
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(words)})
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    options = ModelOptions.model_validate({"backbone": {"source": str(tmp_path / "checkpoint")}})
    model = build_model(options, preprocessing, vocabulary)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert all(torch.equal(w, w.bfloat16().float()) for w in model.backbone.parameters())
    made = Network(model=model, preprocessing=preprocessing, vocabulary=vocabulary)
    save_network(tmp_path, made)
    loaded = load_network(tmp_path).model.state_dict()
    assert all(torch.equal(loaded[n], w) for n, w in model.state_dict().items())


def test_splits_without_a_stay_are_refused(
    store_2012: Path, pretrain_body: Body, tmp_path: Path
) -> None:
    body = pretrain_body(tmp_path / "run")
    body["data"] = body["data"] | {"sources": [{"store": store_2012, "splits": ["z"]}]}
    with pytest.raises(ValueError, match="no episodes"):
        pretrain(config_of(body))
