"""Time to turn one 200-hour stay with 2,000 observations into model input.

`python -m benchmarks.featurise`
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from benchmarks.report import milliseconds, write
from llm4ehr.bundle import load_bundle
from llm4ehr.episode import MAX_HOURS, N_VARIABLES, Episode, featurise
from llm4ehr.variables import VARIABLES


def main() -> None:
    bundle = load_bundle(Path("model_repository"), "llm4ehr", 1)
    network = bundle.network
    rng = np.random.default_rng(0)
    rows = []
    for n_observations, n_events in ((2000, 0), (2000, 500)):
        variable = rng.integers(0, N_VARIABLES, n_observations).astype(np.int16)
        normal = np.array([v.normal for v in VARIABLES])
        codes = [entry.code for entry in network.vocabulary.entries]
        episode = Episode(
            episode_id="benchmark",
            n_hours=MAX_HOURS,
            obs_variable=variable,
            obs_hours=rng.uniform(0, MAX_HOURS, n_observations),
            obs_value=normal[variable],
            obs_priority=np.zeros(n_observations, np.int8),
            ev_code=rng.choice(np.array(codes, object), n_events),
            ev_hours=rng.uniform(0, MAX_HOURS, n_events),
            ev_value=rng.normal(10, 2, n_events),
        )
        seconds = []
        for _ in range(300):
            started = time.perf_counter()
            featurise(episode, network.vocabulary, network.preprocessing, MAX_HOURS)
            seconds.append(time.perf_counter() - started)
        times = milliseconds(seconds, 0.5, 0.99)
        rows.append({"observations": n_observations, "events": n_events, **times})
    write("featurise", rows)


if __name__ == "__main__":
    main()
