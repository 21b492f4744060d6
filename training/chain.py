"""The whole chain from open data to a bundle: prepare, pretrain, finetune, evaluate, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from training.config import FinetuneConfig, PretrainConfig, load_config
from training.data.prepare import prepare
from training.evaluate import evaluate
from training.export import export
from training.finetune import finetune
from training.pretrain import pretrain

CONFIGS = Path(__file__).parent / "configs"

_DEMO_PRETRAIN = ["data.max_episodes=1000", "optim.epochs=1", "optim.warmup_steps=5"]
_DEMO_FINETUNE = ["data.max_episodes=1500", "optim.epochs=3"]


def _yaml(path: Path) -> str:
    """A path as a YAML scalar, whatever characters it has: JSON strings are YAML."""
    return json.dumps(str(path))


def chain(data: Path, out: Path, size: Literal["demo", "full"]) -> Path:
    """Make a bundle from `data`/physionet2012 and `data`/physionet2019; returns its folder.

    Trains on set A of 2012 (and, without labels, on 2019), evaluates on set B, never touches set C.
    Steps that are finished already are not repeated. "demo" uses a small part of the stays and
    shows that everything works, not how well it can work.
    Raises FileNotFoundError when the data is not there.
    """
    stores = {}
    for dataset in ("physionet2012", "physionet2019"):
        source = data / dataset
        if not source.is_dir():
            raise FileNotFoundError(
                f"{source}: not found; put the official files of the challenge there "
                "(openly licensed, see docs/data.md)"
            )
        stores[dataset] = out / "stores" / dataset
        if not stores[dataset].exists():
            prepare(dataset, source, stores[dataset])

    pretrain_config = load_config(
        PretrainConfig,
        CONFIGS / "default_pretrain.yaml",
        [
            f"run={_yaml(out / 'pretrain')}",
            f"data.cache={_yaml(out / 'cache')}",
            f"data.sources=[{{store: {_yaml(stores['physionet2012'])}, splits: [a]}}, "
            f"{{store: {_yaml(stores['physionet2019'])}, splits: [a, b]}}]",
            *(_DEMO_PRETRAIN if size == "demo" else []),
        ],
    )
    pretrain(pretrain_config)

    finetune_config = load_config(
        FinetuneConfig,
        CONFIGS / "default_finetune.yaml",
        [
            f"run={_yaml(out / 'finetune')}",
            f"pretrained={_yaml(out / 'pretrain')}",
            f"data.cache={_yaml(out / 'cache')}",
            f"data.sources=[{{store: {_yaml(stores['physionet2012'])}, splits: [a]}}]",
            *(_DEMO_FINETUNE if size == "demo" else []),
        ],
    )
    finetune(finetune_config)

    results = out / "evaluation"
    evaluate(finetune_config.run, stores["physionet2012"], "b", results)
    repository = out / "model_repository"
    name = "llm4ehr" if size == "full" else "llm4ehr-demo"
    folder = repository / name / "1"
    if not folder.exists():
        export(finetune_config.run, repository, name, 1, results / "metrics.json")
    return folder
