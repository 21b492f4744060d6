"""How much of a pre-training batch is padding, by the way batches are made.

    python -m benchmarks.padding --stores FOLDER

FOLDER holds the prepared stores by name; the stays are those of the default pre-training. Every
figure is what is computed over what is there: hours, event tokens, and pairs of event tokens that
attend to each other. The first run makes the features, which takes minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.report import write
from training.config import PretrainConfig, load_config
from training.dataset import FeatureSet, batches, build_features, fit_preprocessing, token_groups
from training.pretrain import training_episodes
from training.sources import open_sources

CONTEXT, LONGEST = 1024, 200  # tokens of the backbone, hours of a stay
Counts = NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stores", type=Path, required=True)
    stores: Path = parser.parse_args().stores
    config = load_config(PretrainConfig, Path("training/configs/default_pretrain.yaml"))
    features = features_of(config, stores)
    chosen = training_episodes(features, config)
    hours = features.lengths[chosen]
    tokens = np.minimum(np.diff(features.token_offsets)[chosen], CONTEXT)
    size = config.optim.batch_size
    drawn = np.random.default_rng(0).permutation(len(hours))
    shuffled = [drawn[i : i + size] for i in range(0, len(drawn), size)]
    alike = batches(hours, size, seed=0, epoch=0)
    write(
        "padding",
        [
            row("as they come, hours to 200", shuffled, hours, tokens, lambda n: LONGEST, whole),
            row("as they come", shuffled, hours, tokens, max, whole),
            row("similar lengths together", alike, hours, tokens, max, whole),
            row("and tokens in groups", alike, hours, tokens, max, grouped),
        ],
    )


def features_of(config: PretrainConfig, stores: Path) -> FeatureSet:
    """The features of the default pre-training, from stores in another place."""
    sources = open_sources(
        [s.model_copy(update={"store": stores / s.store.name}) for s in config.data.sources],
        training=True,
    )
    fitted = fit_preprocessing(sources, config.preprocessing, config.data.max_codes)
    return build_features(sources, *fitted, config.data.cache)


def row(
    way: str,
    made: list[Counts],
    hours: Counts,
    tokens: Counts,
    length: Callable[[Counts], int],
    parts: Callable[[Counts], Iterable[tuple[int, int]]],
) -> dict[str, object]:
    """Padded over real sizes. `parts` gives the stays and the tokens of what is read at once."""
    padded = [part for batch in made for part in parts(tokens[batch])]
    squares = sum(n * width**2 for n, width in padded)
    return {
        "batches": way,
        "stays": len(hours),
        "hours": round(sum(len(b) * length(hours[b]) for b in made) / hours.sum(), 2),
        "tokens": round(sum(n * width for n, width in padded) / tokens.sum(), 2),
        "pairs_of_tokens": round(squares / float((tokens.astype(float) ** 2).sum()), 2),
    }


def whole(tokens: Counts) -> Iterable[tuple[int, int]]:
    """A batch in one piece."""
    yield len(tokens), int(tokens.max())


def grouped(tokens: Counts) -> Iterable[tuple[int, int]]:
    """A batch in groups, as training reads events."""
    mask = torch.arange(int(tokens.max())) < torch.from_numpy(tokens)[:, None]
    for rows, width in token_groups(mask):
        yield len(rows), width


if __name__ == "__main__":
    main()
