"""The command line: what a user can mend is one line on stderr and status 1."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm4ehr.store import EpisodeStore
from training.cli import main
from training.data import prepare as prepare_module
from training.data.prepare import prepare
from training.data.sources import SourceError

FIXTURES = Path(__file__).parents[1] / "fixtures"


def failed(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line that a command fails with."""
    assert main([str(a) for a in arguments]) == 1
    written = capsys.readouterr().err.splitlines()
    lines = [line for line in written if "━" not in line]  # progress is on the same stream
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def write(path: Path, body: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(body, default=str))))
    return path


def test_prepare_writes_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dataset, episodes in (("physionet2012", 15), ("physionet2019", 4)):
        out = tmp_path / dataset
        status = main(["prepare", dataset, "--source", str(FIXTURES / dataset), "--out", str(out)])
        assert status == 0
        assert EpisodeStore.open(out, verify=True).n_episodes == episodes
        printed = capsys.readouterr()
        assert f'"episodes": {episodes}' in printed.out
        assert "error" not in printed.err


def test_prepare_refuses_what_it_cannot_read_or_would_overwrite(
    tmp_path: Path, store_2012: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = FIXTURES / "physionet2012"
    where = ("--source", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert "nowhere" in failed(capsys, "prepare", "physionet2012", *where)
    assert not (tmp_path / "out").exists()
    where = ("--source", source, "--out", store_2012)
    assert str(store_2012) in failed(capsys, "prepare", "physionet2012", *where)


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A unit's own tables of ten stays."""
    folder = tmp_path / "unit"
    folder.mkdir()
    stays = [f"s{i},p{i},48,no," for i in range(9)] + ["s9,p9,48,yes,48"]
    seen = [f"s{i},hr,{h},{70 + i},/min" for i in range(10) for h in (1, 2)]
    for name, rows in (
        ("stays", ["episode_id,subject_id,end_hours,mortality,death_hours", *stays]),
        ("observations", ["episode_id,variable,hours,value,unit", *seen]),
    ):
        (folder / f"{name}.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_own_data_are_given_a_name(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    infos = {}
    for name in (None, "unit-7"):
        out = tmp_path / f"store-{name}"
        where = ["prepare", "table", "--source", str(tables), "--out", str(out)]
        assert main([*where, *(["--name", name] if name else [])]) == 0
        infos[name] = EpisodeStore.open(out, verify=True).info
        assert json.loads((out / "report.json").read_text())["description"]["source"] == (
            name or "table"
        )
    assert infos[None].source == "table"
    assert infos["unit-7"] == replace(infos[None], source="unit-7")
    where_to = ("--source", tables, "--out", tmp_path / "no")
    for name in ("Unit", "unit 7", "-unit", "a/b", "", "unit\n"):
        message = failed(capsys, "prepare", "table", *where_to, f"--name={name}")
        assert "letter or digit first" in message
    for name in ("physionet2012", "meds"):
        message = failed(capsys, "prepare", "table", *where_to, "--name", name)
        assert f"name {name!r}: that is the name of another data set" in message
    assert not (tmp_path / "no").exists()


def test_a_published_data_set_keeps_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The ban on training with set C of 2012 hangs on the name.
    for dataset in ("physionet2012", "physionet2019"):
        where = ("--source", FIXTURES / dataset, "--out", tmp_path / dataset)
        for name in ("mine", dataset):
            message = failed(capsys, "prepare", dataset, *where, "--name", name)
            assert f"{dataset} keeps its name" in message
        assert not (tmp_path / dataset).exists()


def test_work_of_another_name_is_not_gone_on_with(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "check", lambda *_: ["stopped"])
    mark = tmp_path / "out.work" / "mark"
    for name, kept in (("a", False), ("a", True), ("b", False), (None, False), (None, True)):
        was = mark.exists()
        with pytest.raises(SourceError, match="stopped"):
            prepare("table", tables, tmp_path / "out", name=name, progress=False)
        assert (was and mark.exists()) == kept
        mark.touch()


def test_pretrain_and_finetune_from_files(
    tmp_path: Path,
    pretrain_body: Callable[..., dict[str, Any]],
    store_2012: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    body = pretrain_body(tmp_path / "pretrained")
    body["data"] = body["data"] | {"max_episodes": 4}
    config = write(tmp_path / "pretrain.yaml", body)
    assert main(["pretrain", str(config), "--set", "optim.epochs=1"]) == 0
    made = json.loads((tmp_path / "pretrained" / "pretrain.json").read_text())
    assert made["optim"]["epochs"] == 1

    body = {
        "run": tmp_path / "tuned",
        "pretrained": tmp_path / "pretrained",
        "data": {"sources": [{"store": store_2012, "splits": ["a", "b"]}]}
        | {"cache": tmp_path / "cache", "n_folds": 2, "validation_fold": 1},
        "tasks": {"mortality": 1.0},
        "optim": {"epochs": 1, "batch_size": 8},
    }
    config = write(tmp_path / "finetune.yaml", body)
    assert main(["finetune", str(config), "--set", "tuning=end_to_end"]) == 0
    assert (tmp_path / "tuned" / "result.json").is_file()
    capsys.readouterr()

    arguments = ("export", tmp_path / "tuned", "--repository", tmp_path, "--name", "x", "--no-onnx")
    assert main([str(a) for a in (*arguments, "--version", 1)]) == 0
    assert str(tmp_path / "x" / "1") in capsys.readouterr().out
    assert "immutable" in failed(capsys, *arguments, "--version", 1)
    assert "another configuration" in failed(capsys, "finetune", config)
    where = ("--store", store_2012, "--split", "c")
    assert "split 'c' has no episodes" in failed(capsys, "evaluate", tmp_path / "tuned", *where)


def test_a_wrong_configuration_is_one_line(
    tmp_path: Path, pretrain_body: Callable[..., dict[str, Any]], store_2012: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "config.yaml"
    assert "config.yaml" in failed(capsys, "pretrain", path)
    body = pretrain_body(tmp_path / "run")
    write(path, body | {"surprise": 1, "seed": "x"})
    message = failed(capsys, "pretrain", path)
    assert "surprise" in message
    assert "seed" in message
    write(path, body)
    assert "optim.epoch" in failed(capsys, "pretrain", path, "--set", "optim.epoch=1")
    for store, split, reason in ((store_2012, "c", "evaluation only"), ("nowhere", "a", "nowhere")):
        sources = f"data.sources=[{{store: {store}, splits: [{split}]}}]"
        run = f"run={tmp_path / split}"
        assert reason in failed(capsys, "pretrain", path, "--set", sources, "--set", run)
        assert not (tmp_path / split / "checkpoint").exists()


def test_a_backbone_that_cannot_be_loaded_is_one_line(
    tmp_path: Path, pretrain_body: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    body = pretrain_body(tmp_path / "run")
    body["model"] = {"backbone": {"source": "no-such/model"}}
    message = failed(capsys, "pretrain", write(tmp_path / "config.yaml", body))
    assert "no-such/model" in message
    assert "name that folder as the source" in message


def test_models_that_are_not_there_are_named(
    tmp_path: Path, pretrained: Path, store_2012: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--store", store_2012, "--split", "b")
    message = failed(capsys, "evaluate", tmp_path / "nowhere", *where)
    assert "nowhere" in message
    run = ("export", pretrained, "--repository", tmp_path, "--name", "x", "--version", 1)
    for command in (("evaluate", pretrained, *where), run):  # a run, but it has no heads
        assert str(pretrained) in failed(capsys, *command)


@pytest.mark.parametrize(
    "arguments",
    [[], ["surprise"], ["prepare", "mimic", "--source", "x", "--out", "y"], ["pretrain"]],
)
def test_a_wrong_command_shows_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m training" in capsys.readouterr().err


def test_the_package_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["training", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("training", run_name="__main__")
    assert stopped.value.code == 0
    assert "usage: python -m training" in capsys.readouterr().out
