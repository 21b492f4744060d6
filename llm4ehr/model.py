"""The LLM4EHR network: architecture only.

Two passes share one backbone. The series pass turns hours into hidden states v, from which heads
and decoder read; the EHR pass turns event tokens into hidden states z and serves pre-training. With
`events="fused"` what is known of the events at an hour is also embedded and added to that hour's
token, so that heads can use labs and drugs in one causal stream. With `events="stream"` heads read
the EHR pass beside the series pass: the state of an hour is v and the z of its latest token.

Shape legend: B episodes, T hours, N tokens, P patches, H hidden, S series features, E event
channels, V variables.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from llm4ehr.adapters import add_adapters
from llm4ehr.backbone import Backbone, BackboneSpec
from llm4ehr.prompts import PromptSpec, SuffixPrompt, make_prompt

Task = Literal["decompensation", "mortality", "remaining_los", "phenotyping"]
TASKS: tuple[Task, ...] = ("decompensation", "mortality", "remaining_los", "phenotyping")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything needed to rebuild the network.

    `ts_norm` (M8), `patch_head` (M7) and `head` (M15) are the paper's open choices, and so is
    `event_window` (M20): how many event tokens are read at once, None for the whole context.
    `heads` maps a task to its number of outputs. Raises ValueError for an odd window.
    """

    backbone: BackboneSpec
    n_series: int
    n_event_channels: int
    n_tokens: int
    n_variables: int = 11
    events: Literal["none", "fused", "stream"] = "none"
    event_window: int | None = None
    ts_norm: Literal["layer", "batch", "none"] = "layer"
    patch_hours: int = 5
    patch_head: Literal["none", "tanh", "ehr_linear_tanh"] = "none"
    head: Literal["linear", "mlp"] = "linear"
    begin_token: bool = False
    adapter: int | None = None  # width of the bottlenecks in the backbone
    prompt: PromptSpec | None = None  # M18
    heads: dict[Task, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.event_window is not None and (self.event_window < 2 or self.event_window % 2):
            raise ValueError(
                f"event_window {self.event_window}: chunks overlap by half of it, so it must be an "
                "even number of tokens"
            )

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_json`. Raises TypeError on unknown or missing keys."""
        backbone, prompt = BackboneSpec(**body["backbone"]), body.get("prompt")
        return cls(
            **body | {"backbone": backbone, "prompt": PromptSpec(**prompt) if prompt else None}
        )


class SeriesEncoder(nn.Module):
    """Hour by hour, S -> H: linear, ReLU, linear; the event embedding joins before the norm."""

    def __init__(self, config: ModelConfig, hidden: int) -> None:
        super().__init__()
        self.series = _two_layers(config.n_series, hidden)
        self.events = (
            _two_layers(config.n_event_channels, hidden) if config.events == "fused" else None
        )
        self.norm = _norm(config.ts_norm, hidden)

    def forward(self, series: Tensor, events: Tensor | None) -> Tensor:
        """`series` [..., S] and `events` [..., E] -> tokens [..., H]."""
        token = self.series(series)
        if self.events is not None and events is not None:
            token = token + self.events(events)
        # BatchNorm1d wants [rows, H]; the other norms do not mind.
        normed: Tensor = self.norm(token.reshape(-1, token.shape[-1]))
        return normed.view(token.shape)


class LLM4EHR(nn.Module):
    """Encoder, decoder and heads. Build it from a config; load weights with `llm4ehr.bundle`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone)
        hidden = self.backbone.hidden_size
        if (config.event_window or 0) + config.begin_token > self.backbone.context_length:
            raise ValueError(
                f"event_window {config.event_window} is longer than the context of the backbone, "
                f"{self.backbone.context_length - config.begin_token} event tokens"
            )
        self.series_encoder = SeriesEncoder(config, hidden)
        # The clinical tokens are a table of their own: the backbone's words stay untouched by any
        # optimiser, weight decay included, and checkpoints stay small.
        self.tokens = nn.Embedding(config.n_tokens, hidden)
        nn.init.normal_(self.tokens.weight, std=0.02)
        begin = torch.zeros(1 if config.begin_token else 0, hidden)
        self.begin: Tensor
        self.register_buffer("begin", begin)
        self.decoder = nn.Linear(hidden, config.n_variables)
        self.series_patch = nn.Identity() if config.patch_head == "none" else nn.Tanh()
        self.event_patch = (
            nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh())
            if config.patch_head == "ehr_linear_tanh"
            else self.series_patch
        )
        self.heads = nn.ModuleDict(
            {
                task: _head(config.head, self.state_size, hidden, n)
                for task, n in config.heads.items()
            }
        )
        # Last, so that the same seed draws the same weights for everything else.
        if config.adapter is not None:
            add_adapters(self.backbone, config.adapter)
        self.prompt = make_prompt(config.prompt, self.backbone) if config.prompt else None

    @property
    def state_size(self) -> int:
        """Width of the states that heads read: H, or 2 H with `events="stream"`."""
        return self.backbone.hidden_size * (2 if self.config.events == "stream" else 1)

    def encode_stay(
        self,
        series: Tensor,
        events: Tensor | None,
        hour_mask: Tensor,
        token_ids: Tensor,
        token_hours: Tensor,
        token_mask: Tensor,
    ) -> Tensor:
        """What heads read: states [B, T, state_size] of `series` [B, T, S] and `events` [B, T, E].

        v_t alone, or with `events="stream"` v_t and s_t: z of the last token whose hour is at most
        t, zeros before the first. Tokens [B, N], N > 0, stand in time order; without a stream they
        are not looked at. A causal backbone makes the state of hour t independent of what is later.
        """
        v = self.encode_hours(series, events, hour_mask)
        if self.config.events != "stream":
            return v
        z = self.encode_events(token_ids, token_mask)
        last = _last_tokens(token_hours, token_mask, series.shape[1])[..., None]
        s = z.gather(1, last.clamp(min=0).expand(-1, -1, z.shape[2]))
        return torch.cat([v, s.masked_fill(last < 0, 0)], dim=-1)

    def encode_hours(
        self,
        series: Tensor,
        events: Tensor | None,
        hour_mask: Tensor | None,
        hours: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Series pass: v [B, T, H].

        `series` [B, T, S]; `events` [B, T, E], ignored without fusion; `hour_mask` [B, T] is true
        inside the stay; `hours` [B, T] are positions, by default 0..T-1. `cache` is the engine's,
        a prompt already in it. Without `hours` stays begin at the first row, and v after their end
        is void. Raises ValueError for more than `max_hours`.
        """
        right_padded = hours is None
        if hours is None:
            hours = self._hours(series)
        token = self.series_encoder(series, events)
        if self.prompt is None:
            hidden: Tensor = self.backbone(
                token, hour_mask, hours, cache, right_padded=right_padded
            )
        elif cache is not None:  # the prompt is in it
            hidden = self.backbone(token, hour_mask, hours + self.prompt.shift, cache)
        else:
            if hour_mask is None:
                hour_mask = torch.ones_like(hours, dtype=torch.bool)
            hidden = self.prompt(self.backbone, token, hour_mask, hours, right_padded)
        return hidden

    def encode_with_suffix(
        self, series: Tensor, events: Tensor | None, hour_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `encode_hours`, with the mean state over the suffix prompt: v [B, T, H] and [B, H].

        A stay is read out from the latter. Raises ValueError without a suffix prompt, and for more
        than `max_hours`.
        """
        if not isinstance(self.prompt, SuffixPrompt):
            raise ValueError("this network has no suffix prompt")
        token = self.series_encoder(series, events)
        hours = self._hours(series)
        return self.prompt.with_summary(self.backbone, token, hour_mask, hours, True)

    def _hours(self, series: Tensor) -> Tensor:
        n_hours = series.shape[1]
        if n_hours > self.max_hours:
            raise ValueError(
                f"{n_hours} hours are more than the {self.max_hours} that the positions of the "
                "backbone leave room for"
            )
        return torch.arange(n_hours, device=series.device).expand(series.shape[:2])

    def encode_events(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """EHR pass: z [B, N, H] of `token_ids` [B, N]; positions are token order, not time.

        Padding, false in `token_mask`, stands on the right; its rows of z are void.
        A sequence longer than `event_window` W is read in chunks of W that overlap by half: token i
        is taken from the chunk that starts at max(0, (i // h - 1) h), h = W / 2. So it sees all
        tokens up to itself or the last h + 1 to W of them, and does not change when more follow.
        """
        window, n_tokens = self.config.event_window, token_ids.shape[1]
        if window is None or n_tokens <= window:
            return self._encode_chunks(token_ids, token_mask)
        half = window // 2
        n_chunks = -(-n_tokens // half) - 1
        after = (0, (n_chunks + 1) * half - n_tokens)
        ids_BCW = nn.functional.pad(token_ids, after).unfold(1, window, half)
        mask_BCW = nn.functional.pad(token_mask, after).unfold(1, window, half)
        # A chunk serves its second half, and the first one its first half too.
        needed = mask_BCW[..., half:].any(-1)
        needed[:, 0] = True
        z = self._encode_chunks(ids_BCW[needed], mask_BCW[needed])
        z_BCWH = z.new_zeros(*ids_BCW.shape, z.shape[-1])
        z_BCWH[needed] = z
        served = torch.cat([z_BCWH[:, 0, :half], z_BCWH[:, :, half:].flatten(1, 2)], dim=1)
        return served[:, :n_tokens]

    def _encode_chunks(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        embeds = self.tokens(token_ids)
        n_begin = self.begin.shape[0]
        if n_begin:
            begin = self.begin.expand(embeds.shape[0], n_begin, -1)
            embeds = torch.cat([begin, embeds], dim=1)
            token_mask = nn.functional.pad(token_mask, (n_begin, 0), value=True)
        positions = torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[:2])
        z: Tensor = self.backbone(embeds, token_mask, positions, right_padded=True)
        return z[:, n_begin:]

    @property
    def max_hours(self) -> int:
        """Longest stay of the series pass: what the prompt leaves of the backbone's positions."""
        return self.backbone.context_length - (self.prompt.n_positions if self.prompt else 0)

    @property
    def max_tokens(self) -> int:
        """Longest event sequence of the EHR pass; with an `event_window` there is no limit."""
        if self.config.event_window is not None:
            return sys.maxsize
        return self.backbone.context_length - self.begin.shape[0]

    def reconstruct(self, v: Tensor) -> Tensor:
        """Decode v [..., H] into normalised variables [..., V]."""
        x: Tensor = self.decoder(v)
        return x

    def predict(self, states: Tensor) -> dict[Task, Tensor]:
        """Raw head outputs for states [..., state_size]: task -> [..., n]."""
        return {task: self.heads[task](states) for task in self.config.heads}

    def pool_hours(self, v: Tensor, hour_mask: Tensor) -> Tensor:
        """Mean of v over the hours of each patch that are inside the stay: v' [B, P, H] (Eq. 1)."""
        patch = torch.arange(v.shape[1], device=v.device) // self.config.patch_hours
        patches: Tensor = self.series_patch(_mean_by_patch(v, patch.expand(v.shape[:2]), hour_mask))
        return patches

    def pool_events(self, z: Tensor, token_hours: Tensor, token_mask: Tensor, n: int) -> Tensor:
        """Mean of z over the tokens whose hour falls into each of `n` patches: z' [B, n, H]."""
        patch = token_hours // self.config.patch_hours
        patches: Tensor = self.event_patch(_mean_by_patch(z, patch, token_mask, n))
        return patches


def patch_counts(index: Tensor, mask: Tensor, n: int) -> Tensor:
    """Number of true entries of `mask` [B, K] in each of `n` patches, by `index` [B, K]: [B, n]."""
    counts = torch.zeros(mask.shape[0], n, device=mask.device)
    return counts.scatter_add_(1, index.clamp(0, n - 1), mask.float())


def _mean_by_patch(x: Tensor, patch: Tensor, mask: Tensor, n: int | None = None) -> Tensor:
    n = int(patch.max()) + 1 if n is None else n
    mask = mask & (patch >= 0) & (patch < n)
    index = patch.clamp(0, n - 1)
    total = x.new_zeros(x.shape[0], n, x.shape[2])
    total = total.scatter_add(1, index[..., None].expand_as(x), x * mask[..., None])
    return total / patch_counts(index, mask, n).clamp(min=1)[..., None].to(x.dtype)


def _last_tokens(token_hours: Tensor, token_mask: Tensor, n_hours: int) -> Tensor:
    """[B, T] place of the last true token whose hour is at most t; -1 where there is none yet."""
    there = token_mask & (token_hours >= 0) & (token_hours < n_hours)
    place = torch.arange(token_hours.shape[1], device=token_hours.device)
    place = torch.where(there, place, -1)
    last = place.new_full((token_hours.shape[0], n_hours), -1)
    last = last.scatter_reduce(1, token_hours.clamp(0, n_hours - 1), place, "amax")
    return last.cummax(dim=1).values


def _two_layers(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, n_out), nn.ReLU(), nn.Linear(n_out, n_out))


def _norm(kind: Literal["layer", "batch", "none"], hidden: int) -> nn.Module:
    if kind == "layer":
        return nn.LayerNorm(hidden)
    return nn.BatchNorm1d(hidden) if kind == "batch" else nn.Identity()


def _head(kind: Literal["linear", "mlp"], n_in: int, hidden: int, n_out: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(n_in, n_out)
    return nn.Sequential(nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, n_out))
