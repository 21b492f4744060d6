"""The compiled slot attention: what torch gives, the same bits for a row, where it comes from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.engine.backends import slot_kernel
from service.engine.backends.slot_attention import SlotCache
from service.engine.backends.slot_kernel import SlotKernel, build, slot_library
from service.engine.backends.torch_cpu import TorchCpuBackend
from tests.backends import (
    N_HOURS,
    STEPS,
    Make,
    Stay,
    assert_like_offline,
    backend_of,
    computed,
    features_of,
    tuned,
)

LIBRARY = slot_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no C compiler and no library")


class Slots:
    """Pools with random contents, and random rows for them."""

    def __init__(
        self, heads: int, groups: int, size: int, positions: int = 200, *, seed: int = 0
    ) -> None:
        self.of = torch.Generator().manual_seed(seed)
        self.heads, self.groups, self.size = heads, groups, size
        shape = (4, groups, positions, size)
        self.keys, self.values = self.drawn(*shape), self.drawn(*shape)

    def drawn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.of)

    def rows(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value, with the strides of parts of one larger tensor."""
        wide = self.drawn(n, self.heads + 2 * self.groups, self.size)
        q, k, v = wide[:, :, None].split([self.heads, self.groups, self.groups], dim=1)
        return q, k, v

    def kernel(self, threads: int = 1) -> SlotKernel:
        assert LIBRARY is not None
        return SlotKernel(LIBRARY, [self.keys], [self.values], threads)

    def expected(
        self, slots: list[int], lengths: list[int], rows: tuple[Tensor, ...], scale: float
    ) -> Tensor:
        """In double precision, after the writes."""
        q, k, v = (part[:, :, 0].double() for part in rows)
        keys, values = self.keys.double(), self.values.double()
        for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            keys[slot, :, length - 1], values[slot, :, length - 1] = k[row], v[row]
        out = torch.zeros(q.shape, dtype=torch.float64)
        for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            per_group = q[row].view(self.groups, -1, self.size)
            weights = (per_group @ keys[slot, :, :length].mT * scale).softmax(-1)
            out[row] = (weights @ values[slot, :, :length]).view(self.heads, self.size)
        return out[:, None]


@given(data=st.data())
@settings(max_examples=150)
def test_it_gives_what_the_formula_gives(data: st.DataObject) -> None:
    groups, per_group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    size = data.draw(st.sampled_from([1, 3, 4, 8, 16, 20, 32, 48, 64, 72, 80, 128]))
    pools = Slots(groups * per_group, groups, size, seed=data.draw(st.integers(0, 99)))
    lengths = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=4))
    slots = data.draw(st.permutations(range(4)))[: len(lengths)]
    scale = data.draw(st.sampled_from([size**-0.5, 1.0, 0.03]))
    fill = data.draw(st.integers(0, 3))
    rows = pools.rows(len(slots) + fill)
    expected = pools.expected(slots, lengths, rows, scale)
    kernel = pools.kernel(data.draw(st.integers(1, 3)))
    kernel.begin(slots, lengths, len(slots) + fill)
    out = kernel(0, *rows, scale)
    # Weights close to one another: the sums are of the size of a value. With a scale of 1 scores
    # are larger, and so is what they round off.
    atol = 1e-6 if scale < 1 else 2e-5
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=atol)
    assert not out[len(slots) :].any()


def test_rows_of_one_stay_read_one_another() -> None:
    pools = Slots(2, 2, 32)
    rows = pools.rows(5)
    expected = pools.expected([1] * 5, [8, 9, 10, 11, 12], rows, 0.2)
    kernel = pools.kernel()
    kernel.begin([1] * 5, [8, 9, 10, 11, 12], 5)
    torch.testing.assert_close(kernel(0, *rows, 0.2).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [4, 24, 32, 64, 96])
def test_a_row_has_the_same_bits_in_any_company(size: int) -> None:
    """Neighbours, place, slot and number of threads: only the row's own slot and length count."""
    lengths = [1, 15, 16, 17, 33, 100, 199, 200]
    rng = np.random.default_rng(0)
    rows = Slots(4, 2, size).rows(8)

    def pools() -> Slots:
        made = Slots(4, 2, size, seed=1)
        made.keys[:], made.values[:] = made.keys[:1].clone(), made.values[:1].clone()
        return made

    alone = []
    for row, length in enumerate(lengths):
        kernel = pools().kernel()
        kernel.begin([0], [length], 1)
        alone.append(kernel(0, *(part[row : row + 1] for part in rows), 0.3)[0])
    for threads in (1, 2, 5):
        for _ in range(5):
            here = rng.permutation(8)[:4].tolist()
            slots = rng.permutation(4).tolist()
            kernel = pools().kernel(threads)
            kernel.begin(slots, [lengths[row] for row in here], 6)
            kernel._share(threads)  # work as small as this is not shared otherwise
            picked = [torch.cat([part[here], part[:2]]) for part in rows]
            out = kernel(0, *picked, 0.3)
            for place, row in enumerate(here):
                assert out[place].numpy().tobytes() == alone[row].numpy().tobytes()


def test_numbers_that_are_none_stay_visible() -> None:
    """In the row that has them, and in no other."""
    for bad in (float("nan"), float("inf")):
        pools = Slots(2, 2, 32)
        pools.keys[0, :, 3], pools.values[1, :, 3, 5] = bad, bad
        q, k, v = pools.rows(3)
        kernel = pools.kernel()
        kernel.begin([0, 1, 2], [9, 9, 9], 3)
        out = kernel(0, q.abs(), k, v, 0.2)
        assert out[0].isnan().all()
        assert not out[1, 0, :, 5].isfinite().any()
        assert out[2].isfinite().all()


def test_scores_far_apart_do_not_overflow() -> None:
    pools = Slots(1, 1, 16)
    rows = pools.rows(1)
    expected = pools.expected([0], [200], rows, 300.0)
    kernel = pools.kernel()
    kernel.begin([0], [200], 1)
    torch.testing.assert_close(kernel(0, *rows, 300.0).double(), expected, rtol=1e-3, atol=1e-3)


def test_only_memory_that_fits_is_handed_over() -> None:
    assert LIBRARY is not None
    pools = Slots(4, 2, 16)
    with pytest.raises(ValueError, match="pools"):
        SlotKernel(LIBRARY, [pools.keys.double()], [pools.values], 1)
    with pytest.raises(ValueError, match="pools"):
        SlotKernel(LIBRARY, [pools.keys.mT], [pools.values.mT], 1)
    kernel = pools.kernel()
    for slots, lengths in (([4], [1]), ([-1], [1]), ([0], [0]), ([0], [201]), ([0, 1], [1])):
        with pytest.raises(ValueError, match="outside the slots"):
            kernel.begin(slots, lengths, 2)
    with pytest.raises(ValueError, match="outside the slots"):
        kernel.begin([0, 1], [1, 1], 1)
    kernel.begin([0], [1], 2)
    q, k, v = pools.rows(2)
    for rows in ((q[:1], k[:1], v[:1]), (q, k[:, :1], v), (q[..., :8], k, v), (q[:, :3], k, v)):
        with pytest.raises(ValueError, match="do not fit"):
            kernel(0, *rows, 1.0)
    with pytest.raises(ValueError, match="float32"):
        kernel(0, q.double(), k, v, 1.0)
    strided = q.mT.contiguous().mT  # channels apart: copied, not misread
    kernel.begin([0], [7], 2)
    assert torch.equal(kernel(0, strided, k, v, 0.2), kernel(0, q, k, v, 0.2))


# Where it comes from.


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and no library beside the module."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(slot_kernel, "_BESIDE", tmp_path / "beside.so")
    return tmp_path


def test_it_is_built_once_into_the_cache(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slot_kernel.find_library()
    (built,) = (nowhere / "llm4ehr").iterdir()
    assert built.name.startswith("slot_kernel-")
    before = built.stat().st_mtime_ns
    monkeypatch.setattr(slot_kernel, "build", lambda *a: pytest.fail("built again"))
    slot_kernel.find_library()
    assert built.stat().st_mtime_ns == before


def test_a_home_that_cannot_be_written_is_no_obstacle(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (nowhere / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere / "file"))
    assert slot_kernel.find_library().slot_attention
    assert sorted(p.name for p in nowhere.iterdir()) == ["file"]


def test_a_library_beside_the_module_is_taken_if_it_is_of_this_source(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(nowhere / "beside.so")
    monkeypatch.setattr(slot_kernel, "_compiler", lambda: pytest.fail("not needed"))
    assert slot_kernel.find_library().slot_attention
    monkeypatch.setattr(slot_kernel, "_digest", lambda: "0" * 64)
    with pytest.raises(pytest.fail.Exception, match="not needed"):  # so another one is made
        slot_kernel.find_library()


def test_it_is_built_for_an_image(tmp_path: Path) -> None:
    out = tmp_path / "slot_kernel.so"
    command = [sys.executable, "-m", "service.engine.backends.slot_kernel", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    assert slot_kernel._load(out).slot_attention


@pytest.mark.parametrize("fault", ["no compiler", "a compiler that fails", "a file that is none"])
def test_without_a_kernel_torch_attends(
    nowhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tiny_network: Make,
    random_episode: Stay,
    fault: str,
) -> None:
    if fault == "a file that is none":
        (nowhere / "beside.so").write_text("no library")
    monkeypatch.setenv("PATH", str(nowhere) if fault == "a compiler that fails" else "")
    monkeypatch.delenv("CC", raising=False)
    (nowhere / "cc").write_text("#!/bin/sh\necho error: no >&2\nexit 1\n")
    (nowhere / "cc").chmod(0o755)
    slot_library.cache_clear()
    try:
        network, stay = tuned(tiny_network, "gpt2", "plain"), random_episode(1, N_HOURS)
        backend = backend_of(network)
        assert backend.kernel == "reference"
        assert_like_offline(network, stay, STEPS)
        *_, line = (r.getMessage() for r in caplog.records if r.name == slot_kernel.__name__)
        assert "without the compiled kernel" in line
    finally:
        slot_library.cache_clear()
    assert not (nowhere / "llm4ehr").exists() or not list((nowhere / "llm4ehr").iterdir())


def test_both_attentions_agree(
    tiny_network: Make, random_episode: Stay, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_network("llama")
    features = features_of(network, random_episode(1, N_HOURS))
    compiled = TorchCpuBackend(network, n_slots=1, max_rows=16)
    assert compiled.kernel == "compiled"
    monkeypatch.setattr("service.engine.backends.torch_cpu.slot_library", lambda: None)
    reference = TorchCpuBackend(network, n_slots=1, max_rows=16)
    assert reference.kernel == "reference"
    a, b = computed(compiled, features, STEPS), computed(reference, features, STEPS)
    np.testing.assert_allclose(a["hidden"], b["hidden"], rtol=0, atol=1e-5)


def test_pools_live_as_long_as_the_kernel_needs_them() -> None:
    cache = SlotCache(1, 2, 2, 10, 16, library=LIBRARY)
    kernel = cache._kernel
    assert kernel is not None
    assert kernel._kept[0][0] is cache.keys[0]
