"""The choices that turn an episode into model input, and the static facts of a stay.

What a bundle saves and hashes of its preprocessing; `llm4ehr.episode` carries it out.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llm4ehr.variables import VARIABLES
from llm4ehr.vocabulary import Vocabulary

MAX_HOURS = 200
N_VARIABLES = len(VARIABLES)
PREPROCESSING_VERSION = 1

Sex = Literal["female", "male"]
UnitType = Literal["coronary", "cardiac_surgery", "medical", "surgical", "other"]
SEXES: tuple[Sex, ...] = ("female", "male")
UNIT_TYPES: tuple[UnitType, ...] = ("coronary", "cardiac_surgery", "medical", "surgical", "other")

# Centre and spread of the static facts. Fixed by definition rather than fitted: they only bring
# adult values to the order of one, and a fitted constant would be one more thing to version.
_STATIC_SCALE = {"age_years": (60.0, 20.0), "height_cm": (170.0, 12.0), "weight_kg": (80.0, 25.0)}
STATIC_FEATURES = 2 * len(_STATIC_SCALE) + len(SEXES) + len(UNIT_TYPES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statics:
    """Facts known at admission. All optional; the model sees which ones are missing."""

    age_years: float | None = None
    sex: Sex | None = None
    unit_type: UnitType | None = None
    height_cm: float | None = None
    weight_kg: float | None = None


def static_features(statics: Statics) -> NDArray[np.float32]:
    """Static facts as one row: scaled value and known-flag each, then one-hot sex and unit type."""
    row: list[float] = []
    for name, (centre, spread) in _STATIC_SCALE.items():
        value = getattr(statics, name)
        row += [0.0, 0.0] if value is None else [(value - centre) / spread, 1.0]
    row += [float(statics.sex == s) for s in SEXES]
    row += [float(statics.unit_type == u) for u in UNIT_TYPES]
    return np.array(row, dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """All choices that turn an episode into model input; saved in the bundle and hashed.

    `bin_edge` (M22): "left" puts time t into [t, t+1), "right" into (t-1, t] as the MIMIC-III
    benchmark does. `imputation` (M12): "causal" carries the last value forward and starts from the
    variable's normal value; "linear" is the paper's interpolation, which reads later observations
    and therefore cannot be streamed. `dedupe` (M19) thins repeated codes before tokenising.
    `mean` and `std` normalise the variables and come from the training split.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    imputation: Literal["causal", "linear"] = "causal"
    bin_edge: Literal["left", "right"] = "left"
    dedupe: Literal["hour", "episode_last", "none"] = "hour"
    observed_inputs: bool = True  # observed-mask and hours-since-observed beside the values
    static_inputs: bool = True
    clip: float = 8.0  # bound on normalised values, against artefacts inside the limits
    max_hours: int = MAX_HOURS

    def __post_init__(self) -> None:
        if len(self.mean) != N_VARIABLES or len(self.std) != N_VARIABLES:
            raise ValueError(f"mean and std need {N_VARIABLES} entries, one for each variable")
        if not all(s > 0 for s in self.std):
            raise ValueError("every std must be positive")

    @property
    def n_series(self) -> int:
        """Width S of the series features."""
        per_variable = 3 if self.observed_inputs else 1
        return N_VARIABLES * per_variable + (STATIC_FEATURES if self.static_inputs else 0)

    @property
    def causal(self) -> bool:
        """Whether hour t depends only on what was known by its end."""
        return self.imputation == "causal"

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form, with the variable table it was made for."""
        body = asdict(self) | {"mean": list(self.mean), "std": list(self.std)}
        variables = [{"name": v.name, "unit": v.unit, "normal": v.normal} for v in VARIABLES]
        return {"version": PREPROCESSING_VERSION, "variables": variables, **body}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Preprocessing:
        """Inverse of `to_json`. Raises ValueError if it was made by another version or table."""
        body = dict(body)
        if (version := body.pop("version", None)) != PREPROCESSING_VERSION:
            raise ValueError(f"preprocessing version {version!r}, expected {PREPROCESSING_VERSION}")
        variables = body.pop("variables")
        ours = [{"name": v.name, "unit": v.unit, "normal": v.normal} for v in VARIABLES]
        if variables != ours:
            raise ValueError("preprocessing was made for another table of variables")
        return cls(**body | {"mean": tuple(body["mean"]), "std": tuple(body["std"])})


def preprocessing_digest(preprocessing: Preprocessing, vocabulary: Vocabulary) -> str:
    """SHA-256 over everything that decides how an episode becomes numbers."""
    body = json.dumps([preprocessing.to_json(), vocabulary.to_json()], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()
