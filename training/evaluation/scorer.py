"""A network with all that turns its outputs into answers: calibration, labels, read-outs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llm4ehr.bundle import Network
from llm4ehr.calibration import Calibration
from llm4ehr.episode import Episode
from training.labels import LabelOptions
from training.readout import HOURLY, ReadoutOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """A network with all that is needed to turn its outputs into answers and judge them.

    `cache` is for the features of a network that is not read out hour by hour; a bundle needs none.
    """

    network: Network
    calibration: Calibration
    thresholds: dict[str, float]
    phenotypes: tuple[str, ...]  # outputs of the phenotyping head
    label_options: LabelOptions
    readout: ReadoutOptions = HOURLY
    cache: Path = Path("runs/cache")

    def as_read(self, episode: Episode) -> Episode:
        """The stay as far as it is read.

        What a causal network answers at an hour does not depend on how far it goes on reading, so
        it reads on to the end. Any other must be asked as it was trained.
        """
        if self.network.causal:
            return episode
        return replace(episode, n_hours=min(episode.n_hours, self.readout.max_hours))
