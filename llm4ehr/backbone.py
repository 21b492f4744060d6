"""Any Hugging Face language model as a causal encoder of precomputed embeddings.

The backbone never sees text at run time: hours and events reach it through `inputs_embeds`, with
explicit positions (OPT and RoBERTa would otherwise derive them from other things than the hour) and
an explicit mask, unless the caller vouches for positions 0..T-1 and padding on the right (without
one, transformers takes a jump in the positions for a packed batch and cuts the attention there).
Its word embeddings serve once, to initialise the clinical tokens, and are then dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

AttentionMode = Literal["causal", "native"]


class BackboneError(ValueError):
    """The backbone cannot be built or found; the message says what to do."""


@dataclass(frozen=True, slots=True)
class _Family:
    """What differs between model families.

    `decoder_switch`: causal only with `is_decoder`; without the switch it is causal by nature.
    `position_offset` is added to the hour index. `pad` is the family's own padding id, which the
    word table must cover.
    """

    model_class: str
    decoder_switch: bool = False
    position_offset: int = 0
    pad: int | None = None


_FAMILIES = {
    "gpt2": _Family("GPT2Model"),
    "opt": _Family("OPTModel", pad=1),
    "llama": _Family("LlamaModel"),
    "bert": _Family("BertModel", decoder_switch=True, pad=0),
    # RoBERTa counts positions from its padding id + 1.
    "roberta": _Family("RobertaModel", decoder_switch=True, position_offset=2, pad=1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneSpec:
    """A backbone that can be rebuilt without the hub: its Hugging Face config and how it is run.

    `attention_mode` (M17) "native" leaves BERT-type models bidirectional: for reproducing the
    paper's tables only, since every hour then sees the whole stay. `context` shortens the longest
    sequence below what the positions allow. With a `window` (Longformer) a token attends to so many
    tokens on either side, or before it, and no further.
    """

    config: dict[str, Any]
    context: int | None = None
    window: int | None = None
    attention_mode: AttentionMode = "causal"
    frozen: bool = True

    @property
    def model_type(self) -> str:
        """The Hugging Face family."""
        return str(self.config["model_type"])

    @property
    def causal(self) -> bool:
        """Whether the output of hour t depends on hours up to t only."""
        family = _family(self.model_type)
        return self.attention_mode == "causal" or not family.decoder_switch


class Backbone(nn.Module):
    """A frozen (or trainable) backbone that maps embeddings [B, T, H] to hidden states [B, T, H].

    Built from a spec it has random weights; `load_backbone` brings pre-trained ones.
    """

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        self._family = _family(spec.model_type)
        self.model = _build(spec, self._family)
        if spec.frozen:
            self.requires_grad_(False)
        self.train()

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.model.config.hidden_size)

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens."""
        table = int(self.model.config.max_position_embeddings) - self._family.position_offset
        return table if self.spec.context is None else min(table, self.spec.context)

    def train(self, mode: bool = True) -> Backbone:
        """As nn.Module.train, but a frozen backbone stays in eval mode: its dropout stays off."""
        return super().train(mode and not self.spec.frozen)

    def forward(
        self,
        embeds: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        cache: Cache | None = None,
        *,
        right_padded: bool = False,
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, H].

        `mask` [B, T] is true for real tokens; None is for callers whose `cache` states what each
        row attends to. `positions` [B, T] are hour or token indices from 0.

        `right_padded` says that every row of `positions` is 0..T-1 and that real tokens come first.
        A causal backbone then needs no mask, which lets torch choose its causal kernel; states of
        padding are void.
        """
        attention: Tensor | None = None
        window = self.spec.window
        if mask is not None and window is not None and mask.shape[1] > window + 1:
            attention = self._band(mask, embeds.shape[1], window)
        elif mask is not None and not (right_padded and self.spec.causal):
            attention = mask.long()
        out = self.model(
            inputs_embeds=embeds,
            attention_mask=attention,
            position_ids=positions + self._family.position_offset,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _band(self, mask: Tensor, n_rows: int, window: int) -> Tensor:
        """What each of the last `n_rows` of K tokens attends to, [B, 1, n_rows, K]."""
        key = torch.arange(mask.shape[1], device=mask.device)
        distance = key[-n_rows:, None] - key
        near = (distance <= window) & (distance >= (0 if self.spec.causal else -window))
        return (near & mask[:, None, :])[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBackbone:
    """A backbone with pre-trained weights and the embedding of texts by its own vocabulary.

    `embed_texts` returns the mean of the sub-token rows of each text, [n, H]. `begin` is the row of
    the model's begin-of-sequence token, [1, H], or [0, H] where it has none.
    """

    backbone: Backbone
    embed_texts: Callable[[Sequence[str]], Tensor]
    begin: Tensor


def load_backbone(
    source: str | Path, *, attention_mode: AttentionMode = "causal", frozen: bool = True
) -> LoadedBackbone:
    """Load pre-trained weights from the hub or a local folder, in fp32.

    Longformer checkpoints become RoBERTa with a band for a mask, which equals their local attention
    and can be made causal. Their weights of global attention are not used.
    Raises BackboneError when the model cannot be found or its family is not supported.
    """
    try:
        # transformers loads in the checkpoint's dtype unless told otherwise.
        native = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
        # Without its files transformers makes up a tokenizer that knows no word.
        words = tokenizer("heart rate", add_special_tokens=False)["input_ids"]
        if set(words) <= {tokenizer.unk_token_id}:
            raise OSError("it has no tokenizer files")
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"cannot load the backbone {str(source)!r}: {error}. Without access to the Hugging "
            "Face hub, put its config, tokenizer and safetensors files into one folder and name "
            "that folder as the source."
        ) from error
    spec = spec_from_config(native.config, attention_mode=attention_mode, frozen=frozen)
    backbone = Backbone(spec)
    table = native.get_input_embeddings().weight.detach().clone()
    words = _word_table_name(backbone.model)
    state = {
        name: weight
        for name, weight in native.state_dict().items()
        if name != words and not name.startswith("pooler.") and "_global." not in name
    }
    missing, unexpected = backbone.model.load_state_dict(state, strict=False)
    if missing != [words] or unexpected:
        raise BackboneError(f"weights of {str(source)!r} do not fit: {missing} {unexpected}")

    def embed_texts(texts: Sequence[str]) -> Tensor:
        rows = [table[tokenizer(t, add_special_tokens=False)["input_ids"]].mean(0) for t in texts]
        return torch.stack(rows) if rows else table.new_empty(0, table.shape[1])

    # GPT-2's only special token ends a text; everyone else's first token begins one.
    begin_id = tokenizer.cls_token_id if spec.model_type != "gpt2" else None
    if begin_id is None and spec.model_type in ("opt", "llama"):
        begin_id = tokenizer.bos_token_id
    begin = table[[] if begin_id is None else [begin_id]]
    return LoadedBackbone(backbone=backbone, embed_texts=embed_texts, begin=begin)


def spec_from_config(
    config: PretrainedConfig | dict[str, Any],
    *,
    attention_mode: AttentionMode = "causal",
    frozen: bool = True,
) -> BackboneSpec:
    """The spec of a Hugging Face config, without what is not needed to rebuild the backbone.

    The word table shrinks to the smallest that the padding id allows: words are never looked up.
    Raises BackboneError for a family that is not supported.
    """
    body = dict(config) if isinstance(config, dict) else config.to_dict()
    window = None
    if body.get("model_type") == "longformer":
        widths = body.pop("attention_window")
        layers = set(widths) if isinstance(widths, list) else {widths}
        if len(layers) > 1:
            raise BackboneError(f"Longformer with unequal attention windows {sorted(layers)}")
        window = int(layers.pop()) // 2
        body["model_type"] = "roberta"
        body.pop("onnx_export", None)
    family = _family(body.get("model_type"))
    for key in ("transformers_version", "architectures", "dtype", "_name_or_path", "sep_token_id"):
        body.pop(key, None)
    if body.get("word_embed_proj_dim", body.get("hidden_size")) != body.get("hidden_size"):
        raise BackboneError("OPT with projected word embeddings is not supported")
    body |= {
        "vocab_size": 1 if family.pad is None else family.pad + 1,
        "pad_token_id": family.pad,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family.decoder_switch:
        body["is_decoder"] = attention_mode == "causal"
    return BackboneSpec(config=body, window=window, attention_mode=attention_mode, frozen=frozen)


def _family(model_type: Any) -> _Family:
    try:
        return _FAMILIES[model_type]
    except KeyError:
        known = ", ".join(sorted([*_FAMILIES, "longformer"]))
        raise BackboneError(f"backbone family {model_type!r} is not one of: {known}") from None


def _build(spec: BackboneSpec, family: _Family) -> PreTrainedModel:
    options = {"add_pooling_layer": False} if family.decoder_switch else {}
    config = AutoConfig.for_model(**spec.config)
    model: PreTrainedModel = getattr(transformers, family.model_class)(config, **options)
    for name, weight in model.named_parameters():
        if name == _word_table_name(model):
            weight.requires_grad_(False).zero_()
    return model


def _word_table_name(model: PreTrainedModel) -> str:
    table = model.get_input_embeddings().weight
    return next(name for name, weight in model.named_parameters() if weight is table)
