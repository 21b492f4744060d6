"""The Triton attention against one in double precision: interpreted on the CPU, or on a device.

`TRITON_INTERPRET=1 python -m tests.triton_kernel` interprets it; `... compile` compiles it for a
device that need not be there.
"""

from __future__ import annotations

import sys

import torch

from service.engine.backends.device_slots import attend_by_gather

SHAPES = ((4, 4, 32, 200), (4, 2, 8, 70), (3, 3, 24, 65), (2, 1, 128, 40))
"""Heads, key-value heads, size of a head, positions."""


def check_kernel(device: str) -> None:
    """Raises AssertionError where a row differs from its own attention, alone."""
    from service.engine.backends.slot_attention_triton import attend

    generator = torch.Generator().manual_seed(0)
    for heads, kv_heads, size, longest in SHAPES:
        slots = torch.tensor([0, 3, 3, 1, 2, 0])
        positions = torch.tensor([0, longest - 1, 31, 32, 5, 17])
        query = torch.randn(6, 1, heads, size, generator=generator).transpose(1, 2)
        keys, values = (torch.randn(4, kv_heads, longest, size, generator=generator) for _ in "kv")
        for pool in (keys, values):
            pool[2, :, 6:] = float("nan")  # behind the only row of this slot
        given = [t.to(device) for t in (query, keys, values, slots, positions)]
        got = attend(*given, size**-0.5)
        assert got.shape == (6, 1, heads, size)
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            k, v = (pool[slot, :, : position + 1].double() for pool in (keys, values))
            k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
            score = (query[row].double() @ k.transpose(1, 2)) * size**-0.5
            expected = (score.softmax(-1) @ v)[:, 0]
            assert (got[row, 0].cpu() - expected).abs().max() < 2e-6
            at = slice(row, row + 1)
            alone = [given[0][at], *given[1:3], given[3][at], given[4][at]]
            assert torch.equal(attend(*alone, size**-0.5)[0], got[row])
        assert (attend_by_gather(*given, size**-0.5) - got).abs().max() < 2e-6


def check_compiled() -> None:
    """It compiles, and without the tensor cores that round to TF32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from service.engine.backends.slot_attention_triton import _attend

    types = dict.fromkeys(("query", "keys", "values", "out"), "*fp32")
    types |= dict.fromkeys(("slots", "positions"), "*i64") | {"scale": "fp32"}
    constants = {"GROUP": 2, "SIZE": 24, "WIDTH": 32, "BLOCK": 64}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in _attend.arg_names
    }
    at = {(_attend.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=_attend, signature=signature, constexprs=at)
    target, options = GPUTarget("cuda", 90, 32), {"enable_fp_fusion": False}
    made = triton.compile(source, target=target, options=options)
    assert made.asm["cubin"]
    assert not [word for word in ("mma", "tf32", "fma.rn") if word in made.asm["ptx"]]


if __name__ == "__main__":
    if sys.argv[1:] == ["compile"]:
        check_compiled()
    else:
        check_kernel("cpu")
