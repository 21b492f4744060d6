"""Tuning strategies: what of a pre-trained network learns, and what is added to it."""

from __future__ import annotations

from dataclasses import replace

from llm4ehr.bundle import Network
from llm4ehr.model import LLM4EHR
from training.config import FinetuneConfig
from training.data.phenotypes import PHENOTYPES


def with_heads(network: Network, config: FinetuneConfig) -> Network:
    """The pre-trained network with fresh heads, frozen or not as the tuning strategy says."""
    old = network.model
    backbone = old.config.backbone
    if config.dropout is not None:
        # Attention keeps its own rate: the fused kernels are fast without dropout only.
        rates = {
            key: config.dropout
            for key in old.backbone.model.config.to_dict()
            if key.endswith(("pdrop", "dropout", "dropout_prob")) and not key.startswith("att")
        }
        backbone = replace(backbone, config=backbone.config | rates)
    # A backbone trained from random weights comes as not frozen; linear tuning freezes it too.
    backbone = replace(backbone, frozen=config.tuning.strategy == "linear")
    heads = {task: len(PHENOTYPES) if task == "phenotyping" else 1 for task in config.tasks}
    model = LLM4EHR(replace(old.config, backbone=backbone, head=config.head, heads=heads))
    missing, unexpected = model.load_state_dict(old.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("heads.") for name in missing)
    # Tokens and decoder belong to pre-training: nothing here gives them a gradient.
    model.tokens.requires_grad_(False)
    model.decoder.requires_grad_(False)
    model.event_patch.requires_grad_(False)
    model.series_encoder.requires_grad_(config.tuning.strategy == "end_to_end")
    return replace(network, model=model)
