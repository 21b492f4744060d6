"""The compiled slot attention: found or built, loaded, called on the memory of tensors.

`slot_kernel.c` is plain C. A library beside this module is taken if it was made from this very
source (`python -m service.engine.backends.slot_kernel` makes it, for an image); else one is built
with the system's C compiler on first use, into the user's cache folder. Where neither is possible
there is no kernel, and the attention of torch serves.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".c")
_BESIDE = Path(__file__).with_suffix(".so")
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
_LANES = 16
_BYTES_A_THREAD = 4 << 20  # of keys and values: less is read sooner than a thread wakes up
_INT, _POINTER, _FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class KernelError(RuntimeError):
    """The kernel cannot be built or loaded here; the message says why."""


class _Pool(ctypes.Structure):
    _fields_ = [
        ("keys", _POINTER), ("values", _POINTER),
        ("groups", _INT), ("positions", _INT), ("size", _INT),
    ]  # fmt: skip


class _Rows(ctypes.Structure):
    _fields_ = [
        ("slots", _POINTER), ("lengths", _POINTER), ("rows", _INT), ("all_rows", _INT),
        ("scratch", _POINTER), ("scratch_size", _INT), ("threads", _INT),
    ]  # fmt: skip


class SlotKernel:
    """The kernel on the pools of all layers: keys and values [slots, groups, positions, D] each.

    Without `n_threads` it uses as many as torch has at the time, where the work is worth it.
    Raises ValueError for pools that are not float32, contiguous and on the CPU.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        n_threads: int | None = None,
    ) -> None:
        self._attend = library.slot_attention
        self._shape = keys[0].shape
        for pool in (*keys, *values):
            if not (_plain(pool) and pool.is_contiguous() and pool.shape == self._shape):
                raise ValueError("pools are contiguous float32 of one shape on the CPU")
        self._kept = (list(keys), list(values))
        _, groups, positions, size = self._shape
        self._pools = [
            _Pool(k.data_ptr(), v.data_ptr(), groups, positions, size)
            for k, v in zip(keys, values, strict=True)
        ]
        self._n_threads = n_threads
        self._room = -(-positions // _LANES) * _LANES
        self._scratch = torch.empty(0)
        self._rows = _Rows(scratch_size=self._room)
        self._index = torch.zeros(0, dtype=torch.long)

    def begin(self, slots: Sequence[int], lengths: Sequence[int], n_rows: int) -> None:
        """Set the rows of the calls that follow, filled up to `n_rows`.

        A length counts the position that a row writes. Raises ValueError for a row outside the
        pools.
        """
        _, groups, _, size = self._shape
        check_rows(self._shape, slots, lengths, n_rows)
        self._index = torch.tensor([*slots, *lengths])
        rows, n = self._rows, len(slots)
        rows.slots = self._index.data_ptr()
        rows.lengths = rows.slots + 8 * n
        rows.rows, rows.all_rows = n, n_rows
        read = sum(lengths) * groups * size * 8
        self._share(1 + read // _BYTES_A_THREAD)

    def _share(self, worth: int) -> None:
        """Use as many threads as the work is worth and as there are."""
        threads = min(self._n_threads or torch.get_num_threads(), worth)
        if len(self._scratch) < threads * self._room:
            self._scratch = torch.empty(threads * self._room)
            self._rows.scratch = self._scratch.data_ptr()
        self._rows.threads = threads

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Attention of `query` [R, heads, 1, D]; keeps `key` and `value` [R, groups, 1, D] first.

        Returns [R, 1, heads, D]. Raises ValueError for rows that do not fit.
        """
        q, k, v = _rows_of(query), _rows_of(key), _rows_of(value)
        _, groups, _, size = self._shape
        n_rows, heads, n_new, width = q.shape
        if (
            n_rows != self._rows.all_rows
            or (n_new, width) != (1, size)
            or heads % groups
            or k.shape != (n_rows, groups, 1, size)
            or v.shape != k.shape
        ):
            raise ValueError("rows that do not fit the slots")
        out = torch.empty(n_rows, 1, heads, size)
        self._attend(
            self._pools[layer], self._rows, heads, scale,
            q.data_ptr(), q.stride(0), q.stride(1),
            k.data_ptr(), k.stride(0), k.stride(1),
            v.data_ptr(), v.stride(0), v.stride(1), out.data_ptr(),
        )  # fmt: skip
        return out


def check_rows(
    shape: Sequence[int], slots: Sequence[int], lengths: Sequence[int], n_rows: int
) -> None:
    """Raise ValueError unless all rows lie in pools [slots, groups, positions, D]."""
    n_slots, _, positions, _ = shape
    if not (
        len(slots) == len(lengths) <= n_rows
        and all(0 <= slot < n_slots for slot in slots)
        and all(0 < length <= positions for length in lengths)
    ):
        raise ValueError("a row outside the slots")


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_cpu


def _rows_of(tensor: Tensor) -> Tensor:
    """Each head of a row in one piece; rows and heads may stand apart."""
    if not _plain(tensor):
        raise ValueError("rows are float32 on the CPU")
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@functools.cache
def slot_library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where there is none; says so in the log once."""
    try:
        return find_library()
    except (KernelError, OSError) as error:
        _log.warning("attention without the compiled kernel, which is slower: %s", error)
        return None


def find_library() -> ctypes.CDLL:
    """The library beside this module, in the cache, or built now. Raises KernelError, OSError."""
    if _BESIDE.is_file():
        try:
            return _load(_BESIDE)
        except KernelError as error:  # of another version or machine
            _log.warning("%s", error)
    compiler = _compiler()
    try:
        cached = _cache_folder() / f"slot_kernel-{_key(compiler)}.so"
        if not cached.is_file():
            cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            build(cached, compiler)
        return _load(cached)
    except OSError:  # a home that cannot be written
        with tempfile.TemporaryDirectory(prefix="llm4ehr-") as folder:
            built = Path(folder) / "slot_kernel.so"
            build(built, compiler)
            return _load(built)


def build(out: Path, compiler: str | None = None) -> None:
    """Compile into `out`, which appears when it is complete. Raises KernelError, OSError."""
    compiler = compiler or _compiler()
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    command = [compiler, *_FLAGS, f'-DSOURCE="{_digest()}"', str(_SOURCE), "-o", str(partial)]
    try:
        partial.touch()
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            reason = next((x for x in done.stderr.splitlines() if "error" in x), "it failed")
            raise KernelError(f"{compiler}: {reason}")
        partial.replace(out)
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{compiler} takes too long") from error
    finally:
        partial.unlink(missing_ok=True)


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        library.slot_kernel_source.restype = ctypes.c_char_p
        source = library.slot_kernel_source()
    except (OSError, AttributeError) as error:
        raise KernelError(f"{path} cannot be loaded: {error}") from error
    if source != _digest().encode():
        raise KernelError(f"{path} was made from another source")
    library.slot_attention.argtypes = (
        ctypes.POINTER(_Pool), ctypes.POINTER(_Rows), _INT, _FLOAT,
        *(_POINTER, _INT, _INT) * 3, _POINTER,
    )  # fmt: skip
    library.slot_attention.restype = None
    return library


def _compiler() -> str:
    found = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc"))), None)
    if found is None:
        raise KernelError("there is no C compiler")
    return found


def _digest() -> str:
    return hashlib.sha256(_SOURCE.read_bytes()).hexdigest()


def _key(compiler: str) -> str:
    """Changes with all that a build depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    of = [_digest(), *_FLAGS, compiler, version, platform.platform(), platform.machine()]
    return hashlib.sha256("\n".join(of).encode()).hexdigest()[:24]


def _cache_folder() -> Path:
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home) / "llm4ehr"
    try:
        return Path.home() / ".cache" / "llm4ehr"
    except RuntimeError as error:
        raise OSError("this user has no home") from error


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else _BESIDE
    build(out)
    print(out)
