"""The torch backend: what a plain forward gives.

The comparison is also run against backends that are wrong on purpose: it must notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from llm4ehr.bundle import Network
from llm4ehr.episode import Episode
from llm4ehr.offline import score_episodes
from llm4ehr.prompts import PromptSpec
from service.engine.backends.base import DeviceFault, OutOfMemory
from service.engine.backends.shapes import kv_shape, slots_for
from service.engine.backends.slot_attention import SlotCache
from service.engine.backends.torch_cpu import TorchCpuBackend
from tests.backends import (
    N_HOURS,
    N_SLOTS,
    NETWORKS,
    PREFILL,
    STEPS,
    Make,
    Stay,
    assert_like_offline,
    backend_of,
    computed,
    features_of,
    same_bits,
    tuned,
)
from tests.online import HEADS, ROWS


@pytest.fixture(params=NETWORKS, ids=lambda pair: "-".join(pair))
def network(request: pytest.FixtureRequest, tiny_network: Make) -> Network:
    return tuned(tiny_network, *request.param)


@pytest.fixture(scope="module")
def stay(random_episode: Stay) -> Episode:
    return random_episode(1, N_HOURS)


@pytest.mark.parametrize("chunks", [STEPS, PREFILL], ids=["steps", "prefill"])
def test_slots_give_what_a_plain_forward_gives(
    network: Network, stay: Episode, chunks: list[int]
) -> None:
    assert_like_offline(network, stay, chunks)


@pytest.mark.parametrize("tuning", ["adapter", "prefix", "kv"])
def test_every_family_is_served_with_every_tuning(
    family: str, tiny_network: Make, stay: Episode, tuning: str
) -> None:
    network = tuned(tiny_network, family, tuning)
    assert_like_offline(network, stay, PREFILL)
    plain = replace(network, model=tiny_network(family, heads=HEADS).model)
    (with_it,), (without,) = score_episodes(network, [stay]), score_episodes(plain, [stay])
    assert np.abs(with_it.hidden - without.hidden).max() > 0.1


def test_large_layers_with_packed_weights_are_the_same_layers(
    network: Network, stay: Episode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.engine.backends.linear._LARGE", 1)
    assert_like_offline(network, stay, PREFILL)


def test_the_last_hour_of_the_longest_stay_fits(network: Network, random_episode: Stay) -> None:
    chunks = [ROWS] * 12 + [8]
    assert_like_offline(network, random_episode(2, 200), chunks)


# Wrong on purpose.


def _shifted(change: int) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        begin = SlotCache.begin_tick

        def changed(
            self: SlotCache, slots: Sequence[int], hours: Sequence[int], n: int
        ) -> torch.Tensor:
            begin(self, slots, [max(hour + change, 0) for hour in hours], n)
            return torch.tensor([*hours] + [0] * (n - len(hours)))[:, None]

        patch.setattr(SlotCache, "begin_tick", changed)

    return apply


def _positions(patch: pytest.MonkeyPatch) -> None:
    begin = SlotCache.begin_tick
    # Doubled rather than shifted: where a stay begins does not matter to rotary positions.
    patch.setattr(SlotCache, "begin_tick", lambda *a: begin(*a) * 2)


def _no_write_of_values(patch: pytest.MonkeyPatch) -> None:
    attend = SlotCache.attend

    def changed(
        self: SlotCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, s: float
    ) -> torch.Tensor:
        kept = self.values[layer].clone()
        out = attend(self, q, k, v, layer, s)
        self.values[layer].copy_(kept)
        return out

    patch.setattr(SlotCache, "attend", changed)


def _one_layer_reads_another_one(patch: pytest.MonkeyPatch) -> None:
    attend = SlotCache.attend
    patch.setattr(SlotCache, "attend", lambda self, *a: attend(self, *a[:3], 0, a[4]))


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(_shifted(-1), id="an hour too few"),
        pytest.param(_shifted(+1), id="an hour too many"),
        pytest.param(_positions, id="wrong positions"),
        pytest.param(_no_write_of_values, id="values not kept"),
        pytest.param(_one_layer_reads_another_one, id="a foreign layer"),
    ],
)
def test_the_comparison_notices_a_mistake(
    network: Network,
    stay: Episode,
    mistake: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert_like_offline(network, stay, STEPS)
    mistake(monkeypatch)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_like_offline(network, stay, STEPS)


# What the backend says about itself.


def test_a_network_that_reads_the_future_is_refused(tiny_network: Make) -> None:
    sound = tiny_network()
    linear = replace(sound, preprocessing=replace(sound.preprocessing, imputation="linear"))
    for network in (linear, tiny_network("bert", attention_mode="native")):
        with pytest.raises(ValueError, match="later hours"):
            backend_of(network)


def test_a_network_that_reads_out_after_the_last_hour_is_refused(tiny_network: Make) -> None:
    with pytest.raises(ValueError, match="suffix prompt"):
        backend_of(tiny_network(prompt=PromptSpec(position="suffix", length=20)))


def test_a_backbone_shorter_than_a_stay_is_refused(tiny_network: Make) -> None:
    """Its first row beyond the last position would stop the engine for everybody."""
    network = tiny_network()
    for max_hours, refused in ((256, False), (257, True)):
        longer = replace(network.preprocessing, max_hours=max_hours)
        if refused:
            with pytest.raises(ValueError, match="fewer positions"):
                backend_of(replace(network, preprocessing=longer))
        else:
            backend_of(replace(network, preprocessing=longer))


def test_a_network_that_reads_less_than_a_stay_is_refused(tiny_network: Make) -> None:
    """It would answer with fewer hours than the API has to show."""
    network = tiny_network()
    assert network.preprocessing.max_hours == 200
    shorter = replace(network.preprocessing, max_hours=199)
    with pytest.raises(ValueError, match="fewer than the 200 hours"):
        backend_of(replace(network, preprocessing=shorter))


def test_the_network_of_the_bundle_stays_as_it_was(network: Network, stay: Episode) -> None:
    (before,) = score_episodes(network, [stay])
    computed(backend_of(network), features_of(network, stay), PREFILL)
    (after,) = score_episodes(network, [stay])
    assert before.hidden.tobytes() == after.hidden.tobytes()


def test_memory_is_counted_by_key_value_heads(tiny_network: Make) -> None:
    assert kv_shape(tiny_network("llama")) == {"n_layers": 2, "n_kv_heads": 2, "head_dim": 4}
    assert kv_shape(tiny_network("gpt2")) == {"n_layers": 2, "n_kv_heads": 2, "head_dim": 8}
    slot = 2 * 4 * 200 * 2 * 16  # K and V, 4 bytes, hours, layers, channels
    for memory, slots in ((0, 1), (slot, 1), (2 * slot - 1, 1), (2 * slot, 2), (90 * slot, 90)):
        assert slots_for(tiny_network("gpt2"), memory) == slots
    for tuning in ("prefix", "kv"):  # a prompt of 20 beside 200 hours
        network = tuned(tiny_network, "gpt2", tuning)
        assert slots_for(network, 11 * slot) == 10
        pools = backend_of(network)._caches[0].keys
        assert [tuple(pool.shape) for pool in pools] == [(N_SLOTS, 2, 220, 8)] * 2
    pools = backend_of(tiny_network("llama"))._caches[0].keys
    assert [tuple(pool.shape) for pool in pools] == [(N_SLOTS, 2, 200, 4)] * 2


# Memory.


def test_half_of_the_slots_can_be_given_back(tiny_network: Make, stay: Episode) -> None:
    network = tiny_network()
    features = features_of(network, stay)
    alone = computed(backend_of(network), features, STEPS)
    backend = TorchCpuBackend(network, n_slots=5, max_rows=ROWS)
    for left in (2, 1):
        assert backend.shrink()
        assert backend.n_slots == left
        assert {len(pool) for pool in backend._caches[0].keys} == {left}
        assert same_bits(computed(backend, features, PREFILL, slot=left - 1), alone)
    assert not backend.shrink()
    assert backend.n_slots == 1


def _no_memory(*args: object, **kwargs: object) -> torch.Tensor:
    return torch.zeros(1 << 46)


def test_what_torch_says_without_memory_is_told_apart(
    tiny_network: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_network()
    with pytest.raises(OutOfMemory):
        TorchCpuBackend(network, n_slots=1 << 34, max_rows=ROWS)
    backend = backend_of(network)
    row = np.zeros((1, network.model.config.n_series), np.float32)
    events = np.zeros((1, network.model.config.n_event_channels), np.float32)
    monkeypatch.setattr(SlotCache, "attend", _no_memory)
    with pytest.raises(OutOfMemory):
        backend.tick(row, events, [0], [0])
    monkeypatch.undo()
    backend.tick(row, events, [0], [0])
    with pytest.raises(RuntimeError, match="multiplied"):  # a fault of ours is none of the memory
        backend.tick(row[:, :-1], events, [0], [0])
    monkeypatch.setattr(SlotCache, "__init__", _no_memory)
    with pytest.raises(DeviceFault):
        backend.shrink()


@pytest.mark.parametrize(("slot", "hour"), [(-1, 0), (N_SLOTS, 0), (0, -1), (0, 200)])
def test_a_row_outside_the_slots_writes_nowhere(tiny_network: Make, slot: int, hour: int) -> None:
    network = tiny_network()
    row = np.zeros((1, network.model.config.n_series), np.float32)
    events = np.zeros((1, network.model.config.n_event_channels), np.float32)
    with pytest.raises(ValueError, match="outside the slots"):
        backend_of(network).tick(row, events, [slot], [hour])
