"""One step of pre-training: the losses of a whole batch, however it is held in memory.

A batch may be spread over processes (each computes its share of the loss, see
`training.processes`), and each part may be encoded in chunks of few stays whose activations alone
are held at a time. For that the patches are computed twice (Gao et al. 2021, gradient caching):
first without a graph, to get the gradient of the loss with respect to every patch, then chunk by
chunk with one, to carry that gradient into the weights. A queue adds patches of earlier batches to
the candidates of InfoNCE (He et al. 2020, without their momentum encoder).

Shape legend: B stays, P patches, H hidden, n usable patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from llm4ehr.model import LLM4EHR, patch_counts
from training.dataset import Batch, token_groups
from training.objectives import (
    ObjectiveConfig,
    Pool,
    contrastive_terms,
    nce_loss,
    omega_loss,
    reconstruction_loss,
    reconstruction_sum,
)
from training.processes import gather_rows, n_processes, total


class Gradients(Protocol):
    """How a step hands its loss on; `training.loop.Trainer` is one."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's share of the loss."""
        ...

    def unsynced(self) -> AbstractContextManager[None]:
        """Inside, gradients are added up here without being exchanged between processes."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """Usable patches in (stay, time) order; `episode` numbers the stays as the feature set does."""

    v: Tensor  # [n, H]
    z: Tensor  # [n, H]
    episode: Tensor  # [n]

    @classmethod
    def of(cls, encoded: dict[str, Tensor]) -> Patches:
        """From what `PatchEncoder` gives."""
        usable = encoded["usable"]
        episode = encoded["episode"][:, None].expand(usable.shape)
        return cls(v=encoded["v"][usable], z=encoded["z"][usable], episode=episode[usable])


class PatchEncoder(nn.Module):
    """What is computed stay by stay: pooled patches of both passes and the reconstruction."""

    def __init__(self, model: LLM4EHR, config: ObjectiveConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.queue = PatchQueue(config.queue_patches, model.backbone.hidden_size)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`x_hat` [B, T, V] and, with a contrastive term, `v`, `z` [B, P, H], `usable` [B, P] and
        `episode` [B].

        Where `batch.hide_events` the series pass must do without the fused events.
        """
        model, config = self.model, self.config
        events = batch.events
        if events is not None:
            events = events * ~batch.hide_events[:, None, None]
        v = model.encode_hours(batch.series, events, batch.hour_mask)
        encoded = {"x_hat": model.reconstruct(v)}
        if not (config.lambda_nce or config.lambda_omega):
            return encoded
        mask = batch.hour_mask if config.pad_hours == "mask" else torch.ones_like(batch.hour_mask)
        v_BPH = model.pool_hours(v, mask)
        n_patches = v_BPH.shape[1]
        if batch.event_patches is not None:
            z_BPH = batch.event_patches[:, :n_patches]
        else:
            z_BPH = pooled_events(model, batch, n_patches)
        return encoded | {
            "v": v_BPH,
            "z": z_BPH,
            "usable": usable_patches(model, batch, n_patches),
            "episode": torch.from_numpy(batch.index).to(v.device),
        }


def pooled_events(model: LLM4EHR, batch: Batch, n_patches: int) -> Tensor:
    """The EHR pass, pooled into `n_patches` patches: [B, P, H]."""
    parts, order = [], []
    for rows, width in token_groups(batch.token_mask):
        mask = batch.token_mask[rows, :width]
        z = model.encode_events(batch.token_ids[rows, :width], mask)
        parts.append(model.pool_events(z, batch.token_hours[rows, :width], mask, n_patches))
        order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]


def usable_patches(model: LLM4EHR, batch: Batch, n_patches: int) -> Tensor:
    """[B, P] true where a patch has an event token and an hour inside the stay."""
    hours = model.config.patch_hours
    patch = torch.arange(batch.hour_mask.shape[1], device=batch.hour_mask.device) // hours
    with_hours = patch_counts(patch.expand(batch.hour_mask.shape), batch.hour_mask, n_patches) > 0
    with_tokens = patch_counts(batch.token_hours // hours, batch.token_mask, n_patches) > 0
    return with_hours & with_tokens


class PatchQueue(nn.Module):
    """The newest event patches of earlier batches, oldest overwritten first. Part of checkpoints.

    With frozen token rows they are what they would be today. While the rows learn, they lag behind
    by as many steps as the queue reaches back.
    """

    rows: Tensor  # [Q, H]
    episode: Tensor  # [Q], -1 where nothing is yet
    cursor: Tensor  # []

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, hidden))
        self.register_buffer("episode", torch.full((size,), -1))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.long))

    def filled(self) -> tuple[Tensor, Tensor] | None:
        """Patches [q, H] and their stays [q]; None as long as there are none."""
        there = self.episode >= 0
        return (self.rows[there], self.episode[there]) if there.any() else None

    @torch.no_grad()
    def push(self, z: Tensor, episode: Tensor) -> None:
        """Add patches [n, H] of the stays `episode` [n]."""
        size = len(self.rows)
        z, episode = z[-size:], episode[-size:]
        place = (self.cursor + torch.arange(len(z), device=z.device)) % max(size, 1)
        self.rows[place] = z.to(self.rows.dtype)
        self.episode[place] = episode
        self.cursor.copy_((self.cursor + len(z)) % max(size, 1))


class PretrainStep:
    """Losses and gradients of one batch.

    `encoder` is a `PatchEncoder`, possibly wrapped for several processes; `queue` is its queue.
    Raises ValueError for an objective whose parts have no shares (published code), or a norm over
    the batch, where the batch is in parts.
    """

    def __init__(
        self,
        encoder: nn.Module,
        queue: PatchQueue,
        config: ObjectiveConfig,
        chunk_episodes: int | None = None,
    ) -> None:
        across_stays = (
            not config.shared
            or config.pad_hours == "keep"  # up to the longest stay of the batch
            or any(isinstance(module, nn.BatchNorm1d) for module in encoder.modules())
        )
        if across_stays and (chunk_episodes or n_processes() > 1):
            raise ValueError(
                "unusable_patches: keep, recon: same_step_mean, pad_hours: keep and ts_norm: batch "
                "look at the whole batch at once: use one process and no chunk_episodes"
            )
        self.encoder = encoder
        self.queue = queue
        self.config = config
        self.chunk_episodes = chunk_episodes

    def __call__(self, batch: Batch, gradients: Gradients) -> dict[str, Tensor]:
        """The terms of the whole batch and their weighted sum "loss"; adds the gradients."""
        if self.chunk_episodes is not None and self.chunk_episodes < len(batch.index):
            terms = self._in_chunks(batch, gradients)
        else:
            terms = self._at_once(batch, gradients)
        terms = {name: total(term) for name, term in terms.items()}
        return {"loss": self._weighted(terms).detach()} | terms

    def _at_once(self, batch: Batch, gradients: Gradients) -> dict[str, Tensor]:
        encoded = self.encoder(batch)
        if self.config.shared:
            terms = self._contrastive(Patches.of(encoded)) if "v" in encoded else {}
            terms["recon"] = self._reconstruction(batch, encoded, _stays(batch))
        else:
            terms = self._published(batch, encoded)
        gradients.backward(self._weighted(terms))
        return terms

    def _published(self, batch: Batch, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
        """Terms without shares, of the whole batch in one piece."""
        terms: dict[str, Tensor] = {}
        if "v" in encoded:
            terms["nce"], terms["omega"] = contrastive_terms(
                encoded["v"], encoded["z"], encoded["usable"], self.config
            )
        x = batch.series[..., : encoded["x_hat"].shape[-1]]
        x_hat = encoded["x_hat"].to(x.dtype)
        terms["recon"] = reconstruction_loss(x, x_hat, batch.hour_mask, self.config)
        return terms

    def _in_chunks(self, batch: Batch, gradients: Gradients) -> dict[str, Tensor]:
        chunks = list(_chunks(batch, self.chunk_episodes or len(batch.index)))
        random, stays = [], _stays(batch)
        parts: list[Patches] = []
        with torch.no_grad():
            for chunk in chunks:
                # The second pass over a chunk must drop the same units as the first.
                random.append(_random_state(batch.series.device))
                parts += [Patches.of(e) for e in (self.encoder(chunk),) if "v" in e]
        cached, terms = self._cached_gradients(parts) if parts else ([None] * len(chunks), {})
        recon = batch.series.new_zeros(())
        for i, chunk in enumerate(chunks):
            _set_random_state(random[i], batch.series.device)
            last = i == len(chunks) - 1
            with nullcontext() if last else gradients.unsynced():
                recon += self._carry(chunk, cached[i], stays, gradients)
        return terms | {"recon": recon}

    def _cached_gradients(
        self, parts: Sequence[Patches]
    ) -> tuple[Sequence[Patches | None], dict[str, Tensor]]:
        """Patches with the gradients of the contrastive terms at them, and the terms."""
        leaves = [
            Patches(v=part.v.requires_grad_(), z=part.z.requires_grad_(), episode=part.episode)
            for part in parts
        ]
        terms = self._contrastive(
            Patches(
                v=torch.cat([leaf.v for leaf in leaves]),
                z=torch.cat([leaf.z for leaf in leaves]),
                episode=torch.cat([leaf.episode for leaf in leaves]),
            )
        )
        self._weighted(terms).backward()
        return leaves, terms

    def _carry(
        self, chunk: Batch, cached: Patches | None, stays: Tensor, gradients: Gradients
    ) -> Tensor:
        """Encode a chunk again and carry the cached gradients of its patches into the weights."""
        encoded = self.encoder(chunk)
        recon = self._reconstruction(chunk, encoded, stays)
        loss = self.config.lambda_recon * recon
        if cached is not None:
            again = Patches.of(encoded)
            for patches, gradient in ((again.v, cached.v.grad), (again.z, cached.z.grad)):
                if gradient is not None and patches.requires_grad:
                    loss = loss + (patches * gradient).sum()
        gradients.backward(loss)
        return recon.detach()

    def _contrastive(self, own: Patches) -> dict[str, Tensor]:
        """This process's shares of the contrastive terms of the whole batch."""
        v, first = gather_rows(own.v)
        z, _ = gather_rows(own.z)
        episode, _ = gather_rows(own.episode)
        queued = self.queue.filled()
        pool = Pool(
            v=v,
            z=z,
            episode=episode,
            first=first,
            queue_z=queued[0] if queued else None,
            queue_episode=queued[1] if queued else None,
        )
        terms = {
            "nce": nce_loss(own.v, own.z, own.episode, self.config, pool),
            "omega": omega_loss(own.v, own.z, own.episode, self.config, pool),
        }
        if len(self.queue.rows):
            self.queue.push(z, episode)
        return terms

    def _reconstruction(self, part: Batch, encoded: dict[str, Tensor], stays: Tensor) -> Tensor:
        """The share of some stays of the reconstruction term of the whole batch."""
        x = part.series[..., : encoded["x_hat"].shape[-1]]
        x_hat = encoded["x_hat"].to(x.dtype)
        error, _ = reconstruction_sum(x, x_hat, part.hour_mask, self.config)
        return error / stays.clamp(min=1)

    def _weighted(self, terms: dict[str, Tensor]) -> Tensor:
        weights = {
            "nce": self.config.lambda_nce,
            "omega": self.config.lambda_omega,
            "recon": self.config.lambda_recon,
        }
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def _stays(batch: Batch) -> Tensor:
    """Number of stays with an hour, of the batch of all processes."""
    return total(batch.hour_mask.any(1).sum())


def _chunks(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(batch.index), size):
        yield batch.part(slice(start, start + size))


def _random_state(on: torch.device) -> tuple[Tensor, Tensor | None]:
    gpu = torch.cuda.get_rng_state(on) if on.type == "cuda" else None
    return torch.get_rng_state(), gpu


def _set_random_state(state: tuple[Tensor, Tensor | None], on: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], on)
