"""calibrate: the tick size and the threads for this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from service import calibrate
from service.commands.parsers import Commands
from service.models.bundles import load_allowed
from service.models.version import Name
from service.settings import Settings


def add(commands: Commands) -> None:
    """`calibrate`."""
    measure = commands.add_parser(
        "calibrate", help="find the tick size and threads for this machine"
    )
    measure.add_argument("--out", type=Path, help="file of settings to write; default: print them")
    measure.add_argument(
        "--target-ms", type=float, default=calibrate.TARGET_MS, help="longest tick that is wanted"
    )
    measure.set_defaults(run_command=_calibrate)


def _calibrate(a: argparse.Namespace) -> None:
    settings = Settings()
    n_cores, target_s = calibrate.cores(), a.target_ms / 1000
    name, _, version = settings.bundle.partition("/")
    bundle = load_allowed(settings, Name(name, int(version)))
    max_rows = calibrate.most_rows(bundle, settings)
    measured = calibrate.measure(
        calibrate.ticker(bundle, settings, max_rows),
        calibrate.candidates(settings, max_rows, n_cores),
        target_s=target_s,
    )
    chosen = calibrate.choose_verified(
        measured.seconds, target_s, n_cores, lambda c: calibrate.starts(bundle, settings, c)
    )
    print(calibrate.table(measured, chosen), file=sys.stderr)
    text = calibrate.settings_file(chosen, settings)
    if a.out is None:
        print(text, end="")
    else:
        a.out.write_text(text)
