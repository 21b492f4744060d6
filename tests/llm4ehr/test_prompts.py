"""Prompts: each place against the same worked out by hand, order of time, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llm4ehr.backbone import spec_from_config
from llm4ehr.bundle import Network, load_network, save_network
from llm4ehr.episode import Episode
from llm4ehr.model import LLM4EHR, ModelConfig
from llm4ehr.offline import TOLERANCE, score_episodes
from llm4ehr.prompts import (
    KeyValuePrompt,
    PrefixPrompt,
    PromptSpec,
    SuffixPrompt,
    key_value_shape,
)

Make = Callable[..., Network]
K = 4
POSITIONS = ("prefix", "suffix", "kv")
N_HOURS = (20, 8, 1)


def spec(position: str, length: int = K) -> PromptSpec:
    return PromptSpec(position=position, length=length)  # type: ignore[arg-type]


def prompted(make: Make, family: str, position: str, **options: Any) -> LLM4EHR:
    """A network whose prompt has values as large as the hours have."""
    model: LLM4EHR = make(family, prompt=spec(position), **options).model
    assert model.prompt is not None
    torch.manual_seed(7)
    for parameter in model.prompt.parameters():
        parameter.data.normal_()
    return model


def stays() -> tuple[Tensor, Tensor, Tensor]:
    """Series, events and mask of a long stay, a short one and one of a single hour."""
    torch.manual_seed(1)
    mask = torch.arange(20) < torch.tensor(N_HOURS)[:, None]
    return torch.randn(3, 20, 46), torch.rand(3, 20, 9), mask


def plain_pass(model: LLM4EHR, tokens: Tensor) -> Tensor:
    """The backbone over one sequence [T, H] from position 0, everything real."""
    positions = torch.arange(len(tokens))[None]
    v: Tensor = model.backbone(
        tokens[None], torch.ones_like(positions, dtype=torch.bool), positions
    )
    return v[0]


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_papers_prompt_has_its_size() -> None:
    """20 vectors of GPT-2 124M; as keys and values of 12 layers."""
    for position, size in (("prefix", 15_360), ("suffix", 15_360), ("kv", 2 * 12 * 15_360)):
        with torch.device("meta"):
            config = ModelConfig(
                backbone=spec_from_config({"model_type": "gpt2"}), n_series=11, n_event_channels=0,
                n_tokens=1, prompt=spec(position, 20),
            )  # fmt: skip
            model = LLM4EHR(config)
        assert model.prompt is not None
        assert sum(p.numel() for p in model.prompt.parameters()) == size


# Where they stand.


@torch.no_grad()
def test_a_prefix_stands_before_the_hours_of_each_stay(family: str, tiny_network: Make) -> None:
    model = prompted(tiny_network, family, "prefix")
    assert isinstance(model.prompt, PrefixPrompt)
    series, events, mask = stays()
    v = model.encode_hours(series, events, mask)
    assert v.shape == (3, 20, 16)
    tokens = model.series_encoder(series, events)
    for row, n in enumerate(N_HOURS):
        alone = plain_pass(model, torch.cat([model.prompt.vectors, tokens[row, :n]]))
        assert_close(v[row, :n], alone[K:])


@torch.no_grad()
def test_a_suffix_stands_after_the_last_hour_of_each_stay(family: str, tiny_network: Make) -> None:
    """Not after the padding: a stay is read out the same in whatever batch it is."""
    model = prompted(tiny_network, family, "suffix")
    assert isinstance(model.prompt, SuffixPrompt)
    series, events, mask = stays()
    v, summary = model.encode_with_suffix(series, events, mask)
    assert v.shape == (3, 20, 16)
    assert summary.shape == (3, 16)
    tokens = model.series_encoder(series, events)
    for row, n in enumerate(N_HOURS):
        alone = plain_pass(model, torch.cat([tokens[row, :n], model.prompt.vectors]))
        assert_close(v[row, :n], alone[:n])
        assert_close(summary[row], alone[n:].mean(0))
    assert torch.equal(model.encode_hours(series, events, mask)[mask], v[mask])


@torch.no_grad()
def test_a_suffix_changes_hours_of_a_bidirectional_backbone_alone(tiny_network: Make) -> None:
    series, events, mask = stays()
    for family, mode, inert in (("gpt2", "causal", True), ("bert", "native", False)):
        model = prompted(tiny_network, family, "suffix", attention_mode=mode)
        plain = tiny_network(family, attention_mode=mode).model
        plain.load_state_dict(model.state_dict(), strict=False)
        away = (
            model.encode_hours(series, events, mask) - plain.encode_hours(series, events, mask)
        )[mask]
        assert (away.abs().max() < 1e-5) == inert


@torch.no_grad()
def test_keys_and_values_of_a_prefix_do_what_the_prefix_does(
    family: str, tiny_network: Make
) -> None:
    """With the positions that it would have given to the hours."""
    prefix = prompted(tiny_network, family, "prefix")
    model = prompted(tiny_network, family, "kv")
    assert isinstance(prefix.prompt, PrefixPrompt)
    assert isinstance(model.prompt, KeyValuePrompt)
    made = prefix.prompt.key_values(prefix.backbone)
    layers, heads, size = key_value_shape(model.backbone)
    assert len(made) == layers == 2
    for layer, (keys, values) in enumerate(made):
        assert keys.shape == values.shape == (heads, K, size)
        model.prompt.keys.data[layer] = keys
        model.prompt.values.data[layer] = values
    series, events, mask = stays()
    hours = torch.arange(K, K + 20).expand(3, 20)
    v = model.encode_hours(series, events, mask, hours)
    assert_close(v[mask], prefix.encode_hours(series, events, mask)[mask])


def test_key_value_heads_are_those_of_the_backbone(tiny_network: Make) -> None:
    prompt = tiny_network("llama", prompt=spec("kv")).model.prompt
    assert isinstance(prompt, KeyValuePrompt)
    assert prompt.keys.shape == prompt.values.shape == (2, 2, K, 4)  # of 4 query heads


# What holds for all of them.


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
def test_later_hours_do_not_change_earlier_states(
    family: str, tiny_network: Make, position: str
) -> None:
    model = prompted(tiny_network, family, position)
    series, events, mask = stays()
    later = series.clone()
    later[:, 12:] = torch.randn_like(later[:, 12:])
    a, b = (model.encode_hours(x, events, mask) for x in (series, later))
    assert torch.equal(a[:, :12][mask[:, :12]], b[:, :12][mask[:, :12]])
    assert not torch.equal(a[0, 12:], b[0, 12:])


@pytest.mark.parametrize("position", POSITIONS)
def test_every_vector_gets_a_gradient(family: str, tiny_network: Make, position: str) -> None:
    model = prompted(tiny_network, family, position)
    series, events, mask = stays()
    if position == "suffix":
        model.encode_with_suffix(series, events, mask)[1].square().sum().backward()
    else:
        torch.manual_seed(8)
        v = model.encode_hours(series, events, mask)[mask]
        (v * torch.randn_like(v)).sum().backward()
    assert model.prompt is not None
    for parameter in model.prompt.parameters():
        assert parameter.grad is not None
        assert (parameter.grad.abs().amax(-1) > 0).all()
    assert all(p.grad is None for p in model.backbone.parameters())


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
def test_prompts_run_in_bfloat16(tiny_network: Make, position: str) -> None:
    for norm in ("layer", "none"):  # without the norm tokens are bfloat16 themselves
        model = prompted(tiny_network, "gpt2", position, ts_norm=norm)
        series, events, mask = stays()
        v = model.encode_hours(series, events, mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model.encode_hours(series, events, mask)
        assert 0 < (rounded.float() - v)[mask].abs().max() < 0.3


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
def test_a_saved_network_comes_back(
    family: str, tiny_network: Make, tmp_path: Path, position: str
) -> None:
    network = tiny_network(family, prompt=spec(position), adapter=3)
    save_network(tmp_path, network)
    loaded = load_network(tmp_path)
    assert loaded.model.config == network.model.config
    series, events, mask = stays()
    v = network.model.encode_hours(series, events, mask)
    assert torch.equal(loaded.model.encode_hours(series, events, mask), v)


@pytest.mark.parametrize("position", POSITIONS)
def test_a_stay_is_scored_the_same_in_any_batch(
    tiny_network: Make, random_episode: Callable[..., Episode], position: str
) -> None:
    network = tiny_network("llama", prompt=spec(position))
    episodes = [random_episode(seed, n) for seed, n in enumerate((30, 0, 7, 200))]
    together = list(score_episodes(network, episodes))
    for episode, scores in zip(episodes, together, strict=True):
        (alone,) = score_episodes(network, [episode])
        assert scores.hidden.shape == (episode.n_hours, 16)
        np.testing.assert_allclose(scores.hidden, alone.hidden, rtol=0, atol=TOLERANCE.hidden)


# Refused.


@pytest.mark.parametrize(("position", "room"), [("prefix", 252), ("suffix", 252), ("kv", 256)])
def test_hours_beyond_the_positions_are_refused(
    tiny_network: Make, position: str, room: int
) -> None:
    model = tiny_network(prompt=spec(position)).model
    assert model.max_hours == room
    for n in (room, room + 1):
        series, mask = torch.zeros(1, n, 46), torch.ones(1, n, dtype=torch.bool)
        if n == room:
            assert model.encode_hours(series, None, mask).shape == (1, n, 16)
        else:
            with pytest.raises(ValueError, match=f"more than the {room}"):
                model.encode_hours(series, None, mask)


def test_only_a_suffix_cannot_be_streamed(tiny_network: Make) -> None:
    for position in ("prefix", "kv"):
        assert tiny_network(prompt=spec(position)).not_online is None
    network = tiny_network(prompt=spec("suffix"))
    assert network.not_online is not None
    assert "suffix" in network.not_online
    with pytest.raises(ValueError, match="cannot be streamed"):
        network.model.prompt.key_values(network.model.backbone)


def test_a_prompt_takes_positions_and_reach_from_the_hours(tiny_network: Make) -> None:
    """Online a stay may have `max_hours`, at position K + hour but for keys and values."""
    for max_hours, refused in (
        (252, ()),
        (253, ("prefix",)),
        (256, ("prefix",)),
        (257, ("prefix", "kv")),
    ):
        for position in ("prefix", "kv"):
            network = tiny_network(prompt=spec(position))
            longer = replace(network.preprocessing, max_hours=max_hours)
            reason = replace(network, preprocessing=longer).not_online
            assert (reason is not None) == (position in refused)


def test_keys_and_values_need_a_causal_backbone(tiny_network: Make) -> None:
    tiny_network("bert", prompt=spec("prefix"), attention_mode="native")
    with pytest.raises(ValueError, match="causal backbone"):
        tiny_network("bert", prompt=spec("kv"), attention_mode="native")


def test_a_prompt_that_does_not_exist_is_refused() -> None:
    for position, length in (("middle", 4), ("prefix", 0)):
        with pytest.raises(ValueError, match="prefix, suffix, kv"):
            spec(position, length)


def test_only_a_suffix_is_read_out(tiny_network: Make) -> None:
    series, events, mask = stays()
    for options in ({}, {"prompt": spec("prefix")}):
        with pytest.raises(ValueError, match="no suffix"):
            tiny_network(**options).model.encode_with_suffix(series, events, mask)
