"""Runs logged to MLflow and Weights & Biases: what arrives there, also when a run is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import training.trackers
from training.config import PretrainConfig
from training.contrast import PretrainStep
from training.pretrain import pretrain
from training.trackers import check_trackers, flat

Body = Callable[..., dict[str, Any]]
N_STEPS = 4


@pytest.fixture
def config(pretrain_body: Body, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Four steps on four stays, logged to the trackers given."""

    def make(*trackers: str) -> PretrainConfig:
        body = pretrain_body(tmp_path / "ward-7", trackers=trackers)
        body["data"] = body["data"] | {"max_episodes": 4}
        body["optim"] = body["optim"] | {"batch_size": 2, "epochs": 2, "checkpoint_every": 1}
        return PretrainConfig.model_validate(body)

    return make


def stopped_and_resumed(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, then a failure; then the rest."""
    step = PretrainStep.__call__
    steps = 0

    def failing(*arguments: Any) -> dict[str, Tensor]:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainStep, "__call__", failing)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    pretrain(config)


def logged(config: PretrainConfig) -> list[dict[str, Any]]:
    lines = (config.run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_mlflow(
    config: Callable[..., PretrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs pip install -e '.[trackers]'")
    # The small package has no database; files are what it reads back without a server.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    made = config("mlflow", "tensorboard")
    stopped_and_resumed(made, monkeypatch)
    assert mlflow.active_run() is None
    client = mlflow.MlflowClient()
    (experiment,) = mlflow.search_experiments(filter_string="name = 'llm4ehr'")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    assert [run.info.run_name for run in runs] == ["ward-7", "ward-7"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    losses = {
        m.step: m.value for run in runs for m in client.get_metric_history(run.info.run_id, "loss")
    }
    assert losses == pytest.approx({entry["step"]: entry["loss"] for entry in logged(made)})
    assert len(losses) == N_STEPS
    assert runs[-1].data.params["optim.learning_rate"] == "0.003"
    assert runs[-1].data.params["data.sources.0.splits.1"] == "b"
    assert len(list((made.run / "tensorboard" / "llm4ehr").iterdir())) == 2  # it had both


def test_wandb_offline(
    config: Callable[..., PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="needs pip install -e '.[trackers]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    made = config("wandb")
    stopped_and_resumed(made, monkeypatch)
    assert wandb.run is None
    runs = sorted((made.run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2
    records = b"".join(file.read_bytes() for file in runs)
    for expected in (b"llm4ehr", b"ward-7", b"optim.learning_rate", b"grad_norm"):
        assert expected in records
    assert not [*made.run.rglob("output.log"), *made.run.rglob("diff.patch")]  # nothing it printed
    stays = [p.stem for p in Path(__file__).parents[1].glob("fixtures/physionet2012/set-*/*.txt")]
    assert len(stays) == 15
    assert not [stay for stay in stays if stay.encode() in records]


@pytest.mark.parametrize("name", ["mlflow", "wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_said_at_once(
    name: Any, config: Callable[..., PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.trackers, "find_spec", lambda asked: asked != name or None)
    extra = "train" if name == "tensorboard" else "trackers"
    with pytest.raises(
        ValueError, match=rf"{name} is not installed: pip install -e '.\[{extra}\]'"
    ):
        pretrain(config(name))
    assert not config(name).run.exists()


def test_mlflow_without_an_address_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.trackers, "find_spec", lambda _: True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
        check_trackers(["mlflow"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    check_trackers(["mlflow", "wandb", "tensorboard"])


def test_without_trackers_a_run_is_logged_in_its_folder_alone(
    config: Callable[..., PretrainConfig],
) -> None:
    made = config()
    pretrain(made)
    assert len(logged(made)) == N_STEPS
    assert not {p.name for p in made.run.iterdir()} & {"tensorboard", "wandb", "mlruns"}


def test_a_flat_configuration() -> None:
    nested = {"run": "x", "data": {"folds": 2, "sources": [{"splits": ["a", "b"]}]}, "seed": None}
    assert flat(nested) == {
        "run": "x",
        "data.folds": 2,
        "data.sources.0.splits.0": "a",
        "data.sources.0.splits.1": "b",
        "seed": None,
    }
