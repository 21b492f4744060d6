"""Training on a GPU: what precision, memory, the cache, workers and the compiler may not change."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llm4ehr.bundle import load_network
from tests.training.distributed_step import N_STAYS, batch, model
from training.config import FinetuneConfig, PretrainConfig
from training.contrast import PatchEncoder, PretrainStep
from training.dataset import Batch
from training.event_cache import EventPatches, write_event_patches
from training.finetune import finetune
from training.loop import autocast
from training.objectives import ObjectiveConfig
from training.pretrain import pretrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # The workers of the loader are forked, as everywhere in torch; they touch no thread of ours.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
Body = Callable[..., dict[str, Any]]
ON = torch.device("cuda")
OBJECTIVE = ObjectiveConfig(tau=0.1, omega_scope="batch", queue_patches=50)


class OneProcess:
    """Gradients of a single process."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def unsynced(self) -> Any:
        return nullcontext()


def step(precision: str = "fp32", chunk: int | None = None) -> tuple[dict[str, float], Tensor]:
    """Terms and all gradients, in one vector, of a step on seven stays."""
    encoder = PatchEncoder(model().to(ON).train(), OBJECTIVE).to(ON)
    with autocast(precision, ON):
        made = PretrainStep(encoder, encoder.queue, OBJECTIVE, chunk)
        terms = made(batch().to(ON), OneProcess())
    gradients = [p.grad.flatten() for p in encoder.parameters() if p.grad is not None]
    return {name: term.item() for name, term in terms.items()}, torch.cat(gradients)


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def test_a_step_in_bf16_is_close_to_one_in_fp32() -> None:
    exact, rounded = step("fp32"), step("bf16")
    assert rounded[0] == pytest.approx(exact[0], rel=0.05)
    assert rounded[0] != exact[0]
    assert cosine(rounded[1], exact[1]) > 0.98
    assert rounded[1].dtype == torch.float32


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.03)])
def test_chunks_have_the_losses_and_gradients_of_the_whole_batch(
    precision: str, tolerance: float
) -> None:
    whole, cached = step(precision), step(precision, chunk=2)
    assert cached[0] == pytest.approx(whole[0], rel=tolerance)
    assert cosine(cached[1], whole[1]) > 1 - tolerance
    assert cached[1].norm().item() == pytest.approx(whole[1].norm().item(), rel=tolerance)


def test_event_patches_from_the_cache_are_those_of_the_pass(tmp_path: Path) -> None:
    network = model().to(ON).eval().requires_grad_(False)
    whole = batch()
    features: Any = SimpleNamespace(lengths=whole.hour_mask.sum(1).numpy())
    path = tmp_path / "patches.npy"
    everyone = np.arange(N_STAYS)

    def load(rows: Any) -> Batch:
        return replace(whole.part(rows), index=rows)

    write_event_patches(path, network, features, everyone, lambda rows: load(rows).to(ON))
    rows = np.array([1, 4, 6])
    ready = EventPatches(path, features, network.config.patch_hours).add_to(load(rows))
    encoder = PatchEncoder(network, OBJECTIVE).to(ON)
    plain, cached = (encoder(b.pin_memory().to(ON)) for b in (load(rows), ready))
    usable = plain["usable"]
    torch.testing.assert_close(cached["z"][usable], plain["z"][usable], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cached["v"], plain["v"], rtol=1e-4, atol=1e-5)


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_log(run: Path, other: Path, rel: float) -> None:
    for entry, expected in zip(log_of(run), log_of(other), strict=True):
        assert entry == pytest.approx(expected, rel=rel)


def pretraining(body: dict[str, Any], **optim: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(body | {"optim": body["optim"] | optim})


@pytest.mark.parametrize(("precision", "rel"), [("fp32", 1e-3), ("auto", 0.05)])
def test_a_killed_run_goes_on_with_its_workers_and_random_state(
    precision: str, rel: float, pretrain_body: Body, tmp_path: Path, monkeypatch: Any
) -> None:
    """The tiny network has dropout, so that the random state of the GPU matters."""
    calls = 0

    def killed(*arguments: Any) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    original = PretrainStep.__call__
    whole = pretraining(pretrain_body(tmp_path / "whole"), precision=precision)
    stopped = pretraining(pretrain_body(tmp_path / "stopped"), precision=precision)
    pretrain(whole)
    with monkeypatch.context() as patch:
        patch.setattr(PretrainStep, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(stopped)
    pretrain(stopped)
    assert_same_log(stopped.run, whole.run, rel)


def quiet(body: dict[str, Any], tiny_config: Body) -> dict[str, Any]:
    """Without dropout, whose channels a compiled network draws otherwise."""
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    backbone = {"config": tiny_config("gpt2", **rates), "frozen": False}
    return body | {"model": body["model"] | {"backbone": backbone}}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler has some of its own
def test_a_compiled_network_learns_the_same(
    pretrain_body: Body, tiny_config: Body, tmp_path: Path
) -> None:
    configs = {
        compiled: pretraining(
            quiet(pretrain_body(tmp_path / str(compiled)), tiny_config),
            precision="fp32",
            compile=compiled,
        )
        for compiled in (False, True)
    }
    for config in configs.values():
        pretrain(config)
    assert_same_log(configs[True].run, configs[False].run, rel=1e-3)
    names = [load_file(c.run / "model.safetensors").keys() for c in configs.values()]
    assert names[0] == names[1]


def test_fine_tuning_ends_with_a_network_that_loads(
    pretrained: Path, store_2012: Path, tmp_path: Path
) -> None:
    config = FinetuneConfig.model_validate(
        {
            "run": tmp_path / "run",
            "pretrained": pretrained,
            "data": {
                "sources": [{"store": store_2012, "splits": ["a", "b"]}],
                "cache": tmp_path / "cache",
                "n_folds": 2,
                "validation_fold": 1,
            },
            "tasks": {"mortality": 1.0, "decompensation": 1.0, "remaining_los": 0.3},
            "tuning": "end_to_end",
            "optim": {"epochs": 2, "batch_size": 4, "learning_rate": 0.01},
        }
    )
    finetune(config)
    assert all(np.isfinite(entry["loss"]) for entry in log_of(config.run))
    assert set(load_network(config.run).model.config.heads) == set(config.tasks)
