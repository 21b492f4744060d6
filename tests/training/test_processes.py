"""Several processes, whole or sharded models, chunks and a queue: the same losses and gradients."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("distributed_step.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def steps(folder: Path, n_processes: int, *options: str) -> dict[str, Tensor]:
    """Terms, gradients and state after two steps of so many processes."""
    port = free_port()
    running = []
    for rank in range(n_processes):
        peers = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_processes,
            "LOCAL_WORLD_SIZE": n_processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        own = {name: str(value) for name, value in peers.items()} if n_processes > 1 else {}
        on_cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        environment = os.environ | own | on_cpu | {"PYTHONPATH": str(ROOT)}
        running.append(
            subprocess.Popen(
                [sys.executable, str(SCRIPT), str(folder / "out.safetensors"), *options],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    output = [process.communicate(timeout=200)[0] for process in running]
    assert [process.returncode for process in running] == [0] * n_processes, "\n".join(output)
    return load_file(folder / "out.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """One process, the whole batch at once."""
    return steps(tmp_path_factory.mktemp("one"), 1, "--queue", "50")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [(), ("--chunk", "2", "--shard")],
    ids=["spread", "sharded, in chunks"],
)
def test_two_processes_have_the_losses_and_gradients_of_one(
    alone: dict[str, Tensor], tmp_path: Path, options: tuple[str, ...]
) -> None:
    together = steps(tmp_path, 2, "--queue", "50", *options)
    assert together.keys() == alone.keys()
    compared = [name for name in alone if not name.startswith("state/model")]
    for name in compared:
        torch.testing.assert_close(together[name], alone[name], rtol=2e-5, atol=2e-6)
    assert sum(name.startswith("gradient/") for name in compared) > 20
    assert alone["state/queue.cursor"] > 0
    # Adam turns the rounding of a gradient that is zero into a step: weights agree but for those.
    same = [n for n in alone if n.startswith("state/model") and "c_attn.bias" not in n]
    for name in same:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_one_process_goes_on_where_two_with_a_sharded_model_stopped(
    alone: dict[str, Tensor], tmp_path: Path
) -> None:
    steps(tmp_path, 2, "--queue", "50", "--shard", "--steps", "1")
    resumed = steps(tmp_path, 1, "--queue", "50")
    assert resumed.keys() == {n for n in alone if n.startswith(("1/", "state/"))}
    for name, value in resumed.items():
        if "c_attn.bias" not in name:  # as above
            torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=2e-5)
