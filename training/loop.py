"""The training loop: seeds, precision, processes, checkpoints, logs and exact resume.

A checkpoint holds what learns, the optimiser and the random state as safetensors plus a small JSON;
on CPU a stopped and resumed run ends with the same bits as one that was never stopped. Devices,
several processes and sharding (DDP, FSDP) are Accelerate's: the same code runs under
`accelerate launch` and without it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import ProjectConfiguration
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from llm4ehr.model import LLM4EHR
from training.checkpoint import load_checkpoint, save_checkpoint
from training.config import OptimConfig, Tracker
from training.dataset import Batch
from training.processes import join, n_processes, rank, share
from training.progress import Throughput, progress_bar
from training.run_folder import MetricsLog, RunFolder
from training.trackers import tracking

Index = NDArray[np.int64]
Step = Callable[[Batch, "Trainer"], dict[str, Tensor]]
Load = Callable[[Index, int, slice], Batch]


def device() -> torch.device:
    """The GPU when there is one; with several processes, this one's."""
    return join().device


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


class Trainer:
    """Runs epochs of a step function over batches.

    `epoch_batches` gives the index arrays of an epoch; `load(index, step, part)` makes this
    process's part of one of them and must be a pure function, since worker processes call it ahead.
    `module` is what a step calls: under several processes `self.module` is its wrapped form.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: list[dict[str, Any]],
        config: OptimConfig,
        run: RunFolder,
        epoch_batches: Callable[[int], list[Index]],
        load: Load,
        trackers: Sequence[Tracker] = ("tensorboard",),
    ) -> None:
        self.config = config
        self.run = run
        self.epoch_batches = epoch_batches
        self.load = load
        self.step = 0
        self.epoch = 0
        self.extra: dict[str, Any] = {}  # what the caller wants kept in checkpoints
        join()
        self.accelerator = Accelerator(
            log_with=list(trackers) or None,
            project_config=ProjectConfiguration(
                project_dir=str(run.path), logging_dir=str(run.path / "tensorboard")
            ),
            # The decoder or the tokens have no part in some objectives.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        optimiser = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimiser](
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.module, self.optimiser = self.accelerator.prepare(module, optimiser)
        if rank() > 0:  # the processes began alike, but should not drop the same channels
            torch.manual_seed(torch.initial_seed() + rank())
        self._base_rates = [group["lr"] for group in self.optimiser.param_groups]

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return self.accelerator.device

    def fit(self, step: Step, after_epoch: Callable[[int], bool] | None = None) -> None:
        """Train from the checkpoint, if any, to the end.

        `step` adds gradients through `backward` and returns loss terms with the total under "loss".
        `after_epoch` returns False to stop early; it must not change the random state of torch.
        """
        total = self.config.epochs * len(self.epoch_batches(0))
        self._resume()
        speed = Throughput()
        with (
            tracking(self.accelerator, self.run, self.step),
            MetricsLog(self.run, self.step) as log,
            progress_bar() as bar,
        ):
            task = bar.add_task("training", total=total, completed=self.step, note="")
            for epoch in range(self.epoch, self.config.epochs):
                self.epoch = epoch
                todo = self.epoch_batches(epoch)
                for batch, hours in self._loaded(todo, epoch * len(todo)):
                    terms = self._train_step(step, batch, total)
                    self.accelerator.log(terms, step=self.step)
                    log.write({"step": self.step, "epoch": epoch, **terms})
                    speed.add(len(batch.index) * n_processes(), hours * n_processes())
                    bar.update(task, advance=1, below=_below(speed, terms))
                    if self.step % self.config.checkpoint_every == 0 and self.step % len(todo):
                        self.save()
                go_on = after_epoch is None or after_epoch(epoch)
                # A run that stopped early has nothing left to do when it is started again.
                self.epoch = epoch + 1 if go_on else self.config.epochs
                self.save()
                if not go_on:
                    break

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's share of a loss.

        Between processes gradients are averaged, while shares are to be added up.
        """
        self.accelerator.backward(loss * n_processes())

    @contextmanager
    def unsynced(self) -> Iterator[None]:
        """Add gradients up without exchanging them between processes."""
        with self.accelerator.no_sync(self.module):
            yield

    def whole(self, model: LLM4EHR, build: Callable[[], LLM4EHR]) -> LLM4EHR:
        """The model with all its weights: itself or, where it is sharded, a copy on the CPU.

        `build` makes a model of the same architecture. All processes must call it.
        """
        if self.accelerator.distributed_type != DistributedType.FSDP:
            return model
        state = get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        copy = build()
        if self.accelerator.is_main_process:
            copy.load_state_dict(state)
        return copy

    def save(self) -> None:
        """Write a checkpoint; the previous one stays until the new one is complete."""
        save_checkpoint(
            self.run.checkpoint,
            self.module,
            self.optimiser.optimizer,
            {"step": self.step, "epoch": self.epoch, "extra": self.extra},
        )

    def _resume(self) -> None:
        progress = load_checkpoint(self.run.checkpoint, self.module, self.optimiser.optimizer)
        if progress is not None:
            self.step, self.epoch = progress["step"], progress["epoch"]
            self.extra = progress["extra"]

    def _loaded(self, todo: list[Index], first_step: int) -> Iterator[tuple[Batch, int]]:
        """The batches of an epoch that are left, on the device, and the hours in each.

        On a GPU machine they are made ahead.
        """
        on_gpu = self.device.type == "cuda"
        loader: DataLoader[Batch] = DataLoader(
            _Batches(self.load, todo, first_step),
            batch_size=None,
            sampler=range(self.step - first_step, len(todo)),
            num_workers=min(8, (os.cpu_count() or 2) // 2) if on_gpu else 0,
            pin_memory=on_gpu,
            # Its own, so that the random state of the run does not depend on how it loads.
            generator=torch.Generator(),
        )
        for batch in loader:
            yield batch.to(self.device), int(batch.hour_mask.sum())

    def _train_step(self, step: Step, batch: Batch, total: int) -> dict[str, float]:
        factor = learning_rate_factor(self.step, total, self.config)
        for group, rate in zip(self.optimiser.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor
        self.module.train()
        self.optimiser.zero_grad(set_to_none=True)
        with autocast(self.config.precision, self.device):
            terms = step(batch, self)
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.config.clip_norm)
        self.optimiser.step()
        self.step += 1
        # One copy from the device a step: each of its own would wait for it.
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm  # sharded with FSDP
        numbers = torch.stack([*terms.values(), whole]).detach().float().tolist()
        values = dict(zip([*terms, "grad_norm"], numbers, strict=True))
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(f"the loss is {values['loss']} at step {self.step}")
        return values


class _Batches(Dataset[Batch]):
    """This process's part of each batch of an epoch."""

    def __init__(self, load: Load, todo: list[Index], first_step: int) -> None:
        self.load = load
        self.todo = todo
        self.first_step = first_step

    def __getitem__(self, i: int) -> Batch:
        index = self.todo[i]
        return self.load(index, self.first_step + i, share(len(index)))


def _below(speed: Throughput, terms: dict[str, float]) -> str:
    return "  ".join([str(speed), *(f"{name} {value:.3f}" for name, value in terms.items())])
