"""Events as a second stream: windows over long sequences, and the state that heads read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from llm4ehr.bundle import Network
from llm4ehr.episode import Episode, event_tokens
from llm4ehr.model import LLM4EHR, ModelConfig
from llm4ehr.offline import TOLERANCE, score_episodes

Make = Callable[..., Network]
Stay = Callable[..., Episode]
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
N_HOURS, N_TOKENS = 12, 13


def stays(seed: int = 1, n: int = 30) -> Batch:
    """What `encode_stay` takes, of three stays: full, short, and a single hour without a token."""
    torch.manual_seed(seed)
    hour_mask = torch.arange(N_HOURS) < torch.tensor([N_HOURS, 7, 1])[:, None]
    token_mask = torch.arange(n) < torch.tensor([n, n // 2, 0])[:, None]
    hours = torch.randint(1, N_HOURS, (3, n)).sort(1).values
    return (
        torch.randn(3, N_HOURS, 46), torch.rand(3, N_HOURS, 9), hour_mask,
        torch.randint(0, N_TOKENS, (3, n)), torch.where(token_mask, hours, -1), token_mask,
    )  # fmt: skip


# The window.


@torch.no_grad()
@pytest.mark.parametrize("begin_token", [False, True])
@pytest.mark.parametrize("n", [1, 8, 9, 12, 13, 30])
def test_a_token_sees_from_half_a_window_to_a_whole_one(
    tiny_network: Make, n: int, begin_token: bool
) -> None:
    """Against the same tokens read one chunk after the other, each by itself."""
    windowed = tiny_network(event_window=8, begin_token=begin_token).model
    windowed.begin.fill_(0.5)
    whole = tiny_network(begin_token=begin_token).model
    whole.load_state_dict(windowed.state_dict())
    ids, mask = torch.randint(0, N_TOKENS, (2, n)), torch.ones(2, n, dtype=torch.bool)
    z = windowed.encode_events(ids, mask)
    assert z.shape == (2, n, 16)
    for i in range(n):
        start = max(0, (i // 4 - 1) * 4)
        alone = whole.encode_events(ids[:, start : i + 1], mask[:, start : i + 1])[:, -1]
        torch.testing.assert_close(z[:, i], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_windows_of_a_prefix_are_those_of_the_whole(family: str, tiny_network: Make) -> None:
    model = tiny_network(family, event_window=8).model
    ids, mask = torch.randint(0, N_TOKENS, (2, 29)), torch.ones(2, 29, dtype=torch.bool)
    z = model.encode_events(ids, mask)
    for n in range(1, 29):
        early = model.encode_events(ids[:, :n], mask[:, :n])
        torch.testing.assert_close(early, z[:, :n], rtol=0, atol=1e-5)


@torch.no_grad()
def test_chunks_without_tokens_are_not_read(tiny_network: Make) -> None:
    model = tiny_network(event_window=8).model
    shapes: list[torch.Size] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    lengths = torch.tensor([40, 3, 0, 9])
    mask = torch.arange(40) < lengths[:, None]
    ids = torch.randint(0, N_TOKENS, (4, 40))
    z = model.encode_events(ids, mask)
    assert [tuple(s) for s in shapes] == [(9 + 1 + 1 + 2, 8, 16)]
    assert torch.isfinite(z).all()
    changed = model.encode_events(torch.where(mask, ids, (ids + 1) % N_TOKENS), mask)
    assert torch.equal(changed[mask], z[mask])


def test_a_window_lifts_the_limit_and_must_fit(tiny_network: Make) -> None:
    assert tiny_network().model.max_tokens == 256
    assert tiny_network(event_window=8).model.max_tokens > 10**6
    tiny_network(event_window=256)
    for window in (0, 1, 7):
        with pytest.raises(ValueError, match=f"event_window {window}: .* even"):
            tiny_network(event_window=window)
    with pytest.raises(ValueError, match="longer than the context of the backbone, 255"):
        tiny_network(event_window=256, begin_token=True)


# The state.


@torch.no_grad()
def test_the_state_is_v_and_the_last_token_known(tiny_network: Make) -> None:
    model = tiny_network(events="stream", event_window=8).model
    batch = stays()
    series, events, hour_mask, ids, hours, token_mask = batch
    states = model.encode_stay(*batch)
    assert states.shape == (3, N_HOURS, model.state_size) == (3, N_HOURS, 32)
    assert torch.equal(states[..., :16], model.encode_hours(series, events, hour_mask))
    z = model.encode_events(ids, token_mask)
    for b in range(3):
        for t in range(N_HOURS):
            known = [i for i in range(30) if token_mask[b, i] and hours[b, i] <= t]
            expected = z[b, known[-1]] if known else torch.zeros(16)
            assert torch.equal(states[b, t, 16:], expected)
    assert model.predict(states)["mortality"].shape == (3, N_HOURS, 1)


@torch.no_grad()
@pytest.mark.parametrize("events", ["none", "fused"])
def test_without_a_stream_the_state_is_v(tiny_network: Make, events: str) -> None:
    model = tiny_network(events=events).model
    batch = stays()
    assert model.state_size == 16
    assert torch.equal(model.encode_stay(*batch), model.encode_hours(*batch[:3]))


@torch.no_grad()
def test_a_stay_whose_tokens_are_hidden_has_an_empty_stream(tiny_network: Make) -> None:
    model = tiny_network(events="stream", event_window=8).model
    *others, token_mask = stays()
    states = model.encode_stay(*others, torch.zeros_like(token_mask))
    assert torch.equal(states[..., 16:], torch.zeros(3, N_HOURS, 16))
    assert torch.isfinite(states).all()


@torch.no_grad()
def test_what_is_later_changes_no_state(family: str, tiny_network: Make) -> None:
    model = tiny_network(family, events="stream", event_window=8).model
    series, events, hour_mask, ids, hours, token_mask = stays()
    other = stays(seed=2)
    now = 5
    later = torch.arange(N_HOURS)[None, :, None] > now
    changed = model.encode_stay(
        torch.where(later, other[0], series), torch.where(later, other[1], events), hour_mask,
        torch.where(hours > now, other[3], ids), hours, token_mask,
    )  # fmt: skip
    states = model.encode_stay(series, events, hour_mask, ids, hours, token_mask)
    assert torch.equal(changed[:, : now + 1], states[:, : now + 1])
    assert not torch.equal(changed[0, now + 1, :16], states[0, now + 1, :16])
    assert not torch.equal(changed[0, now + 1 :, 16:], states[0, now + 1 :, 16:])


@torch.no_grad()
def test_hour_by_hour_gives_the_states_of_the_whole(family: str, tiny_network: Make) -> None:
    model = tiny_network(family, events="stream", event_window=8).model
    series, events, hour_mask, ids, hours, token_mask = (x[:1] for x in stays())
    whole = model.encode_stay(series, events, hour_mask, ids, hours, token_mask)
    for t in range(N_HOURS):
        n = max(int((hours <= t).sum()), 1)
        early = model.encode_stay(
            series[:, : t + 1], events[:, : t + 1], hour_mask[:, : t + 1],
            ids[:, :n], hours[:, :n], token_mask[:, :n],
        )  # fmt: skip
        torch.testing.assert_close(early, whole[:, : t + 1], rtol=0, atol=1e-5)


def test_gradients_reach_both_streams_and_no_frozen_weight_moves(
    family: str, tiny_network: Make
) -> None:
    """Bit-equal with weight decay too."""
    model = tiny_network(family, events="stream", event_window=8).model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    outputs = model.predict(model.encode_stay(*stays()))
    torch.stack([out.square().mean() for out in outputs.values()]).sum().backward()
    optimiser.step()
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert not {name for name in moved if name.startswith("backbone.")}
    assert {"tokens.weight", "series_encoder.series.0.weight", "heads.mortality.weight"} <= moved


# Whole stays.


def test_scores_of_a_stream_do_not_depend_on_company_or_future(
    tiny_network: Make, random_episode: Stay
) -> None:
    network = tiny_network(events="stream", event_window=8)
    episodes = [random_episode(seed, n) for seed, n in enumerate((30, 1, 0, 48, 12))]
    n_tokens = len(event_tokens(episodes[3], network.vocabulary, 48, network.preprocessing).ids)
    assert n_tokens > 16  # several windows
    together = list(score_episodes(network, episodes, batch_hours=40))
    for episode, scores in zip(episodes, together, strict=True):
        (alone,) = score_episodes(network, [episode])
        assert scores.hidden.shape == (episode.n_hours, 32)
        assert_allclose(scores.hidden, alone.hidden, rtol=0, atol=TOLERANCE.hidden)
    for n_hours in (1, 7, 20):
        (early,) = score_episodes(network, [replace(episodes[3], n_hours=n_hours)])
        whole = together[3].hidden[:n_hours]
        assert_allclose(early.hidden, whole, rtol=0, atol=TOLERANCE.hidden)
        raw = together[3].raw["mortality"][:n_hours]
        assert_allclose(early.raw["mortality"], raw, rtol=0, atol=TOLERANCE.hidden)
    without = replace(episodes[3], ev_code=np.array([], object), ev_hours=np.array([]))
    (scores,) = score_episodes(network, [replace(without, ev_value=np.array([]))])
    assert not scores.hidden[:, 16:].any()
    assert together[3].hidden[:, 16:].any()


def test_what_a_stream_needs_to_be_causal_and_to_be_served(tiny_network: Make) -> None:
    network = tiny_network(events="stream")
    assert network.causal
    assert network.not_online is None
    last = replace(network.preprocessing, dedupe="episode_last")
    assert not replace(network, preprocessing=last).causal
    assert replace(tiny_network(), preprocessing=last).causal  # its tokens serve no head
    # The window of a Longformer of 256 tokens on either side, and the token itself.
    for event_window, served in ((256, True), (258, False), (None, False)):
        narrow = tiny_network("longformer", events="stream", event_window=event_window)
        assert (narrow.not_online is None) == served


def test_a_config_with_a_stream_survives_json(tiny_network: Make) -> None:
    config = tiny_network(events="stream", event_window=8).model.config
    again = ModelConfig.from_json(config.to_json())
    assert again == config
    assert LLM4EHR(again).state_size == 32
