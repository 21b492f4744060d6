"""A network with all that turns its outputs into answers: calibration, labels, read-outs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from llm4ehr.bundle import Network
from llm4ehr.calibration import Calibration
from llm4ehr.episode import Episode
from training.evaluation.reading import Reading
from training.labels import LabelOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """A network with all that is needed to turn its outputs into answers and judge them."""

    network: Network
    calibration: Calibration
    thresholds: dict[str, float]
    phenotypes: tuple[str, ...]  # outputs of the phenotyping head
    label_options: LabelOptions
    reading: Reading = field(default_factory=Reading)

    def as_read(self, episode: Episode) -> Episode:
        """The stay as far as it is read.

        What a causal network answers at an hour does not depend on how far it goes on reading, so
        it reads on to the end. Any other, and one that answers a stay as a whole, must be asked as
        it was trained.
        """
        if self.reading.max_hours is None or (self.reading.hourly and self.network.causal):
            return episode
        return replace(episode, n_hours=min(episode.n_hours, self.reading.max_hours))

    @property
    def patch_hours(self) -> int:
        """Hours of a patch."""
        return self.network.model.config.patch_hours
