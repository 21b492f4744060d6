"""The training loop: exact resume, recovery, schedules, and what a run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.config import OptimConfig
from training.loop import Trainer, autocast, learning_rate_factor
from training.run_folder import RunFolder

N_BATCHES = 5
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Rows:
    """Stands for a batch."""

    index: NDArray[np.int64]
    hour_mask: Tensor

    def to(self, device: torch.device) -> Rows:
        return self


def load(index: NDArray[np.int64], step: int, part: slice) -> Any:
    return Rows(index[part], torch.ones(len(index[part]), 24, dtype=torch.bool))


class Stopped(Exception):
    """The process was killed."""


def epoch_batches(epoch: int) -> list[NDArray[np.int64]]:
    order = np.random.default_rng([7, epoch]).permutation(40)
    return list(order.reshape(N_BATCHES, 8))


def optim(**changes: Any) -> OptimConfig:
    return OptimConfig(
        **{"epochs": 3, "learning_rate": 0.01, "weight_decay": 0.1, "checkpoint_every": 2}
        | {"schedule": "cosine", "warmup_steps": 3}
        | changes
    )


def trainer(path: Path, **changes: Any) -> Trainer:
    """A small network with dropout, so that the random state matters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    config = optim(**changes)
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.005},
        {"params": [p for layer in model[1:] for p in layer.parameters()]},
    ]
    return Trainer(model, groups, config, RunFolder(path, "kind", config), epoch_batches, load)


def step_of(made: Trainer, stop_after: int | None = None) -> Callable[..., dict[str, Tensor]]:
    def step(batch: Any, trainer: Trainer) -> dict[str, Tensor]:
        if made.step == stop_after:
            raise Stopped
        noise = torch.rand(len(batch.index), 1)
        loss = (made.module(X[batch.index]) - noise).square().mean()
        trainer.backward(loss)
        return {"loss": loss, "half": loss / 2}

    return step


def run(path: Path, *stops: int, **changes: Any) -> Trainer:
    """Train to the end, killed before the given steps and started again each time."""
    for stop in stops:
        made = trainer(path, **changes)
        with pytest.raises(Stopped):
            made.fit(step_of(made, stop))
    made = trainer(path, **changes)
    made.fit(step_of(made))
    return made


def state_of(made: Trainer) -> dict[str, Tensor]:
    moments = {
        f"{i}.{name}": torch.as_tensor(value)
        for i, entries in made.optimiser.state_dict()["state"].items()
        for name, value in entries.items()
    }
    return dict(made.module.state_dict()) | moments | {"random": torch.get_rng_state()}


def metrics_of(path: Path) -> list[str]:
    return (path / "metrics.jsonl").read_text().splitlines()


# Stops: before the first checkpoint, on one, after one, at the end of an epoch, twice, at the end.
@pytest.mark.parametrize("stops", [(0,), (1,), (2,), (3,), (5,), (6, 7), (3, 11), (14,)])
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, stops: tuple[int, ...]
) -> None:
    whole = state_of(run(tmp_path / "whole"))
    resumed = state_of(run(tmp_path / "resumed", *stops))
    assert whole.keys() == resumed.keys()
    assert [n for n in whole if not torch.equal(whole[n], resumed[n])] == []
    assert metrics_of(tmp_path / "resumed") == metrics_of(tmp_path / "whole")
    assert [json.loads(m)["step"] for m in metrics_of(tmp_path / "whole")] == list(range(1, 16))


def test_the_checkpoint_before_last_is_used_when_the_newest_was_not_put_in_place(
    tmp_path: Path,
) -> None:
    """Killed between removing the old checkpoint and renaming the new one."""
    whole = state_of(run(tmp_path / "whole"))
    made = trainer(tmp_path / "run")
    with pytest.raises(Stopped):
        made.fit(step_of(made, 9))
    checkpoint = made.run.checkpoint
    checkpoint.rename(checkpoint.with_suffix(".partial"))
    resumed = trainer(tmp_path / "run")
    seen: list[int] = []
    inner = step_of(resumed)
    resumed.fit(lambda *step: seen.append(resumed.step) or inner(*step))
    assert seen[0] == 8  # from the checkpoint, not from the start
    assert all(torch.equal(whole[n], value) for n, value in state_of(resumed).items())


def test_an_unfinished_checkpoint_is_ignored(tmp_path: Path) -> None:
    whole = state_of(run(tmp_path / "whole"))
    made = trainer(tmp_path / "run")
    with pytest.raises(Stopped):
        made.fit(step_of(made, 3))
    fresh = made.run.checkpoint.with_suffix(".partial")
    fresh.mkdir()
    (fresh / "model.safetensors").write_bytes(b"half a file")
    assert all(torch.equal(whole[n], v) for n, v in state_of(run(tmp_path / "run")).items())


def test_a_line_that_was_cut_off_is_dropped_from_the_log(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    made = trainer(tmp_path / "run")
    with pytest.raises(Stopped):
        made.fit(step_of(made, 5))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "epo')
    run(tmp_path / "run")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_early_stopping_and_what_the_caller_keeps(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run")
    epochs: list[int] = []

    def after_epoch(epoch: int) -> bool:
        epochs.append(epoch)
        made.extra["scores"] = [*made.extra.get("scores", []), epoch / 2]
        return epoch < 1

    made.fit(step_of(made), after_epoch)
    assert epochs == [0, 1]
    assert made.step == 2 * N_BATCHES
    progress = json.loads((made.run.checkpoint / "progress.json").read_text())
    assert progress["extra"] == {"scores": [0, 0.5]}


def test_a_run_that_stopped_early_stays_stopped_when_started_again(tmp_path: Path) -> None:
    """Killed after the last epoch, before the result was written."""
    made = trainer(tmp_path / "run")
    made.fit(step_of(made), lambda _: False)
    before = state_of(made)
    again = trainer(tmp_path / "run")
    again.fit(step_of(again), lambda _: False)
    assert again.step == N_BATCHES
    assert all(torch.equal(before[n], v) for n, v in state_of(again).items())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run")
    inner = step_of(made)

    def step(*of: Any) -> dict[str, Tensor]:
        terms = inner(*of)
        return {n: t * float("nan") for n, t in terms.items()} if made.step == 3 else terms

    with pytest.raises(FloatingPointError, match="the loss is nan at step 4"):
        made.fit(step)
    progress = json.loads((made.run.checkpoint / "progress.json").read_text())
    assert progress["step"] == 2  # the last sound checkpoint is kept
    assert len(metrics_of(tmp_path / "run")) == 3


def test_learning_rate_factor() -> None:
    constant = OptimConfig(warmup_steps=4)
    assert [learning_rate_factor(s, 10, constant) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = OptimConfig(warmup_steps=2, schedule="cosine")
    made = [learning_rate_factor(s, 12, cosine) for s in (0, 1, 2, 7, 12, 99)]
    assert made == pytest.approx([0.5, 1, 1, 0.5, 0, 0])
    assert learning_rate_factor(0, 0, OptimConfig(schedule="cosine")) == 1


def test_each_group_keeps_its_own_rate(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", epochs=1, schedule="constant", warmup_steps=10)
    made.fit(step_of(made))
    assert [g["lr"] for g in made.optimiser.param_groups] == pytest.approx([0.0025, 0.005])


def test_gradients_are_clipped_but_logged_as_they_were(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", epochs=1, clip_norm=1e-3)
    norms: list[float] = []
    inner = made.optimiser.optimizer
    inner.register_step_pre_hook(
        lambda *_: norms.append(
            nn.utils.get_total_norm([p.grad for p in made.module.parameters()]).item()
        )
    )
    made.fit(step_of(made))
    assert max(norms) <= 1.001e-3
    logged = [json.loads(m)["grad_norm"] for m in metrics_of(tmp_path / "run")]
    assert min(logged) > 1e-2


def test_precision() -> None:
    cpu, x = torch.device("cpu"), torch.ones(1, 6)
    layer = nn.Linear(6, 2)
    for precision, dtype in (
        ("fp32", torch.float32),
        ("auto", torch.float32),
        ("bf16", torch.bfloat16),
    ):
        with autocast(precision, cpu):
            assert layer(x).dtype == dtype


def test_a_run_folder_holds_one_configuration(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", "kind", optim())
    RunFolder(tmp_path / "run", "kind", optim())  # the same: a resume
    with pytest.raises(FileExistsError, match="another configuration"):
        RunFolder(tmp_path / "run", "kind", optim(epochs=4))


def test_a_finished_run_keeps_its_result_and_drops_its_checkpoint(tmp_path: Path) -> None:
    made = run(tmp_path / "run", epochs=1)
    assert made.run.checkpoint.is_dir()
    assert not made.run.finished
    made.run.finish({"steps": made.step})
    assert made.run.finished
    assert not made.run.checkpoint.exists()
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == {"steps": 5}
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["packages"].keys() == {"torch", "transformers", "accelerate", "numpy"}
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    assert (tmp_path / "run" / "curves.png").read_bytes()[1:4] == b"PNG"
