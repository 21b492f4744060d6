"""Configuration of training runs: YAML in, validated, unknown keys refused.

A `preset` fills in the model facts' open questions; keys written out in the file win over it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from llm4ehr.model import Task
from training.labels import MIN_HISTORY_HOURS, LabelAlign, LabelOptions
from training.objectives import ObjectiveConfig


class Strict(BaseModel):
    """Unknown keys are errors; nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ConfigError(ValueError):
    """The configuration cannot be used; the message says where and why."""


class SourceConfig(Strict):
    """One episode store, and what to read from it.

    `labels` names the tasks whose labels are taken from it (null: all that it has). Of a store with
    more than `max_episodes` stays in the splits, a fixed part of that size is read.
    """

    store: Path
    splits: tuple[str, ...] = Field(min_length=1)
    split_column: Literal["split", "benchmark_split"] = "split"
    labels: tuple[Task, ...] | None = None
    max_episodes: PositiveInt | None = None


class DataConfig(Strict):
    """Where episodes come from. One of `n_folds` patient folds is held out for selection."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    cache: Path = Path("runs/cache")
    n_folds: PositiveInt = 20
    validation_fold: int | None = 0
    max_codes: PositiveInt = 512
    max_episodes: PositiveInt | None = None
    # Few-shot: this share of the stays that would be trained on, drawn by the seed.
    fraction: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _holds_out_one_of_the_folds(self) -> Self:
        fold = self.validation_fold
        if fold is not None and (self.n_folds < 2 or not 0 <= fold < self.n_folds):
            raise ValueError(
                f"validation_fold {fold} of n_folds {self.n_folds}: it must be one of at least two "
                "folds, counted from 0, or null"
            )
        return self


class PreprocessingOptions(Strict):
    """The choices of `llm4ehr.episode.Preprocessing` that are not fitted."""

    imputation: Literal["causal", "linear"] = "causal"  # M12
    bin_edge: Literal["left", "right"] = "left"  # M22
    dedupe: Literal["hour", "episode_last", "none"] = "hour"  # M19
    observed_inputs: bool = True
    static_inputs: bool = True


class BackboneOptions(Strict):
    """Pre-trained weights by `source`, or random ones from a `config`.

    A source is a name of `training.backbones`, a name on the hub, or a folder. A config is that of
    Hugging Face, or `{name: gpt2-xl}` with what differs from that backbone.
    """

    source: str | None = None
    config: dict[str, Any] | None = None
    attention_mode: Literal["causal", "native"] = "causal"  # M17
    frozen: bool = True

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.source is None) == (self.config is None):
            raise ValueError("give exactly one of `source` and `config`")
        if self.config is not None and self.frozen:
            raise ValueError("a backbone with random weights cannot be frozen: set frozen: false")
        return self


class ModelOptions(Strict):
    """Architecture.

    `event_window` (M20): None cuts an event sequence at the backbone's context; a number of tokens
    reads it in overlapping chunks of that length, so that none is lost. `events: stream` needs it.
    """

    backbone: BackboneOptions
    events: Literal["none", "fused", "stream"] = "none"
    event_window: PositiveInt | None = None
    ts_norm: Literal["layer", "batch", "none"] = "layer"  # M8
    patch_hours: PositiveInt = 5
    patch_head: Literal["none", "tanh", "ehr_linear_tanh"] = "none"  # M7
    train_new_tokens: bool = True  # M10

    @model_validator(mode="after")
    def _stream_is_bounded(self) -> Self:
        if self.events == "stream" and self.event_window is None:
            raise ValueError("events: stream needs an event_window, the tokens it may look back")
        if self.event_window is not None and self.event_window % 2:
            raise ValueError("event_window must be even: the chunks overlap by half of it")
        return self


Tracker = Literal["tensorboard", "mlflow", "wandb"]


class OptimConfig(Strict):
    """Optimiser and loop. `precision` auto is bf16 on a GPU that has it, else fp32.

    `compile` runs the network through torch.compile, which pays on a GPU.
    """

    optimiser: Literal["adamw", "adam"] = "adamw"
    epochs: PositiveInt = 5
    batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 1e-4
    weight_decay: float = 0.0
    clip_norm: PositiveFloat = 2.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint_every: PositiveInt = 200
    compile: bool = False


class PretrainConfig(Strict):
    """One pre-training run.

    With `chunk_episodes` the contrastive batch is encoded in chunks of so many stays, whose
    activations alone are held at a time (gradient caching): the losses stay those of the batch.
    """

    run: Path
    seed: int = 0
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    data: DataConfig
    preprocessing: PreprocessingOptions = PreprocessingOptions()
    model: ModelOptions
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    # Share of episodes whose fused events are hidden in the series pass, so that series and events
    # are aligned rather than copied and a stay without events still works.
    modality_dropout: float = Field(default=0.5, ge=0, le=1)
    chunk_episodes: PositiveInt | None = None

    @model_validator(mode="after")
    def _has_no_few_shots(self) -> Self:
        if self.data.fraction < 1:
            raise ValueError(
                "data.fraction is for fine-tuning: pre-training has no labels to spare"
            )
        return self


class PlainTuning(Strict):
    """`linear` trains the heads alone, `end_to_end` everything in the series pass as well."""

    strategy: Literal["linear", "end_to_end"]


class AdapterTuning(Strict):
    """Two bottlenecks a block (Houlsby et al. 2019), and the norms of the backbone if asked."""

    strategy: Literal["adapter"]
    width: PositiveInt = 64
    train_norms: bool = False
    train_series_encoder: bool = False


class PromptTuning(Strict):
    """Trained vectors beside the hours (M18): before them, after them, or as keys and values."""

    strategy: Literal["prompt"]
    length: PositiveInt = 20
    position: Literal["prefix", "suffix", "kv"] = "prefix"
    train_series_encoder: bool = False


class LoraTuning(Strict):
    """Low-rank updates of the attention (Hu et al. 2022); merged into the weights in the end."""

    strategy: Literal["lora"]
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: float = Field(default=0.0, ge=0, lt=1)
    train_series_encoder: bool = False


Tuning = Annotated[
    Annotated[
        PlainTuning | AdapterTuning | PromptTuning | LoraTuning, Field(discriminator="strategy")
    ],
    # `tuning: linear` says the same as `tuning: {strategy: linear}`.
    BeforeValidator(lambda value: {"strategy": value} if isinstance(value, str) else value),
]

EpisodeTask = Literal["mortality", "phenotyping"]
Readout = Literal["hourly", "last_valid", "last_row", "mean", "max"]


class FinetuneConfig(Strict):
    """One fine-tuning run on top of a pre-training run: all tasks share one encoder.

    `readout` (M16) says how a stay is answered: "hourly" at every hour, what a deployed model does;
    the others once, from its hours up to `max_hours`. `hourly_unit` (M14) "patch" asks the hourly
    tasks once a patch of five hours. Both other ways are for the paper's tables and cannot be
    exported.
    """

    run: Path
    seed: int = 0
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    pretrained: Path
    data: DataConfig
    tasks: dict[Task, PositiveFloat] = Field(min_length=1)  # task -> weight of its loss
    tuning: Tuning = PlainTuning(strategy="linear")
    # How heads read events, where it differs from the pre-training: an encoder that does not read
    # them hour by hour has the event pass beside it (stream), or does without (none).
    events: Literal["none", "stream"] | None = None
    head: Literal["linear", "mlp"] = "linear"  # M15
    readout: dict[EpisodeTask, Readout] = {}
    hourly_unit: Literal["hour", "patch"] = "hour"
    # What the remaining stay is fitted as: squared error of log(1 + days), or of days as the paper.
    los_scale: Literal["log_days", "days"] = "log_days"
    label_align: LabelAlign = "bin_end"  # M13
    # Mortality is asked of stays of at least so many hours: 48 is the paper's cohort (M23).
    mortality_min_hours: NonNegativeFloat = 0.0
    # Decompensation, remaining stay and phenotypes are asked at times after so many hours.
    min_history_hours: NonNegativeFloat = MIN_HISTORY_HOURS
    # The network reads hours up to this one when it is fine-tuned and selected.
    max_hours: PositiveInt = 200
    modality_dropout: float = Field(default=0.1, ge=0, le=1)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    encoder_learning_rate: PositiveFloat | None = None  # of everything but the heads
    # The epoch that is kept: the one with the best score of a task, with the lowest weighted loss,
    # or the last one whatever its score.
    select_by: Task | Literal["loss", "last"] = "loss"
    patience: PositiveInt = 3
    # How probabilities are calibrated on the held-out fold, and the coverage of the intervals of
    # the remaining stay.
    calibration: Literal["none", "platt", "temperature", "isotonic", "platt_isotonic"] = "platt"
    coverage: float = Field(default=0.9, gt=0, lt=1)
    optim: OptimConfig = OptimConfig(epochs=10, learning_rate=5e-4)

    @model_validator(mode="after")
    def _selects_by_a_head(self) -> Self:
        if self.select_by not in ("loss", "last") and self.select_by not in self.tasks:
            raise ValueError(f"select_by: {self.select_by} is not one of the tasks")
        return self

    @property
    def label_options(self) -> LabelOptions:
        """How labels are made."""
        return LabelOptions(
            align=self.label_align,
            min_history_hours=self.min_history_hours,
            mortality_min_hours=self.mortality_min_hours,
        )


_PRETRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "causal": {},
    "paper": {
        "preprocessing": {
            "imputation": "linear",
            "bin_edge": "right",
            "observed_inputs": False,
            "static_inputs": False,
        },
        "model": {"events": "none", "backbone": {"attention_mode": "native"}},
        "modality_dropout": 0.0,
    },
    # Explains differences to the published code; not a recommendation.
    "public_code": {
        "preprocessing": {
            "imputation": "linear",
            "bin_edge": "right",
            "dedupe": "episode_last",
            "observed_inputs": False,
            "static_inputs": False,
        },
        "model": {
            "events": "none",
            "ts_norm": "batch",
            "patch_head": "ehr_linear_tanh",
            "train_new_tokens": False,
            "backbone": {"attention_mode": "native"},
        },
        "objective": {
            "nce_denominator": "include",
            "nce_scope": "batch",
            "omega_mask": "full",
            "omega_grad": "flow",
            "reduction": "pair_mean",
            "recon": "same_step_mean",
            "pad_hours": "keep",
            "unusable_patches": "keep",
        },
        "modality_dropout": 0.0,
    },
}
# The paper's tables. Where the paper is silent (optimiser, epochs, read-out of mortality) they
# follow the published code.
_PAPER_FINETUNE: dict[str, Any] = {
    "tuning": "linear",
    "readout": {"mortality": "max", "phenotyping": "last_valid"},
    "los_scale": "days",
    "label_align": "bin_start",
    "mortality_min_hours": 48,
    "modality_dropout": 0.0,
    "select_by": "last",
    "optim": {"optimiser": "adam", "learning_rate": 5e-4, "epochs": 10, "batch_size": 64},
}
_FINETUNE_PRESETS: dict[str, dict[str, Any]] = {
    "causal": {},
    "paper": _PAPER_FINETUNE,
    "public_code": _PAPER_FINETUNE
    | {
        "head": "mlp",
        "readout": {"mortality": "max", "phenotyping": "last_row"},
        "hourly_unit": "patch",
    },
}
PRESETS: dict[type[Strict], dict[str, dict[str, Any]]] = {
    PretrainConfig: _PRETRAIN_PRESETS,
    FinetuneConfig: _FINETUNE_PRESETS,
}

C = TypeVar("C", bound=Strict)


def load_config(kind: type[C], path: Path, overrides: list[str] | None = None) -> C:
    """Read a YAML file, apply `key.path=value` overrides and the preset, and validate.

    An override may name another preset. Raises ConfigError that names the file and every wrong key.
    """
    try:
        body = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(body, dict):
        raise ConfigError(f"{path}: expected a mapping")
    for override in overrides or []:
        key, eq, value = override.partition("=")
        if not eq:
            raise ConfigError(f"override {override!r}: expected key.path=value")
        try:
            nested: Any = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: {error}") from error
        for part in reversed(key.split(".")):
            nested = {part: nested}
        body = _merge(body, nested)
    if presets := PRESETS.get(kind):
        preset = body.pop("preset", "causal")
        if preset not in presets:
            raise ConfigError(f"{path}: preset {preset!r} is not one of {', '.join(presets)}")
        body = _merge(presets[preset], body)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        wrong = [
            f"{'.'.join(str(part) for part in e['loc']) or 'file'}: {e['msg']}"
            for e in error.errors()
        ]
        raise ConfigError(f"{path}: {'; '.join(wrong)}") from error


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`, mappings merged key by key."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
