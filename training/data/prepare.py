"""From a published data set to an episode store."""

from __future__ import annotations

from pathlib import Path

from llm4ehr.store import StoreInfo, StoreWriter
from training.data import READERS
from training.data.sources import SourceError, Tally
from training.progress import track


def prepare(dataset: str, source: Path, out: Path, *, progress: bool = True) -> StoreInfo:
    """Read the data set of that name at `source` into a new store at `out`.

    The same source always gives the same Parquet digests. `progress` shows a bar with the time
    left. Raises SourceError for an unknown data set or a malformed source, and StoreError if `out`
    is in use; neither leaves anything behind.
    """
    if dataset not in READERS:
        raise SourceError(f"unknown data set {dataset!r}; known: {', '.join(sorted(READERS))}")
    tally = Tally()
    reader = READERS[dataset](source)
    records = reader.records(tally)
    with StoreWriter(out, reader.info, codes=reader.codes) as writer:
        for record in track(records, dataset, reader.n_episodes) if progress else records:
            writer.add(record)
        return writer.close(refused=tally.refused, repaired=tally.repaired)
