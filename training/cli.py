"""Command line of the training side.

prepare | pretrain | finetune | crossvalidate | evaluate | export | chain
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llm4ehr.backbone import BackboneError
from llm4ehr.bundle import BundleError
from llm4ehr.store import StoreError
from training.config import ConfigError, FinetuneConfig, PretrainConfig, load_config
from training.data import READERS


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. What a user can mend is one line, no traceback."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run_command(arguments)
    except (BackboneError, BundleError, ConfigError, OSError, StoreError, ValueError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


def _prepare(a: argparse.Namespace) -> None:
    from training.data.prepare import prepare

    given = {name: getattr(a, name) for name in ("profile", "lab_delay", "code_map")}
    options = {name: value for name, value in given.items() if value is not None}
    info = prepare(a.dataset, a.source, a.out, **options)
    print(json.dumps(info.counts, indent=2))
    print(f"report: {a.out / 'report.html'}")


def _pretrain(a: argparse.Namespace) -> None:
    from training.pretrain import pretrain

    pretrain(load_config(PretrainConfig, a.config, a.set))


def _finetune(a: argparse.Namespace) -> None:
    from training.finetune import finetune

    finetune(load_config(FinetuneConfig, a.config, a.set))


def _crossvalidate(a: argparse.Namespace) -> None:
    from training.crossvalidate import crossvalidate

    print(json.dumps(crossvalidate(load_config(FinetuneConfig, a.config, a.set)), indent=2))


def _chain(a: argparse.Namespace) -> None:
    from training.chain import chain

    print(chain(a.data, a.out, a.size))


def _evaluate(a: argparse.Namespace) -> None:
    from training.evaluate import evaluate

    print(json.dumps(evaluate(a.model, a.store, a.split, a.out), indent=2))


def _export(a: argparse.Namespace) -> None:
    from training.export import export

    print(export(a.run, a.repository, a.name, a.version, a.metrics))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True)

    prepare = commands.add_parser("prepare", help="official files -> episode store")
    prepare.add_argument("dataset", choices=sorted(READERS))
    prepare.add_argument("--source", type=Path, required=True, help="folder of the official files")
    prepare.add_argument("--out", type=Path, required=True, help="episode store to write")
    prepare.add_argument(
        "--profile",
        choices=("strict", "benchmark"),
        help="mimic3, eicu: corrected (default), or the published benchmark with its quirks",
    )
    prepare.add_argument(
        "--lab-delay",
        type=float,
        metavar="HOURS",
        help="mimic3, mimic4: from drawing a sample to its result, where the source does not tell",
    )
    prepare.add_argument(
        "--code-map", type=Path, metavar="FILE", help="meds: YAML that maps codes to the variables"
    )
    prepare.set_defaults(run_command=_prepare)

    for name, run, text in (
        ("pretrain", _pretrain, "episode stores -> encoder"),
        ("finetune", _finetune, "encoder -> encoder with heads"),
        ("crossvalidate", _crossvalidate, "fine-tune once a patient fold, out-of-fold metrics"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", type=Path, help="YAML file, see training/configs/")
        command.add_argument(
            "--set", action="append", metavar="KEY.PATH=VALUE", help="override a key of the file"
        )
        command.set_defaults(run_command=run)

    evaluate = commands.add_parser("evaluate", help="score a split and compute metrics")
    evaluate.add_argument("model", type=Path, help="bundle folder or fine-tuning run")
    evaluate.add_argument("--store", type=Path, required=True)
    evaluate.add_argument("--split", required=True)
    evaluate.add_argument("--out", type=Path, help="folder for metrics.json and predictions")
    evaluate.set_defaults(run_command=_evaluate)

    export = commands.add_parser("export", help="fine-tuning run -> bundle")
    export.add_argument("run", type=Path, help="fine-tuning run")
    export.add_argument("--repository", type=Path, default=Path("model_repository"))
    export.add_argument("--name", required=True)
    export.add_argument("--version", type=int, required=True)
    export.add_argument(
        "--metrics",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="metrics.json of `evaluate`, one for each data set, for the card",
    )
    export.set_defaults(run_command=_export)

    chain = commands.add_parser("chain", help="open data -> bundle, all steps in one")
    chain.add_argument(
        "--data", type=Path, required=True, help="folder with physionet2012/ and physionet2019/"
    )
    chain.add_argument("--out", type=Path, required=True, help="folder for stores and runs")
    chain.add_argument("--size", choices=("demo", "full"), default="full")
    chain.set_defaults(run_command=_chain)
    return parser
