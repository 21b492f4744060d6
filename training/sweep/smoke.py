"""Sweeps in small: the same rows, tasks and data sets with tiny networks, few stays, one epoch.

It shows that an experiment runs, from the first step to the table, and nothing about its numbers.
"""

from __future__ import annotations

from typing import Any

from training.backbones import BACKBONES, find
from training.config import BackboneOptions, ConfigError, FinetuneConfig, PretrainConfig
from training.sweep.config import SweepConfig

_SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_WIDE = _SHAPE | {"intermediate_size": 32, "max_position_embeddings": 256}
_TINY: dict[str, dict[str, Any]] = {
    "longformer": _WIDE | {"max_position_embeddings": 514, "attention_window": [512, 512]},
    "roberta": _WIDE | {"max_position_embeddings": 258},
    "bert": _WIDE,
    "opt": _SHAPE | {"max_position_embeddings": 256, "word_embed_proj_dim": 16, "ffn_dim": 32},
    "llama": _WIDE | {"num_key_value_heads": 1},
    "gpt2": {"n_positions": 256, "n_embd": 16, "n_layer": 2, "n_head": 2},
}
_EPISODES = 16


def tiny_config(backbone: BackboneOptions) -> dict[str, Any]:
    """A Hugging Face config of the family of a backbone, two layers of 16 channels.

    Raises ConfigError for a source that is not in `training.backbones`.
    """
    if backbone.config is not None and "model_type" in backbone.config:
        family = backbone.config["model_type"]
    else:
        name = backbone.source or (backbone.config or {}).get("name", "")
        if (named := find(name)) is None:
            raise ConfigError(f"backbone {name!r} is not one of: {', '.join(BACKBONES)}")
        family = named[1].config["model_type"]
    return {"model_type": family} | _TINY[family]


def smoke_sweep(config: SweepConfig) -> SweepConfig:
    """Two seeds, a small part of each test split, and a folder of its own."""
    targets = [
        target.model_copy(
            update={
                "test": target.test.model_copy(update={"max_episodes": _EPISODES}),
                "threshold_on": tuple(
                    s.model_copy(update={"max_episodes": _EPISODES}) for s in target.threshold_on
                ),
            }
        )
        for target in config.targets
    ]
    return config.model_copy(
        update={
            "runs": config.runs / "smoke",
            "seeds": config.seeds[:2],
            "targets": tuple(targets),
        }
    )


def smoke_pretrain(config: PretrainConfig) -> PretrainConfig:
    """A random network of the same family; batches keep their order of sizes."""
    body = config.model_dump()
    body["model"]["backbone"] |= {
        "source": None, "config": tiny_config(config.model.backbone), "frozen": False,
    }  # fmt: skip
    if config.model.event_window is not None:
        body["model"]["event_window"] = 64  # within the tiny context
    body["data"] |= {"max_episodes": _EPISODES, "max_codes": 8}
    body["optim"] |= {"epochs": 1, "batch_size": max(config.optim.batch_size // 16, 2)}
    return PretrainConfig.model_validate(body)


def smoke_finetune(config: FinetuneConfig) -> FinetuneConfig:
    """One epoch over few stays."""
    body = config.model_dump()
    body["data"] |= {"max_episodes": _EPISODES}
    body["optim"] |= {"epochs": 1, "batch_size": 8}
    return FinetuneConfig.model_validate(body)
