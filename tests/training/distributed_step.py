"""Training steps as one of several processes; `test_processes.py` runs it with and without peers.

    python distributed_step.py OUT [--chunk N] [--queue N] [--shard] [--steps N]

Writes the loss terms and the gradients of the first process to OUT as safetensors.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from llm4ehr.backbone import spec_from_config
from llm4ehr.model import LLM4EHR, ModelConfig
from training.checkpoint import learning_state
from training.config import OptimConfig, Strict
from training.contrast import PatchEncoder, PretrainStep
from training.dataset import Batch
from training.loop import Trainer
from training.objectives import ObjectiveConfig
from training.processes import join, rank
from training.run_folder import RunFolder

N_STAYS, N_HOURS, N_TOKENS, N_SERIES, N_CODES = 7, 23, 40, 13, 20
GPT2 = {"model_type": "gpt2", "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.3}


def model() -> LLM4EHR:
    """A small network that is trained end to end, the same in every process."""
    torch.manual_seed(0)
    return LLM4EHR(
        ModelConfig(
            backbone=spec_from_config(GPT2 | NO_DROPOUT, frozen=False),
            n_series=N_SERIES,
            n_event_channels=0,
            n_tokens=N_CODES,
        )
    )


def batch() -> Batch:
    """Stays of different lengths with tokens in time order; some patches have none."""
    rng = np.random.default_rng(1)
    hours = np.sort(rng.integers(3, N_HOURS + 1, N_STAYS))
    hours[-1] = N_HOURS
    tokens = rng.integers(0, N_TOKENS + 1, N_STAYS)
    token_hours = np.full((N_STAYS, N_TOKENS), -1)
    for i in range(N_STAYS):
        token_hours[i, : tokens[i]] = np.sort(rng.integers(0, hours[i], tokens[i]))
    mask = torch.from_numpy(np.arange(N_HOURS) < hours[:, None])
    series = torch.from_numpy(rng.standard_normal((N_STAYS, N_HOURS, N_SERIES))).float()
    return Batch(
        index=np.arange(N_STAYS) + 100,
        series=series * mask[..., None],
        events=None,
        hour_mask=mask,
        labels=torch.full((N_STAYS, N_HOURS, 3), torch.nan),
        valid=mask,
        phenotypes=torch.full((N_STAYS, 25), torch.nan),
        token_ids=torch.from_numpy(rng.integers(0, N_CODES, (N_STAYS, N_TOKENS))),
        token_hours=torch.from_numpy(token_hours),
        token_mask=torch.from_numpy(token_hours >= 0),
        hide_events=torch.zeros(N_STAYS, dtype=torch.bool),
    )


class Config(Strict):
    """What the run folder asks for."""


def main() -> None:
    """Take two steps, or go on after the first; the second one sees the queue of the first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--queue", type=int, default=0)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.shard:
        _allow_sharding_without_a_gpu()
    objective = ObjectiveConfig(tau=0.1, omega_scope="batch", queue_patches=arguments.queue)
    encoder = PatchEncoder(model(), objective)
    optim = OptimConfig(
        epochs=arguments.steps, batch_size=N_STAYS, learning_rate=1e-3, clip_norm=1e9
    )
    trainer = Trainer(
        encoder,
        [{"params": list(encoder.parameters())}],
        optim,
        RunFolder(arguments.out.parent / "run", "step", Config()),
        lambda epoch: [np.arange(N_STAYS)],
        lambda index, step, part: batch().part(part),
    )
    step = PretrainStep(trainer.module, encoder.queue, objective, arguments.chunk)
    seen: dict[str, Any] = {}

    def remember(part: Batch, made: Trainer) -> dict[str, torch.Tensor]:
        terms = step(part, made)
        seen.update({f"{made.step}/{name}": term.detach() for name, term in terms.items()})
        if made.step == 0:
            for name, parameter in encoder.named_parameters():
                if parameter.grad is not None:
                    seen[f"gradient/{name}"] = _whole(parameter.grad).clone()
        return terms

    assert arguments.shard == (trainer.accelerator.distributed_type == DistributedType.FSDP)
    trainer.fit(remember)
    seen |= {f"state/{name}": value for name, value in learning_state(trainer.module).items()}
    if rank() == 0:
        save_file({name: value.contiguous() for name, value in seen.items()}, arguments.out)


def _allow_sharding_without_a_gpu() -> None:
    """Accelerate shards on accelerators only; torch itself does so on a CPU as well."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "GPT2Block",
    }
    join()._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _whole(gradient: Any) -> torch.Tensor:
    """A gradient that FSDP has cut into shards, in one piece."""
    whole: torch.Tensor = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return whole


if __name__ == "__main__":
    main()
