"""The pre-training objective L_NCE + L_omega + L_recon (paper, Eq. 2 to 7).

Every switch is an open question of the paper, numbered M1 to M11 as in docs/model.md. Contrastive
terms work on the usable patches of a batch, flattened in (episode, time) order.

Shape legend: B episodes, P patches, H hidden, T hours, V variables, n usable patches.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
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


def _log_sum(logits: Tensor, candidates: Tensor) -> Tensor:
    return torch.logsumexp(logits.masked_fill(~candidates, -torch.inf), dim=1)


def _candidates(episode: Tensor, scope: Scope, *, include_self: bool) -> Tensor:
    """[n, n] true where column k is a candidate of anchor i."""
    n = episode.shape[0]
    if scope == "episode":
        allowed = episode[:, None] == episode[None, :]
    else:
        allowed = torch.ones(n, n, dtype=torch.bool, device=episode.device)
    return (
        allowed
        if include_self
        else allowed & ~torch.eye(n, dtype=torch.bool, device=allowed.device)
    )


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of every row of a [m, H] with every row of b [n, H], in fp32 or better: [m, n]."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return F.normalize(a.to(dtype), dim=1) @ F.normalize(b.to(dtype), dim=1).T


def nce_loss(v: Tensor, z: Tensor, episode: Tensor, config: ObjectiveConfig) -> Tensor:
    """InfoNCE of series patches v [n, H] against event patches z [n, H] (Eq. 5).

    `episode` [n] numbers the episode of each patch. As printed, the positive is not among the
    candidates of the denominator; an anchor without any candidate is left out.
    """
    logits = cosines(v, z) / config.tau
    include = config.nce_denominator == "include"
    candidates = _candidates(episode, config.nce_scope, include_self=include)
    anchors = candidates.any(dim=1)
    loss = (_log_sum(logits[anchors], candidates[anchors]) - logits.diagonal()[anchors]).sum()
    return loss if config.reduction == "sum" else loss / anchors.sum().clamp(min=1)


def omega_loss(v: Tensor, z: Tensor, episode: Tensor, config: ObjectiveConfig) -> Tensor:
    """Attraction of series patches weighted by the likeness of their events (Eq. 2).

    omega is a softmax over all candidates but the anchor itself; the triangle is taken afterwards,
    so its rows do not sum to one. The self pair stays out of both softmaxes: at tau = 0.02 it would
    swallow everything else.
    """
    n = v.shape[0]
    candidates = _candidates(episode, config.omega_scope, include_self=False)
    triangle = {
        "lower": lambda m: m.tril(-1),
        "full": lambda m: m,
        "upper": lambda m: m.triu(1),
    }[config.omega_mask](candidates)
    # Anchors without candidates go first: the log-sum of an empty set has no gradient.
    anchors = candidates.any(dim=1)
    candidates, triangle = candidates[anchors], triangle[anchors]
    event_cosines = cosines(z[anchors], z)
    if config.omega_grad == "stop":
        event_cosines = event_cosines.detach()
    log_omega = event_cosines - _log_sum(event_cosines, candidates)[:, None]
    logits = cosines(v[anchors], v) / config.tau
    log_q = logits - _log_sum(logits, candidates)[:, None]
    loss = -(log_omega[triangle].exp() * log_q[triangle]).sum()
    if config.reduction == "sum":
        return loss
    denominator = n * n if config.reduction == "pair_mean" else int(anchors.sum())
    return loss / max(denominator, 1)


def reconstruction_loss(
    x: Tensor, x_hat: Tensor, hour_mask: Tensor, config: ObjectiveConfig
) -> Tensor:
    """Reconstruction of x [B, T, V] from x_hat [B, T, V], decoded at every hour (Eq. 6, 7).

    `next_step_sum`: hour t is compared with what was decoded at t - 1, squared norm over the
    variables, mean over the valid hours of the episode, mean over episodes. `same_step_mean` is the
    published code: same hour, mean over everything, at most 10.
    """
    if config.pad_hours == "keep":
        hour_mask = torch.ones_like(hour_mask)
    if config.recon == "same_step_mean":
        return (x - x_hat).square()[hour_mask].mean().clamp(max=10)
    pair = hour_mask[:, 1:] & hour_mask[:, :-1]
    per_hour = (x[:, 1:] - x_hat[:, :-1]).square().sum(-1) * pair
    hours = hour_mask.sum(1)
    return (per_hour.sum(1) / hours.clamp(min=1)).sum() / (hours > 0).sum().clamp(min=1)


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
