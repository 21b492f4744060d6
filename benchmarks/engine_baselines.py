"""Other ways to compute the next hour of many stays, in plain PyTorch and Hugging Face.

Each holds what it needs of `context` hours and answers `tick` with the outputs of one hour more,
without keeping that hour: it can be asked again. All stays are at the same hour, which spares the
alternatives the padding that they need in service.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from llm4ehr.bundle import Network

Rows = NDArray[np.float32]


class Reference:
    """The network on a device, called the way Hugging Face models are."""

    def __init__(self, network: Network, device: torch.device) -> None:
        self.model = network.model.to(device).eval()
        self.device = device

    def tensor(self, rows: Rows) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self.device)

    def forward(
        self, series: Tensor, events: Tensor, hours: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        """v [B, T, H] of hours that follow what the cache holds, with a mask as it is usual."""
        backbone = self.model.backbone
        before = cache.get_seq_length() if cache is not None else 0
        mask = torch.ones(len(series), before + series.shape[1], device=self.device).long()
        out = backbone.model(
            inputs_embeds=self.model.series_encoder(series, events),
            attention_mask=mask,
            position_ids=hours.expand(series.shape[:2]),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def answers(self, v: Tensor) -> Rows:
        """All heads side by side, [B, n], on the host."""
        outputs = self.model.predict(v)
        return torch.cat([outputs[task] for task in outputs], dim=-1).float().cpu().numpy()


class Stateless:
    """Recomputes the whole prefix in one padded forward, and reads the last hour."""

    name = "stateless"

    def __init__(self, reference: Reference, series: Rows, events: Rows) -> None:
        self._reference = reference
        self._series, self._events = series, events  # [B, 200, ...]

    def extend(self, context: int) -> None:
        """There is nothing to hold."""

    @torch.inference_mode()
    def tick(self, context: int) -> Rows:
        r = self._reference
        series = r.tensor(self._series[:, : context + 1])
        events = r.tensor(self._events[:, : context + 1])
        hours = torch.arange(context + 1, device=r.device)
        return r.answers(r.forward(series, events, hours, None)[:, -1])


class PatientCaches:
    """One DynamicCache a patient; what the two alternatives below share."""

    def __init__(self, reference: Reference, series: Rows, events: Rows) -> None:
        self.reference = reference
        self.series, self.events = series, events
        self.caches = [DynamicCache() for _ in range(len(series))]

    @torch.inference_mode()
    def extend(self, context: int) -> None:
        """Bring every cache to `context` hours, one patient after the other."""
        r = self.reference
        for i, cache in enumerate(self.caches):
            have = cache.get_seq_length()
            if have < context:
                hours = torch.arange(have, context, device=r.device)
                part = slice(have, context)
                series, events = self.series[i : i + 1, part], self.events[i : i + 1, part]
                r.forward(r.tensor(series), r.tensor(events), hours, cache)


class Loop:
    """A forward for every patient, one after the other."""

    name = "loop"

    def __init__(self, patients: PatientCaches) -> None:
        self._patients = patients

    def extend(self, context: int) -> None:
        self._patients.extend(context)

    @torch.inference_mode()
    def tick(self, context: int) -> Rows:
        p, r = self._patients, self._patients.reference
        hours = torch.tensor([context], device=r.device)
        out = []
        for i, cache in enumerate(p.caches):
            series = r.tensor(p.series[i : i + 1, context : context + 1])
            events = r.tensor(p.events[i : i + 1, context : context + 1])
            out.append(r.answers(r.forward(series, events, hours, cache)[:, -1]))
            cache.crop(-1)
        return np.concatenate(out)


class Restacked:
    """All caches stacked into one, one forward, and split again: stays come and go every tick.

    The split gives views of the stacked tensors, the cheapest way there is.
    """

    name = "restacked"

    def __init__(self, patients: PatientCaches) -> None:
        self._patients = patients

    def extend(self, context: int) -> None:
        self._patients.extend(context)

    @torch.inference_mode()
    def tick(self, context: int) -> Rows:
        p, r = self._patients, self._patients.reference
        layers = range(len(p.caches[0].layers))
        stacked = _cache(
            (
                torch.cat([c.layers[n].keys for c in p.caches]),
                torch.cat([c.layers[n].values for c in p.caches]),
            )
            for n in layers
        )
        series = r.tensor(p.series[:, context : context + 1])
        events = r.tensor(p.events[:, context : context + 1])
        hours = torch.tensor([context], device=r.device)
        answers = r.answers(r.forward(series, events, hours, stacked)[:, -1])
        for i in range(len(p.caches)):  # what the next tick would begin with
            _cache((layer.keys[i : i + 1], layer.values[i : i + 1]) for layer in stacked.layers)
        return answers


def _cache(layers: Iterable[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache around keys and values as they are; its constructor would copy them."""
    cache = DynamicCache()
    for keys, values in layers:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache
