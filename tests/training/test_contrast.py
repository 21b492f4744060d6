"""Chunks, the queue of patches and the event cache: what they may and may not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llm4ehr.model import LLM4EHR
from tests.training.distributed_step import N_STAYS, batch, model
from training.contrast import PatchEncoder, Patches, PatchQueue, PretrainStep
from training.event_cache import EventPatches, event_pass_is_frozen, write_event_patches
from training.objectives import ObjectiveConfig, Pool, nce_loss


class OneProcess:
    """Counts how often gradients are exchanged."""

    def __init__(self) -> None:
        self.synced = 0
        self._inside = False

    def backward(self, loss: Tensor) -> None:
        self.synced += not self._inside
        loss.backward()

    @contextmanager
    def unsynced(self) -> Iterator[None]:
        self._inside = True
        yield
        self._inside = False


def step(
    chunk: int | None = None, dropout: float = 0.0, queue: int = 0, n: int = 1, **objective: Any
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Terms and gradients of the last of `n` steps on the same batch, from the same seed."""
    network = model()
    network.backbone.model.drop.p = dropout
    network.train()
    config = ObjectiveConfig(**{"tau": 0.1, "queue_patches": queue} | objective)
    encoder = PatchEncoder(network, config)
    made = PretrainStep(encoder, encoder.queue, config, chunk)
    torch.manual_seed(5)
    for i in range(n):
        encoder.zero_grad()
        shifted = replace(batch(), index=np.arange(N_STAYS) + 100 * i)
        terms = made(shifted, OneProcess())
    gradients = {k: p.grad for k, p in encoder.named_parameters() if p.grad is not None}
    return {name: term.item() for name, term in terms.items()}, gradients


@given(chunk=st.integers(1, N_STAYS), scope=st.sampled_from(["batch", "episode"]))
def test_cached_gradients_are_those_of_the_whole_batch(chunk: int, scope: str) -> None:
    whole = step(omega_scope=scope, nce_scope=scope)
    cached = step(chunk, omega_scope=scope, nce_scope=scope)
    assert cached[0] == pytest.approx(whole[0], rel=1e-5)
    assert cached[1].keys() == whole[1].keys()
    for name, gradient in whole[1].items():
        torch.testing.assert_close(cached[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_both_passes_over_a_chunk_drop_the_same_units() -> None:
    """Else the cached gradients would belong to other patches: compare with finite differences."""
    network = model().double()
    network.backbone.model.drop.p = 0.4
    network.train()
    encoder = PatchEncoder(network, ObjectiveConfig(tau=0.1))
    made = PretrainStep(encoder, encoder.queue, encoder.config, 2)
    precise = replace(batch(), series=batch().series.double())
    weight = network.series_encoder.series[0].weight

    def loss(shift: float) -> float:
        with torch.no_grad():
            weight.add_(shift)
        torch.manual_seed(5)
        return made(precise, OneProcess())["loss"].item()

    loss(0)
    expected = weight.grad.sum().item()
    step = 1e-6
    slope = (loss(step) - loss(-2 * step)) / (2 * step)
    assert slope == pytest.approx(expected, rel=1e-4)


def test_chunks_exchange_gradients_once() -> None:
    encoder = PatchEncoder(model(), ObjectiveConfig(tau=0.1))
    gradients = OneProcess()
    PretrainStep(encoder, encoder.queue, encoder.config, 3)(batch(), gradients)
    assert gradients.synced == 1


def test_a_chunk_is_not_padded_to_the_longest_stay_of_the_batch() -> None:
    short = batch().part(slice(0, 1))
    assert short.series.shape[1] == int(batch().hour_mask[0].sum()) < batch().series.shape[1]
    assert short.token_mask.all()


@pytest.mark.parametrize(
    "objective",
    [{"unusable_patches": "keep"}, {"recon": "same_step_mean"}, {"pad_hours": "keep"}],
)
def test_terms_that_look_at_the_whole_batch_have_no_shares(objective: dict[str, Any]) -> None:
    config = ObjectiveConfig(**objective)
    encoder = PatchEncoder(model(), config)
    with pytest.raises(ValueError, match="one process and no chunk_episodes"):
        PretrainStep(encoder, encoder.queue, config, 2)
    PretrainStep(encoder, encoder.queue, config)(batch(), OneProcess())


def test_batch_norm_looks_at_the_whole_batch() -> None:
    network = LLM4EHR(replace(model().config, ts_norm="batch"))
    encoder = PatchEncoder(network, ObjectiveConfig())
    with pytest.raises(ValueError, match="ts_norm: batch"):
        PretrainStep(encoder, encoder.queue, encoder.config, 2)


# The queue.


def test_the_queue_keeps_the_newest_patches() -> None:
    queue = PatchQueue(5, 2)
    assert queue.filled() is None
    rows = torch.arange(16.0).view(8, 2)
    queue.push(rows[:3], torch.tensor([0, 0, 1]))
    assert queue.filled()[0].tolist() == rows[:3].tolist()
    queue.push(rows[3:6], torch.tensor([1, 2, 2]))
    kept, episode = queue.filled()
    assert sorted(map(tuple, kept.tolist())) == sorted(map(tuple, rows[1:6].tolist()))
    assert sorted(episode.tolist()) == [0, 1, 1, 2, 2]
    queue.push(rows, torch.arange(8))
    assert sorted(map(tuple, queue.filled()[0].tolist())) == sorted(map(tuple, rows[3:].tolist()))


def test_queued_patches_are_candidates_as_those_of_a_larger_batch_would_be() -> None:
    torch.manual_seed(0)
    v, z, old = torch.randn(3, 6, 4, dtype=torch.float64)
    episode, config = torch.tensor([0, 0, 1, 1, 2, 2]), ObjectiveConfig(tau=0.5)
    queued = Pool(v=v, z=z, episode=episode, queue_z=old, queue_episode=episode + 3)
    larger = Pool(v=torch.cat([v, old]), z=torch.cat([z, old]), episode=torch.arange(12))
    sums = config.model_copy(update={"reduction": "sum"})
    expected = nce_loss(v, z, episode, sums, larger) / 6
    torch.testing.assert_close(nce_loss(v, z, episode, config, queued), expected)
    # A patch of the same stay is no stranger.
    same = replace(queued, queue_episode=episode)

    assert nce_loss(v, z, episode, config, same) < nce_loss(v, z, episode, config, queued)

    episodes = config.model_copy(update={"nce_scope": "episode"})
    alone = nce_loss(v, z, episode, episodes)
    torch.testing.assert_close(nce_loss(v, z, episode, episodes, queued), alone)


def test_the_queue_is_used_from_the_second_step_on_and_takes_no_gradient() -> None:
    first, second = step(queue=200), step(queue=200, n=2)
    assert first[0] == step()[0]
    assert second[0]["nce"] > first[0]["nce"]
    assert second[0]["omega"] == first[0]["omega"]
    chunked = step(2, queue=200, n=2)
    assert chunked[0] == pytest.approx(second[0], rel=1e-5)


# The event pass, once.


class _Features:
    """As much of a feature set as the cache needs."""

    lengths = batch().hour_mask.sum(1).numpy()


def test_cached_event_patches_are_those_of_the_event_pass(tmp_path: Path) -> None:
    network = model().eval()
    network.backbone.requires_grad_(False)
    assert not event_pass_is_frozen(network)
    network.tokens.requires_grad_(False)
    assert event_pass_is_frozen(network)

    def load(index: Any) -> Any:
        whole = batch()
        order = torch.from_numpy(np.asarray(index))
        return replace(whole._with(lambda tensor: tensor[order], np.asarray(index)))

    path = tmp_path / "patches.npy"
    features: Any = _Features()
    write_event_patches(path, network, features, np.arange(N_STAYS), load)
    cached = EventPatches(path, features, network.config.patch_hours)
    encoder = PatchEncoder(network, ObjectiveConfig())
    index = np.array([1, 4, 6])
    plain, ready = Patches.of(encoder(load(index))), Patches.of(encoder(cached.add_to(load(index))))
    torch.testing.assert_close(ready.z, plain.z, rtol=0, atol=2e-6)
    assert torch.equal(ready.v, plain.v)
    stamp = path.stat().st_mtime_ns
    write_event_patches(path, network, features, np.arange(N_STAYS), load)
    assert path.stat().st_mtime_ns == stamp  # kept
