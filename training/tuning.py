"""Tuning strategies: what of a pre-trained network learns, and what is added to it.

    linear       the heads
    end_to_end   everything in the series pass, and the heads
    adapter      bottlenecks in the backbone (`llm4ehr.adapters`), and the heads
    prompt       vectors beside the hours (`llm4ehr.prompts`), and the heads
    lora         low-rank updates of the attention, and the heads

The backbone is frozen but for `end_to_end`. The series encoder learns with `end_to_end`, and with
the last three if asked. Decoder and patch heads belong to pre-training, and so do the clinical
tokens unless heads read the event stream and everything learns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import nn

from llm4ehr.backbone import BackboneSpec
from llm4ehr.bundle import Network
from llm4ehr.model import LLM4EHR
from llm4ehr.prompts import PromptSpec
from training.config import (
    AdapterTuning,
    FinetuneConfig,
    LoraTuning,
    PlainTuning,
    PromptTuning,
    Tuning,
)
from training.data.phenotypes import PHENOTYPES
from training.processes import n_processes

# Queries and values, as in the paper of LoRA; GPT-2 has them in one projection with the keys.
_ATTENTION = {
    "gpt2": ["c_attn"],
    "opt": ["q_proj", "v_proj"],
    "llama": ["q_proj", "v_proj"],
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
}


def with_heads(network: Network, config: FinetuneConfig) -> Network:
    """The pre-trained network with fresh heads and what the strategy adds, and what learns of it.

    With `lora`, call `merge` after training. Raises ValueError for a strategy that the network has
    no room for.
    """
    old, tuning = network.model, config.tuning
    if old.config.ts_norm == "batch" and trains_encoder(tuning) and n_processes() > 1:
        raise ValueError("ts_norm: batch, trained, needs the whole batch in one process")
    spec = _with_dropout(old.config.backbone, old, config.dropout)
    # A backbone trained from random weights comes as not frozen; all but one strategy freeze it.
    spec = replace(spec, frozen=tuning.strategy != "end_to_end")
    heads = {task: len(PHENOTYPES) if task == "phenotyping" else 1 for task in config.tasks}
    prompt = None
    if isinstance(tuning, PromptTuning):
        prompt = PromptSpec(position=tuning.position, length=tuning.length)
    made = replace(
        old.config,
        backbone=spec,
        events=_events(old, config),
        head=config.head,
        heads=heads,
        adapter=tuning.width if isinstance(tuning, AdapterTuning) else None,
        prompt=prompt,
    )
    model = LLM4EHR(made)
    if isinstance(tuning, PromptTuning):
        _check_room(model, tuning, config.max_hours)
    missing, unexpected = model.load_state_dict(old.state_dict(), strict=False)
    assert not unexpected
    assert all(n.startswith(("heads.", "prompt.")) or ".adapter." in n for n in missing)
    if isinstance(tuning, LoraTuning):
        _add_lora(model, tuning)
    _choose(model, tuning)
    return replace(network, model=model)


def _events(model: LLM4EHR, config: FinetuneConfig) -> Literal["none", "fused", "stream"]:
    """How heads read events. Raises ValueError where the encoder cannot be read so."""
    if config.events is not None and model.config.events == "fused":
        raise ValueError(
            f"events: {config.events}: this encoder was pre-trained with events: fused, it reads "
            "them hour by hour"
        )
    if config.events == "stream" and model.config.event_window is None:
        raise ValueError(
            "events: stream: this encoder was pre-trained without an event_window, the tokens that "
            "a stream may look back"
        )
    return config.events or model.config.events


def trains_encoder(tuning: Tuning) -> bool:
    """Whether the series encoder learns."""
    if isinstance(tuning, PlainTuning):
        return tuning.strategy == "end_to_end"
    return tuning.train_series_encoder


def set_train_mode(model: LLM4EHR, tuning: Tuning) -> None:
    """As `model.train()`, but what is frozen stays in eval mode.

    Dropout is off there, and batch norm does not move its running statistics.
    """
    model.train()
    if not trains_encoder(tuning):
        model.series_encoder.eval()
    for module in model.backbone.modules():
        if isinstance(dropout := getattr(module, "lora_dropout", None), nn.Module):
            dropout.train()


def merge(network: Network) -> Network:
    """Add low-rank updates to the weights that they belong to and drop them, in place.

    Afterwards nothing tells the network from one that was tuned as a whole. Without LoRA nothing
    happens.
    """
    from peft.tuners.lora import LoraLayer

    backbone = network.model.backbone.model
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                child.merge()
                setattr(parent, name, child.get_base_layer())
    vars(backbone).pop("peft_config", None)
    return network


def _with_dropout(spec: BackboneSpec, model: LLM4EHR, rate: float | None) -> BackboneSpec:
    if rate is None:
        return spec
    # Attention keeps its own rate: the fused kernels are fast without dropout only.
    rates = {
        key: rate
        for key in model.backbone.model.config.to_dict()
        if key.endswith(("pdrop", "dropout", "dropout_prob")) and not key.startswith("att")
    }
    return replace(spec, config=spec.config | rates)


def _check_room(model: LLM4EHR, tuning: PromptTuning, max_hours: int) -> None:
    if max_hours > model.max_hours:
        raise ValueError(
            f"the backbone has {model.backbone.context_length} positions: beside a prompt of "
            f"{tuning.length} a stay has at most {model.max_hours} hours, set max_hours to that"
        )
    if tuning.position == "suffix" and model.config.events == "stream":
        raise ValueError("a suffix prompt has no state of the event stream: use prefix or kv")


def _add_lora(model: LLM4EHR, tuning: LoraTuning) -> None:
    from peft import LoraConfig, inject_adapter_in_model  # slow to import, and seldom needed

    family = model.config.backbone.model_type
    options = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,  # type: ignore[arg-type]  # a fraction does as well
        lora_dropout=tuning.dropout,
        target_modules=_ATTENTION[family],
        fan_in_fan_out=family == "gpt2",  # its Conv1D keeps weights transposed
    )
    inject_adapter_in_model(options, model.backbone.model)


def _choose(model: LLM4EHR, tuning: Tuning) -> None:
    """Set which parameters learn. Whether those of the backbone do, its spec and peft have said."""
    for name, parameter in model.named_parameters():
        if name.startswith("series_encoder."):
            parameter.requires_grad_(trains_encoder(tuning))
        elif name.startswith("tokens."):  # they belong to pre-training, unless heads read them
            stream = model.config.events == "stream"
            parameter.requires_grad_(stream and tuning.strategy == "end_to_end")
        elif not name.startswith(("backbone.", "heads.", "prompt.")):
            parameter.requires_grad_(False)
    if isinstance(tuning, AdapterTuning) and tuning.train_norms:
        for module in model.backbone.modules():
            if "Norm" in type(module).__name__:
                module.requires_grad_(True)
