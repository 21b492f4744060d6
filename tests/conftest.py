"""Shared by all tests: one thread, no hub, reproducible hypothesis, tiny networks, real stays."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from llm4ehr.episode import (
    Episode,
    Features,
    Preprocessing,
    Statics,
    event_tokens,
    featurise,
    variable_indices,
)
from llm4ehr.variables import VARIABLES
from llm4ehr.vocabulary import CodeEntry, Vocabulary

# Set before torch and transformers are imported, which happens in the tests that need them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

pytest_plugins = ["tests.postgres"]

settings.register_profile("stable", deadline=None, derandomize=True)
settings.load_profile("stable")

FIXTURES = Path(__file__).parent / "fixtures"

_SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
# Weights are drawn wider than the usual 0.02, with which tiny networks hardly react to their input:
# a test of what depends on what would have nothing to see.
_TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 256, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3},
    "opt": _SHAPE
    | {"max_position_embeddings": 256, "word_embed_proj_dim": 16, "ffn_dim": 32, "init_std": 0.3},
    "llama": _SHAPE
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    | {"max_position_embeddings": 256, "initializer_range": 0.3},
    "bert": _SHAPE
    | {"intermediate_size": 32, "max_position_embeddings": 256, "initializer_range": 0.3},
    "roberta": _SHAPE
    | {"intermediate_size": 32, "max_position_embeddings": 258, "initializer_range": 0.3},
    "longformer": _SHAPE
    | {"intermediate_size": 32, "max_position_embeddings": 514, "initializer_range": 0.3}
    | {"attention_window": [512, 512]},
}


@pytest.fixture(params=sorted(_TINY))
def family(request: pytest.FixtureRequest) -> str:
    """Every backbone family in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., dict[str, Any]]:
    """`tiny_config(family, **changes)`: a Hugging Face config of 2 layers and 16 channels."""

    def make(family: str = "gpt2", **changes: Any) -> dict[str, Any]:
        return {"model_type": family} | _TINY[family] | changes

    return make


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """A code on a linear scale, one on a log scale, one without numbers."""
    return Vocabulary(
        [
            CodeEntry(
                code="LOINC/2160-0", descriptor="creatinine", unit="mg/dL", n=90,
                deciles=tuple(i / 10 for i in range(1, 10)), mean=0.5, std=0.25, low=0.0, high=1.0,
            ),
            CodeEntry(
                code="LOINC/2524-7", descriptor="lactate", unit="mmol/L", n=80,
                deciles=(1.0, 2.0, 4.0), scale="log", mean=0.7, std=0.5, low=0.5, high=16.0,
            ),
            CodeEntry(
                code="SNOMED/40617009", descriptor="mechanical ventilation", unit=None, n=70
            ),
        ]
    )  # fmt: skip


@pytest.fixture(scope="session")
def preprocessing() -> Preprocessing:
    """Causal preprocessing, normalised around the normal values."""
    return Preprocessing(
        mean=tuple(v.normal for v in VARIABLES),
        std=tuple((v.plausible_high - v.plausible_low) / 8 for v in VARIABLES),
    )


@pytest.fixture(scope="session")
def make_episode() -> Callable[..., Episode]:
    """Build an episode from `(variable, hours, value[, priority])` and `(code, hours, value)`."""

    def make(
        observations: Sequence[tuple[Any, ...]] = (),
        events: Sequence[tuple[str, float, float]] = (),
        *,
        episode_id: str = "e",
        n_hours: int = 48,
        statics: Statics | None = None,
    ) -> Episode:
        return Episode(
            episode_id=episode_id,
            n_hours=n_hours,
            obs_variable=variable_indices([o[0] for o in observations]),
            obs_hours=np.array([o[1] for o in observations], dtype=np.float64),
            obs_value=np.array([o[2] for o in observations], dtype=np.float64),
            obs_priority=np.array([o[3] if len(o) > 3 else 0 for o in observations], dtype=np.int8),
            ev_code=np.array([e[0] for e in events], dtype=object),
            ev_hours=np.array([e[1] for e in events], dtype=np.float64),
            ev_value=np.array([e[2] for e in events], dtype=np.float64),
            statics=statics or Statics(),
        )

    return make


class Road:
    """From items to features and tokens; `choices` change the shared preprocessing."""

    def __init__(
        self, make: Callable[..., Episode], preprocessing: Preprocessing, vocabulary: Vocabulary
    ) -> None:
        self.make, self.preprocessing, self.vocabulary = make, preprocessing, vocabulary

    def features(self, seen: list, happened: list, n_hours: int, **choices: Any) -> Features:
        chosen = replace(self.preprocessing, **choices)
        return featurise(self.make(seen, happened), self.vocabulary, chosen, n_hours)

    def tokens(self, happened: list, n_hours: int, **choices: Any) -> list[tuple[int, int]]:
        chosen = replace(self.preprocessing, **choices)
        made = event_tokens(self.make([], happened), self.vocabulary, n_hours, chosen)
        return list(zip(made.ids.tolist(), made.hours.tolist(), strict=True))


@pytest.fixture(scope="session")
def road(
    make_episode: Callable[..., Episode], preprocessing: Preprocessing, vocabulary: Vocabulary
) -> Road:
    """Features and tokens straight from lists of items."""
    return Road(make_episode, preprocessing, vocabulary)


@pytest.fixture(scope="session")
def random_episode(
    make_episode: Callable[..., Episode], vocabulary: Vocabulary
) -> Callable[..., Episode]:
    """`random_episode(seed, n_hours)`: a stay with a few items an hour."""

    def make(seed: int, n_hours: int = 48, n_observations: int | None = None) -> Episode:
        rng = np.random.default_rng(seed)
        n = 4 * n_hours if n_observations is None else n_observations
        observed = [VARIABLES[i] for i in rng.integers(0, len(VARIABLES), n)]
        codes = [e.code for e in vocabulary.entries]
        return make_episode(
            [
                (v.name, rng.uniform(0, n_hours), rng.uniform(v.plausible_low, v.plausible_high))
                for v in observed
            ],
            [
                (codes[rng.integers(len(codes))], rng.uniform(0, n_hours), rng.uniform(0, 2))
                for _ in range(n_hours)
            ],
            episode_id=f"stay-{seed:03d}",
            n_hours=n_hours,
            statics=Statics(age_years=float(rng.integers(20, 90)), sex="female"),
        )

    return make


@pytest.fixture(scope="session")
def tiny_network(
    tiny_config: Callable[..., dict[str, Any]],
    preprocessing: Preprocessing,
    vocabulary: Vocabulary,
) -> Callable[..., Any]:
    """`tiny_network(family, ...)`: a network with random weights, heads for three tasks."""

    def make(
        family: str = "gpt2",
        *,
        seed: int = 0,
        frozen: bool = True,
        attention_mode: str = "causal",
        events: str = "fused",
        heads: dict[str, int] | None = None,
        **options: Any,
    ) -> Any:
        import torch

        from llm4ehr.backbone import spec_from_config
        from llm4ehr.bundle import Network
        from llm4ehr.model import LLM4EHR, ModelConfig

        torch.manual_seed(seed)
        config = ModelConfig(
            backbone=spec_from_config(
                tiny_config(family), attention_mode=attention_mode, frozen=frozen
            ),
            n_series=preprocessing.n_series,
            n_event_channels=3 * len(vocabulary),
            n_tokens=vocabulary.n_tokens,
            events=events,
            heads={"decompensation": 1, "mortality": 1, "remaining_los": 1}
            if heads is None
            else heads,
            **options,
        )
        model = LLM4EHR(config).eval()
        return Network(model=model, preprocessing=preprocessing, vocabulary=vocabulary)

    return make


@pytest.fixture(scope="session")
def store_2012(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 15 stays of the PhysioNet 2012 fixture as an episode store (splits a and b)."""
    from training.data.prepare import prepare

    path = tmp_path_factory.mktemp("stores") / "physionet2012"
    prepare("physionet2012", FIXTURES / "physionet2012", path, progress=False)
    return path


@pytest.fixture(scope="session")
def store_2019(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 4 stays of the PhysioNet 2019 fixture as an episode store (splits a and b)."""
    from training.data.prepare import prepare

    path = tmp_path_factory.mktemp("stores") / "physionet2019"
    prepare("physionet2019", FIXTURES / "physionet2019", path, progress=False)
    return path


@pytest.fixture(scope="session")
def pretrain_body(
    tiny_config: Callable[..., dict[str, Any]],
    store_2012: Path,
    store_2019: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., dict[str, Any]]:
    """`pretrain_body(run, **changes)`: pre-training of a tiny GPT-2 on all fixture stays."""
    cache = tmp_path_factory.mktemp("features")

    def make(run: Path, **changes: Any) -> dict[str, Any]:
        return {
            "run": run,
            "data": {
                "sources": [
                    {"store": store_2012, "splits": ["a", "b"]},
                    {"store": store_2019, "splits": ["a", "b"]},
                ],
                "cache": cache,
                "n_folds": 2,
                "validation_fold": 1,
            },
            "model": {
                "backbone": {"config": tiny_config("gpt2"), "frozen": False},
                "events": "fused",
            },
            "optim": {
                "epochs": 2,
                "batch_size": 4,
                "learning_rate": 3e-3,
                "checkpoint_every": 2,
            },
        } | changes

    return make


@pytest.fixture(scope="session")
def pretrained(
    pretrain_body: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a finished pre-training run."""
    from training.config import PretrainConfig
    from training.pretrain import pretrain

    run = tmp_path_factory.mktemp("runs") / "pretrain"
    pretrain(PretrainConfig.model_validate(pretrain_body(run)))
    return run


@pytest.fixture(scope="session")
def llm4ehr_data() -> Path:
    """The folder with the whole open data sets; tests that need it are skipped without."""
    folder = os.environ.get("LLM4EHR_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LLM4EHR_DATA names no folder with the open data sets, see docs/training.md")
    return Path(folder)
