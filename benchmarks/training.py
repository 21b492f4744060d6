"""Pre-training steps: a plain Hugging Face model in fp32, padded, against ours.

`python -m benchmarks.training [--backbone small|gpt2] [--batch N] [--stays N] [--repeats N]`

Both run the same losses on the same synthetic stays. "plain" is the public recipe: the model as it
comes, fp32, every stay padded to 200 hours and every event sequence to the longest of the batch,
the key/value cache that Hugging Face makes by default, Adam. "ours" is what `training pretrain`
does: stays of similar length together, event passes in groups of similar length, no mask where
padding stands on the right, fused AdamW, bf16 on a GPU. "ours, rows frozen" has the event pass of
frozen token rows cached, which is the other reading of the paper (M10). Repeats are interleaved;
medians are shown.

Utilisation is model FLOPs (no padding counted) over the measured peak of a large matrix product in
the precision of the variant.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.models.auto.configuration_auto import AutoConfig

from benchmarks.report import write
from benchmarks.training_stays import (
    N_CODES,
    N_SERIES,
    bucketed_batches,
    lengths,
    padded_batches,
    stays,
)
from llm4ehr.backbone import spec_from_config
from llm4ehr.model import LLM4EHR, ModelConfig
from training.contrast import PatchEncoder, Patches, PretrainStep, pooled_events
from training.dataset import Batch
from training.loop import autocast, device
from training.objectives import ObjectiveConfig, nce_loss, omega_loss, reconstruction_loss

BACKBONES = {
    "small": {
        "model_type": "gpt2", "n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 1024,
        "activation_function": "gelu_pytorch_tanh",
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "gpt2": {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}  # fmt: skip
EPOCHS, MIMIC_STAYS = 5, 28_588  # of the paper's pre-training
OBJECTIVE = ObjectiveConfig()


class Plain(nn.Module):
    """The two passes straight on a Hugging Face model, as the public recipe has them."""

    def __init__(self, config: dict[str, Any], frozen: bool) -> None:
        super().__init__()
        self.backbone = AutoModel.from_config(AutoConfig.for_model(**config))
        hidden = self.backbone.config.hidden_size
        self.encoder = nn.Sequential(
            nn.Linear(N_SERIES, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
        )
        self.tokens = nn.Embedding(N_CODES, hidden)
        self.decoder = nn.Linear(hidden, 11)
        if frozen:
            self.backbone.requires_grad_(False).eval()

    def loss(self, batch: Batch) -> Tensor:
        """NCE + omega + reconstruction over the usable patches of a batch."""
        v = self.backbone(inputs_embeds=self.encoder(batch.series)).last_hidden_state
        z = self.backbone(
            inputs_embeds=self.tokens(batch.token_ids), attention_mask=batch.token_mask.long()
        ).last_hidden_state
        n_patches = v.shape[1] // 5
        patch = torch.arange(v.shape[1], device=v.device) // 5
        in_patch = torch.nn.functional.one_hot(patch, n_patches).to(v.dtype)  # [T, P]
        inside = in_patch * batch.hour_mask[..., None]
        v_BPH = torch.einsum("bth,btp->bph", v, inside) / inside.sum(1).clamp(min=1)[..., None]
        of_token = (batch.token_hours // 5)[..., None] == torch.arange(n_patches, device=v.device)
        weight = (of_token & batch.token_mask[..., None]).to(z.dtype)
        z_BPH = torch.einsum("bnh,bnp->bph", z, weight) / weight.sum(1).clamp(min=1)[..., None]
        usable = (weight.sum(1) > 0) & (inside.sum(1) > 0)
        patches = Patches.of(
            {
                "v": v_BPH, "z": z_BPH, "usable": usable,
                "episode": torch.arange(len(v), device=v.device),
            }
        )  # fmt: skip
        x = batch.series[..., :11]
        return (
            nce_loss(patches.v, patches.z, patches.episode, OBJECTIVE)
            + omega_loss(patches.v, patches.z, patches.episode, OBJECTIVE)
            + reconstruction_loss(x, self.decoder(v), batch.hour_mask, OBJECTIVE)
        )


class _Gradients:
    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def unsynced(self) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass
class Variant:
    """One way to train, and how long its passes over the stays took."""

    name: str
    precision: str
    step: Callable[[Batch], None]
    make: Callable[[Batch], Iterator[Batch]]
    everything: Batch
    seconds: list[float] = field(default_factory=list)
    memory: float | None = None  # of the GPU; a process cannot tell its own parts apart

    def run(self) -> None:
        """One pass over all stays."""
        on = device()
        if on.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        started = time.perf_counter()
        for batch in self.make(self.everything):
            with autocast(self.precision, on):
                self.step(batch.to(on))
        if on.type == "cuda":
            torch.cuda.synchronize()
            self.memory = torch.cuda.max_memory_allocated() / 2**30
        self.seconds.append(time.perf_counter() - started)


def plain(config: dict[str, Any], frozen: bool, everything: Batch, size: int) -> Variant:
    """(a): what the comparison is against."""
    torch.manual_seed(0)
    model = Plain(config, frozen).to(device())
    optimiser = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def step(batch: Batch) -> None:
        optimiser.zero_grad()
        model.loss(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimiser.step()

    return Variant("plain", "fp32", step, lambda b: padded_batches(b, size), everything)


def ours(
    config: dict[str, Any], frozen: bool, everything: Batch, size: int, *, cached: bool = False
) -> Variant:
    """(b): the step of `training pretrain`; `cached` with token rows that do not learn."""
    torch.manual_seed(0)
    spec = spec_from_config(config, frozen=frozen)
    model = LLM4EHR(
        ModelConfig(backbone=spec, n_series=N_SERIES, n_event_channels=0, n_tokens=N_CODES)
    ).to(device())
    name = "ours"
    if cached:
        name = "ours, rows frozen"
        model.tokens.requires_grad_(False)
        with torch.inference_mode(), autocast("auto", device()):
            parts = [
                pooled_events(model, everything.part(slice(i, i + size)).to(device()), 40).float()
                for i in range(0, len(everything.index), size)
            ]
        everything = replace(everything, event_patches=torch.cat(parts).cpu().clone())
    encoder = PatchEncoder(model, OBJECTIVE)
    step_of = PretrainStep(encoder, encoder.queue, OBJECTIVE)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=1e-4, weight_decay=0.0, fused=True)

    def step(batch: Batch) -> None:
        optimiser.zero_grad(set_to_none=True)
        step_of(batch, _Gradients())
        nn.utils.clip_grad_norm_(learning, 2.0)
        optimiser.step()

    return Variant(name, "auto", step, lambda b: bucketed_batches(b, size), everything)


def model_flops(config: dict[str, Any], frozen: bool, everything: Batch, cached: bool) -> float:
    """Floating-point operations that one pass over the stays needs, padding left out.

    Forward 2 and backward 2 for each weight that a token meets, 2 more where the weight learns
    (Kaplan et al. 2020); attention 4 T H a layer and token forward (2 T H causal) and twice that
    backward.
    """
    hidden, layers = config.get("n_embd", 768), config.get("n_layer", 12)
    weights = 12 * layers * hidden**2
    of_token = weights * (4 if frozen else 6)
    total = 0.0
    masks = [everything.hour_mask] if cached else [everything.hour_mask, everything.token_mask]
    for mask in masks:
        n = mask.sum(1).double()
        total += float((n * of_token + 3 * layers * 2 * n * n * hidden).sum())
    return total


def peak_flops(precision: str) -> float:
    """Measured FLOP/s of a large matrix product in the precision that a variant computes in."""
    on = device()
    size = 8192 if on.type == "cuda" else 2048
    a = torch.randn(size, size, device=on)
    best = float("inf")
    with autocast(precision, on), torch.no_grad():
        for _ in range(6):
            started = time.perf_counter()
            (a @ a).sum().item()
            best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", choices=sorted(BACKBONES), default="small")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--stays", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    config, size = BACKBONES[arguments.backbone], arguments.batch
    frozen = arguments.backbone == "gpt2"
    rows = []
    for fixed in (False, True):
        n = arguments.stays if not fixed else max(arguments.stays // 4, size)
        everything = stays(lengths(n, fixed=fixed), max_tokens=1023)
        variants = [plain(config, frozen, everything, size), ours(config, frozen, everything, size)]
        if frozen:
            variants.append(ours(config, frozen, everything, size, cached=True))
        for variant in variants:
            variant.run()  # warms up
            variant.seconds.clear()
        for _ in range(arguments.repeats):
            for variant in variants:
                variant.run()
        tokens = int(everything.hour_mask.sum() + everything.token_mask.sum())
        base = statistics.median(variants[0].seconds)
        for variant in variants:
            seconds = statistics.median(variant.seconds)
            flops = model_flops(config, frozen, everything, "frozen" in variant.name)
            rows.append(
                {
                    "stays": "all of 200 h" if fixed else "mixed lengths",
                    "backbone": arguments.backbone,
                    "variant": variant.name,
                    "batch": size,
                    "seconds": round(seconds, 3),
                    "tokens_per_s": round(tokens / seconds),
                    "episodes_per_s": round(n / seconds, 1),
                    "times_plain": round(base / seconds, 2),
                    "utilisation": round(flops / seconds / peak_flops(variant.precision), 3),
                    "peak_gpu_memory_gib": variant.memory and round(variant.memory, 2),
                    "five_epochs_minutes": round(EPOCHS * MIMIC_STAYS / n * seconds / 60, 1),
                }
            )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    write(f"training_{arguments.backbone}_{'gpu' if gpu != 'cpu' else 'cpu'}", rows)


if __name__ == "__main__":
    main()
