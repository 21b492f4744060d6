"""Event codes, their decile tokens and how their numbers are normalised.

A vocabulary is fitted on the training split only and saved with the model. Token rows of the
clinical token table: 0..9 are the decile tokens <Q1>..<Q10>, shared by all codes as in ETHOS; row
10 + i is code i.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

N_DECILES = 10
VOCABULARY_VERSION = 1

# Below this many training values a decile is noise, and the code gets no decile token.
_MIN_VALUES = 50
# A positive quantity whose 99th percentile is this many times its median is put on a log scale.
_LOG_TAIL = 4.0
_DECILE_WORDS = (
    "first", "second", "third", "fourth", "fifth",
    "sixth", "seventh", "eighth", "ninth", "tenth",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeEntry:
    """One event code.

    `deciles` are the inner decile edges, duplicates removed. Values are clipped to [`low`, `high`]
    (0.5th and 99.5th percentile), put on the `scale`, then standardised with `mean` and `std` of
    the training split on that scale. A code without numbers has no edges and `std` 1.
    """

    code: str
    descriptor: str
    unit: str | None
    n: int
    deciles: tuple[float, ...] = ()
    scale: Literal["linear", "log"] = "linear"
    mean: float = 0.0
    std: float = 1.0
    low: float = -np.inf
    high: float = np.inf


class Vocabulary:
    """An ordered set of event codes. Immutable."""

    def __init__(self, entries: Sequence[CodeEntry] = ()) -> None:
        self.entries = tuple(entries)
        self._index = {entry.code: i for i, entry in enumerate(self.entries)}
        if len(self._index) != len(self.entries):
            raise ValueError("a code stands twice in the vocabulary")

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def n_tokens(self) -> int:
        """Rows of the clinical token table."""
        return N_DECILES + len(self.entries)

    def entry(self, code: str) -> CodeEntry | None:
        """The entry of a code, or None if the model does not know it."""
        i = self._index.get(code)
        return None if i is None else self.entries[i]

    def indices(self, codes: Iterable[str]) -> NDArray[np.int64]:
        """Index of each code, -1 for unknown ones."""
        return np.array([self._index.get(c, -1) for c in codes], dtype=np.int64)

    def descriptors(self) -> list[str]:
        """Text of every token row, used to initialise its embedding."""
        deciles = [f"{word} decile" for word in _DECILE_WORDS]
        return deciles + [entry.descriptor for entry in self.entries]

    def code_tokens(self, code: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token row of each code index."""
        return code + N_DECILES

    def decile_tokens(
        self, code: NDArray[np.int64], value: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """Decile token of each value: number of edges strictly below it; -1 where there is none."""
        below = (self._edges[code] < value[:, None]).sum(axis=1)
        return np.where(np.isnan(value) | ~self._has_deciles[code], -1, below)

    def normalise(self, code: NDArray[np.int64], value: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values of the given code indices on their training scale; 0 for a code never fitted."""
        clipped = np.clip(value, self._low[code], self._high[code])
        is_log = self._log[code]
        # Only positive quantities are ever on a log scale, and their lower clip is positive.
        scaled = np.where(is_log, np.log(np.where(is_log, clipped, 1.0)), clipped)
        z = (scaled - self._mean[code]) / self._std[code]
        return np.where(self._has_deciles[code], z, 0.0)

    @cached_property
    def _edges(self) -> NDArray[np.float64]:
        edges = np.full((len(self.entries), N_DECILES - 1), np.inf)
        for i, entry in enumerate(self.entries):
            edges[i, : len(entry.deciles)] = entry.deciles
        return edges

    @cached_property
    def _has_deciles(self) -> NDArray[np.bool_]:
        return np.array([bool(e.deciles) for e in self.entries], dtype=bool)

    @cached_property
    def _log(self) -> NDArray[np.bool_]:
        return np.array([e.scale == "log" for e in self.entries], dtype=bool)

    @cached_property
    def _low(self) -> NDArray[np.float64]:
        return np.array([e.low for e in self.entries], dtype=np.float64)

    @cached_property
    def _high(self) -> NDArray[np.float64]:
        return np.array([e.high for e in self.entries], dtype=np.float64)

    @cached_property
    def _mean(self) -> NDArray[np.float64]:
        return np.array([e.mean for e in self.entries], dtype=np.float64)

    @cached_property
    def _std(self) -> NDArray[np.float64]:
        return np.array([e.std for e in self.entries], dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form; unbounded limits become null."""
        codes = [
            asdict(e)
            | {
                "deciles": list(e.deciles),
                "low": None if np.isinf(e.low) else e.low,
                "high": None if np.isinf(e.high) else e.high,
            }
            for e in self.entries
        ]
        return {"version": VOCABULARY_VERSION, "codes": codes}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Vocabulary:
        """Inverse of `to_json`. Raises ValueError for another version."""
        if body.get("version") != VOCABULARY_VERSION:
            raise ValueError(
                f"vocabulary version {body.get('version')!r}, expected {VOCABULARY_VERSION}"
            )
        return cls(
            [
                CodeEntry(
                    **c
                    | {
                        "deciles": tuple(c["deciles"]),
                        "low": -np.inf if c["low"] is None else c["low"],
                        "high": np.inf if c["high"] is None else c["high"],
                    }
                )
                for c in body["codes"]
            ]
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def fit_vocabulary(
    values: Mapping[str, NDArray[np.float64]],
    descriptors: Mapping[str, tuple[str, str | None]],
    max_codes: int = 512,
) -> Vocabulary:
    """Fit on the training split.

    `values` holds every occurrence of each code (NaN for one without a number); `descriptors` maps
    a code to its text and unit. The `max_codes` most frequent codes are kept, ties by name.
    """
    kept = sorted(values, key=lambda code: (-len(values[code]), code))[:max_codes]
    return Vocabulary([_fit_code(code, values[code], *descriptors[code]) for code in sorted(kept)])


def _fit_code(
    code: str, occurrences: NDArray[np.float64], descriptor: str, unit: str | None
) -> CodeEntry:
    x = np.asarray(occurrences, dtype=np.float64)
    n = len(x)
    x = x[np.isfinite(x)]
    if len(np.unique(x)) < 2 or len(x) < _MIN_VALUES:
        return CodeEntry(code=code, descriptor=descriptor, unit=unit, n=n)
    edges = np.unique(np.quantile(x, np.arange(1, N_DECILES) / N_DECILES))
    low, median, tail, high = np.quantile(x, [0.005, 0.5, 0.99, 0.995])
    log = bool(low > 0 and tail > _LOG_TAIL * median)
    clipped = np.clip(x, low, high)
    scaled = np.log(clipped) if log else clipped
    return CodeEntry(
        code=code,
        descriptor=descriptor,
        unit=unit,
        n=n,
        deciles=tuple(float(e) for e in edges),
        scale="log" if log else "linear",
        mean=float(scaled.mean()),
        std=float(scaled.std()) or 1.0,
        low=float(low),
        high=float(high),
    )
