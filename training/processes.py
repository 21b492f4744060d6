"""What several training processes share: rows of one another, and sums over all of them.

Every process computes its share of a loss of the whole batch, so that the shares add up to what one
process alone would compute. With a single process everything here hands back what it was given.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from numpy.typing import NDArray
from torch import Tensor

# How long processes wait for one another: the first one alone makes features and event patches,
# which takes long on much data.
_PATIENCE = timedelta(hours=6)


def join() -> PartialState:
    """This process among its peers, whom it joins with the first call; and its device.

    That is the GPU when there is one, or the CPU where Accelerate is told so.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return PartialState(cpu=cpu, timeout=_PATIENCE)


def n_processes() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if n_processes() > 1 else 0


def share(n: int) -> slice:
    """Which of `n` items of a batch are this process's: contiguous parts in the order of ranks.

    So rows gathered from all processes stand in the order of the batch.
    """
    world, own = n_processes(), rank()
    return slice(n * own // world, n * (own + 1) // world)


def even(batches: list[NDArray[np.int64]], batch_size: int) -> list[NDArray[np.int64]]:
    """The batches, cut so that every process has as many stays of each as the others.

    Sharded models need it: all processes must call every block equally often. What is cut are fewer
    stays an epoch than there are processes. Raises ValueError where whole batches cannot be shared.
    """
    world = n_processes()
    if batch_size % world:
        raise ValueError(f"optim.batch_size {batch_size} is not a multiple of {world} processes")
    cut = [batch[: len(batch) // world * world] for batch in batches]
    return [batch for batch in cut if len(batch)]


def agreed(value: float, on: torch.device) -> float:
    """The value of the first process, so that all decide alike. `on` is where tensors travel."""
    if n_processes() == 1:
        return value
    sent = torch.tensor([value], dtype=torch.float64, device=on)
    dist.broadcast(sent, 0)
    return float(sent)


def total(x: Tensor) -> Tensor:
    """Sum of `x` over all processes, without a gradient."""
    if n_processes() == 1:
        return x.detach()
    summed = x.detach().clone()
    dist.all_reduce(summed)
    return summed


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """The rows [n, ...] of all processes below one another, and where this process's begin.

    Processes may have different numbers of rows. The gradient of every process reaches the rows:
    what arrives at a row is the sum over all processes of what they have made of it.
    """
    if n_processes() == 1:
        return x, 0
    counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(n_processes())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    sizes = [int(count) for count in counts]
    rows: Tensor = _GatherRows.apply(x, sizes)
    return rows, sum(sizes[: rank()])


class _GatherRows(torch.autograd.Function):
    """All rows forward; backward the sum over processes, cut to the own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded.contiguous())
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        start = sum(ctx.sizes[: rank()])
        return summed[start : start + ctx.sizes[rank()]], None
