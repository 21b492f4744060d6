"""Configurations: unknown keys, presets, overrides, and combinations that make no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from training.config import (
    PRESETS,
    BackboneOptions,
    ConfigError,
    FinetuneConfig,
    PretrainConfig,
    load_config,
)

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
PRETRAIN: dict[str, Any] = {
    "run": "runs/x",
    "data": {"sources": [{"store": "stores/x", "splits": ["a"]}]},
    "model": {"backbone": {"source": "gpt2"}},
}
FINETUNE: dict[str, Any] = {
    "run": "runs/y",
    "pretrained": "runs/x",
    "data": {"sources": [{"store": "stores/x", "splits": ["a"]}]},
    "tasks": {"mortality": 1},
}


def write(tmp_path: Path, body: Any) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


def pretrain_config(tmp_path: Path, *overrides: str, **changes: Any) -> PretrainConfig:
    return load_config(PretrainConfig, write(tmp_path, PRETRAIN | changes), list(overrides))


def error_of(tmp_path: Path, body: Any, *overrides: str, kind: Any = PretrainConfig) -> str:
    path = write(tmp_path, body)
    with pytest.raises(ConfigError) as caught:
        load_config(kind, path, list(overrides))
    message = str(caught.value)
    assert str(path) in message or "override" in message
    return message


def test_what_is_not_written_has_a_default(tmp_path: Path) -> None:
    config = pretrain_config(tmp_path)
    assert config.model.backbone.source == "gpt2"
    assert (config.optim.epochs, config.optim.learning_rate, config.optim.batch_size) == (
        5,
        1e-4,
        64,
    )
    assert config.objective.tau == 0.02
    assert config.preprocessing.imputation == "causal"
    made = load_config(FinetuneConfig, write(tmp_path, FINETUNE))
    assert (made.tuning.strategy, made.label_align, made.optim.epochs) == ("linear", "bin_end", 10)


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (PRETRAIN | {"surprise": 1}, "surprise"),
        (PRETRAIN | {"optim": {"learning_rat": 1}}, "optim.learning_rat"),
        (PRETRAIN | {"objective": {"nce": 1}}, "objective.nce"),
        (PRETRAIN | {"model": {"backbone": {"source": "x", "layers": 1}}}, "model.backbone.layers"),
        (PRETRAIN | {"data": {"sources": []}}, "data.sources"),
        (PRETRAIN | {"optim": {"epochs": 0}}, "optim.epochs"),
        (PRETRAIN | {"optim": {"schedule": "linear"}}, "optim.schedule"),
        (PRETRAIN | {"modality_dropout": 1.5}, "modality_dropout"),
        ({}, "run"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_file(
    body: dict[str, Any], key: str, tmp_path: Path
) -> None:
    assert key in error_of(tmp_path, body)


@pytest.mark.parametrize("base", [PRETRAIN, FINETUNE])
@pytest.mark.parametrize(
    ("n_folds", "fold", "fits"),
    [(5, 99, False), (5, 5, False), (5, -1, False), (1, 0, False),
     (5, 4, True), (5, 0, True), (2, 1, True), (1, None, True)],
)  # fmt: skip
def test_the_fold_held_out_is_one_of_the_folds(
    base: dict[str, Any], n_folds: int, fold: int | None, fits: bool, tmp_path: Path
) -> None:
    kind = PretrainConfig if base is PRETRAIN else FinetuneConfig
    body = base | {"data": base["data"] | {"n_folds": n_folds, "validation_fold": fold}}
    if fits:
        assert load_config(kind, write(tmp_path, body)).data.validation_fold == fold
    else:
        message = error_of(tmp_path, body, kind=kind)
        assert f"validation_fold {fold} of n_folds {n_folds}" in message


def test_every_wrong_key_is_named_at_once(tmp_path: Path) -> None:
    message = error_of(tmp_path, PRETRAIN | {"one": 1, "optim": {"two": 2}})
    assert "one" in message
    assert "optim.two" in message


@pytest.mark.parametrize("text", ["[1, 2]", "7", "", "{", "a: b: c", "a: [1"])
def test_a_file_that_is_no_mapping_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(PretrainConfig, path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(PretrainConfig, tmp_path / "nowhere.yaml")


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    config = pretrain_config(
        tmp_path,
        "optim.epochs=2",
        "optim.learning_rate=5e-4",
        "model.backbone.frozen=false",
        "objective.omega_mask=full",
        "data.validation_fold=null",
        "data.sources=[{store: s, splits: [a, b]}]",
        "run=elsewhere=here",
        optim={"epochs": 7, "batch_size": 3},
    )
    assert (config.optim.epochs, config.optim.batch_size) == (2, 3)
    assert config.optim.learning_rate == 5e-4
    assert config.model.backbone.frozen is False
    assert config.model.backbone.source == "gpt2"
    assert config.objective.omega_mask == "full"
    assert config.data.validation_fold is None
    assert config.data.sources[0].splits == ("a", "b")
    assert config.run == Path("elsewhere=here")
    assert pretrain_config(tmp_path, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize("override", ["optim.epochs", "optim.epochs=[", "nothing.here=1", "seed=x"])
def test_an_override_that_cannot_be_used_is_an_error(override: str, tmp_path: Path) -> None:
    message = error_of(tmp_path, PRETRAIN, override)
    assert override.partition("=")[0].partition(".")[0] in message


# Presets.


def test_the_causal_preset_is_the_default(tmp_path: Path) -> None:
    assert pretrain_config(tmp_path) == pretrain_config(tmp_path, preset="causal")


def test_the_paper_preset(tmp_path: Path) -> None:
    config = pretrain_config(tmp_path, preset="paper")
    assert config.preprocessing.model_dump() == {
        "imputation": "linear",
        "bin_edge": "right",
        "dedupe": "hour",
        "observed_inputs": False,
        "static_inputs": False,
    }
    assert config.model.backbone.attention_mode == "native"
    assert config.model.backbone.source == "gpt2"
    assert (config.model.events, config.modality_dropout) == ("none", 0)
    assert config.objective == pretrain_config(tmp_path).objective  # the printed equations


def test_the_public_code_preset(tmp_path: Path) -> None:
    config = pretrain_config(tmp_path, preset="public_code")
    assert config.preprocessing.dedupe == "episode_last"
    model = config.model
    assert (model.ts_norm, model.patch_head) == ("batch", "ehr_linear_tanh")
    assert not model.train_new_tokens
    objective = config.objective
    assert (objective.nce_denominator, objective.reduction) == ("include", "pair_mean")
    assert (objective.omega_grad, objective.omega_mask) == ("flow", "full")
    assert (objective.recon, objective.pad_hours) == ("same_step_mean", "keep")
    assert objective.unusable_patches == "keep"


def test_the_file_wins_over_its_preset_and_overrides_over_both(tmp_path: Path) -> None:
    written = {
        "preset": "paper",
        "preprocessing": {"imputation": "causal"},
        "model": {"backbone": {"source": "x"}, "events": "fused"},
    }
    config = pretrain_config(tmp_path, "preprocessing.bin_edge=left", **written)
    assert config.preprocessing.imputation == "causal"
    assert config.preprocessing.bin_edge == "left"
    assert config.preprocessing.observed_inputs is False  # still the preset's
    assert config.model.events == "fused"
    assert config.model.backbone.attention_mode == "native"
    assert (
        PRESETS[PretrainConfig]["paper"]["preprocessing"]["bin_edge"] == "right"
    )  # not changed in place


def test_an_unknown_preset_is_refused(tmp_path: Path) -> None:
    message = error_of(tmp_path, PRETRAIN | {"preset": "papr"})
    assert "'papr' is not one of causal, paper, public_code" in message


def test_the_presets_of_fine_tuning(tmp_path: Path) -> None:
    paper = load_config(FinetuneConfig, write(tmp_path, FINETUNE | {"preset": "paper"}))
    assert paper.tuning.strategy == "linear"
    assert paper.readout == {"mortality": "max", "phenotyping": "last_valid"}
    assert (paper.head, paper.label_align, paper.los_scale) == ("linear", "bin_start", "days")
    assert (paper.select_by, paper.optim.optimiser, paper.optim.epochs) == ("last", "adam", 10)
    public = load_config(FinetuneConfig, write(tmp_path, FINETUNE | {"preset": "public_code"}))
    assert (public.head, public.hourly_unit) == ("mlp", "patch")
    assert public.readout["phenotyping"] == "last_row"


def test_a_tuning_strategy_by_name_or_with_its_options(tmp_path: Path) -> None:
    def strategy(tuning: Any) -> dict[str, Any]:
        path = write(tmp_path, FINETUNE | {"tuning": tuning})
        return load_config(FinetuneConfig, path).tuning.model_dump()

    assert strategy("linear") == {"strategy": "linear"}
    assert strategy({"strategy": "adapter", "width": 96})["width"] == 96
    assert strategy("prompt")["length"] == 20
    assert strategy({"strategy": "lora"})["rank"] == 8
    message = error_of(
        tmp_path, FINETUNE | {"tuning": {"strategy": "linear", "width": 4}}, kind=FinetuneConfig
    )
    assert "width" in message


# Combinations.


def test_a_random_backbone_cannot_be_frozen(tmp_path: Path) -> None:
    random = {"model": {"backbone": {"config": {"model_type": "gpt2"}}}}
    assert "set frozen: false" in error_of(tmp_path, PRETRAIN | random)
    config = pretrain_config(tmp_path, "model.backbone.frozen=false", **random)
    assert config.model.backbone.config == {"model_type": "gpt2"}


@pytest.mark.parametrize("origin", [{}, {"source": "x", "config": {}, "frozen": False}])
def test_a_backbone_has_one_origin(origin: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="exactly one"):
        BackboneOptions(**origin)


def test_tasks_are_known_and_weighted(tmp_path: Path) -> None:
    for tasks, key in (({}, "tasks"), ({"sepsis": 1}, "tasks"), ({"mortality": 0}, "tasks")):
        message = error_of(tmp_path, FINETUNE | {"tasks": tasks}, kind=FinetuneConfig)
        assert key in message


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configurations_are_valid(path: Path) -> None:
    kind = FinetuneConfig if "pretrained" in yaml.safe_load(path.read_text()) else PretrainConfig
    load_config(kind, path)


@pytest.mark.parametrize(
    ("model", "message"),
    [({"events": "stream"}, "needs an event_window"), ({"event_window": 7}, "must be even")],
)
def test_the_event_stream_is_bounded(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    body = PRETRAIN | {"model": PRETRAIN["model"] | model}
    assert message in error_of(tmp_path, body)
    fine = PRETRAIN | {"model": PRETRAIN["model"] | {"events": "stream", "event_window": 64}}
    assert load_config(PretrainConfig, write(tmp_path, fine)).model.event_window == 64


def test_pretraining_takes_no_fraction_of_the_stays(tmp_path: Path) -> None:
    body = PRETRAIN | {"data": PRETRAIN["data"] | {"fraction": 0.1}}
    assert "data.fraction is for fine-tuning" in error_of(tmp_path, body)
    few = load_config(FinetuneConfig, write(tmp_path, FINETUNE), ["data.fraction=0.1"])
    assert few.data.fraction == 0.1
