"""Networks of every family and tuning on the CPU backend, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.testing import assert_allclose

from llm4ehr.bundle import Network
from llm4ehr.calibration import default_calibration
from llm4ehr.episode import Episode, Features, featurise
from llm4ehr.offline import TOLERANCE, score_episodes
from llm4ehr.prompts import PromptSpec
from service.engine.backends.base import TickResult
from service.engine.backends.torch_cpu import TorchCpuBackend
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
