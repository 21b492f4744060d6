"""The same properties, guided by what code their examples reach.

    python -m tests.fuzz.guided [--property items|rows] [--seconds 60]

Needs `pip install atheris`; without it nothing is done.
"""

from __future__ import annotations

import argparse
import sys

try:
    import atheris
except ImportError:
    atheris = None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--property", choices=["items", "rows"], default="items")
    parser.add_argument("--seconds", type=int, default=60)
    a = parser.parse_args()
    if atheris is None:
        print("atheris is not installed: nothing is guided by coverage")
        return 0
    with atheris.instrument_imports(include=["service", "llm4ehr"]):
        from tests.fuzz.test_bodies import test_items
        from tests.fuzz.test_rows import test_rows_of_a_stay
    chosen = {"items": test_items, "rows": test_rows_of_a_stay}[a.property]
    arguments = [sys.argv[0], f"-max_total_time={a.seconds}", "-max_len=4096"]
    atheris.Setup(arguments, chosen.hypothesis.fuzz_one_input)  # type: ignore[attr-defined]
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
