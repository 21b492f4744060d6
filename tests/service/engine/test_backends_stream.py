"""The event pass of the torch backend: its own slots, the same promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from llm4ehr.bundle import Network
from llm4ehr.offline import TOLERANCE
from service.engine.backends.base import RowDependenceError
from service.engine.backends.shapes import slots_for
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.engine.backends.verify import agreeing_sizes
from tests.backends import N_SLOTS, Make, backend_of, tuned
from tests.online import HEADS, ROWS

WINDOW = 20
CASES = [(f, b) for f in ("bert", "gpt2", "llama", "longformer", "opt") for b in (False, True)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}{'-begin' * case[1]}")
def network(request: pytest.FixtureRequest, tiny_network: Make) -> Network:
    family, begin = request.param
    made = tiny_network(
        family, heads=HEADS, events="stream", event_window=WINDOW, begin_token=begin
    )
    made.model.begin.normal_()
    made.model.tokens.weight.data.normal_()
    return made


@pytest.fixture
def ids(network: Network) -> np.ndarray:
    return np.random.default_rng(0).integers(network.model.config.n_tokens, size=WINDOW)


def read(backend: TorchCpuBackend, ids: np.ndarray, chunk: int, slot: int = 0) -> np.ndarray:
    parts = [
        backend.tick_tokens(ids[i : i + chunk], [slot] * len(ids[i : i + chunk]), places)
        for i in range(0, len(ids), chunk)
        for places in [range(i, i + len(ids[i : i + chunk]))]
    ]
    return np.concatenate(parts)


def test_a_window_of_tokens_gives_what_the_event_pass_gives(
    network: Network, ids: np.ndarray
) -> None:
    with torch.no_grad():
        there = torch.ones(1, WINDOW, dtype=torch.bool)
        whole = network.model.encode_events(torch.from_numpy(ids)[None], there)[0]
    for chunk in (1, 7, ROWS):
        got = read(backend_of(network), ids, chunk)
        assert_allclose(got, whole.numpy(), rtol=0, atol=TOLERANCE.hidden)
    assert np.abs(whole[1:].numpy() - whole[:-1].numpy()).max() > 0.1


def test_a_token_has_the_same_bits_in_any_company(network: Network, ids: np.ndarray) -> None:
    backend = backend_of(network)
    sizes = agreeing_sizes(backend, network, ROWS)
    alone = read(backend, ids, 1)
    for size in sizes:
        backend.tick_sizes = (size, ROWS)
        for slot, chunk in enumerate((1, 3, 5, ROWS)):
            assert read(backend, ids, chunk, slot).tobytes() == alone.tobytes()
    slots, other = [4, 0, 2], ids[::-1]
    for place in range(WINDOW):
        rows = np.array([other[place], ids[place], other[place]])
        got = backend.tick_tokens(rows, slots, [place] * 3)
        assert got[1].tobytes() == alone[place].tobytes()


def test_the_begin_token_stays_and_nothing_else_is_read(network: Network, ids: np.ndarray) -> None:
    alone = read(backend_of(network), ids, 1)
    backend = backend_of(network)
    hours, tokens = backend._caches
    for pool in (*hours.keys, *hours.values):
        pool[:] = float("nan")
    for pool in (*tokens.keys, *tokens.values):
        pool[:, :, len(network.model.begin) :] = float("nan")
        pool[torch.arange(N_SLOTS) != 1] = float("nan")
    assert read(backend, ids, 4, slot=1).tobytes() == alone.tobytes()


def test_heads_read_the_latest_token_beside_the_hour(network: Network) -> None:
    model, config = network.model, network.model.config
    rng = np.random.default_rng(0)
    series = rng.standard_normal((3, config.n_series)).astype(np.float32)
    events = rng.standard_normal((3, config.n_event_channels)).astype(np.float32)
    latest = rng.standard_normal((3, 16)).astype(np.float32)
    backend = backend_of(network)
    result = backend.tick(series, events, [0, 1, 2], [0, 0, 0], latest)
    with torch.no_grad():
        v = model.encode_hours(torch.from_numpy(series)[:, None], None, None)[:, 0]
        states = torch.cat([v, torch.from_numpy(latest)], dim=1)
        expected = model.predict(states)
    assert_allclose(result.hidden, states, rtol=0, atol=TOLERANCE.hidden)
    for task, raw in result.raw.items():
        assert_allclose(raw, expected[task], rtol=0, atol=TOLERANCE.hidden)
    with pytest.raises(ValueError, match="latest"):
        backend.tick(series, events, [0, 1, 2], [0, 0, 0])


def test_shrinking_keeps_the_begin_token(network: Network, ids: np.ndarray) -> None:
    alone = read(backend_of(network), ids, ROWS)
    backend = backend_of(network)
    assert backend.shrink()
    assert {len(cache.keys[0]) for cache in backend._caches} == {N_SLOTS // 2}
    assert read(backend, ids, ROWS, slot=1).tobytes() == alone.tobytes()


class _RoundsTokensByCompany(TorchCpuBackend):
    def tick_tokens(self, ids: np.ndarray, *rest: object) -> np.ndarray:  # type: ignore[override]
        z = super().tick_tokens(ids, *rest)  # type: ignore[arg-type]
        if len(ids) > 1:
            z[0, 0] = np.nextafter(z[0, 0], np.float32(np.inf))
        return z


def test_tokens_are_verified_as_hours_are(tiny_network: Make) -> None:
    network = tiny_network(events="stream", event_window=8)
    assert agreeing_sizes(backend_of(network), network, ROWS)[-1] == ROWS
    backend = _RoundsTokensByCompany(network, n_slots=4, max_rows=ROWS)
    with pytest.raises(RowDependenceError):
        agreeing_sizes(backend, network, ROWS)


def test_a_network_without_a_stream_takes_no_tokens(tiny_network: Make) -> None:
    with pytest.raises(ValueError, match="no second stream"):
        backend_of(tiny_network()).tick_tokens(np.zeros(1, np.int64), [0], [0])


def test_memory_is_counted_for_both_slot_arrays(tiny_network: Make) -> None:
    position = 2 * 4 * 2 * 16  # K and V, 4 bytes, layers, channels
    for window, begin, positions in ((8, False, 8), (8, True, 9), (None, True, 256)):
        network = tiny_network(events="stream", event_window=window, begin_token=begin)
        slot = position * (200 + positions)
        assert slots_for(network, 7 * slot) == 7
        assert slots_for(network, 7 * slot - 1) == 6
        pools = backend_of(network)._caches[1].keys
        assert [tuple(pool.shape) for pool in pools] == [(N_SLOTS, 2, positions, 8)] * 2


def test_a_prompt_of_the_hours_is_none_of_the_tokens(tiny_network: Make) -> None:
    network = tuned(tiny_network, "gpt2", "plain")
    prompted = tuned(tiny_network, "gpt2", "prefix")
    assert backend_of(network)._caches[0].n_first == 0
    assert backend_of(prompted)._caches[0].n_first == 20
