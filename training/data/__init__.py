"""Readers of ICU data sets: each turns a source, as published, into an episode store."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.sources import Dataset, SourceError

if TYPE_CHECKING:
    from training.data.extraction import TableReader

READERS: Mapping[str, tuple[str, str]] = {
    "eicu": ("training.data.eicu.reader", "EICU"),
    "meds": ("training.data.meds.reader", "Meds"),
    "mimic3": ("training.data.mimic.mimic3", "Mimic3"),
    "mimic4": ("training.data.mimic.mimic4", "Mimic4"),
    "physionet2012": ("training.data.physionet2012", "PhysioNet2012"),
    "physionet2019": ("training.data.physionet2019", "PhysioNet2019"),
    "table": ("training.data.user_table.reader", "UserTables"),
}
"""Data set name -> module and class of its reader, imported when it is needed."""


def reader_for(dataset: str, source: Path, **options: Any) -> Dataset | TableReader:
    """The reader of a data set at its source.

    Raises SourceError for an unknown data set, an option that it does not have, or a source that is
    not this data set.
    """
    if dataset not in READERS:
        raise SourceError(f"unknown data set {dataset!r}; known: {', '.join(sorted(READERS))}")
    module, name = READERS[dataset]
    reader = getattr(import_module(module), name)
    known = inspect.signature(reader).parameters
    for option in options:
        if option not in known:
            raise SourceError(f"{dataset} has no option {option!r}")
    made: Dataset | TableReader = reader(source, **options)
    return made
