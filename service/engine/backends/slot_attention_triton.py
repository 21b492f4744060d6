"""Attention over KV slots in place, as a Triton kernel for CUDA devices.

One program computes one head of one row. It walks over its own prefix in blocks of a fixed size
with a running maximum and sum, so its result depends on nothing but its own query, slot and length.
Products are summed elementwise in fp32: no tensor core, hence no TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _attend(
    query,
    keys,
    values,
    out,
    slots,
    positions,
    scale,
    pool_slot,
    pool_head,
    pool_position,
    n_heads,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    within = channel < SIZE
    last = tl.load(positions + row)
    # Slots are 64-bit numbers: a pool may be larger than 32-bit offsets reach.
    start_of_slot = tl.load(slots + row) * pool_slot + (head // GROUP) * pool_head
    q = tl.load(query + (row * n_heads + head) * SIZE + channel, mask=within, other=0.0)
    q = q.to(tl.float32) * scale
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    sums = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, last + 1, BLOCK):
        position = first + tl.arange(0, BLOCK)
        known = position <= last
        inside = known[:, None] & within[None, :]
        place = start_of_slot + position[:, None] * pool_position + channel[None, :]
        k = tl.load(keys + place, mask=inside, other=0.0)
        score = tl.sum(k * q[None, :], axis=1)
        score = tl.where(known, score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, axis=0))
        shrink = tl.exp(highest - higher)
        weight = tl.exp(score - higher)
        v = tl.load(values + place, mask=inside, other=0.0)
        sums = sums * shrink + tl.sum(weight[:, None] * v, axis=0)
        total = total * shrink + tl.sum(weight, axis=0)
        highest = higher
    tl.store(out + (row * n_heads + head) * SIZE + channel, sums / total, mask=within)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """Attention of `query` [R, heads, 1, D] over positions 0 to `positions` [R] of `slots` [R].

    `keys` and `values` are pools [slots, kv heads, positions, D], contiguous, fp32. Returns
    [R, 1, heads, D].
    """
    n_rows, n_heads, _, size = query.shape
    out = torch.empty(n_rows, 1, n_heads, size, dtype=torch.float32, device=query.device)
    width = max(triton.next_power_of_2(size), 16)
    _attend[(n_rows, n_heads)](
        query.contiguous(),
        keys,
        values,
        out,
        slots,
        positions,
        scale,
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        n_heads,
        GROUP=n_heads // keys.shape[1],
        SIZE=size,
        WIDTH=width,
        BLOCK=64 if width <= 64 else 32,
        num_warps=4,
        enable_fp_fusion=False,  # stated, as the default of Triton changes
    )
    return out
