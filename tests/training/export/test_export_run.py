"""From a fine-tuning run to a bundle with graphs: complete or not there at all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm4ehr.bundle import load_bundle, save_bundle
from llm4ehr.offline import TOLERANCE, score_episodes
from llm4ehr.store import EpisodeStore
from training.cli import main
from training.config import FinetuneConfig
from training.export import run as module
from training.export.run import NotDeployableError, export, refuse_undeployable
from training.finetune import finetune

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from training.export import check as onnx_check
from training.export import onnx as onnx_export

DOCS = Path(__file__).parents[3] / "docs" / "export.md"


@pytest.fixture(scope="module")
def body(pretrained: Path, store_2012: Path, tmp_path_factory: Any) -> dict[str, Any]:
    """A fine-tuning that can be exported, as in its file."""
    return {
        "run": tmp_path_factory.mktemp("runs") / "finetune",
        "pretrained": pretrained,
        "data": {
            "sources": [{"store": store_2012, "splits": ["a", "b"]}],
            "cache": tmp_path_factory.mktemp("features"),
            "n_folds": 2,
            "validation_fold": 1,
        },
        "tasks": {"mortality": 1.0, "remaining_los": 0.3, "decompensation": 1.0},
        "optim": {"epochs": 1, "batch_size": 4},
    }


@pytest.fixture(scope="module")
def tuned(body: dict[str, Any]) -> Path:
    """The folder of the finished run."""
    finetune(FinetuneConfig.model_validate(body))
    return Path(body["run"])


@pytest.fixture(scope="module")
def repository(tuned: Path, tmp_path_factory: Any) -> Path:
    """A repository with the run exported as my-model, version 1, on the command line."""
    path: Path = tmp_path_factory.mktemp("exported") / "model_repository"
    arguments = ["export", tuned, "--repository", path, "--name", "my-model", "--version", 1]
    assert main([str(a) for a in arguments]) == 0
    return path


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def test_graphs_belong_to_the_bundle(repository: Path) -> None:
    folder = repository / "my-model" / "1"
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in ("model.onnx", "step.onnx", "weights.onnx.data"):
        assert manifest["files"][file] == hashlib.sha256((folder / file).read_bytes()).hexdigest()
    bundle = load_bundle(repository, "my-model", 1)
    onnx = bundle.metrics["provenance"]["onnx"]
    assert onnx["stays"] == 4
    assert onnx["bytes"]["step.onnx"] == (folder / "step.onnx").stat().st_size
    for of in onnx["max_difference"].values():
        for largest in of.values():
            assert 0 < largest["hidden"] <= TOLERANCE.hidden
    assert "| step.onnx | stays | " in bundle.card
    config = (repository / "my-model_step" / "config.pbtxt").read_text()
    assert bundle.digest in config
    assert bundle.network.preprocessing_digest in config
    # A graph that was changed is found out when the bundle is loaded.
    changed = repository.parent / "changed" / "my-model" / "1"
    changed.mkdir(parents=True)
    for file in folder.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    (changed / "step.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"step\.onnx: SHA-256 differs"):
        load_bundle(repository.parent / "changed", "my-model", 1)


def test_the_documented_example_steps_a_stay(
    repository: Path,
    store_2012: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "stores").mkdir()
    (tmp_path / "stores" / "physionet2012").symlink_to(store_2012)
    (tmp_path / "model_repository").symlink_to(repository)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(DOCS), "exec"), {})  # noqa: S102
    printed = np.array([line.split() for line in capsys.readouterr().out.splitlines()], float)
    bundle = load_bundle(repository, "my-model", 1)
    episode = next(iter(EpisodeStore.open(store_2012))).episode
    (scores,) = score_episodes(bundle.network, [episode])
    wanted = scores.answers(bundle.calibration)["decompensation"][:, 0]
    np.testing.assert_array_equal(printed[:, 0], np.arange(len(wanted)))
    np.testing.assert_allclose(printed[:, 1], wanted, rtol=0, atol=TOLERANCE.probability)


def test_the_card_tells_tuning_and_calibration(
    tuned: Path, tmp_path: Path, make_copy: Callable[[Path], Path]
) -> None:
    run = make_copy(tuned)
    result = json.loads((run / "result.json").read_text())
    result["calibration"]["remaining_los"]["interval"] = {
        "coverage": 0.9, "first_hours": [0, 24], "half_widths": [0.5, 0.25], "stays": [900, 600],
    }  # fmt: skip
    (run / "result.json").write_text(json.dumps(result))
    export(run, tmp_path, "x", 1)
    card = load_bundle(tmp_path, "x", 1).card
    assert "- Tuning: linear\n" in card
    told = "remaining_los log_days with intervals for 90% of stays, fitted on 1,500 stays"
    assert told in card
    assert "## ONNX" not in card


def test_only_graph_files_can_be_added(repository: Path, tmp_path: Path) -> None:
    bundle = load_bundle(repository, "my-model", 1)
    stray = tmp_path / "other.onnx"
    stray.write_bytes(b"")
    with pytest.raises(ValueError, match=r"other\.onnx is not the name of a graph file"):
        save_bundle(
            tmp_path, "x", 1, bundle.network, calibration=bundle.calibration, labels={},
            metrics={}, card="", graphs=[stray],
        )  # fmt: skip
    assert files_of(tmp_path) == {"other.onnx"}


def test_a_wrong_graph_leaves_nothing_behind(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = onnx_export.write_graphs

    def wrong(network: Any, folder: Path) -> Any:
        bias = network.model.heads["mortality"].bias
        bias.data += 1e-3
        try:
            return write(network, folder)
        finally:
            bias.data -= 1e-3

    monkeypatch.setattr(onnx_export, "write_graphs", wrong)
    with pytest.raises(onnx_check.GraphError, match=r"model\.onnx: differs from torch"):
        export(tuned, tmp_path / "repository", "x", 1, onnx=True)
    assert files_of(tmp_path) == set()


def test_a_layout_that_fails_takes_the_bundle_with_it(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    # Writing graphs takes long and is not what this is about.
    monkeypatch.setattr(module, "_write_onnx", lambda *_: None)
    monkeypatch.setattr(module, "write_layout", full)
    with pytest.raises(OSError, match="no space"):
        export(tuned, tmp_path, "x", 1, onnx=True)
    assert not (tmp_path / "x" / "1").exists()


def test_what_stands_in_the_way_is_said_before_anything_is_made(
    repository: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(module, "_write_onnx", never)
    before = files_of(repository)
    with pytest.raises(ValueError, match="immutable"):
        export(tuned, repository, "my-model", 1, onnx=True)
    config = repository / "my-model" / "config.pbtxt"
    text = config.read_text()
    config.write_text(text.replace('"events"', '"something"'))
    with pytest.raises(ValueError, match="choose another name"):
        export(tuned, repository, "my-model", 2, onnx=True)
    config.write_text(text)
    assert files_of(repository) == before


def test_without_the_packages_the_rest_can_be_exported(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("training.export.onnx.importlib.util.find_spec", lambda name: None)
    run = ["export", tuned, "--repository", tmp_path / "r", "--name", "x", "--version", 1]
    assert main([str(a) for a in run]) == 1
    message = capsys.readouterr().err
    assert "onnx, onnxruntime, onnxscript not installed" in message
    assert not (tmp_path / "r").exists()
    assert main([str(a) for a in [*run, "--no-onnx"]]) == 0
    assert files_of(tmp_path / "r" / "x") >= {"1", "1/manifest.json"}
    assert not any("onnx" in file or "pbtxt" in file for file in files_of(tmp_path / "r"))
    assert load_bundle(tmp_path / "r", "x", 1).metrics["provenance"]["onnx"] is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"readout": {"mortality": "max"}}, "readout of mortality: max"),
        ({"hourly_unit": "patch"}, "hourly_unit: patch"),
        ({"tuning": {"strategy": "prompt", "position": "suffix"}}, "suffix prompt"),
    ],
)
def test_what_no_bundle_can_do_is_refused(
    change: dict[str, Any], reason: str, body: dict[str, Any]
) -> None:
    with pytest.raises(NotDeployableError, match=reason):
        refuse_undeployable(FinetuneConfig.model_validate(body | change))


@pytest.mark.parametrize(
    "change",
    [
        {"readout": {"mortality": "hourly"}},
        {"tuning": {"strategy": "prompt", "position": "prefix"}},
        {"tuning": {"strategy": "adapter"}},
    ],
)
def test_what_a_bundle_can_do_is_not(change: dict[str, Any], body: dict[str, Any]) -> None:
    refuse_undeployable(FinetuneConfig.model_validate(body | change))


def test_a_run_that_cannot_be_deployed_is_refused(
    tuned: Path, tmp_path: Path, make_copy: Callable[[Path], Path]
) -> None:
    run = make_copy(tuned)
    config = json.loads((run / "finetune.json").read_text())
    (run / "finetune.json").write_text(json.dumps(config | {"readout": {"mortality": "mean"}}))
    with pytest.raises(NotDeployableError):
        export(run, tmp_path / "repository", "x", 1)
    assert not (tmp_path / "repository").exists()


@pytest.fixture
def make_copy(tmp_path: Path) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in folder.iterdir():
            if file.is_file():
                (copy / file.name).write_bytes(file.read_bytes())
        return copy

    return make
