"""The network: sizes of the paper, pooling, the two passes, heads, and what may move."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm4ehr.backbone import spec_from_config
from llm4ehr.bundle import Network
from llm4ehr.model import LLM4EHR, ModelConfig, SeriesEncoder, patch_counts

Make = Callable[..., Network]
N_SERIES, N_EVENTS, N_TOKENS = 46, 9, 13


def n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def stays(b: int = 3, t: int = 12, seed: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Series, event channels and hour mask of stays of different length."""
    torch.manual_seed(seed)
    lengths = torch.tensor([t, max(t - 5, 1), 1])[:b]
    mask = torch.arange(t) < lengths[:, None]
    return torch.randn(b, t, N_SERIES), torch.rand(b, t, N_EVENTS), mask


def events(seed: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, their hours and mask: full, short and none at all."""
    torch.manual_seed(seed)
    mask = torch.arange(7) < torch.tensor([7, 4, 0])[:, None]
    hours = torch.where(mask, torch.randint(0, 12, (3, 7)).sort(1).values, -1)
    return torch.randint(0, N_TOKENS, (3, 7)), hours, mask


def test_the_papers_encoder_and_decoder_have_its_sizes(
    tiny_config: Callable[..., dict[str, Any]],
) -> None:
    spec = spec_from_config(tiny_config("gpt2", n_embd=768, n_layer=1, n_head=12, n_positions=8))
    config = ModelConfig(
        backbone=spec, n_series=11, n_event_channels=0, n_tokens=1, ts_norm="batch"
    )
    model = LLM4EHR(config)
    assert n_parameters(model.series_encoder) == 601_344
    assert n_parameters(model.decoder) == 8_459


@pytest.mark.parametrize(("norm", "extra"), [("layer", 32), ("batch", 32), ("none", 0)])
def test_the_norm_of_the_encoder_is_chosen_by_name(
    tiny_network: Make, norm: str, extra: int
) -> None:
    config = replace(tiny_network(events="none").model.config, ts_norm=norm)
    encoder = SeriesEncoder(config, 16)
    assert n_parameters(encoder) == 46 * 16 + 16 + 16 * 16 + 16 + extra
    out = encoder(torch.randn(4, 5, N_SERIES), None)
    assert out.shape == (4, 5, 16)
    if norm == "layer":
        torch.testing.assert_close(out.mean(-1), torch.zeros(4, 5), rtol=0, atol=1e-5)
    if norm == "batch":
        torch.testing.assert_close(out.mean((0, 1)), torch.zeros(16), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_in_eval_mode_an_hour_is_embedded_by_itself(tiny_network: Make, norm: str) -> None:
    encoder = tiny_network(ts_norm=norm).model.series_encoder
    series, channels, _ = stays()
    whole = encoder(series, channels)
    torch.testing.assert_close(encoder(series[:, 3], channels[:, 3]), whole[:, 3])


# Pooling, against loops.


def naive_mean(x: Tensor, patch: Tensor, mask: Tensor, n: int) -> Tensor:
    out = torch.zeros(x.shape[0], n, x.shape[2])
    for b in range(x.shape[0]):
        for q in range(n):
            rows = [x[b, i] for i in range(x.shape[1]) if mask[b, i] and patch[b, i] == q]
            if rows:
                out[b, q] = torch.stack(rows).mean(0)
    return out


@torch.no_grad()
@pytest.mark.parametrize("n_hours", [1, 5, 12, 15])
def test_hours_are_pooled_by_patch(tiny_network: Make, n_hours: int) -> None:
    model = tiny_network().model
    v = torch.randn(3, n_hours, 16)
    mask = torch.rand(3, n_hours) < 0.6
    patch = (torch.arange(n_hours) // 5).expand(3, n_hours)
    expected = naive_mean(v, patch, mask, -(-n_hours // 5))
    torch.testing.assert_close(model.pool_hours(v, mask), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_tokens_are_pooled_by_the_patch_of_their_hour(tiny_network: Make) -> None:
    model = tiny_network().model
    torch.manual_seed(0)
    z = torch.randn(3, 20, 16)
    hours = torch.randint(-1, 24, (3, 20))  # before admission, and beyond the last patch
    mask = torch.rand(3, 20) < 0.7
    patch = torch.div(hours, 5, rounding_mode="floor")
    pooled = model.pool_events(z, hours, mask, 3)
    torch.testing.assert_close(pooled, naive_mean(z, patch, mask, 3), rtol=0, atol=1e-6)
    n_inside = (mask & (hours >= 0) & (hours < 5)).sum(1)
    inside = mask & (hours >= 0)
    assert patch_counts(patch, inside, 5)[:, 0].tolist() == n_inside.tolist()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "tanh", "ehr_linear_tanh"])
def test_patch_heads_act_after_the_mean(tiny_network: Make, kind: str) -> None:
    model = tiny_network(patch_head=kind).model
    v, z = 3 * torch.randn(1, 5, 16), 3 * torch.randn(1, 5, 16)
    mask, hours = torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 5, dtype=torch.long)
    v_mean, z_mean = v.mean(1, keepdim=True), z.mean(1, keepdim=True)
    if kind == "ehr_linear_tanh":
        z_mean = model.event_patch[0](z_mean)
    if kind != "none":
        v_mean, z_mean = v_mean.tanh(), z_mean.tanh()
    torch.testing.assert_close(model.pool_hours(v, mask), v_mean)
    torch.testing.assert_close(model.pool_events(z, hours, mask, 1), z_mean)
    extra = n_parameters(model) - n_parameters(tiny_network().model)
    assert extra == (16 * 16 + 16 if kind == "ehr_linear_tanh" else 0)


# The two passes.


@torch.no_grad()
def test_hours_are_causal_and_padding_is_inert(family: str, tiny_network: Make) -> None:
    model = tiny_network(family).model
    series, channels, mask = stays()
    other, other_channels, _ = stays(seed=9)
    v = model.encode_hours(series, channels, mask)
    now = 4
    later = torch.arange(12)[None, :, None] > now
    changed = model.encode_hours(
        torch.where(later, other, series), torch.where(later, other_channels, channels), mask
    )
    assert torch.equal(v[:, : now + 1], changed[:, : now + 1])
    assert not torch.equal(v[0, now + 1], changed[0, now + 1])
    padded = model.encode_hours(
        torch.where(mask[..., None], series, other), channels * mask[..., None], mask
    )
    assert torch.equal(v[mask], padded[mask])


@torch.no_grad()
def test_positions_are_hours_from_admission(tiny_network: Make) -> None:
    model = tiny_network().model
    series, channels, mask = stays(1)
    hours = torch.arange(12).expand(1, 12)
    default = model.encode_hours(series, channels, mask)
    assert torch.equal(model.encode_hours(series, channels, mask, hours), default)
    assert not torch.equal(model.encode_hours(series, channels, mask, hours + 1), default)


@torch.no_grad()
def test_events_reach_the_hours_only_when_fused(tiny_network: Make) -> None:
    series, channels, mask = stays()
    none = tiny_network(events="none").model
    assert torch.equal(
        none.encode_hours(series, channels, mask), none.encode_hours(series, None, mask)
    )
    fused = tiny_network(events="fused").model
    hidden = channels.clone()
    hidden[0] = 0
    seen, unseen = (fused.encode_hours(series, c, mask) for c in (channels, hidden))
    without = fused.encode_hours(series, torch.zeros_like(channels), mask)
    assert torch.equal(unseen[0], without[0])  # a stay whose events are hidden has none
    assert not torch.equal(unseen[0], seen[0])
    assert torch.equal(unseen[1:], seen[1:])


@torch.no_grad()
@pytest.mark.parametrize("begin_token", [False, True])
def test_event_padding_is_inert_and_the_begin_token_is_dropped(
    family: str, tiny_network: Make, begin_token: bool
) -> None:
    model = tiny_network(family, begin_token=begin_token).model
    model.begin.copy_(torch.randn_like(model.begin))
    ids, _, mask = events()
    z = model.encode_events(ids, mask)
    assert z.shape == (3, 7, 16)
    assert torch.isfinite(z).all()  # also where a stay has no event at all
    changed = torch.where(mask, ids, (ids + 1) % N_TOKENS)
    assert torch.equal(model.encode_events(changed, mask)[mask], z[mask])
    third = ids.clone()
    third[0, 3] = (ids[0, 3] + 1) % N_TOKENS
    other = model.encode_events(third, mask)[0]
    assert torch.equal(other[:3], z[0, :3])  # row i is token i, and sees what came before
    assert not torch.equal(other[3], z[0, 3])
    assert model.max_tokens == model.backbone.context_length - begin_token
    if begin_token:
        model.begin.add_(torch.randn_like(model.begin))
        assert not torch.equal(model.encode_events(ids, mask), z)


def test_a_stay_without_events_gives_finite_gradients(family: str, tiny_network: Make) -> None:
    model = tiny_network(family, frozen=False).model
    ids, hours, mask = events()
    model.pool_events(model.encode_events(ids, mask), hours, mask, 3)[:2].sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)


# Heads, and what may move.


@torch.no_grad()
def test_heads_are_those_of_the_config(tiny_network: Make) -> None:
    model = tiny_network(heads={"mortality": 1, "phenotyping": 25}).model
    v = torch.randn(2, 6, 16)
    out = model.predict(v)
    assert {task: o.shape for task, o in out.items()} == {
        "mortality": (2, 6, 1),
        "phenotyping": (2, 6, 25),
    }
    torch.testing.assert_close(model.predict(v[:, 3])["phenotyping"], out["phenotyping"][:, 3])
    assert tiny_network(heads={}).model.predict(v) == {}
    assert model.reconstruct(v).shape == (2, 6, 11)
    mlp = tiny_network(heads={"mortality": 1}, head="mlp").model.heads
    assert n_parameters(model.heads["mortality"]) == 17
    assert n_parameters(mlp) == 16 * 16 + 16 + 17


def test_a_frozen_backbone_does_not_move_but_new_tokens_do(family: str, tiny_network: Make) -> None:
    """Bit-equal with weight decay too, which moves rows that merely have no gradient."""
    model = tiny_network(family, begin_token=True).model.train()
    model.begin.fill_(0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    series, channels, mask = stays()
    ids, _, token_mask = events()
    v = model.encode_hours(series, channels, mask)
    z = model.encode_events(ids, token_mask)
    x = model.reconstruct(v)
    (v.square().sum() + z[token_mask].square().sum() + x.square().sum()).backward()
    optimiser.step()
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert not {name for name in moved if name.startswith(("backbone.", "begin"))}
    assert {"tokens.weight", "decoder.weight", "series_encoder.series.0.weight"} <= moved


def test_a_config_survives_json(tiny_network: Make) -> None:
    config = tiny_network(
        "longformer", frozen=False, attention_mode="native", patch_head="tanh", begin_token=True
    ).model.config
    text = json.dumps(config.to_json())
    again = ModelConfig.from_json(json.loads(text))
    assert json.dumps(again.to_json()) == text
    built = {n: p.shape for n, p in LLM4EHR(again).state_dict().items()}
    assert built == {n: p.shape for n, p in LLM4EHR(config).state_dict().items()}
    with pytest.raises(TypeError, match="surprise"):
        ModelConfig.from_json(json.loads(text) | {"surprise": 1})
