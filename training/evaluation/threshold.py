"""Decision threshold and calibration of mortality from stays that nothing else has used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llm4ehr.calibration import OutputMap
from training.evaluation.report import scored_rows
from training.evaluation.scorer import Scorer
from training.evaluation.table import hourly_table, pooled
from training.metrics import fit_platt, s1_threshold
from training.sources import LeakageError, Source


def with_threshold(scorer: Scorer, held_out: Sequence[Source], tested: Sequence[Source]) -> Scorer:
    """The scorer with mortality calibrated on `held_out`, and the threshold that is best there.

    Raises LeakageError if a stay of `held_out` is also tested, and ValueError if mortality is not
    known of both classes there.
    """
    keys = [{s.key(e) for s in sources for e in s.episode_ids} for sources in (held_out, tested)]
    if both := keys[0] & keys[1]:
        raise LeakageError(f"{len(both)} stays would choose the threshold that judges them")
    table = pooled([hourly_table(scorer, source) for source in held_out])
    at = scored_rows(table, "mortality")
    y, p = table["label_mortality"][at], table["mortality_uncalibrated"][at]
    if not 0 < y.sum() < len(y):
        raise ValueError("the stays that choose a threshold have no deaths or no survivors")
    a, b = fit_platt(np.log(p / (1 - p)), y)
    # A falling line would turn the order of the risks round.
    risk = OutputMap(kind="platt", a=a, b=b) if a > 0 else OutputMap(kind="platt")
    calibrated = replace(scorer, calibration={**scorer.calibration, "mortality": risk})
    answers = pooled([hourly_table(calibrated, source) for source in held_out])["mortality"][at]
    return replace(
        calibrated, thresholds={**scorer.thresholds, "mortality": s1_threshold(y, answers)}
    )
