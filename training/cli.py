"""Command line of the training side.

prepare | pretrain | finetune | crossvalidate | evaluate | interpret | sweep | export | chain | meds
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from training.data import READERS

# What a command needs is imported when it runs: `prepare` needs no torch.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. What a user can mend is one line, no traceback."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run_command(arguments) or 0)
    except (OSError, ValueError) as error:  # every error of ours that has a cure is a ValueError
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1


def _prepare(a: argparse.Namespace) -> int:
    from training.data.prepare import prepare

    if a.check:
        return _check(a)
    if a.out is None:
        raise ValueError("--out is missing: the episode store to write")
    given = {name: getattr(a, name) for name in ("profile", "lab_delay", "code_map")}
    options = {name: value for name, value in given.items() if value is not None}
    info = prepare(a.dataset, a.source, a.out, name=a.name, **options)
    print(json.dumps(info.counts, indent=2))
    print(f"report: {a.out / 'report.html'}")
    return 0


def _check(a: argparse.Namespace) -> int:
    from training.data.user_table.reader import check

    if a.dataset != "table":
        raise ValueError(f"--check is for the data set table, not {a.dataset}")
    # As `prepare` names it; without a store in the current folder, but never among the tables.
    source = a.source.resolve()
    beside = a.out.resolve() if a.out is not None else Path.cwd() / source.name
    if beside.is_relative_to(source):
        if a.out is not None:
            raise ValueError(f"--out lies in the source folder: {a.out}")
        beside = source
    rejected = beside.with_name(beside.name + ".rejected.csv")
    rejected.parent.mkdir(parents=True, exist_ok=True)
    report = check(a.source, rejected)
    print(report)
    if rejected.exists():
        print(f"refused rows: {rejected}")
    return 0 if report.passed else 1


def _pretrain(a: argparse.Namespace) -> None:
    from accelerate import PartialState

    from training.config import PretrainConfig, load_config
    from training.pretrain import pretrain

    pretrain(load_config(PretrainConfig, a.config, a.set))
    PartialState().destroy_process_group()


def _finetune(a: argparse.Namespace) -> None:
    from accelerate import PartialState

    from training.config import FinetuneConfig, load_config
    from training.finetune import finetune

    finetune(load_config(FinetuneConfig, a.config, a.set))
    PartialState().destroy_process_group()


def _crossvalidate(a: argparse.Namespace) -> None:
    from training.config import FinetuneConfig, load_config
    from training.crossvalidate import crossvalidate

    print(json.dumps(crossvalidate(load_config(FinetuneConfig, a.config, a.set)), indent=2))


def _chain(a: argparse.Namespace) -> None:
    from training.chain import chain

    print(chain(a.data, a.out, a.size))


def _evaluate(a: argparse.Namespace) -> None:
    from llm4ehr.model import TASKS
    from training.config import SourceConfig
    from training.evaluation.evaluate import evaluate

    if unknown := sorted(set(a.labels or ()) - set(TASKS)):
        raise ValueError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    report = evaluate(
        a.model,
        a.store,
        a.split,
        a.out,
        labels=a.labels,
        split_column=a.split_column,
        max_episodes=a.max_episodes,
        threshold_on=[
            SourceConfig(store=Path(store), splits=(split,))
            for store, split in a.threshold_on or ()
        ],
    )
    print(json.dumps(report, indent=2))


def _interpret(a: argparse.Namespace) -> None:
    from training.config import SourceConfig
    from training.evaluation.interpret import interpret

    source = SourceConfig(
        store=a.store, splits=tuple(a.split), split_column=a.split_column,
        max_episodes=a.max_episodes,
    )  # fmt: skip
    print(json.dumps(interpret(a.run, source, a.out, seeds=range(a.seeds)), indent=2))


def _sweep(a: argparse.Namespace) -> None:
    from training.sweep.config import load_sweep
    from training.sweep.run import sweep
    from training.sweep.table import markdown

    config = load_sweep(a.config, a.set)
    out = a.out or config.runs / ("smoke" if a.smoke else "tables") / a.config.stem
    print(markdown(sweep(config, out, smoke=a.smoke)))
    print(f"table: {out / 'table.md'}")


def _export(a: argparse.Namespace) -> None:
    from training.export.run import export

    print(export(a.run, a.repository, a.name, a.version, a.metrics, onnx=a.onnx))


def _meds(a: argparse.Namespace) -> None:
    from training.data.meds.dataset import write_dataset
    from training.data.meds.export import write_labels, write_predictions

    if a.what == "dataset":
        print(f"{write_dataset(a.store, a.out):,} events")
    elif a.what == "labels":
        print(json.dumps(write_labels(a.store, a.out), indent=2))
    elif a.predictions is None:
        raise ValueError("--predictions is missing: the file that `python -m service score` wrote")
    else:
        rows = write_predictions(a.predictions, a.store, a.out, threshold=a.threshold)
        print(json.dumps(rows, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True)
    _add_prepare(commands)

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

    sweep = commands.add_parser("sweep", help="an experiment: rows, tasks and seeds into one table")
    sweep.add_argument("config", type=Path, help="YAML file, see training/configs/paper/")
    sweep.add_argument(
        "--set", action="append", metavar="KEY.PATH=VALUE", help="override a key of the file"
    )
    sweep.add_argument("--smoke", action="store_true", help="tiny networks, few stays, one epoch")
    sweep.add_argument("--out", type=Path, help="folder for table.json and table.md")
    sweep.set_defaults(run_command=_sweep)

    interpret = commands.add_parser("interpret", help="cluster the patches of a pre-training run")
    interpret.add_argument("run", type=Path, help="pre-training run")
    interpret.add_argument("--store", type=Path, required=True)
    interpret.add_argument("--split", action="append", required=True)
    interpret.add_argument("--split-column", choices=("split", "benchmark_split"), default="split")
    interpret.add_argument("--max-episodes", type=int, help="read at most so many stays")
    interpret.add_argument("--seeds", type=int, default=5, help="of K-means, counted from 0")
    interpret.add_argument("--out", type=Path, required=True, help="folder for JSON and picture")
    interpret.set_defaults(run_command=_interpret)

    evaluate = commands.add_parser("evaluate", help="score splits and compute metrics")
    evaluate.add_argument("model", type=Path, help="bundle folder or fine-tuning run")
    evaluate.add_argument(
        "--store", type=Path, action="append", required=True, help="repeat it to pool stores"
    )
    evaluate.add_argument("--split", action="append", required=True)
    evaluate.add_argument("--split-column", choices=("split", "benchmark_split"), default="split")
    evaluate.add_argument(
        "--labels", action="append", metavar="TASK", help="task to judge; repeatable; default: all"
    )
    evaluate.add_argument("--max-episodes", type=int, help="read at most so many of each store")
    evaluate.add_argument(
        "--threshold-on",
        nargs=2,
        action="append",
        metavar=("STORE", "SPLIT"),
        help="other stays that choose the threshold and the calibration of mortality; repeatable",
    )
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
    export.add_argument(
        "--onnx",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also write ONNX graphs, checked against torch, as Triton reads them",
    )
    export.set_defaults(run_command=_export)

    chain = commands.add_parser("chain", help="open data -> bundle, all steps in one")
    chain.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with the official files, see docs/training.md",
    )
    chain.add_argument("--out", type=Path, required=True, help="folder for stores and runs")
    chain.add_argument("--size", choices=("demo", "full"), default="full")
    chain.set_defaults(run_command=_chain)

    meds = commands.add_parser("meds", help="episode store -> MEDS data set, labels, predictions")
    meds.add_argument("what", choices=("dataset", "labels", "predictions"))
    meds.add_argument("--store", type=Path, required=True)
    meds.add_argument("--out", type=Path, required=True, help="folder to write")
    meds.add_argument("--predictions", type=Path, help="file that `python -m service score` wrote")
    meds.add_argument("--threshold", type=float, default=0.5, help="of a positive prediction")
    meds.set_defaults(run_command=_meds)
    return parser


def _add_prepare(commands: argparse._SubParsersAction) -> None:
    prepare = commands.add_parser("prepare", help="official files -> episode store")
    prepare.add_argument("dataset", choices=sorted(READERS))
    prepare.add_argument("--source", type=Path, required=True, help="folder of the official files")
    prepare.add_argument("--out", type=Path, help="episode store to write")
    prepare.add_argument(
        "--name",
        help="meds, table: what the data set is called from here on (default: meds, table)",
    )
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
    prepare.add_argument(
        "--check", action="store_true", help="table: only say which rows would be refused"
    )
    prepare.set_defaults(run_command=_prepare)
