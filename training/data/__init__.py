"""Readers of ICU data sets: each turns a source, as published, into episode records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from training.data.physionet2012 import PhysioNet2012
from training.data.physionet2019 import PhysioNet2019
from training.data.sources import Dataset

READERS: Mapping[str, Callable[[Path], Dataset]] = {
    "physionet2012": PhysioNet2012,
    "physionet2019": PhysioNet2019,
}
"""Data set name -> its reader, called with the folder or archive that holds the source."""
