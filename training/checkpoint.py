"""Checkpoints of a run that goes on: what learns, the optimiser, the random state. No pickle.

Frozen weights are not saved: they come from where they came from before. Under FSDP the shards are
gathered into one file, so that a run may go on with another number of processes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from training.processes import gather_rows, join, rank

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_EVERYWHERE = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
_LOADED = StateDictOptions(
    full_state_dict=True, broadcast_from_rank0=False, ignore_frozen_params=True, strict=False
)


def learning_state(module: nn.Module) -> dict[str, Tensor]:
    """What a run changes: learning parameters and buffers, whole and on the CPU."""
    state = cast(dict[str, Tensor], get_model_state_dict(module, options=_WHOLE))
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}


def load_learning_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Take up what `learning_state` gave."""
    set_model_state_dict(module, cast(dict[str, Any], state), options=_LOADED)


def save_checkpoint(
    folder: Path, module: nn.Module, optimiser: Optimizer, progress: dict[str, Any]
) -> None:
    """Write a checkpoint; the previous one stays until the new one is complete.

    All processes must call it; the first one writes.
    """
    state = learning_state(module)
    optimising = get_optimizer_state_dict(module, optimiser, options=_WHOLE)
    random = _random_states(module)
    if rank() != 0:  # the first process alone has the whole of it
        return
    moments = cast(Any, optimising["state"])
    fresh = folder.with_suffix(".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    save_file(state, fresh / "model.safetensors")
    flat = {
        f"{parameter}/{name}": torch.as_tensor(value).contiguous().clone()
        for parameter, entries in moments.items()
        for name, value in entries.items()
    }
    save_file(flat, fresh / "optimiser.safetensors")
    save_file(random, fresh / "random.safetensors")
    # Written last: its presence says that the checkpoint is complete.
    (fresh / "progress.json").write_text(json.dumps(progress))
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def load_checkpoint(folder: Path, module: nn.Module, optimiser: Optimizer) -> dict[str, Any] | None:
    """Take up a checkpoint and return its progress; None where there is none."""
    fresh = folder.with_suffix(".partial")
    with join().main_process_first():
        if not folder.exists() and (fresh / "progress.json").exists():
            fresh.rename(folder)  # stopped between dropping the old checkpoint and renaming this
    if not folder.exists():
        return None
    load_learning_state(module, load_file(folder / "model.safetensors"))
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(folder / "optimiser.safetensors").items():
        parameter, _, name = key.rpartition("/")
        moments.setdefault(parameter, {})[name] = value
    groups = get_optimizer_state_dict(module, optimiser, options=_EVERYWHERE)["param_groups"]
    set_optimizer_state_dict(
        module,
        optimiser,
        {"state": cast(Any, moments), "param_groups": groups},
        options=_LOADED,
    )
    random = load_file(folder / "random.safetensors")
    torch.set_rng_state(_own(random["cpu"], torch.get_rng_state()))
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(_own(random["cuda"], torch.cuda.get_rng_state()))
    progress: dict[str, Any] = json.loads((folder / "progress.json").read_text())
    return progress


def _random_states(module: nn.Module) -> dict[str, Tensor]:
    """The random states of all processes, one a row."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    on = next(module.parameters()).device
    return {name: gather_rows(state[None].to(on))[0].cpu() for name, state in states.items()}


def _own(states: Tensor, like: Tensor) -> Tensor:
    """This process's row; there may have been fewer processes."""
    rows = states.view(-1, len(like))
    return rows[rank() % len(rows)].clone()
