"""One test for each way in which a Hugging Face model can quietly do the wrong thing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    BertTokenizer,
    DynamicCache,
    PreTrainedTokenizerFast,
)

from llm4ehr.backbone import (
    Backbone,
    BackboneError,
    BackboneSpec,
    load_backbone,
    spec_from_config,
)
from llm4ehr.vocabulary import Vocabulary
from training.config import BackboneOptions, ModelOptions
from training.pretrain import build_model

Config = Callable[..., dict[str, Any]]
BIDIRECTIONAL = ("bert", "roberta", "longformer")
NARROW = {"attention_window": [32, 32], "max_position_embeddings": 90}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "first", "ninth", "dec", "##ile"]
WORDS += ["lac", "##tate", "mechanical", "vent", "##il", "##ation", "heart", "rate"]
GPT2_WORDS = {word: i for i, word in enumerate([*WORDS[5:], "<unk>", "decile"])}


def build(config: dict[str, Any], mode: str = "causal", *, frozen: bool = True) -> Backbone:
    torch.manual_seed(0)
    return Backbone(spec_from_config(config, attention_mode=mode, frozen=frozen))


def sequence(n: int = 20, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of two stays, everything unmasked, positions from 0."""
    torch.manual_seed(1)
    hours = torch.arange(n).expand(2, n)
    return torch.randn(2, n, width), torch.ones(2, n, dtype=torch.bool), hours


def other_from(x: Tensor, hour: int) -> Tensor:
    """The same until that hour. Random: a constant shift would vanish in the first layer norm."""
    torch.manual_seed(2)
    return torch.cat([x[:, :hour], torch.randn_like(x[:, hour:])], dim=1)


def save_checkpoint(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Path:
    """A checkpoint of that family with a small tokenizer, as the hub would deliver it."""
    torch.manual_seed(3)
    filled = AutoConfig.for_model(**config, vocab_size=len(WORDS))
    AutoModel.from_config(filled).to(dtype).save_pretrained(folder)
    if config["model_type"] == "gpt2":
        raw = Tokenizer(models.WordLevel(GPT2_WORDS, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>").save_pretrained(folder)
    else:
        BertTokenizer(vocab={w: i for i, w in enumerate(WORDS)}).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_later_hours_do_not_change_earlier_states(family: str, tiny_config: Config) -> None:
    backbone = build(tiny_config(family))
    x, mask, hours = sequence()
    changed = other_from(x, 12)
    a, b = backbone(x, mask, hours), backbone(changed, mask, hours)
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.equal(a[:, 12:], b[:, 12:])
    assert backbone.spec.causal


@torch.no_grad()
@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_native_attention_of_encoders_looks_ahead_and_says_so(
    family: str, tiny_config: Config
) -> None:
    backbone = build(tiny_config(family), "native")
    x, mask, hours = sequence()
    changed = other_from(x, 12)
    assert (backbone(x, mask, hours) - backbone(changed, mask, hours))[:, :12].abs().max() > 1e-3
    assert not backbone.spec.causal


def test_encoders_run_as_decoders(tiny_config: Config) -> None:
    for name in BIDIRECTIONAL:
        assert build(tiny_config(name)).model.config.is_decoder
        assert not build(tiny_config(name), "native").model.config.is_decoder
    assert spec_from_config(tiny_config("gpt2"), attention_mode="native").causal


@torch.no_grad()
def test_a_jump_in_the_positions_does_not_cut_the_attention(
    family: str, tiny_config: Config
) -> None:
    backbone = build(tiny_config(family))
    x, mask, hours = sequence()
    jumping = torch.where(hours < 10, hours, hours + 30)
    changed = torch.cat([other_from(x, 0)[:, :1], x[:, 1:]], dim=1)
    late = [backbone(e, mask, jumping)[:, 15] for e in (x, changed)]
    assert not torch.equal(*late)


@torch.no_grad()
def test_transformers_takes_a_jump_for_a_packed_batch_without_a_mask(tiny_config: Config) -> None:
    """Why the mask is always given: without it the test above fails."""
    model = build(tiny_config("gpt2")).model
    x, _, hours = sequence()
    jumping = torch.where(hours < 10, hours, hours + 30)
    changed = torch.cat([other_from(x, 0)[:, :1], x[:, 1:]], dim=1)
    late = [
        model(inputs_embeds=e, position_ids=jumping, use_cache=False).last_hidden_state[:, 15]
        for e in (x, changed)
    ]
    assert torch.equal(*late)


@torch.no_grad()
def test_padding_does_not_change_what_stands_before_it(family: str, tiny_config: Config) -> None:
    for mode in ("causal", "native"):
        backbone = build(tiny_config(family), mode)
        x, mask, hours = sequence()
        mask[:, 14:] = False
        a, b = backbone(x, mask, hours), backbone(other_from(x, 14), mask, hours)
        assert torch.equal(a[:, :14], b[:, :14])


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "roberta"])
def test_positions_are_those_of_the_pretrained_model(family: str, tiny_config: Config) -> None:
    """An unpadded sequence from hour 0 gets the positions that the model itself would choose."""
    backbone = build(tiny_config(family))
    x, mask, hours = sequence()
    own = backbone.model(inputs_embeds=x, use_cache=False).last_hidden_state
    torch.testing.assert_close(backbone(x, mask, hours), own, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "table", "offset"),
    [
        ("gpt2", "wpe", 0),
        ("opt", "decoder.embed_positions", 2),
        ("bert", "embeddings.position_embeddings", 0),
        ("roberta", "embeddings.position_embeddings", 2),
        ("longformer", "embeddings.position_embeddings", 2),
    ],
)
def test_positions_are_hours_whatever_the_mask(
    family: str, table: str, offset: int, tiny_config: Config
) -> None:
    backbone = build(tiny_config(family))
    positions = backbone.model.get_submodule(table)
    looked_up: list[Tensor] = []
    positions.register_forward_hook(lambda _, __, out: looked_up.append(out))
    x, mask, hours = sequence()
    mask[:, 3:6] = False
    backbone(x, mask, hours + 7)
    expected = positions.weight[hours + 7 + offset]
    assert torch.equal(looked_up[0].expand_as(expected), expected)
    last = torch.full((2, 1), backbone.context_length - 1)
    assert torch.isfinite(backbone(x[:, :1], mask[:, :1], last)).all()


@torch.no_grad()
def test_hour_by_hour_with_a_cache_equals_the_whole_pass(family: str, tiny_config: Config) -> None:
    backbone = build(tiny_config(family))
    x, mask, hours = sequence()
    whole = backbone(x, mask, hours)
    cache = DynamicCache()
    steps = [
        backbone(x[:, t : t + 1], mask[:, : t + 1], hours[:, t : t + 1], cache)
        for t in range(x.shape[1])
    ]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-4)


def test_a_frozen_backbone_stays_in_eval_mode(family: str, tiny_config: Config) -> None:
    frozen, free = build(tiny_config(family)), build(tiny_config(family), frozen=False)
    for backbone in (frozen, free):
        torch.nn.ModuleDict({"inside": backbone}).train()
    assert not any(module.training for module in frozen.modules())
    assert all(module.training for module in free.modules())
    assert not any(p.requires_grad for p in frozen.parameters())
    x, mask, hours = sequence()
    assert torch.equal(frozen(x, mask, hours), frozen(x, mask, hours))


def test_the_unused_word_table_is_never_trained(family: str, tiny_config: Config) -> None:
    backbone = build(tiny_config(family), frozen=False)
    words = backbone.model.get_input_embeddings().weight
    assert not words.requires_grad
    assert len(words) <= 2
    assert sum(p.requires_grad for p in backbone.parameters()) > 10


def test_no_cache_is_kept_in_training(family: str, tiny_config: Config) -> None:
    backbone = build(tiny_config(family), frozen=False)
    outputs: list[Any] = []
    backbone.model.register_forward_hook(lambda _, __, out: outputs.append(out))
    backbone(*sequence())
    assert outputs[0].past_key_values is None


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_half_precision_checkpoint_is_loaded_in_fp32(
    family: str, tiny_config: Config, tmp_path: Path
) -> None:
    loaded = load_backbone(save_checkpoint(tmp_path, tiny_config(family), torch.bfloat16))
    assert {p.dtype for p in loaded.backbone.parameters()} == {torch.float32}
    assert loaded.embed_texts(["first"]).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_loading_keeps_the_weights(family: str, tiny_config: Config, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny_config(family), torch.float32)
    ours = load_backbone(tmp_path, attention_mode="native").backbone
    theirs = AutoModel.from_pretrained(tmp_path)
    x, mask, hours = sequence()
    expected = theirs(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours(x, mask, hours), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_new_tokens_start_as_the_mean_of_their_descriptors_pieces(
    family: str, tiny_config: Config, tmp_path: Path, preprocessing: Any, vocabulary: Vocabulary
) -> None:
    save_checkpoint(tmp_path, tiny_config(family), torch.float32)
    table = AutoModel.from_pretrained(tmp_path).get_input_embeddings().weight
    options = ModelOptions(backbone=BackboneOptions(source=str(tmp_path)))
    model = build_model(options, preprocessing, vocabulary)
    pieces = {
        "gpt2": {0: ["first", "decile"], 11: ["<unk>"], 12: ["mechanical", "<unk>"]},
        "bert": {
            8: ["ninth", "dec", "##ile"],
            11: ["lac", "##tate"],
            12: ["mechanical", "vent", "##il", "##ation"],
        },
    }[family]
    ids = {w: i for i, w in enumerate(WORDS)}
    if family == "gpt2":
        ids = GPT2_WORDS
    for token, words in pieces.items():
        expected = table[[ids[w] for w in words]].mean(0)
        torch.testing.assert_close(model.tokens.weight[token], expected, rtol=0, atol=1e-7)
    assert model.tokens.weight.shape == (13, 16)
    assert len(model.begin) == (0 if family == "gpt2" else 1)
    assert family == "gpt2" or torch.equal(model.begin[0], table[ids["[CLS]"]])


@torch.no_grad()
@pytest.mark.parametrize("n", [16, 17, 18, 40, 63])
def test_a_longformer_is_a_roberta_with_a_band(n: int, tiny_config: Config, tmp_path: Path) -> None:
    """Within half its window and beyond, with padding."""
    save_checkpoint(tmp_path, tiny_config("longformer", **NARROW), torch.float32)
    ours = load_backbone(tmp_path, attention_mode="native").backbone
    theirs = AutoModel.from_pretrained(tmp_path)
    assert ours.model.config.model_type == "roberta"
    x, mask, hours = sequence(n)
    mask[1, n - 12 :] = False
    expected = theirs(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours(x, mask, hours)[mask], expected[mask], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_band_is_causal_and_as_wide_as_half_the_window(tiny_config: Config) -> None:
    backbone = build(
        tiny_config("longformer", num_hidden_layers=1, **NARROW | {"attention_window": 32})
    )
    x, mask, hours = sequence(40)
    mask[1, 20:] = False  # padding has nothing to attend to
    before = backbone(x, mask, hours)
    assert torch.isfinite(before).all()
    later = backbone(other_from(x, 25), mask, hours)
    assert torch.equal(later[:, :25], before[:, :25])
    assert not torch.equal(later[0, 25], before[0, 25])
    changed = torch.cat([other_from(x, 0)[:, :1], x[:, 1:]], dim=1)
    moved = (backbone(changed, mask, hours) != before).any(-1)
    assert moved[0].tolist() == [True] * 17 + [False] * 23
    cache = DynamicCache()
    steps = [
        backbone(x[:1, t : t + 1], mask[:1, : t + 1], hours[:1, t : t + 1], cache)
        for t in range(40)
    ]
    torch.testing.assert_close(torch.cat(steps, dim=1), before[:1], rtol=0, atol=1e-5)


def test_a_longformer_reads_its_whole_context(tiny_config: Config) -> None:
    assert build(tiny_config("longformer", **NARROW)).context_length == 88
    with pytest.raises(BackboneError, match=r"unequal attention windows \[32, 64\]"):
        spec_from_config(tiny_config("longformer", attention_window=[32, 64]))


def test_a_spec_without_a_window_still_loads(tiny_config: Config) -> None:
    body = asdict(spec_from_config(tiny_config("longformer", **NARROW)))
    del body["window"]
    old = BackboneSpec(**body | {"context": 16})
    assert (old.window, Backbone(old).context_length) == (None, 16)


def test_padding_on_the_right_needs_no_mask(family: str, tiny_config: Config) -> None:
    """States and gradients of real tokens are those with the mask, bit by bit."""
    backbone = build(tiny_config(family))
    x, mask, hours = sequence()
    mask[1, 9:] = False
    seen: list[Any] = []
    backbone.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["attention_mask"]), with_kwargs=True
    )
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with_mask = backbone(inputs[0], mask, hours)[mask]
    without = backbone(inputs[1], mask, hours, right_padded=True)[mask]
    assert seen[0] is not None
    assert seen[1] is None
    assert torch.equal(with_mask, without)
    for out in (with_mask, without):
        out.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_without_causality_padding_is_masked_wherever_it_stands(
    family: str, tiny_config: Config
) -> None:
    backbone = build(tiny_config(family), "native")
    x, mask, hours = sequence()
    mask[1, 9:] = False
    a, b = (backbone(x, mask, hours, right_padded=said) for said in (False, True))
    assert torch.equal(a, b)


def test_the_context_of_each_family(tiny_config: Config) -> None:
    lengths = {f: build(tiny_config(f)).context_length for f in ("gpt2", "opt", "roberta")}
    assert lengths == {"gpt2": 256, "opt": 256, "roberta": 256}


def test_an_unknown_family_is_refused_with_those_known(tiny_config: Config) -> None:
    known = "bert, gpt2, llama, longformer, opt, roberta"
    with pytest.raises(BackboneError, match=f"'t5' is not one of: {known}"):
        spec_from_config({"model_type": "t5"})
    with pytest.raises(BackboneError, match="projected word embeddings"):
        spec_from_config(tiny_config("opt", word_embed_proj_dim=8))


def test_an_unreachable_source_says_what_to_do(tmp_path: Path) -> None:
    for source in ("gpt2", tmp_path / "nowhere", tmp_path):
        with pytest.raises(BackboneError, match="put its config, tokenizer and safetensors") as e:
            load_backbone(source)
        assert re.escape(str(source)) in re.escape(str(e.value))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_folder_without_its_tokenizer_is_refused(
    family: str, tiny_config: Config, tmp_path: Path
) -> None:
    """Otherwise one is made up, and every descriptor becomes the unknown word or NaN."""
    save_checkpoint(tmp_path, tiny_config(family), torch.float32)
    for file in tmp_path.glob("token*"):
        file.unlink()
    with pytest.raises(BackboneError, match="tokenizer"):
        load_backbone(tmp_path)
