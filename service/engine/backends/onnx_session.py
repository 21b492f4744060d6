"""A session of ONNX Runtime that does sums the same way every time, and what its errors mean."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from service.engine.backends.base import DeviceFault, OutOfMemory
from service.engine.backends.transfer import says_no_memory

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_EXTRAS = {"cpu": "onnx", "cuda": "gpu"}
_FAULTS = ("DeviceReset", "EngineError", "EPFail", "Fail", "RuntimeException")


def open_session(
    graph: Path, device: Literal["cpu", "cuda"], threads: int
) -> tuple[Any, torch.cuda.Stream | None]:
    """A session of the graph on a device, and the stream that it computes on.

    Raises ValueError that says what is missing: the graph, the package or the device.
    """
    if not graph.is_file():
        raise ValueError(
            f"the bundle has no {graph.name}: export it again with --onnx, or set "
            "LLM4EHR_BACKEND=torch-cpu or torch-cuda"
        )
    provider = _provider(device)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that wait sleep: the event loop and the log need the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    stream, settings = None, {}
    if device == "cuda":
        onnxruntime.preload_dlls()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        settings = {
            "device_id": str(stream.device_index),
            "user_compute_stream": str(stream.cuda_stream),
            "use_tf32": "0",
            "arena_extend_strategy": "kSameAsRequested",
        }
    with runtime_errors():
        session = onnxruntime.InferenceSession(
            str(graph), options, providers=[(provider, settings)]
        )
    session.disable_fallback()
    # Without the libraries of CUDA the runtime takes the CPU and says so in its log only.
    if provider not in session.get_providers():
        raise ValueError(
            f"onnxruntime cannot load {provider}: CUDA and cuDNN of the versions it was built for "
            f"are needed (pip install 'llm4ehr[gpu]' with torch for CUDA)"
        )
    return session, stream


def without_waiting() -> Any:
    """Run options under which a run returns when its work is queued on the stream."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


@contextmanager
def runtime_errors() -> Iterator[None]:
    """Raise OutOfMemory and DeviceFault for failures of the runtime. Other errors pass."""
    try:
        yield
    except Exception as error:
        kind = type(error)
        if not (kind.__module__.startswith("onnxruntime.") and kind.__name__ in _FAULTS):
            raise
        if says_no_memory(str(error)):
            raise OutOfMemory(str(error)) from error
        raise DeviceFault(str(error)) from error


def _provider(device: Literal["cpu", "cuda"]) -> str:
    """The name of the execution provider, if it is there. Raises ValueError."""
    extra, provider = _EXTRAS[device], _PROVIDERS[device]
    if importlib.util.find_spec("onnxruntime") is None:
        raise ValueError(f"onnxruntime is not installed: pip install 'llm4ehr[{extra}]'")
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise ValueError(
            f"this onnxruntime has no {provider}: pip uninstall onnxruntime, then pip install "
            f"'llm4ehr[{extra}]'"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device: install a driver and torch with CUDA")
    return provider
