"""The whole chain from open data to a bundle: prepare, pretrain, finetune, evaluate, export."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm4ehr.model import Task
from training.config import FinetuneConfig, PretrainConfig, load_config
from training.data.prepare import prepare
from training.evaluation.evaluate import evaluate
from training.export.run import export
from training.finetune import finetune
from training.pretrain import pretrain

CONFIGS = Path(__file__).parent / "configs"
Size = Literal["demo", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenData:
    """An open data set and its part in the chain. `labels`: None for all that it has."""

    folder: str
    pretrain: tuple[str, ...]
    finetune: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    labels: tuple[Task, ...] | None = None
    required: bool = False
    # At most so many stays of each part are read: by size "full", and by size "demo".
    at_most: int | None = None
    demo: int


# The length of stay of 2012 is that of the hospital stay, to the day: it would teach the head of
# the remaining ICU stay something else. The demos are small, so their fine-tuning split is added to
# the pre-training split instead of standing alone; `test` is never trained on.
OPEN_DATA: dict[str, OpenData] = {
    "physionet2012": OpenData(
        folder="physionet2012",
        pretrain=("a",),
        finetune=("a",),
        test=("b",),
        labels=("mortality", "decompensation"),
        required=True,
        demo=600,
    ),
    "physionet2019": OpenData(
        folder="physionet2019", pretrain=("a", "b"), required=True, at_most=8000, demo=300
    ),
    **{
        name: OpenData(
            folder=folder,
            pretrain=("pretrain",),
            finetune=("pretrain", "finetune"),
            test=("test",),
            demo=200,
        )
        for name, folder in (
            ("eicu", "eicu-demo-2.0.1"),
            ("mimic3", "mimic-iii-demo-1.4"),
            ("mimic4", "mimic-iv-demo-2.2"),
        )
    },
}
DEMOS = ("eicu", "mimic3", "mimic4")  # evaluated together: each test split alone is small
_DEMO_PRETRAIN = ["optim.epochs=1", "optim.warmup_steps=5"]
_DEMO_FINETUNE = ["optim.epochs=2", "optim.warmup_steps=5"]


def chain(data: Path, out: Path, size: Size) -> Path:
    """Make a bundle from the open data sets found under `data`; returns its folder.

    Trains on set A of 2012, without labels on 2019, and on the MIMIC and eICU demos but for their
    test split; evaluates on set B and on those test splits; never touches set C. A demo that is not
    there is reported and left out. Steps that are finished already are not repeated. "demo" uses a
    small part of the stays and shows that everything works, not how well it can work.
    Raises FileNotFoundError when 2012 or 2019 is not there.
    """
    stores = prepare_stores(data, out / "stores")

    def sources(part: Literal["pretrain", "finetune"]) -> list[dict[str, Any]]:
        found = []
        for name, store in stores.items():
            of = OPEN_DATA[name]
            if splits := getattr(of, part):
                at_most = of.demo if size == "demo" else of.at_most
                source = {"store": str(store), "splits": list(splits), "max_episodes": at_most}
                labels = of.labels if part != "pretrain" else None
                found.append(source | {"labels": None if labels is None else list(labels)})
        return found

    pretrain_config = load_config(
        PretrainConfig,
        CONFIGS / "default_pretrain.yaml",
        [
            f"run={_yaml(str(out / 'pretrain'))}",
            f"data.cache={_yaml(str(out / 'cache'))}",
            f"data.sources={_yaml(sources('pretrain'))}",
            *(_DEMO_PRETRAIN if size == "demo" else []),
        ],
    )
    pretrain(pretrain_config)

    finetune_config = load_config(
        FinetuneConfig,
        CONFIGS / "default_finetune.yaml",
        [
            f"run={_yaml(str(out / 'finetune'))}",
            f"pretrained={_yaml(str(out / 'pretrain'))}",
            f"data.cache={_yaml(str(out / 'cache'))}",
            f"data.sources={_yaml(sources('finetune'))}",
            *(_DEMO_FINETUNE if size == "demo" else []),
        ],
    )
    finetune(finetune_config)

    results = []
    for name, stays in (("physionet2012", ["physionet2012"]), ("demos", DEMOS)):
        if chosen := [n for n in stays if n in stores]:
            of = OPEN_DATA[chosen[0]]
            evaluate(
                finetune_config.run,
                [stores[n] for n in chosen],
                of.test,
                out / "evaluation" / name,
                labels=of.labels,
                max_episodes=of.demo if size == "demo" else None,
            )
            results.append(out / "evaluation" / name / "metrics.json")

    repository = out / "model_repository"
    name = "llm4ehr" if size == "full" else "llm4ehr-demo"
    folder = repository / name / "1"
    if not folder.exists():
        # Where the data lie on this machine is nobody else's business.
        command = f"python -m training chain --data DATA --out {out} --size {size}"
        export(finetune_config.run, repository, name, 1, results, command, onnx=True)
    return folder


def prepare_stores(data: Path, stores: Path) -> dict[str, Path]:
    """Prepare what is under `data` and not in `stores` yet: data set -> its store.

    Raises FileNotFoundError when a required data set is not there.
    """
    found = {}
    for name, of in OPEN_DATA.items():
        source = data / of.folder
        if source.is_dir():
            found[name] = stores / name
        elif of.required:
            raise FileNotFoundError(
                f"{source}: not found; put the official files there (openly licensed, see "
                "docs/data.md)"
            )
        else:
            print(f"{source}: not found, {name} is left out", file=sys.stderr)
    for name, store in found.items():
        if not store.exists():
            prepare(name, data / OPEN_DATA[name].folder, store)
    return found


def _yaml(value: Any) -> str:
    """A value as YAML, whatever characters it has: JSON is YAML."""
    return json.dumps(value)
