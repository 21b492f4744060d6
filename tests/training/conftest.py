"""A store as the relational data sets give it: exact deaths, ICU stays, phenotypes, two splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llm4ehr.episode import Episode
from llm4ehr.store import CodeInfo, EpisodeRecord, Outcome, StoreInfo, StoreWriter
from llm4ehr.vocabulary import Vocabulary
from training.data.phenotypes import PHENOTYPES

SPLITS = ("pretrain", "pretrain", "pretrain", "finetune", "test", "test")
N_STAYS = 24


@pytest.fixture(scope="session")
def write_icu_store(
    random_episode: Callable[..., Episode], vocabulary: Vocabulary
) -> Callable[..., Path]:
    """`write_icu_store(path, ...)`: 24 stays of 24 patients, 6 to 62 hours long.

    Every fourth dies at the end of the stay, every fifth was not coded. `seed_of_test` draws the
    stays of the split `test` alone. `benchmark_split` is "train" for even stays and null for odd.
    """

    def make(
        path: Path, source: str = "mimic3", licence: str = "ODbL-1.0", seed_of_test: int = 0
    ) -> Path:
        info = StoreInfo(
            source=source, licence=licence, citation="nobody", created_by="a test",
            label_notes={"length_of_stay": "until discharge", "mortality": "in hospital"},
        )  # fmt: skip
        codes = {e.code: CodeInfo(e.descriptor, e.unit) for e in vocabulary.entries}
        with StoreWriter(path, info, codes=codes, episodes_per_group=7) as writer:
            for i in range(N_STAYS):
                split = SPLITS[i % len(SPLITS)]
                shift = 1000 * seed_of_test if split == "test" else 0
                los = 5.5 + 56 * (i / (N_STAYS - 1))
                episode = random_episode(i + shift, int(np.ceil(los)))
                died = i % 4 == 1
                flags = np.random.default_rng(i).random(len(PHENOTYPES)) < 0.4
                writer.add(
                    EpisodeRecord(
                        episode=replace(episode, episode_id=f"stay-{i:03d}"),
                        subject_id=f"p{i}",
                        split=split,
                        benchmark_split="train" if i % 2 == 0 else None,
                        outcome=Outcome(
                            mortality=died,
                            los_hours=los,
                            death_hours_low=los if died else None,
                            death_hours_high=float(np.nextafter(los, np.inf)) if died else None,
                            phenotypes=None
                            if i % 5 == 4
                            else tuple(n for n, f in zip(PHENOTYPES, flags, strict=True) if f),
                        ),
                    )
                )
        return path

    return make


@pytest.fixture(scope="session")
def icu_store(
    write_icu_store: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One such store, of the source "mimic3"."""
    return write_icu_store(tmp_path_factory.mktemp("icu") / "mimic3")
