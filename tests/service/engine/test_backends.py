"""The torch backend: what a plain forward gives, and always the same bits for the same row.

Every comparison is also run against backends that are wrong on purpose: it must notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from llm4ehr.bundle import Network
from llm4ehr.calibration import default_calibration
from llm4ehr.episode import Episode, Features, featurise
from llm4ehr.offline import TOLERANCE, score_episodes
from llm4ehr.prompts import PromptSpec
from service.engine.backends.base import TickResult
from service.engine.backends.slot_attention import SlotCache, SlotRows
from service.engine.backends.torch_cpu import (
    RowDependenceError,
    TorchCpuBackend,
    kv_shape,
    slots_for,
)
from tests.online import HEADS, ROWS

Make = Callable[..., Network]
Stay = Callable[..., Episode]
N_HOURS = 40
N_SLOTS = 5


TUNINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adapter": {"adapter": 8},
    "prefix": {"prompt": PromptSpec(position="prefix", length=20)},
    "kv": {"prompt": PromptSpec(position="kv", length=20)},
}
# Every family, and every tuning in two of them.
NETWORKS = [(f, "plain") for f in ("bert", "gpt2", "llama", "longformer", "opt", "roberta")]
NETWORKS += [("gpt2", "adapter"), ("bert", "adapter"), ("opt", "prefix"), ("roberta", "prefix")]
NETWORKS += [("gpt2", "kv"), ("llama", "kv")]


def tuned(make: Make, family: str, tuning: str) -> Network:
    """A network in which what the tuning has added does something."""
    network = make(family, heads=HEADS, **TUNINGS[tuning])
    torch.manual_seed(1)
    for name, parameter in network.model.named_parameters():
        if ".adapter." in name or name.startswith("prompt."):
            parameter.data.normal_(std=0.3)
    return network


@pytest.fixture(params=NETWORKS, ids=lambda pair: "-".join(pair))
def network(request: pytest.FixtureRequest, tiny_network: Make) -> Network:
    return tuned(tiny_network, *request.param)


@pytest.fixture(scope="module")
def stay(random_episode: Stay) -> Episode:
    return random_episode(1, N_HOURS)


def backend_of(network: Network) -> TorchCpuBackend:
    return TorchCpuBackend(network, n_slots=N_SLOTS, max_rows=ROWS)


def features_of(network: Network, episode: Episode) -> Features:
    return featurise(episode, network.vocabulary, network.preprocessing, episode.n_hours)


def computed(
    backend: TorchCpuBackend, features: Features, chunks: Sequence[int], slot: int = 0
) -> dict[str, np.ndarray]:
    """All hours of a stay in one slot, `chunks` says how many a tick; hidden states and raw."""
    start, parts = 0, []
    for n in chunks:
        rows = slice(start, start + n)
        hours = range(start, start + n)
        parts.append(backend.tick(features.series[rows], features.events[rows], [slot] * n, hours))
        start += n
    return joined(parts)


def joined(parts: list[TickResult]) -> dict[str, np.ndarray]:
    raw = {task: np.concatenate([p.raw[task] for p in parts]) for task in parts[0].raw}
    return raw | {"hidden": np.concatenate([p.hidden for p in parts])}


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


STEPS = [1] * N_HOURS
PREFILL = [ROWS, ROWS, N_HOURS - 2 * ROWS]


def assert_like_offline(network: Network, episode: Episode, chunks: Sequence[int]) -> None:
    got = computed(backend_of(network), features_of(network, episode), chunks)
    (offline,) = score_episodes(network, [episode])
    assert_allclose(got["hidden"], offline.hidden, rtol=0, atol=TOLERANCE.hidden)
    hours = np.arange(len(offline.hidden))
    for task, calibration in default_calibration(list(HEADS)).items():
        atol = TOLERANCE.hours if task == "remaining_los" else TOLERANCE.probability
        assert_allclose(
            calibration(got[task], hours), calibration(offline.raw[task], hours), rtol=0, atol=atol
        )


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


def test_the_last_hour_of_the_longest_stay_fits(network: Network, random_episode: Stay) -> None:
    chunks = [ROWS] * 12 + [8]
    assert_like_offline(network, random_episode(2, 200), chunks)


# The same row, to the last bit.


def test_prefill_and_steps_are_one(network: Network, stay: Episode) -> None:
    backend, features = backend_of(network), features_of(network, stay)
    alone = computed(backend, features, STEPS)
    for chunks in (PREFILL, [3] * 13 + [1], [1, 2, 4, 8, 16, 9]):
        assert same_bits(computed(backend, features, chunks), alone)


def test_the_slot_does_not_matter(network: Network, stay: Episode) -> None:
    backend, features = backend_of(network), features_of(network, stay)
    alone = computed(backend, features, PREFILL)
    for slot in range(1, N_SLOTS):
        assert same_bits(computed(backend, features, PREFILL, slot), alone)


def test_neighbours_do_not_matter(network: Network, random_episode: Stay) -> None:
    """Five stays at different hours in shuffled order, one to three hours each a tick."""
    features = [features_of(network, random_episode(seed, 24)) for seed in range(N_SLOTS)]
    alone = [computed(backend_of(network), f, [1] * 24) for f in features]
    backend, rng = backend_of(network), np.random.default_rng(0)
    at = [0] * N_SLOTS
    parts: list[list[TickResult]] = [[] for _ in at]
    while min(at) < 24:
        here = rng.permutation(N_SLOTS)[: rng.integers(1, N_SLOTS + 1)]
        rows = [(s, h) for s in here for h in range(at[s], min(24, at[s] + rng.integers(1, 4)))]
        rows = [rows[i] for i in rng.permutation(len(rows))][:ROWS]
        if not rows:
            continue
        result = backend.tick(
            np.stack([features[s].series[h] for s, h in rows]),
            np.stack([features[s].events[h] for s, h in rows]),
            *zip(*rows, strict=True),
        )
        for i in sorted(range(len(rows)), key=lambda i: rows[i]):
            raw = {task: out[i : i + 1] for task, out in result.raw.items()}
            slot, hour = rows[i]
            parts[slot].append(TickResult(raw=raw, hidden=result.hidden[i : i + 1]))
            at[slot] = hour + 1
    for got, expected in zip(parts, alone, strict=True):
        assert same_bits(joined(got), expected)


def test_what_stands_elsewhere_is_never_read(network: Network, stay: Episode) -> None:
    """Later hours of the slot, other slots and the scratch slot hold nothing but NaN. So does the
    place of the prompt in other slots."""
    features = features_of(network, stay)
    alone = computed(backend_of(network), features, STEPS)
    backend = backend_of(network)
    prompt = network.model.prompt.length if network.model.prompt else 0
    for pool in (*backend._cache.keys, *backend._cache.values):
        pool[:, :, prompt:] = float("nan")
        pool[torch.arange(len(pool)) != 2] = float("nan")
    assert same_bits(computed(backend, features, [3] * 13 + [1], slot=2), alone)


def test_a_tail_computed_again_is_the_same(network: Network, stay: Episode) -> None:
    """A correction: the slot is cropped by writing over it."""
    backend, features = backend_of(network), features_of(network, stay)
    alone = computed(backend, features, PREFILL)
    backend.tick(features.series[9:20] + 1, features.events[9:20], [0] * 11, range(9, 20))
    again = backend.tick(features.series[9:20], features.events[9:20], [0] * 11, range(9, 20))
    assert same_bits(joined([again]), {name: rows[9:20] for name, rows in alone.items()})


# Wrong on purpose.


def _lengths(change: int) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        begin = SlotCache.begin_tick

        def changed(self: SlotCache, slots: list[int], positions: list[int], n: int) -> object:
            hours = begin(self, slots, positions, n)
            self._lengths = [max(n + change, 1) for n in self._lengths]
            return hours

        patch.setattr(SlotCache, "begin_tick", changed)

    return apply


def _positions(patch: pytest.MonkeyPatch) -> None:
    begin = SlotCache.begin_tick
    # Doubled rather than shifted: where a stay begins does not matter to rotary positions.
    patch.setattr(SlotCache, "begin_tick", lambda *a: begin(*a) * 2)


def _no_write_of_values(patch: pytest.MonkeyPatch) -> None:
    update = SlotCache.update

    def changed(self: SlotCache, keys: object, values: object, layer: int, *a: object) -> object:
        kept = self.values[layer].clone()
        answer = update(self, keys, values, layer, *a)
        self.values[layer].copy_(kept)
        return answer

    patch.setattr(SlotCache, "update", changed)


def _one_layer_reads_another_slot(patch: pytest.MonkeyPatch) -> None:
    update = SlotCache.update

    def changed(
        self: SlotCache, keys: object, values: object, layer: int, *a: object
    ) -> tuple[SlotRows, SlotRows]:
        k, v = update(self, keys, values, layer, *a)
        return (SlotRows(k.pool, [1] * len(k.slots), k.lengths) if layer == 1 else k), v

    patch.setattr(SlotCache, "update", changed)


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(_lengths(-1), id="an hour too few"),
        pytest.param(_lengths(+1), id="an hour too many"),
        pytest.param(_positions, id="wrong positions"),
        pytest.param(_no_write_of_values, id="values not kept"),
        pytest.param(_one_layer_reads_another_slot, id="a foreign slot"),
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


def test_rows_are_verified_on_this_machine(network: Network) -> None:
    backend_of(network).verify_rows()


class _RoundsByCompany(TorchCpuBackend):
    """As maths libraries may: a row comes out otherwise when it has neighbours."""

    def tick(self, series: np.ndarray, *rest: Sequence[int]) -> TickResult:  # type: ignore[override]
        result = super().tick(series, *rest)
        if len(series) > 1:
            result.hidden[0, 0] = np.nextafter(result.hidden[0, 0], np.float32(np.inf))
        return result


def test_a_machine_that_mixes_rows_is_refused(tiny_network: Make) -> None:
    backend = _RoundsByCompany(tiny_network(), n_slots=4, max_rows=ROWS)
    with pytest.raises(RowDependenceError, match="LLM4EHR_ENGINE_ROWS=1"):
        backend.verify_rows()


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
        pools = backend_of(network)._cache.keys
        assert [tuple(pool.shape) for pool in pools] == [(N_SLOTS + 1, 2, 220, 8)] * 2
    pools = backend_of(tiny_network("llama"))._cache.keys
    assert [tuple(pool.shape) for pool in pools] == [(N_SLOTS + 1, 2, 200, 4)] * 2
