"""Whole runs as two processes, as `torchrun` starts them: killed, resumed, compared with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizer

from training.config import FinetuneConfig, PretrainConfig
from training.finetune import finetune
from training.pretrain import pretrain

ROOT = Path(__file__).parents[2]
KILLED = Path(__file__).with_name("killed_run.py")
N_STAYS = 8
STEPS = 2  # an epoch

pytestmark = pytest.mark.slow


def launch(*command: object) -> subprocess.CompletedProcess[str]:
    """Two processes on the CPU run the same command."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    torchrun = ["torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    return subprocess.run(
        [sys.executable, "-m", *torchrun, "--rdzv-endpoint=localhost:0", *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def as_two(command: str, body: dict[str, Any], kill_at: int) -> None:
    """Run a command, killed once so many steps are in a checkpoint, and run it again to the end."""
    run = Path(body["run"])
    file = run.with_suffix(".yaml")
    plain = json.loads(json.dumps(body, default=str))
    file.write_text(yaml.safe_dump(plain, sort_keys=False))  # heads are drawn in the order of tasks
    died = launch(KILLED, kill_at, command, file)
    assert died.returncode != 0
    assert (run / "checkpoint").is_dir(), died.stderr
    progress = json.loads((run / "checkpoint" / "progress.json").read_text())
    assert progress["step"] == kill_at
    done = launch("-m", "training", command, file)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def files(run: Path) -> set[str]:
    """What lies in a run folder, logs of TensorBoard aside."""
    found = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return {str(path) for path in found if path.parts[0] != "tensorboard"}


def assert_alike(two: Path, one: Path) -> None:
    """The same files, the same log, the same weights; and it was two processes."""
    assert files(two) == files(one)
    logs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (two, one)
    ]
    assert [entry["step"] for entry in logs[0]] == [entry["step"] for entry in logs[1]]
    for entry, expected in zip(*logs, strict=True):
        assert entry == pytest.approx(expected, rel=1e-4, abs=1e-5)
    weights = [load_file(run / "model.safetensors") for run in (two, one)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-4)
    environments = [json.loads((run / "environment.json").read_text()) for run in (two, one)]
    assert [environment["processes"] for environment in environments] == [2, 1]


@pytest.fixture(scope="module")
def bert(tiny_config: Callable[..., dict[str, Any]], tmp_path_factory: Any) -> Path:
    """A folder with weights that stay frozen, so that event patches are computed once."""
    folder: Path = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "creatinine", "heart", "rate"]
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    config = BertConfig(**tiny_config("bert", vocab_size=len(words)) | quiet)
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={w: i for i, w in enumerate(words)}).save_pretrained(folder)
    return folder


def test_two_processes_killed_and_resumed_make_what_one_makes(
    bert: Path, store_2012: Path, tmp_path: Path
) -> None:
    data = {
        "sources": [{"store": store_2012, "splits": ["a", "b"]}],
        "n_folds": 2,
        "validation_fold": 1,
        "max_episodes": N_STAYS,
    }
    optim = {"epochs": 2, "batch_size": N_STAYS // STEPS, "checkpoint_every": 1}

    def pretraining(name: str) -> dict[str, Any]:
        return {
            "run": tmp_path / f"{name}-pretrain",
            "data": data | {"cache": tmp_path / f"{name}-cache"},
            "model": {
                "backbone": {"source": str(bert), "frozen": True},
                "events": "fused",
                "train_new_tokens": False,
            },
            "objective": {"tau": 0.1, "queue_patches": 20},
            "optim": optim | {"learning_rate": 3e-3},
        }

    def finetuning(name: str) -> dict[str, Any]:
        return {
            "run": tmp_path / f"{name}-finetune",
            "pretrained": tmp_path / f"{name}-pretrain",
            "data": data | {"cache": tmp_path / f"{name}-cache"},
            "tasks": {"mortality": 1.0, "remaining_los": 0.3, "phenotyping": 1.0},
            "optim": optim | {"learning_rate": 0.01},
        }

    as_two("pretrain", pretraining("two"), kill_at=1)
    as_two("finetune", finetuning("two"), kill_at=STEPS)
    pretrain(PretrainConfig.model_validate(pretraining("one")))
    finetune(FinetuneConfig.model_validate(finetuning("one")))
    for kind in ("pretrain", "finetune"):
        assert_alike(tmp_path / f"two-{kind}", tmp_path / f"one-{kind}")
    assert len(list((tmp_path / "two-cache").iterdir())) == len(
        list((tmp_path / "one-cache").iterdir())
    )
