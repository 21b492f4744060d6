"""What the project is made of: locked packages, weights that run no code, no secrets, a bill."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.requirements.lock import EXTRAS, cuda_packages, pins
from llm4ehr.bundle import load_bundle

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "deploy" / "requirements").glob("*.txt"))
CODE = ("llm4ehr", "service", "training", "benchmarks", "deploy")
SOURCES = sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py"))

FORBIDDEN_MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"),
}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "os.system", "os.popen", "yaml.load"}
HARMLESS_LOADERS = (["yaml.SafeLoader"], ["yaml.BaseLoader"])
"""Of YAML: they make nothing but text, numbers, lists and mappings."""
FORBIDDEN_KEYWORDS = {"allow_pickle", "shell"}
"""With the value True."""


def version_of() -> dict[str, str]:
    return dict(pin.split("==") for pin in pins(ROOT / "constraints.txt"))  # type: ignore[misc]


def named(path: Path) -> dict[str, str]:
    return dict(pin.split("==") for pin in pins(path))  # type: ignore[misc]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_locked_versions_are_those_the_tests_run_with(lock: Path) -> None:
    locked, constraints = named(lock), version_of()
    assert locked
    for name, version in locked.items():
        assert version.partition("+")[0] == constraints[name], name
    # Every line that is no hash and no comment pins exactly one package, and has hashes.
    blocks = re.split(r"^(?=[a-z0-9])", lock.read_text(), flags=re.MULTILINE)[1:]
    assert len(blocks) == len(locked)
    for block in blocks:
        first, *hashes = block.split(" \\\n")
        assert re.fullmatch(r"[a-z0-9-]+==\S+", first), first
        assert hashes, first
        for found in hashes:
            assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}\n?", found), first


def test_everything_the_service_needs_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(EXTRAS) <= {path.name for path in LOCKS}
    for name, chosen in EXTRAS.items():
        needed = [*project["dependencies"], *(line for extra in chosen for line in extras[extra])]
        names = {canonicalize_name(Requirement(line).name) for line in needed}
        assert names - {"torch"} <= named(ROOT / "deploy" / "requirements" / name).keys()
        assert not {"torch", *cuda_packages()} & named(LOCKS[0].parent / name).keys()
    with_cuda = named(ROOT / "deploy" / "requirements" / "torch.txt").keys()
    assert with_cuda == {"torch", *cuda_packages()}


def found_in(source: str) -> Iterator[str]:
    """What a source has of that which runs what it reads."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                modules = [alias.name for alias in node.names]
            case ast.ImportFrom():
                modules = [node.module or ""]
                modules += [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (name for name in modules if name in FORBIDDEN_CALLS)
            case ast.Call():
                called = ast.unparse(node.func)
                loaders = [ast.unparse(k.value) for k in node.keywords if k.arg == "Loader"]
                if called in FORBIDDEN_CALLS and loaders not in HARMLESS_LOADERS:
                    yield called
                for keyword in node.keywords:
                    harmless = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                    if keyword.arg in FORBIDDEN_KEYWORDS and not harmless:
                        yield keyword.arg or ""
                modules = []
                if called in ("__import__", "importlib.import_module") and node.args:
                    modules = [ast.unparse(node.args[0]).strip("'\"")]
            case ast.Attribute():
                modules = [ast.unparse(node)]
            case _:
                continue
        yield from (name for name in modules if name.partition(".")[0] in FORBIDDEN_MODULES)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import cloudpickle as c", "import joblib",
        "torch.load(p)", "from torch import load", "eval(x)", "exec(x)", "yaml.load(f)",
        "yaml.load(f, Loader=yaml.UnsafeLoader)",
        "np.load(p, allow_pickle=True)", "np.load(p, allow_pickle=flag)", "run(c, shell=True)",
        "os.system(c)", "importlib.import_module('pickle')", "__import__('dill')",
        "def f():\n    import marshal",
    ],
)  # fmt: skip
def test_what_runs_what_it_reads_is_found(source: str) -> None:
    assert list(found_in(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()", "yaml.safe_load(f)", "run(c, shell=False)", "load_file(p)", "re.compile(x)",
        "yaml.load(f, Loader=yaml.BaseLoader)",
    ],
)  # fmt: skip
def test_what_does_not_is_not_found(source: str) -> None:
    assert not list(found_in(source))


def test_nothing_runs_what_it_reads() -> None:
    assert len(SOURCES) > 100
    found = {
        str(path.relative_to(ROOT)): list(dict.fromkeys(found_in(path.read_text())))
        for path in SOURCES
    }
    assert {path: what for path, what in found.items() if what} == {}


_SECRET = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}|xox[baprs]-[0-9A-Za-z-]{10,}"
)


def test_no_secret_is_in_the_repository() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a checkout of git")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        assert path.suffix not in (".key", ".p12", ".pfx"), name
        if path.is_file() and path.stat().st_size < 1 << 20:
            assert not _SECRET.search(path.read_text(errors="replace")), name


def test_weights_are_data() -> None:
    """By their names and by what they begin with: an archive or a pickle is neither of these."""
    files = [path for path in (ROOT / "model_repository").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    known = {".safetensors", ".json", ".md", ".onnx", ".data", ".pbtxt", ".txt"}
    assert {path.suffix for path in files} <= known
    for path in files:
        with path.open("rb") as file:
            start = file.read(4)
        assert start[:2] != b"PK", path
        assert start[:1] != b"\x80", path


def test_the_bill_of_materials(tmp_path: Path) -> None:
    out = tmp_path / "sbom.cdx.json"
    command = [sys.executable, "-m", "deploy.sbom", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    text = out.read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill: dict[str, Any] = json.loads(text)
    components = {c["name"]: c for c in bill["components"] if c["type"] == "library"}
    locked = {**named(LOCKS[0].parent / "service.txt"), **named(LOCKS[0].parent / "torch.txt")}
    assert {name: c["version"] for name, c in components.items()} == locked
    assert components["fastapi"]["licenses"]
    bundle = load_bundle(ROOT / "model_repository", "llm4ehr", 1)
    [model] = [c for c in bill["components"] if c["type"] == "machine-learning-model"]
    assert model["hashes"] == [{"alg": "SHA-256", "content": bundle.digest}]
    assert "model.safetensors" in {file["name"] for file in model["components"]}
    assert {"license": {"id": "ODbL-1.0"}} in model["licenses"]
