"""Bottleneck adapters: how many, where, and that the backbone's own weights keep their names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from llm4ehr.adapters import Adapter, add_adapters
from llm4ehr.backbone import Backbone, spec_from_config
from llm4ehr.bundle import Network, load_network, save_network
from llm4ehr.model import ModelConfig

Make = Callable[..., Network]
Config = Callable[..., dict[str, Any]]


def adapter_parameters(backbone: Backbone) -> list[nn.Parameter]:
    adapters = (m for m in backbone.modules() if isinstance(m, Adapter))
    return [parameter for adapter in adapters for parameter in adapter.parameters()]


def stays(n: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Series, events and mask of a long and a short stay."""
    torch.manual_seed(1)
    mask = torch.arange(n) < torch.tensor([[n], [8]])
    return torch.randn(2, n, 46), torch.rand(2, n, 9), mask


def roused(network: Network) -> Network:
    """With adapters that do something."""
    torch.manual_seed(2)
    for parameter in adapter_parameters(network.model.backbone):
        parameter.data.normal_(std=0.3)
    return network


@pytest.mark.parametrize(("width", "size"), [(64, 2_379_264), (96, 3_559_680), (128, 4_740_096)])
def test_the_papers_adapters_have_its_sizes(width: int, size: int) -> None:
    with torch.device("meta"):
        backbone = Backbone(spec_from_config({"model_type": "gpt2"}))  # the defaults are 124M
        add_adapters(backbone, width)
    assert sum(p.numel() for p in adapter_parameters(backbone)) == size


@given(st.integers(1, 40))
def test_any_width_has_the_size_of_the_formula(tiny_config: Config, width: int) -> None:
    for family in ("gpt2", "opt", "llama", "bert", "roberta", "longformer"):
        with torch.device("meta"):
            backbone = Backbone(spec_from_config(tiny_config(family)))
            add_adapters(backbone, width)
        size = sum(p.numel() for p in adapter_parameters(backbone))
        assert size == 2 * 2 * (2 * 16 * width + 16 + width)


def test_every_block_has_two_before_its_residuals(family: str, tiny_config: Config) -> None:
    """What leaves each of the two projections is what its weights give, corrected."""
    torch.manual_seed(0)
    backbone = Backbone(spec_from_config(tiny_config(family)))
    ends = ("c_proj", "out_proj", "fc2", "o_proj", "down_proj", "output.dense")
    found = {n: m for n, m in backbone.model.named_modules() if n.endswith(ends)}
    assert len(found) == 4
    x = torch.randn(3, 5, 64)
    # Conv1D has its weights transposed.
    fits = {n: x[..., : m.weight.shape[0 if "c_proj" in n else 1]] for n, m in found.items()}
    before = {n: found[n](fits[n]) for n in found}
    add_adapters(backbone, 8)
    for name, projection in found.items():
        assert isinstance(projection.adapter, Adapter)
        expected = before[name] + projection.adapter(before[name])
        assert torch.equal(projection(fits[name]), expected)
    assert sum(isinstance(m, Adapter) for m in backbone.modules()) == 4


@torch.no_grad()
def test_weights_without_adapters_load_and_the_answer_hardly_changes(
    family: str, tiny_network: Make
) -> None:
    plain, adapted = tiny_network(family).model, tiny_network(family, adapter=8, seed=9).model
    missing, unexpected = adapted.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert len(missing) == 4 * 4
    assert all(".adapter." in name for name in missing)
    series, events, mask = stays()
    v, same = adapted.encode_hours(series, events, mask), plain.encode_hours(series, events, mask)
    assert 0 < (v - same)[mask].abs().max() < 1e-3
    assert plain.config.adapter is None


@torch.no_grad()
def test_adapters_act_in_both_passes_and_keep_the_order_of_time(
    family: str, tiny_network: Make
) -> None:
    plain, adapted = tiny_network(family).model, roused(tiny_network(family, adapter=8)).model
    series, events, mask = stays()
    v = adapted.encode_hours(series, events, mask)
    assert (v - plain.encode_hours(series, events, mask))[mask].abs().max() > 0.1
    later = series.clone()
    later[:, 12:] = torch.randn_like(later[:, 12:])
    changed = adapted.encode_hours(later, events, mask)
    assert torch.equal(changed[:, :12], v[:, :12])
    assert not torch.equal(changed[0, 12:], v[0, 12:])
    ids = torch.arange(10)[None]
    there = torch.ones_like(ids, dtype=torch.bool)
    z, same = adapted.encode_events(ids, there), plain.encode_events(ids, there)
    assert (z - same).abs().max() > 0.1


def test_adapters_learn_in_a_frozen_backbone_and_nothing_else_does(
    family: str, tiny_network: Make
) -> None:
    backbone = tiny_network(family, adapter=8).model.backbone
    learning = {id(p) for p in backbone.parameters() if p.requires_grad}
    assert learning == {id(p) for p in adapter_parameters(backbone)}
    backbone.train()
    assert not any(m.training for m in backbone.modules())


@torch.no_grad()
def test_a_saved_network_comes_back(family: str, tiny_network: Make, tmp_path: Path) -> None:
    network = roused(tiny_network(family, adapter=8))
    save_network(tmp_path, network)
    loaded = load_network(tmp_path)
    assert loaded.model.config == network.model.config
    assert loaded.model.config.adapter == 8
    series, events, mask = stays()
    v = network.model.encode_hours(series, events, mask)
    assert torch.equal(loaded.model.encode_hours(series, events, mask), v)


def test_a_config_from_before_adapters_is_read(tiny_network: Make) -> None:
    config = tiny_network().model.config
    body = json.loads(json.dumps(config.to_json()))
    del body["adapter"], body["prompt"]
    assert ModelConfig.from_json(body) == config


def test_a_width_below_one_is_refused(tiny_network: Make) -> None:
    with pytest.raises(ValueError, match="width 0"):
        tiny_network(adapter=0)
