"""Published figures of the MIMIC-III benchmark (Harutyunyan et al. 2019, code of April 2023).

Counts are train, validation and test together. Its distributions are those of the training set,
whole stays in hourly bins, the last value carried forward, without limits.
"""

from __future__ import annotations

from collections.abc import Mapping

from training.data.phenotypes import PHENOTYPES

_N_TRAIN, _N_TEST = 35_621, 6_281
# Share of the training (with validation) and of the test stays, in the order of PHENOTYPES.
_PHENOTYPE_SHARES = (
    (0.214, 0.212), (0.075, 0.066), (0.103, 0.108), (0.321, 0.323), (0.134, 0.132),
    (0.131, 0.126), (0.207, 0.213), (0.072, 0.071), (0.268, 0.268), (0.322, 0.331),
    (0.095, 0.094), (0.193, 0.192), (0.291, 0.289), (0.419, 0.423), (0.269, 0.265),
    (0.072, 0.079), (0.133, 0.130), (0.089, 0.089), (0.051, 0.057), (0.040, 0.043),
    (0.087, 0.091), (0.139, 0.135), (0.181, 0.177), (0.143, 0.139), (0.078, 0.082),
)  # fmt: skip
# Share of hours with a value, and mean of the hourly values.
_DISTRIBUTIONS = {
    "hr": (0.9051, 85.5385),
    "sbp": (0.8794, 122.3976),
    "dbp": (0.8792, 61.7375),
    "mbp": (0.8756, 79.5964),
    "rr": (0.8919, 19.8679),
    "spo2": (0.8704, 104.9811),
    "temp": (0.2932, 36.944),
    "fio2": (0.057, 0.2942),
    "ph": (0.0956, 7.2073),
    "glucose": (0.2301, 140.387),
    "gcs_total": (0.1728, None),
}

PUBLISHED: Mapping[str, float] = {
    "stays": _N_TRAIN + _N_TEST,
    "subjects": 23_466 + 5_154 + 5_058,
    "mortality.stays": 17_903 + 3_236,
    "mortality.positive": 2_423 + 374,
    "decompensation.positive": 61_013 + 9_683,
    "decompensation.negative": 2_847_401 + 513_525,
    "remaining_los.hours": 2_925_434 + 525_912,
    "phenotyping.stays": _N_TRAIN + _N_TEST,
    **{
        f"phenotype.{name}": (_N_TRAIN * train + _N_TEST * test) / (_N_TRAIN + _N_TEST)
        for name, (train, test) in zip(PHENOTYPES, _PHENOTYPE_SHARES, strict=True)
    },
    **{f"observed.{name}": observed for name, (observed, _) in _DISTRIBUTIONS.items()},
    **{f"mean.{name}": mean for name, (_, mean) in _DISTRIBUTIONS.items() if mean is not None},
}
"""Name of a figure of the report -> its published value."""
