"""Rows of a tick on the host and on the device, and what a device's errors mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from service.engine.backends.base import DeviceFault, OutOfMemory

# What libraries under torch say, in errors that have no class of their own.
_NO_MEMORY = ("out of memory", "ALLOC_FAILED", "Failed to allocate memory", "bad allocation")
_DEVICE = ("CUDA", "CUBLAS", "CUDNN", "Triton Error")


class Mirror:
    """A tensor on the device and its twin in pinned memory of the host; on the CPU one tensor.

    `array` is the host's, to be written before `push` and read after `pull` and an event.
    """

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device) -> None:
        self.device = torch.zeros(shape, dtype=dtype, device=device)
        self._host = self.device
        if device.type != "cpu":
            self._host = torch.zeros(shape, dtype=dtype, pin_memory=True)
        self.array = self._host.numpy()

    def push(self, n_rows: int) -> None:
        """Host to device, in stream order: the first rows."""
        if self._host is not self.device:
            self.device[:n_rows].copy_(self._host[:n_rows], non_blocking=True)

    def pull(self, rows: torch.Tensor) -> None:
        """The first rows, from a tensor of the device to the host, in stream order."""
        self._host[: len(rows)].copy_(rows, non_blocking=True)


@contextmanager
def device_errors() -> Iterator[None]:
    """Raise OutOfMemory and DeviceFault for what torch raises. Other errors pass."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(str(error)) from error
    except RuntimeError as error:
        text = str(error)
        is_device = isinstance(error, torch.AcceleratorError) or any(s in text for s in _DEVICE)
        if is_device and says_no_memory(text):
            raise OutOfMemory(text) from error
        if is_device:
            raise DeviceFault(text) from error
        raise


def says_no_memory(text: str) -> bool:
    """Whether the message of a library means that memory ran out."""
    return any(said in text for said in _NO_MEMORY)
