"""Scoring of whole stays: `llm4ehr.offline` against a plain padded Hugging Face forward.

    python -m benchmarks.batch [--store FOLDER ...] [--models default,6x384] [--stays 1000]
                               [--repeats 3] [--threads 1] [--device cpu] [--quick]

Both begin with episodes in memory, as a store gives them, and end with raw outputs and states of
every hour on the host.

    plain   batches of 32 in the order of the store, padded to the longest, an explicit mask, the
            cache that Hugging Face keeps by default
    ours    `score_episodes`

They must agree within `llm4ehr.offline.TOLERANCE`. Repeats are interleaved, medians are shown.
Without a store, lengths are log-normal with a median of two days. `featurise_s` is part of both.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.engine_models import network_of
from benchmarks.report import progress, write
from llm4ehr.bundle import Network
from llm4ehr.episode import Episode, Features, featurise
from llm4ehr.offline import TOLERANCE, score_episodes
from llm4ehr.store import EpisodeStore
from llm4ehr.variables import VARIABLES

PLAIN_BATCH = 32
TARGET = 3.0


def main() -> None:
    a = _arguments()
    torch.set_num_threads(a.threads)
    sets = {path.name: stored(path, a.stays) for path in a.store}
    rows = []
    with progress() as bar:
        ways = len(a.models) * max(len(sets), 1)
        task = bar.add_task("batch", total=ways * a.repeats)
        for name in a.models:
            network = network_of(name)
            network.model.to(a.device)
            for source, episodes in (sets or {"synthetic": synthetic(network, a.stays)}).items():
                rows.append(
                    {"model": name, "source": source}
                    | compared(network, episodes, a.repeats, lambda: bar.advance(task))
                )
    write(a.name, rows, device=a.device, target=TARGET)


def compared(network: Network, episodes: list[Episode], repeats: int, done: Any) -> dict[str, Any]:
    """A row of the table."""
    seconds: dict[str, list[float]] = {"plain": [], "ours": [], "featurise": []}
    difference = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        features = [features_of(network, episode) for episode in episodes]
        seconds["featurise"].append(time.perf_counter() - started)
        started = time.perf_counter()
        theirs = list(plain(network, episodes))
        seconds["plain"].append(time.perf_counter() - started)
        started = time.perf_counter()
        ours = list(score_episodes(network, episodes))
        seconds["ours"].append(time.perf_counter() - started)
        done()
        difference = max(
            float(np.abs(own.hidden - states).max(initial=0.0))
            for own, states in zip(ours, theirs, strict=True)
        )
        if difference > TOLERANCE.hidden:
            raise RuntimeError(f"hidden states differ by {difference}")
    hours = sum(len(f.series) for f in features)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    return {
        "stays": len(episodes),
        "hours": hours,
        "longest": max(len(f.series) for f in features),
        "plain_hours_per_s": round(hours / medians["plain"]),
        "ours_hours_per_s": round(hours / medians["ours"]),
        "times_plain": round(medians["plain"] / medians["ours"], 2),
        "target": TARGET,
        "plain_s": round(medians["plain"], 3),
        "ours_s": round(medians["ours"], 3),
        "featurise_s": round(medians["featurise"], 3),
        "difference": float(f"{difference:.1e}"),
        "repeats": repeats,
    }


def features_of(network: Network, episode: Episode) -> Features:
    return featurise(episode, network.vocabulary, network.preprocessing, episode.n_hours)


@torch.inference_mode()
def plain(network: Network, episodes: list[Episode]) -> Iterator[np.ndarray[Any, Any]]:
    """States of every stay, in the plain way; heads are computed as well."""
    model = network.model.eval()
    device = next(model.parameters()).device
    for start in range(0, len(episodes), PLAIN_BATCH):
        features = [features_of(network, e) for e in episodes[start : start + PLAIN_BATCH]]
        lengths = torch.tensor([len(f.series) for f in features], device=device)
        series = _padded([torch.from_numpy(f.series) for f in features]).to(device)
        events = _padded([torch.from_numpy(f.events) for f in features]).to(device)
        hours = torch.arange(series.shape[1], device=device)
        hidden = model.backbone.model(
            inputs_embeds=model.series_encoder(series, events),
            attention_mask=(hours < lengths[:, None]).long(),
            position_ids=hours.expand(series.shape[:2]),
        ).last_hidden_state
        for out in model.predict(hidden).values():
            out.cpu().numpy()
        states = hidden.cpu().numpy()
        for row, f in enumerate(features):
            yield states[row, : len(f.series)]


def _padded(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def stored(path: Path, n: int) -> list[Episode]:
    """The first stays of a store that have an hour."""
    found = (record.episode for block in EpisodeStore.open(path).blocks() for record in block)
    episodes = []
    for episode in found:
        if episode.n_hours > 0:
            episodes.append(episode)
        if len(episodes) == n:
            break
    return episodes


def synthetic(network: Network, n: int) -> list[Episode]:
    """Stays of mixed lengths with 8 observations and 2 events an hour."""
    rng = np.random.default_rng(0)
    most = network.preprocessing.max_hours
    lengths = np.clip(rng.lognormal(math.log(50), 0.9, n), 6, most).astype(int)
    codes = np.array([entry.code for entry in network.vocabulary.entries], object)
    return [_episode(rng, f"stay-{i}", int(hours), codes) for i, hours in enumerate(lengths)]


def _episode(rng: np.random.Generator, name: str, hours: int, codes: Any) -> Episode:
    n, m = 8 * hours, 2 * hours
    variable = rng.integers(0, len(VARIABLES), n).astype(np.int16)
    return Episode(
        episode_id=name,
        n_hours=hours,
        obs_variable=variable,
        obs_hours=rng.uniform(0, hours, n),
        obs_value=np.array([v.normal for v in VARIABLES])[variable] * rng.uniform(0.8, 1.2, n),
        obs_priority=np.zeros(n, np.int8),
        ev_code=rng.choice(codes, m),
        ev_hours=rng.uniform(0, hours, m),
        ev_value=rng.uniform(0, 10, m),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, nargs="*", default=[])
    parser.add_argument("--models", type=lambda text: text.split(","), default=["default"])
    parser.add_argument("--stays", type=int, default=1000, help="at most, of each store")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="batch", help="results/NAME.json")
    parser.add_argument("--quick", action="store_true", help="a few stays")
    a = parser.parse_args()
    if a.quick:
        a.models, a.stays, a.repeats = ["tiny"], 3, 1
    return a


if __name__ == "__main__":
    main()
