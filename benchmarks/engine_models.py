"""The networks that the engine is measured with, and what a tick of them costs at least."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm4ehr.backbone import spec_from_config
from llm4ehr.bundle import Network, load_bundle
from llm4ehr.model import LLM4EHR, ModelConfig
from llm4ehr.prompts import key_value_shape

_OFF = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_GPT2 = {"model_type": "gpt2", "activation_function": "gelu_pytorch_tanh", "n_positions": 1024}
# Shapes beside the default bundle, with random weights.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "6x384": {"n_embd": 384, "n_layer": 6, "n_head": 12},
    "gpt2-124m": {"n_embd": 768, "n_layer": 12, "n_head": 12},
}
MODELS = ("default", "6x384", "gpt2-124m")


def network_of(name: str) -> Network:
    """`default` is the bundle that is served; the others share its features, events and heads."""
    bundle = load_bundle(Path("model_repository"), "llm4ehr", 1).network
    if name == "default":
        return bundle
    config = bundle.model.config
    torch.manual_seed(0)
    model = LLM4EHR(
        ModelConfig(
            backbone=spec_from_config(_GPT2 | SHAPES[name] | _OFF),
            n_series=config.n_series,
            n_event_channels=config.n_event_channels,
            n_tokens=config.n_tokens,
            events="fused",
            heads=config.heads,
        )
    )
    return Network(
        model=model.eval(), preprocessing=bundle.preprocessing, vocabulary=bundle.vocabulary
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What computing one hour of each of several stays cannot do without."""

    flops: float
    bytes: float

    def floor_seconds(self, peak: Peak) -> float:
        """The larger of the time to multiply and the time to read."""
        return max(self.flops / peak.flops_per_s, self.bytes / peak.bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """What a device was measured to do in fp32."""

    flops_per_s: float
    bytes_per_s: float


def tick_cost(network: Network, n_stays: int, context: int) -> Cost:
    """Of hour `context` of `n_stays` stays that have `context` hours before it.

    Multiply-adds of the linear layers and of attention; weights read once, keys and values read
    once. The slots of a stay are written by one position, which is left out.
    """
    weights = _linear_weights(network.model)
    layers, kv_heads, size = key_value_shape(network.model.backbone)
    hidden = network.model.backbone.hidden_size
    keys = n_stays * (context + 1)
    return Cost(
        flops=2.0 * n_stays * weights + 4.0 * keys * hidden * layers,
        bytes=4.0 * weights + 4.0 * 2 * keys * layers * kv_heads * size,
    )


def _linear_weights(model: LLM4EHR) -> int:
    """Weights of the layers that a tick multiplies by; not the tables, not the decoder."""
    used = (model.series_encoder, model.backbone, model.heads)
    tables = {id(m.weight) for part in used for m in part.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for part in used for p in part.parameters() if id(p) not in tables)


def measured_peak(device: torch.device) -> Peak:
    """The best of a few large fp32 products, and of a few copies far beyond any cache."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    out = torch.empty(n, n, device=device)
    product = _best(device, lambda: torch.mm(a, b, out=out))
    elements = (1 << 30) if device.type == "cuda" else (1 << 26)  # 4 GiB or 256 MiB
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    copy = _best(device, lambda: target.copy_(source))
    return Peak(flops_per_s=2.0 * n**3 / product, bytes_per_s=2 * 4.0 * elements / copy)


def _best(device: torch.device, work: Callable[[], object], repeats: int = 8) -> float:
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
