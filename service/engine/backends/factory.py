"""Make the backend that the settings name, sized, verified and warm."""

from __future__ import annotations

import torch

from llm4ehr.bundle import Bundle
from service.engine.backends.base import Backend, DeviceFault, OutOfMemory
from service.engine.backends.onnx_runtime import OnnxBackend
from service.engine.backends.shapes import slots_for
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.engine.backends.torch_cuda import TorchCudaBackend
from service.engine.backends.verify import agreeing_sizes
from service.settings import Settings


def make_backend(bundle: Bundle, settings: Settings) -> Backend:
    """A backend that is ready for its first tick; it owns no memory of other backends.

    Raises ValueError that says what is missing (a package, a device, a graph, memory), and
    RowDependenceError.
    """
    try:
        backend = unverified_backend(bundle, settings)
        # Also warms up: the first ticks allocate, choose kernels and are captured.
        backend.tick_sizes = agreeing_sizes(backend, bundle.network, settings.engine_rows)
        if isinstance(backend, OnnxBackend):
            backend.past_lengths = backend.agreeing_lengths()
    except OutOfMemory as error:
        raise ValueError(
            f"no memory for LLM4EHR_KV_MEMORY_MIB={settings.kv_memory_mib} beside the model on "
            f"the device of {settings.backend}"
        ) from error
    except DeviceFault as error:
        raise ValueError(f"{settings.backend}: {error}") from error
    return backend


def unverified_backend(
    bundle: Bundle, settings: Settings
) -> TorchCpuBackend | TorchCudaBackend | OnnxBackend:
    """A backend of which it is not known yet which tick sizes agree."""
    network, rows = bundle.network, settings.engine_rows
    n_slots = slots_for(network, settings.kv_memory_mib << 20)
    if settings.backend == "torch-cpu":
        return TorchCpuBackend(
            network, n_slots=n_slots, max_rows=rows, precision=settings.precision
        )
    if settings.backend == "torch-cuda":
        return TorchCudaBackend(network, n_slots=n_slots, max_rows=rows)
    return OnnxBackend(
        network,
        settings.model_repository / bundle.name / str(bundle.version) / "step.onnx",
        # The rows of a tick are copied out of their slots: memory for as many goes to the copy.
        n_slots=max(n_slots - rows, 1),
        max_rows=rows,
        device="cuda" if settings.backend == "onnx-cuda" else "cpu",
        threads=torch.get_num_threads(),
    )
