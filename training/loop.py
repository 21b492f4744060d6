"""The training loop: seeds, precision, checkpoints, logs and exact resume.

A checkpoint holds weights, optimiser state and random state as safetensors plus a small JSON; on
CPU a stopped and resumed run ends with the same bits as one that was never stopped.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from training.config import OptimConfig, Strict
from training.progress import progress_bar

Step = Callable[[NDArray[np.int64]], dict[str, Tensor]]


def device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(precision: str, on: torch.device) -> AbstractContextManager[Any]:
    """bf16 autocast where asked for (or, with "auto", where the GPU has it)."""
    supported = on.type == "cuda" and torch.cuda.is_bf16_supported()
    if precision == "bf16" or (precision == "auto" and supported):
        return torch.autocast(on.type, dtype=torch.bfloat16)
    return nullcontext()


def learning_rate_factor(step: int, total: int, config: OptimConfig) -> float:
    """Factor on the learning rate at a step: linear warm-up, then constant or cosine to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(total - config.warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class RunFolder:
    """A run's directory: resolved config as `<kind>.json`, environment, metrics log, TensorBoard,
    checkpoint, and in the end the network and the result."""

    def __init__(self, path: Path, kind: str, config: Strict) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        resolved = config.model_dump(mode="json")
        existing = path / f"{kind}.json"
        if existing.exists() and json.loads(existing.read_text()) != resolved:
            raise FileExistsError(
                f"{path} holds a run with another configuration; choose another `run`"
            )
        existing.write_text(json.dumps(resolved, indent=2))
        (path / "environment.json").write_text(json.dumps(environment(), indent=2))

    @property
    def checkpoint(self) -> Path:
        """Folder of the newest checkpoint."""
        return self.path / "checkpoint"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "result.json").exists()

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result and drop the checkpoint."""
        (self.path / "result.json").write_text(json.dumps(result, indent=2))
        shutil.rmtree(self.checkpoint, ignore_errors=True)


def environment() -> dict[str, Any]:
    """What a reader needs to judge a number: versions, hardware, revision."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "git": git.stdout.strip() or None,
    }


class Trainer:
    """Runs epochs of a step function over batches of episode indices."""

    def __init__(
        self,
        model: nn.Module,
        parameters: list[dict[str, Any]],
        config: OptimConfig,
        run: RunFolder,
        epoch_batches: Callable[[int], list[NDArray[np.int64]]],
    ) -> None:
        self.model = model
        self.config = config
        self.run = run
        self.epoch_batches = epoch_batches
        self.step = 0
        self.epoch = 0
        self.extra: dict[str, Any] = {}  # what the caller wants kept in checkpoints
        self.optimiser = torch.optim.AdamW(
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self._base_rates = [group["lr"] for group in self.optimiser.param_groups]
        self._device = next(model.parameters()).device

    def fit(self, step: Step, after_epoch: Callable[[int], bool] | None = None) -> None:
        """Train from the checkpoint, if any, to the end.

        `step` returns loss terms with the total under "loss". `after_epoch` returns False to stop
        early; it must not change the random state of torch.
        """
        total = self.config.epochs * len(self.epoch_batches(0))
        self._resume()
        writer = SummaryWriter(str(self.run.path / "tensorboard"), purge_step=self.step)
        with progress_bar() as bar, _MetricsLog(self.run.path / "metrics.jsonl", self.step) as log:
            task = bar.add_task("training", total=total, completed=self.step, note="")
            for epoch in range(self.epoch, self.config.epochs):
                self.epoch = epoch
                todo = self.epoch_batches(epoch)
                for index in todo[self.step - epoch * len(todo) :]:
                    terms = self._train_step(step, index, total)
                    for name, value in terms.items():
                        writer.add_scalar(name, value, self.step)
                    log.write(json.dumps({"step": self.step, "epoch": epoch, **terms}) + "\n")
                    bar.update(task, advance=1, note=_note(terms))
                    if self.step % self.config.checkpoint_every == 0 and self.step % len(todo):
                        self.save()
                go_on = after_epoch is None or after_epoch(epoch)
                # A run that stopped early has nothing left to do when it is started again.
                self.epoch = epoch + 1 if go_on else self.config.epochs
                self.save()
                if not go_on:
                    break
        writer.close()

    def _train_step(self, step: Step, index: NDArray[np.int64], total: int) -> dict[str, float]:
        factor = learning_rate_factor(self.step, total, self.config)
        for group, rate in zip(self.optimiser.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor
        self.model.train()
        self.optimiser.zero_grad(set_to_none=True)
        with autocast(self.config.precision, self._device):
            terms = step(index)
        terms["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimiser.step()
        self.step += 1
        values = {name: float(value.detach()) for name, value in terms.items()}
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(f"the loss is {values['loss']} at step {self.step}")
        return values | {"grad_norm": float(norm)}

    def save(self) -> None:
        """Write a checkpoint; the previous one stays until the new one is complete."""
        fresh = self.run.checkpoint.with_suffix(".partial")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        save_file(_contiguous(self.model.state_dict()), fresh / "model.safetensors")
        state = self.optimiser.state_dict()["state"]
        moments = {
            f"{index}.{name}": torch.as_tensor(value)
            for index, entries in state.items()
            for name, value in entries.items()
        }
        save_file(_contiguous(moments), fresh / "optimiser.safetensors")
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        save_file(random, fresh / "random.safetensors")
        # Written last: its presence says that the checkpoint is complete.
        (fresh / "progress.json").write_text(
            json.dumps({"step": self.step, "epoch": self.epoch, "extra": self.extra})
        )
        shutil.rmtree(self.run.checkpoint, ignore_errors=True)
        fresh.rename(self.run.checkpoint)

    def _resume(self) -> None:
        folder = self.run.checkpoint
        fresh = folder.with_suffix(".partial")
        if not folder.exists() and (fresh / "progress.json").exists():
            fresh.rename(
                folder
            )  # stopped between dropping the old checkpoint and renaming this one
        if not folder.exists():
            return
        self.model.load_state_dict(load_file(folder / "model.safetensors"))
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(folder / "optimiser.safetensors").items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        random = load_file(folder / "random.safetensors")
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])
        progress = json.loads((folder / "progress.json").read_text())
        self.step, self.epoch, self.extra = progress["step"], progress["epoch"], progress["extra"]


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().contiguous().clone() for name, t in tensors.items()}


def _note(terms: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in terms.items())


class _MetricsLog(AbstractContextManager[TextIO]):
    """Append to a JSON-lines log, first dropping what a later resume would write again."""

    def __init__(self, path: Path, step: int) -> None:
        kept = list(_kept_lines(path, step)) if path.exists() else []
        self._file = path.open("w", buffering=1)
        self._file.writelines(kept)

    def __enter__(self) -> TextIO:
        return self._file

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _kept_lines(path: Path, step: int) -> Iterator[str]:
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            yield line
