"""score: a whole cohort in one go; gate: what a reduced precision changes."""

from __future__ import annotations

import argparse
from pathlib import Path

from service.batch import score_store
from service.commands.parsers import Commands, add_bundle, bundle_of
from service.precision import LIMIT, measure


def add(commands: Commands) -> None:
    """`score` and `gate`."""
    score = commands.add_parser("score", help="score every hour of an episode store")
    score.add_argument("--data", type=Path, required=True, help="episode store")
    score.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    add_bundle(score)
    score.add_argument("--embeddings", action="store_true", help="add the hidden states")
    score.set_defaults(run_command=_score)

    gate = commands.add_parser(
        "gate", help="measure on real stays what a reduced precision changes"
    )
    gate.add_argument("--precision", choices=["bf16"], required=True)
    gate.add_argument("--data", type=Path, required=True, help="episode store")
    gate.add_argument("--out", type=Path, required=True, help="JSON file to write")
    gate.add_argument(
        "--limit", type=float, default=LIMIT, help="largest change of a probability that passes"
    )
    add_bundle(gate)
    gate.set_defaults(run_command=_gate)


def _score(a: argparse.Namespace) -> None:
    n_rows = score_store(a.data, a.out, bundle_of(a), embeddings=a.embeddings)
    print(f"{n_rows} episode-hours -> {a.out}")


def _gate(a: argparse.Namespace) -> None:
    gate = measure(bundle_of(a), a.data, a.precision, a.limit)
    a.out.write_text(gate.model_dump_json(indent=1) + "\n")
    for task, change in gate.changes.items():
        print(f"{task}: largest change {change.max:.2g}, mean {change.mean:.2g} ({change.unit})")
    said = "passed" if gate.passed else f"NOT passed: more than {gate.limit}"
    print(f"{gate.stays} stays, {gate.hours} hours: {said} -> {a.out}")
