"""Command line of the service: serve | score | gate | calibrate | replay."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from llm4ehr.bundle import Bundle, BundleError, load_bundle
from llm4ehr.store import StoreError
from service import calibrate
from service.batch import score_store
from service.engine.backends.base import DeviceFault, RowDependenceError
from service.log.base import LogUnavailable
from service.precision import LIMIT, measure
from service.replay import replay
from service.runtime import build_app
from service.server import FATAL_STATUS, Server
from service.settings import PREFIX, Settings

DEMO_STORE = Path(__file__).parent / "demo" / "store"

_DEMO_NOTICE = """\
DEMO: a dozen stays of PhysioNet 2012 (ODC-BY 1.0) are replayed, their clock compressed; the log is
temporary and no score is withheld as stale. For research only, not a medical device.
  curl -s {url}/episodes?sort=risk
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. What a user can mend is one line, no traceback."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    a = _parser().parse_args(argv)
    try:
        a.run_command(a)
    except KeyboardInterrupt:
        return 130
    except ValidationError as error:
        # The settings that are right may hold what does not belong on a terminal.
        for wrong in error.errors(include_input=False, include_url=False):
            # A name from a file of settings carries the prefix already.
            parts = (str(part).upper().removeprefix(PREFIX) for part in wrong["loc"])
            name = "".join(f"{PREFIX}{part}" for part in parts)
            print(f"error: {name} {wrong['msg']}", file=sys.stderr)
        return 1
    except (BundleError, StoreError, LogUnavailable, RowDependenceError, OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def _serve(a: argparse.Namespace) -> None:
    if not a.demo:
        _run(Settings())
        return
    with tempfile.TemporaryDirectory(prefix="llm4ehr-demo-") as folder:
        settings = Settings(log_path=Path(folder) / "log.sqlite", staleness_limit_hours=None)
        url = f"http://{settings.host}:{settings.port}"
        print(_DEMO_NOTICE.format(url=url), flush=True)
        with _Replay(url, a.seconds_per_hour) as demo:
            _run(settings, demo.begin_when_started)


def _run(settings: Settings, beside: Callable[[Server], None] | None = None) -> None:
    # The server stops in order on SIGTERM, then raises the signal again for the handler that was
    # there before: being told to stop and stopping is a success.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    fatal = threading.Event()

    def on_fatal(error: BaseException) -> None:
        if isinstance(error, DeviceFault):
            # Other engines may hang in the same device: nothing is waited for.
            os._exit(FATAL_STATUS)
        fatal.set()

    server = Server(build_app(settings, on_fatal), settings, fatal)
    if beside is not None:
        beside(server)
    try:
        server.run()  # ends by the signal's own handler if it was told to stop
    finally:
        if server.failed:
            # What touches a broken device may hang, the end of the interpreter included.
            os._exit(FATAL_STATUS)
    if not server.started:
        raise OSError(f"the service could not start on {settings.host}:{settings.port}")


class _Replay:
    """The demo's client: a process of its own, so that it does not slow the service it talks to."""

    def __init__(self, url: str, seconds_per_hour: float) -> None:
        self._command = [
            *(sys.executable, "-m", "service", "replay"),
            *("--url", url, "--seconds-per-hour", str(seconds_per_hour)),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()

    def begin_when_started(self, server: Server) -> None:
        """Start once this very server listens: another one may be on the port already."""

        def wait() -> None:
            while not server.started:
                if self._over.wait(0.1):
                    return
            self._process = subprocess.Popen(self._command)

        threading.Thread(target=wait, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def _score(a: argparse.Namespace) -> None:
    n_rows = score_store(a.data, a.out, _bundle(a), embeddings=a.embeddings)
    print(f"{n_rows} episode-hours -> {a.out}")


def _bundle(a: argparse.Namespace) -> Bundle:
    name, _, version = (a.bundle or Settings().bundle).partition("/")
    if not version.isdigit():
        raise ValueError("--bundle is NAME/VERSION")
    return load_bundle(a.repository or Settings().model_repository, name, int(version))


def _gate(a: argparse.Namespace) -> None:
    gate = measure(_bundle(a), a.data, a.precision, a.limit)
    a.out.write_text(gate.model_dump_json(indent=1) + "\n")
    for task, change in gate.changes.items():
        print(f"{task}: largest change {change.max:.2g}, mean {change.mean:.2g} ({change.unit})")
    said = "passed" if gate.passed else f"NOT passed: more than {gate.limit}"
    print(f"{gate.stays} stays, {gate.hours} hours: {said} -> {a.out}")


def _replay(a: argparse.Namespace) -> None:
    replay(
        a.data,
        a.url.rstrip("/"),
        seconds_per_hour=a.seconds_per_hour,
        head_start_hours=a.head_start_hours,
    )


def _calibrate(a: argparse.Namespace) -> None:
    settings = Settings()
    n_cores, target_s = calibrate.cores(), a.target_ms / 1000
    name, _, version = settings.bundle.partition("/")
    bundle = load_bundle(settings.model_repository, name, int(version))
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    commands = parser.add_subparsers(required=True)

    serve = commands.add_parser("serve", help="run the HTTP service; settings are LLM4EHR_*")
    serve.add_argument("--demo", action="store_true", help="replay a dozen real stays into it")
    serve.add_argument("--seconds-per-hour", type=float, default=5.0, help="pace of the demo")
    serve.set_defaults(run_command=_serve)

    score = commands.add_parser("score", help="score every hour of an episode store")
    score.add_argument("--data", type=Path, required=True, help="episode store")
    score.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    score.add_argument("--bundle", help="NAME/VERSION; default: the service's")
    score.add_argument("--repository", type=Path, help="folder of bundles")
    score.add_argument("--embeddings", action="store_true", help="add the hidden states")
    score.set_defaults(run_command=_score)

    measure = commands.add_parser(
        "calibrate", help="find the tick size and threads for this machine"
    )
    measure.add_argument("--out", type=Path, help="file of settings to write; default: print them")
    measure.add_argument(
        "--target-ms", type=float, default=calibrate.TARGET_MS, help="longest tick that is wanted"
    )
    measure.set_defaults(run_command=_calibrate)

    gate = commands.add_parser(
        "gate", help="measure on real stays what a reduced precision changes"
    )
    gate.add_argument("--precision", choices=["bf16"], required=True)
    gate.add_argument("--data", type=Path, required=True, help="episode store")
    gate.add_argument("--out", type=Path, required=True, help="JSON file to write")
    gate.add_argument(
        "--limit", type=float, default=LIMIT, help="largest change of a probability that passes"
    )
    gate.add_argument("--bundle", help="NAME/VERSION; default: the service's")
    gate.add_argument("--repository", type=Path, help="folder of bundles")
    gate.set_defaults(run_command=_gate)

    again = commands.add_parser("replay", help="replay an episode store into a running service")
    again.add_argument("--data", type=Path, default=DEMO_STORE, help="episode store")
    again.add_argument("--url", default="http://127.0.0.1:8000")
    again.add_argument("--seconds-per-hour", type=float, default=5.0)
    again.add_argument("--head-start-hours", type=int, default=6, help="hours sent at once")
    again.set_defaults(run_command=_replay)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
