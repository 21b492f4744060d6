"""The pre-training objective L_NCE + L_omega + L_recon (paper, Eq. 2 to 7).

Every switch is an open question of the paper, numbered M1 to M11 as in docs/model.md. Contrastive
terms work on the usable patches of a batch, flattened in (episode, time) order.

Shape legend: B episodes, P patches, H hidden, T hours, V variables, n usable patches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, model_validator
from torch import Tensor
from torch.nn import functional as F

Scope = Literal["batch", "episode"]


class ObjectiveConfig(BaseModel):
    """Weights and switches of the objective; docs/model.md argues for the defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lambda_nce: float = 1.0
    lambda_omega: float = 1.0
    lambda_recon: float = 1.0
    tau: float = 0.02
    nce_denominator: Literal["exclude", "include"] = "exclude"  # M1
    nce_scope: Scope = "batch"  # M2
    omega_scope: Scope = "episode"  # M3
    omega_mask: Literal["lower", "full", "upper"] = "lower"  # M4
    omega_grad: Literal["stop", "flow"] = "stop"  # M5
    reduction: Literal["anchor_mean", "sum", "pair_mean"] = "anchor_mean"  # M6
    recon: Literal["next_step_sum", "same_step_mean"] = "next_step_sum"  # M9
    pad_hours: Literal["mask", "keep"] = "mask"  # M11
    # The published code normalises over all patches of the batch, usable or not, itself included.
    unusable_patches: Literal["drop", "keep"] = "drop"
    # Event patches of earlier batches kept as further candidates of InfoNCE (as in MoCo).
    queue_patches: NonNegativeInt = 0

    @model_validator(mode="after")
    def _queue_has_a_use(self) -> Self:
        if self.queue_patches and (self.nce_scope == "episode" or self.unusable_patches == "keep"):
            raise ValueError(
                "queue_patches: patches of other stays are no candidates with nce_scope: episode, "
                "nor with unusable_patches: keep"
            )
        return self

    @property
    def shared(self) -> bool:
        """Whether parts of a batch have shares of the loss that add up to that of the batch."""
        return self.unusable_patches == "drop" and self.recon == "next_step_sum"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """All patches that anchors are compared with, in the order of the batch.

    `first` is where the anchors' own patches begin: with several processes each has its anchors in
    the pool of all. `queue_z` [Q, H] are event patches of earlier batches, candidates of InfoNCE in
    batch scope alone, and never for a patch of the same stay (`queue_episode` [Q]).
    """

    v: Tensor  # [m, H]
    z: Tensor  # [m, H]
    episode: Tensor  # [m]
    first: int = 0
    queue_z: Tensor | None = None
    queue_episode: Tensor | None = None


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of every row of a [m, H] with every row of b [n, H], in fp32 or better: [m, n]."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):  # it would do the product in bf16
        return F.normalize(a.to(dtype), dim=1) @ F.normalize(b.to(dtype), dim=1).T


def _log_sum(logits: Tensor, candidates: Tensor) -> Tensor:
    """Log-sum over the candidates; over everything where there are none, which keeps the gradient
    finite for rows that the caller leaves out."""
    allowed = candidates | ~candidates.any(dim=1, keepdim=True)
    return torch.logsumexp(logits.masked_fill(~allowed, -torch.inf), dim=1)


def _candidates(episode: Tensor, pool: Pool, scope: Scope) -> Tensor:
    """[n, m] true where column k of the pool is a candidate of anchor i, itself left out."""
    own = pool.first + torch.arange(len(episode), device=episode.device)
    others = torch.arange(len(pool.episode), device=episode.device) != own[:, None]
    return others & (episode[:, None] == pool.episode) if scope == "episode" else others


def _queue_candidates(episode: Tensor, pool: Pool, scope: Scope) -> Tensor:
    """[n, Q] true where a patch of the queue is a candidate of anchor i."""
    if pool.queue_episode is None or scope == "episode":
        return episode.new_zeros(len(episode), 0, dtype=torch.bool)
    return episode[:, None] != pool.queue_episode


def _n_anchors(pool: Pool, scope: Scope) -> Tensor:
    """How many patches of the whole pool have a candidate besides themselves."""
    _, stay, size = pool.episode.unique(return_inverse=True, return_counts=True)
    if scope == "episode":
        return (size[stay] > 1).sum()
    queued = _queue_candidates(pool.episode, pool, scope).any(dim=1)
    return (queued | (len(stay) > 1)).sum()


def nce_loss(
    v: Tensor, z: Tensor, episode: Tensor, config: ObjectiveConfig, pool: Pool | None = None
) -> Tensor:
    """InfoNCE of series patches v [n, H] against event patches z [n, H] (Eq. 5).

    `episode` [n] numbers the episode of each patch. As printed, the positive is not among the
    candidates of the denominator; an anchor without any candidate is left out. With a `pool` the
    anchors' share of the loss of the whole pool.
    """
    pool = pool or Pool(v=v, z=z, episode=episode)
    queue = pool.queue_z if pool.queue_z is not None and config.nce_scope == "batch" else None
    keys = pool.z if queue is None else torch.cat([pool.z, queue.to(pool.z.dtype)])
    logits = cosines(v, keys) / config.tau
    place = torch.arange(len(v), device=v.device)
    candidates = _candidates(episode, pool, config.nce_scope)
    if config.nce_denominator == "include":
        candidates[place, pool.first + place] = True
    candidates = torch.cat([candidates, _queue_candidates(episode, pool, config.nce_scope)], dim=1)
    anchors = candidates.any(dim=1)
    loss = ((_log_sum(logits, candidates) - logits[place, pool.first + place]) * anchors).sum()
    if config.reduction == "sum":
        return loss
    include = config.nce_denominator == "include"
    n = len(pool.v) if include else _n_anchors(pool, config.nce_scope)
    return loss / torch.as_tensor(n).clamp(min=1)


def omega_loss(
    v: Tensor, z: Tensor, episode: Tensor, config: ObjectiveConfig, pool: Pool | None = None
) -> Tensor:
    """Attraction of series patches weighted by the likeness of their events (Eq. 2).

    omega is a softmax over all candidates but the anchor itself; the triangle is taken afterwards,
    so its rows do not sum to one. The self pair stays out of both softmaxes: at tau = 0.02 it would
    swallow everything else. `pool` as in `nce_loss`.
    """
    pool = pool or Pool(v=v, z=z, episode=episode)
    candidates = _candidates(episode, pool, config.omega_scope)
    column = torch.arange(len(pool.v), device=v.device)
    place = pool.first + torch.arange(len(v), device=v.device)[:, None]
    pairs = {"lower": column < place, "full": column != place, "upper": column > place}
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.omega_grad == "flow"):
        event_cosines = cosines(z, pool.z)
        log_omega = event_cosines - _log_sum(event_cosines, candidates)[:, None]
    logits = cosines(v, pool.v) / config.tau
    log_q = logits - _log_sum(logits, candidates)[:, None]
    loss = -(log_omega.exp() * log_q * (candidates & pairs[config.omega_mask])).sum()
    if config.reduction == "sum":
        return loss
    if config.reduction == "pair_mean":
        return loss / max(len(pool.v) ** 2, 1)
    return loss / _n_anchors(
        replace(pool, queue_z=None, queue_episode=None), config.omega_scope
    ).clamp(min=1)


def reconstruction_sum(
    x: Tensor, x_hat: Tensor, hour_mask: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """Error of the next hour (Eq. 6, 7), added up over the stays, and the number of stays.

    Hour t is compared with what was decoded at t - 1: squared norm over the variables, mean over
    the valid hours of the stay.
    """
    if config.pad_hours == "keep":
        hour_mask = torch.ones_like(hour_mask)
    pair = hour_mask[:, 1:] & hour_mask[:, :-1]
    per_hour = (x[:, 1:] - x_hat[:, :-1]).square().sum(-1) * pair
    hours = hour_mask.sum(1)
    return (per_hour.sum(1) / hours.clamp(min=1)).sum(), (hours > 0).sum()


def reconstruction_loss(
    x: Tensor, x_hat: Tensor, hour_mask: Tensor, config: ObjectiveConfig
) -> Tensor:
    """Reconstruction of x [B, T, V] from x_hat [B, T, V], decoded at every hour (Eq. 6, 7).

    `next_step_sum`: hour t is compared with what was decoded at t - 1, squared norm over the
    variables, mean over the valid hours of the episode, mean over episodes. `same_step_mean` is the
    published code: same hour, mean over everything, at most 10.
    """
    if config.recon == "same_step_mean":
        there = torch.ones_like(hour_mask) if config.pad_hours == "keep" else hour_mask
        return (x - x_hat).square()[there].mean().clamp(max=10)
    error, stays = reconstruction_sum(x, x_hat, hour_mask, config)
    return error / stays.clamp(min=1)


def public_code_terms(
    v: Tensor, z: Tensor, usable: Tensor, tau: float, *, triangular: bool = False
) -> tuple[Tensor, Tensor]:
    """NCE and omega as the published code computes them, for v, z [B, P, H] and usable [B, P].

    All B P patches stand in both softmaxes, the anchor included; a masked cosine becomes 0, not
    minus infinity, and so keeps the weight exp(0).
    """
    episode = torch.arange(v.shape[0], device=v.device).repeat_interleave(v.shape[1])
    v, z, ok = v.flatten(0, 1), z.flatten(0, 1), usable.flatten()
    logits = cosines(v, z) / tau
    nce = (torch.logsumexp(logits, 1) - logits.diagonal())[ok].mean()
    pairs = ok[:, None] & ok[None, :]
    if triangular:
        pairs = pairs.tril()
    same = episode[:, None] == episode[None, :]
    weights = cosines(z, z).masked_fill(~(pairs & same), 0).softmax(1)
    omega = -(weights * (cosines(v, v) / tau).log_softmax(1)).sum() / pairs.sum()
    return nce, omega


def contrastive_terms(
    v: Tensor, z: Tensor, usable: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """NCE and omega of patches v, z [B, P, H] with `usable` [B, P]; 0 when none is usable."""
    if not usable.any():
        return v.sum() * 0, v.sum() * 0
    if config.unusable_patches == "keep":
        return public_code_terms(v, z, usable, config.tau, triangular=config.omega_mask != "full")
    episode = torch.arange(v.shape[0], device=v.device)[:, None].expand(usable.shape)[usable]
    v, z = v[usable], z[usable]
    return nce_loss(v, z, episode, config), omega_loss(v, z, episode, config)
