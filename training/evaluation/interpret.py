"""How clinical the embedding of the series is: clusters of patches compared (paper, Table 11).

CI and SI are the adjusted mutual information between clusters of the series embedding v' and those
of the event embedding z', or of the measured values f; docs/experiments.md has the definitions.

Shape legend: n patches, H hidden, V variables.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.manifold import TSNE
from sklearn.metrics import adjusted_mutual_info_score, silhouette_score

from llm4ehr.bundle import Network, load_network
from training.config import SourceConfig
from training.contrast import pooled_events, usable_patches
from training.dataset import build_features
from training.evaluation.facts import facts_of_network
from training.loop import device
from training.progress import track
from training.run_folder import environment
from training.sources import Source, open_sources

Floats = NDArray[np.floating]

MAX_PATCHES = 20_000  # the silhouette is quadratic in them
SAMPLE = 5_000  # of the silhouettes that choose a number of clusters, and of the picture
CLUSTERS = range(2, 21)
RESTARTS = 10
PERPLEXITY = 30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Patches:
    """The usable patches of some stays: event tokens are there, and hours inside the stay."""

    v: Floats  # [n, H] series embedding v'
    z: Floats  # [n, H] event embedding z'
    f: Floats  # [n, V] the normalised variables, mean over the hours of the patch
    episodes: NDArray[np.str_]  # [n]


def interpret(
    run: Path, source: SourceConfig, out: Path, *, seeds: Sequence[int] = tuple(range(5))
) -> dict[str, Any]:
    """Cluster the patches of a split by a pre-training run, once a seed.

    Writes metrics.json and tsne.png to `out`. Raises ValueError when there are too few patches.
    """
    (opened,) = open_sources([source], training=False)
    network = load_network(run)
    config = json.loads((run / "pretrain.json").read_text())
    patches = collect(network, opened, Path(config["data"]["cache"]))
    by_seed = [agreement(patches, seed) for seed in seeds]
    report = {
        "model": str(run),
        "source": opened.name,
        "splits": list(source.splits),
        "patches": len(patches.v),
        "facts": {"backbone": config["model"]["backbone"]["source"]}
        | {"seeds": {"pretraining": config["seed"], "clustering": list(seeds)}}
        | facts_of_network(network, np.unique(patches.episodes)),
        "mean": {m: float(np.mean([of[m] for of in by_seed])) for m in by_seed[0]},
        "std": {m: float(np.std([of[m] for of in by_seed])) for m in by_seed[0]},
        "by_seed": by_seed,
        "environment": environment(),
    }
    out.mkdir(parents=True, exist_ok=True)
    clusters = kmeans(patches.f, int(by_seed[0]["k_si"]), seeds[0])
    draw_tsne(out / "tsne.png", patches.v, clusters, seeds[0])
    # Written last: its presence says that all of it is there.
    (out / "metrics.json").write_text(json.dumps(report, indent=2))
    return report


@torch.inference_mode()
def collect(network: Network, source: Source, cache: Path) -> Patches:
    """At most `MAX_PATCHES` usable patches, drawn with seed 0."""
    model = network.model.to(device()).eval()
    features = build_features([source], network.preprocessing, network.vocabulary, cache)
    parts: dict[str, list[NDArray[Any]]] = {"v": [], "z": [], "f": [], "episode": []}
    starts = range(0, len(features), 64)
    for start in track(starts, f"patches of {source.name}", len(starts)):
        index = np.arange(start, min(start + 64, len(features)))
        batch = features.batch(index, model.max_tokens).to(device())
        v_BPH = model.pool_hours(
            model.encode_hours(batch.series, batch.events, batch.hour_mask), batch.hour_mask
        )
        n = v_BPH.shape[1]
        z_BPH = pooled_events(model, batch, n)
        x = batch.series[..., : model.config.n_variables]
        f_BPV = mean_of_patches(x, batch.hour_mask, model.config.patch_hours)
        usable = usable_patches(model, batch, n)
        for name, patches in (("v", v_BPH), ("z", z_BPH), ("f", f_BPV)):
            parts[name].append(patches[usable].float().cpu().numpy())
        names = np.array([features.episode_ids[i] for i in index])
        parts["episode"].append(names[usable.nonzero()[:, 0].cpu().numpy()])
    whole = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    drawn = _sample(len(whole["v"]), MAX_PATCHES, 0)
    return Patches(
        v=whole["v"][drawn],
        z=whole["z"][drawn],
        f=whole["f"][drawn],
        episodes=whole["episode"][drawn],
    )


def mean_of_patches(x_BTV: torch.Tensor, hour_mask: torch.Tensor, hours: int) -> torch.Tensor:
    """Mean over the hours of each patch that are inside the stay: [B, P, V]."""
    pad = -x_BTV.shape[1] % hours
    x = torch.nn.functional.pad(x_BTV * hour_mask[..., None], (0, 0, 0, pad))
    n = torch.nn.functional.pad(hour_mask, (0, pad)).unflatten(1, (-1, hours)).sum(2)
    return x.unflatten(1, (-1, hours)).sum(2) / n.clamp(min=1)[..., None]


def agreement(patches: Patches, seed: int) -> dict[str, float]:
    """CI, SI and silhouettes with one seed of K-means.

    The numbers of clusters are those with the best silhouette of z' and of f. `silhouette` is that
    of v' under its own clusters, as many as f has; beside it are the variant with as many as z' has
    and that of v' under the clusters of f.
    """
    v, z, f = patches.v, patches.z, patches.f
    k_ci, k_si = best_k(z, seed), best_k(f, seed)
    v_ci, v_si = kmeans(v, k_ci, seed), kmeans(v, k_si, seed)
    of_f = kmeans(f, k_si, seed)
    return {
        "k_ci": k_ci,
        "k_si": k_si,
        "ci_ami": float(adjusted_mutual_info_score(v_ci, kmeans(z, k_ci, seed))),
        "si_ami": float(adjusted_mutual_info_score(v_si, of_f)),
        "silhouette": _silhouette(v, v_si, None, seed),
        "silhouette_k_ci": _silhouette(v, v_ci, None, seed),
        "silhouette_by_values": _silhouette(v, of_f, None, seed),
    }


def kmeans(x: Floats, k: int, seed: int) -> NDArray[np.int32]:
    """Cluster of every row: Lloyd's algorithm, Euclidean, best of ten starts."""
    made = KMeans(k, n_init=RESTARTS, random_state=seed, algorithm="lloyd").fit(x)
    labels: NDArray[np.int32] = made.labels_
    return labels


def best_k(x: Floats, seed: int) -> int:
    """The number of clusters, of 2 to 20, with the best silhouette.

    Raises ValueError for fewer than four rows, which no number of clusters divides sensibly.
    """
    distinct = len(np.unique(x, axis=0))
    if distinct < 4:
        raise ValueError(f"{distinct} different patches are too few to cluster")
    grid = [k for k in CLUSTERS if k < distinct]
    return max(grid, key=lambda k: _silhouette(x, kmeans(x, k, seed), SAMPLE, seed))


def _silhouette(x: Floats, labels: NDArray[np.int32], sample: int | None, seed: int) -> float:
    size = None if sample is None or sample >= len(x) else sample
    return float(silhouette_score(x, labels, sample_size=size, random_state=seed))


def draw_tsne(path: Path, v_nH: Floats, clusters: NDArray[np.int32], seed: int) -> None:
    """Figure 4: t-SNE of v' in the colours of the clusters of f."""
    drawn = _sample(len(v_nH), SAMPLE, seed)
    perplexity = min(PERPLEXITY, (len(drawn) - 1) / 3)
    made = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(v_nH[drawn])
    figure = Figure(figsize=(6, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.scatter(made[:, 0], made[:, 1], c=clusters[drawn], cmap="tab20", s=3)
    axes.set(xticks=[], yticks=[], title="t-SNE of v' by clusters of the values")
    figure.savefig(path, dpi=120)


def _sample(n: int, at_most: int, seed: int) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(seed).permutation(n)[:at_most])
