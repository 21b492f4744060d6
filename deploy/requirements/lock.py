"""Write the locked requirements of the images: exact versions, with the hashes of their files.

`python -m deploy.requirements.lock` at the root of the checkout. Versions are those of
constraints.txt; hashes come from the package index, which has to be reachable. torch stands in a
file of its own, for its wheel may come from another index, where it has other hashes:
`--torch-cpu-index URL` locks the wheel for a CPU of that index as well.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
CONSTRAINTS = "constraints.txt"
_CUDA = "# What the CUDA build of torch brings along on Linux."

EXTRAS = {"service.txt": ("otel",), "onnx.txt": ("onnx", "otel"), "gpu.txt": ("gpu", "otel")}
"""File -> extras of the project whose packages it holds, besides those that are always needed."""


def cuda_packages() -> list[str]:
    """Names of what comes with torch for CUDA alone."""
    _, _, listed = Path(CONSTRAINTS).read_text().partition(_CUDA)
    return [line.partition("==")[0] for line in listed.split()]


def pins(path: Path) -> list[str]:
    """The lines NAME==VERSION of a file of requirements."""
    lines = (line.removesuffix("\\").strip() for line in path.read_text().splitlines())
    return [line for line in lines if "==" in line and not line.startswith("#")]


def compile_into(out: Path, source: str, *options: str) -> None:
    """Resolve `source` for Python 3.12 on x86-64 Linux within the constraints."""
    subprocess.run(
        [
            *("uv", "pip", "compile", source, "--constraint", CONSTRAINTS, "--generate-hashes"),
            *("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_28"),
            *("--no-python-downloads", "--no-config", "--only-binary", ":all:", "--quiet"),
            *("--no-annotate", "--custom-compile-command", "make lock"),
            *("--output-file", str(out), *options),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    print(out)


def _without(names: Sequence[str]) -> list[str]:
    return [part for name in names for part in ("--no-emit-package", name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch-cpu-index", help="address of an index with CPU wheels of torch")
    index = parser.parse_args().torch_cpu_index
    torch = ["torch", *cuda_packages()]
    for name, extras in EXTRAS.items():
        chosen = [part for extra in extras for part in ("--extra", extra)]
        compile_into(HERE / name, "pyproject.toml", *chosen, *_without(torch))
    pin = next(pin for pin in pins(Path(CONSTRAINTS)) if pin.startswith("torch=="))
    with tempfile.NamedTemporaryFile("w", suffix=".in") as source:
        source.write(pin)
        source.flush()
        # What else it needs is in the other files.
        others = [line.partition("==")[0] for line in pins(HERE / "service.txt")]
        compile_into(HERE / "torch.txt", source.name, *_without(others))
        if index is not None:
            compile_into(HERE / "torch-cpu.txt", source.name, "--index", index, "--no-deps")


if __name__ == "__main__":
    main()
