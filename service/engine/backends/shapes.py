"""What the slots of a network look like: sizes, what every slot begins with, how many fit."""

from __future__ import annotations

import math

import torch
from transformers.cache_utils import DynamicCache

from llm4ehr.bundle import Network
from llm4ehr.model import LLM4EHR
from llm4ehr.prompts import KeyValues, key_value_shape


def kv_shape(network: Network) -> dict[str, int]:
    """Layers, key-value heads and head size of the backbone."""
    layers, heads, size = key_value_shape(network.model.backbone)
    return {"n_layers": layers, "n_kv_heads": heads, "head_dim": size}


def token_positions(network: Network) -> int:
    """Event tokens that a slot of the event pass holds; 0 without `events="stream"`."""
    model = network.model
    if model.config.events != "stream":
        return 0
    return model.config.event_window or model.max_tokens


@torch.no_grad()
def before_hours(model: LLM4EHR) -> KeyValues:
    """Keys and values of the prompt, which stand before the first hour."""
    return model.prompt.key_values(model.backbone) if model.prompt else ()


@torch.no_grad()
def before_tokens(model: LLM4EHR) -> KeyValues:
    """Keys and values of the begin token, which stands before the first token of a window."""
    if not len(model.begin):
        return ()
    cache = DynamicCache()
    at = torch.zeros(1, 1, dtype=torch.long, device=model.begin.device)
    model.backbone(model.begin[None], torch.ones_like(at, dtype=torch.bool), at, cache)
    return [(keys[0], values[0]) for keys, values, _ in cache]


def slot_bytes(network: Network) -> int:
    """Memory of a slot, with that of the event pass."""
    model = network.model
    positions = network.preprocessing.max_hours + (model.prompt.length if model.prompt else 0)
    if tokens := token_positions(network):
        positions += tokens + len(model.begin)
    return 2 * 4 * positions * math.prod(key_value_shape(model.backbone))


def slots_for(network: Network, memory_bytes: int) -> int:
    """How many slots fit into a memory budget; at least one."""
    return max(memory_bytes // slot_bytes(network), 1)
