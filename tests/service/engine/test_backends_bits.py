"""The torch backend: always the same bits for the same row, whatever happens beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm4ehr.bundle import Network
from llm4ehr.episode import Episode
from service.engine.backends.base import RowDependenceError, TickResult, candidate_sizes
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.engine.backends.verify import agreeing_sizes
from tests.backends import (
    N_HOURS,
    N_SLOTS,
    NETWORKS,
    PREFILL,
    STEPS,
    Make,
    Stay,
    backend_of,
    computed,
    features_of,
    joined,
    same_bits,
    tuned,
)
from tests.online import ROWS

CASES = [(*pair, "compiled") for pair in NETWORKS]
CASES += [("gpt2", "plain", "reference"), ("llama", "kv", "reference")]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def network(
    request: pytest.FixtureRequest, tiny_network: Make, monkeypatch: pytest.MonkeyPatch
) -> Network:
    """With the compiled kernel, and twice without."""
    family, tuning, attention = request.param
    if attention == "reference":
        monkeypatch.setattr("service.engine.backends.torch_cpu.slot_library", lambda: None)
    return tuned(tiny_network, family, tuning)


@pytest.fixture(scope="module")
def stay(random_episode: Stay) -> Episode:
    return random_episode(1, N_HOURS)


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
    """Later hours of the slot and other slots hold nothing but NaN. So does the place of the prompt
    in other slots."""
    features = features_of(network, stay)
    alone = computed(backend_of(network), features, STEPS)
    backend = backend_of(network)
    prompt = network.model.prompt.length if network.model.prompt else 0
    (cache,) = backend._caches
    for pool in (*cache.keys, *cache.values):
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


def test_the_size_of_the_tick_does_not_matter(network: Network, stay: Episode) -> None:
    backend, features = backend_of(network), features_of(network, stay)
    sizes = agreeing_sizes(backend, network, ROWS)
    assert sizes[-1] == ROWS
    alone = computed(backend_of(network), features, STEPS)
    for size in sizes:
        backend = backend_of(network)
        backend.tick_sizes = (size, ROWS)
        assert same_bits(computed(backend, features, STEPS), alone)
        assert same_bits(computed(backend, features, [3] * 13 + [1], slot=2), alone)


def test_sizes_are_verified_on_this_machine(network: Network) -> None:
    backend = backend_of(network)
    sizes = agreeing_sizes(backend, network, 8)
    assert sizes[-1] == 8
    assert set(sizes) <= set(candidate_sizes(8)) == {4, 8}
    assert backend.tick_sizes == (8,)


class _RoundsByCompany(TorchCpuBackend):
    """As maths libraries may: a row comes out otherwise when it has neighbours."""

    def tick(self, series: np.ndarray, *rest: object) -> TickResult:  # type: ignore[override]
        result = super().tick(series, *rest)  # type: ignore[arg-type]
        if len(series) > 1:
            result.hidden[0, 0] = np.nextafter(result.hidden[0, 0], np.float32(np.inf))
        return result


class _RoundsBySize(TorchCpuBackend):
    """Other sums in small ticks: in one place of the hidden state, or of one head only."""

    small, place = 8, "hidden"

    def tick(self, *rows: object) -> TickResult:  # type: ignore[override]
        result = super().tick(*rows)  # type: ignore[arg-type]
        if self.tick_sizes[0] < self.small:
            of = result.hidden if self.place == "hidden" else result.raw[self.place]
            of[-1] = np.nextafter(of[-1], np.float32(np.inf))
        return result


class _RoundsByPosition(TorchCpuBackend):
    """Another rounding where an attention over more than 100 hours is cut in two."""

    def tick(self, *rows: object) -> TickResult:  # type: ignore[override]
        result = super().tick(*rows)  # type: ignore[arg-type]
        if self.tick_sizes[0] == 4 and rows[3][0] > 100:  # type: ignore[index]
            result.hidden[0] += np.float32(1e-3)
        return result


class _RoundsByPlace(TorchCpuBackend):
    """As kernels do that cut many rows into blocks: another rounding in the last places."""

    def tick(self, series: np.ndarray, *rest: object) -> TickResult:  # type: ignore[override]
        result = super().tick(series, *rest)  # type: ignore[arg-type]
        result.hidden[60:] = np.nextafter(result.hidden[60:], np.float32(np.inf))
        return result


def test_every_place_of_a_large_tick_is_looked_at(tiny_network: Make) -> None:
    network = tiny_network()
    backend = _RoundsByPlace(network, n_slots=4, max_rows=64)
    with pytest.raises(RowDependenceError, match="LLM4EHR_ENGINE_ROWS=32"):
        agreeing_sizes(backend, network, 64)
    backend = _RoundsByPlace(network, n_slots=4, max_rows=32)
    assert agreeing_sizes(backend, network, 32)[-1] == 32


def test_a_machine_that_mixes_rows_is_refused(tiny_network: Make) -> None:
    network = tiny_network()
    backend = _RoundsByCompany(network, n_slots=4, max_rows=ROWS)
    with pytest.raises(RowDependenceError, match="LLM4EHR_ENGINE_ROWS=8"):
        agreeing_sizes(backend, network, ROWS)


@pytest.mark.parametrize("place", ["hidden", "mortality"])
def test_a_size_with_other_bits_is_left_out(
    tiny_network: Make, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    network = tiny_network()
    sound = agreeing_sizes(TorchCpuBackend(network, n_slots=9, max_rows=ROWS), network, ROWS)
    monkeypatch.setattr(_RoundsBySize, "place", place)
    backend = _RoundsBySize(network, n_slots=9, max_rows=ROWS)
    assert agreeing_sizes(backend, network, ROWS) == tuple(n for n in sound if n != 4)
    backend = _RoundsByPosition(network, n_slots=9, max_rows=ROWS)
    assert agreeing_sizes(backend, network, ROWS) == tuple(n for n in sound if n != 4)
