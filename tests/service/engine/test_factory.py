"""The backend that the settings name: made, sized, verified; or what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm4ehr.bundle import Bundle, load_bundle
from service.engine.backends import factory
from service.engine.backends.base import DeviceFault, OutOfMemory, candidate_sizes
from service.engine.backends.shapes import slots_for
from service.settings import Settings

REPOSITORY = Path(__file__).parents[3] / "model_repository"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(REPOSITORY, "llm4ehr", 1)


def settings(**changes: Any) -> Settings:
    return Settings(
        **{"model_repository": REPOSITORY, "engine_rows": 8, "kv_memory_mib": 32} | changes
    )


@pytest.mark.parametrize(("name", "copied"), [("torch-cpu", 0), ("onnx-cpu", 8)])
def test_it_is_sized_verified_and_ready(bundle: Bundle, name: str, copied: int) -> None:
    if name == "onnx-cpu":
        pytest.importorskip("onnxruntime")
    backend = factory.make_backend(bundle, settings(backend=name))
    assert backend.name == name
    assert backend.n_slots == slots_for(bundle.network, 32 << 20) - copied
    assert backend.tick_sizes[-1] == 8
    assert set(backend.tick_sizes) <= set(candidate_sizes(8))
    config = bundle.network.model.config
    rows = [np.zeros((3, n), np.float32) for n in (config.n_series, config.n_event_channels)]
    assert backend.tick(rows[0], rows[1], [0, 1, 2], [0, 0, 0]).hidden.shape == (3, 128)


def test_a_small_budget_still_gives_a_slot(bundle: Bundle) -> None:
    pytest.importorskip("onnxruntime")
    made = factory.make_backend(bundle, settings(backend="onnx-cpu", kv_memory_mib=1))
    assert made.n_slots == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("name", ["torch-cuda", "onnx-cuda"])
def test_without_a_device_there_is_no_backend(bundle: Bundle, name: str) -> None:
    with pytest.raises(ValueError, match="CUDA"):
        factory.make_backend(bundle, settings(backend=name))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OutOfMemory("much"), "no memory for LLM4EHR_KV_MEMORY_MIB=32 .* torch-cpu"),
        (DeviceFault("it broke"), "torch-cpu: it broke"),
    ],
)
def test_what_fails_at_the_start_is_one_line(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(factory, "unverified_backend", fail)
    with pytest.raises(ValueError, match=said):
        factory.make_backend(bundle, settings())
