"""Whether a log still says what was written to it: every hash, every number, and the anchors.

A chain shows a row that was changed, removed from the middle, swapped or put in between. It does
not show that its last rows are gone, nor that somebody with the whole database in hand computed it
anew. An anchor does: where every chain had got to, kept in another place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from service.log.base import LogCorrupt
from service.log.rows import FIRST, Row, chain_hash
from service.log.tables import CHAINED, Table, Tables, counted

Problem = Literal["changed", "missing", "not-as-anchored", "not-removed", "unreadable"]

_FORMAT = "llm4ehr-anchors/1"


class Head(NamedTuple):
    """The last row of a chain."""

    seq: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it was written."""

    table: Table
    chain: str
    """Episode id, or writer of the audit trail; empty if it is not known."""
    seq: int
    """The row, or the first of those that are missing."""
    problem: Problem

    def to_json(self) -> str:
        return json.dumps(asdict(self))


Anchors = Mapping[Table, Mapping[str, Sequence[Head]]]
"""Where the chains of a table had got to at some moments."""


@dataclass(slots=True)
class Chains:
    """Follows the rows of one table in their order. Holds the head of every chain."""

    table: Table
    anchors: Mapping[str, Sequence[Head]] = field(default_factory=dict)
    heads: dict[str, Head] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def follow(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows, each of them checked before it is passed on."""
        try:
            for row in rows:
                self._check(row)
                yield row
        except LogCorrupt:
            self._find("", 0, "unreadable")

    def end(self, retired: Mapping[str, Head]) -> list[Finding]:
        """All findings, after the last row; `retired` are the chains that may be gone."""
        for chain, anchors in self.anchors.items():
            last = self.heads.get(chain) or retired.get(chain) or Head(0, FIRST)
            if last.seq < max(anchor.seq for anchor in anchors):
                self._find(chain, last.seq + 1, "missing")
            elif chain not in self.heads and self._contradicts(chain, last):
                self._find(chain, last.seq, "not-as-anchored")
        for chain in self.heads.keys() & retired.keys():
            self._find(chain, 1, "not-removed")
        return self.findings

    def _check(self, row: Row) -> None:
        chain, seq, hashed = row[0], row[1], row[-1]
        last = self.heads.get(chain, Head(0, FIRST))
        if seq != last.seq + 1:
            self._find(chain, last.seq + 1, "missing")
        elif chain_hash(last.hash, row[:-1]) != hashed:
            self._find(chain, seq, "changed")
        head = Head(seq, hashed)
        if self._contradicts(chain, head):
            self._find(chain, seq, "not-as-anchored")
        self.heads[chain] = head

    def _contradicts(self, chain: str, head: Head) -> bool:
        """Whether an anchor has another hash for this number."""
        anchors = self.anchors.get(chain, ())
        return any(a.seq == head.seq and a.hash != head.hash for a in anchors)

    def _find(self, chain: str, seq: int, problem: Problem) -> None:
        self.findings.append(Finding(self.table, chain, seq, problem))


def verify(tables: Tables, anchors: Anchors, advance: Callable[[int], None]) -> list[Finding]:
    """What is wrong with a log, of one moment, by its hashes and by anchors of earlier moments;
    `advance` is told of rows that were read.

    Raises LogUnavailable.
    """
    findings: list[Finding] = []
    with tables.snapshot():
        retired = retired_heads(tables)
        for table in CHAINED:
            chains = Chains(table, anchors.get(table, {}))
            for _ in chains.follow(counted(tables.rows(table), advance)):
                pass
            findings += chains.end(retired if table == "log" else {})
    return findings


def retired_heads(tables: Tables) -> dict[str, Head]:
    """Where the episodes ended whose entries were removed."""
    rows = tables.execute("SELECT episode_id, seq, hash FROM retired")
    return {episode_id: Head(seq, hashed) for episode_id, seq, hashed in rows}


def write_anchors(tables: Tables, out: Path) -> int:
    """Write where every chain has got to into a new file; returns how many there are.

    One JSON object a line. Raises FileExistsError, LogUnavailable, OSError.
    """
    n = 0
    with out.open("x") as file:
        file.write(json.dumps({"format": _FORMAT}) + "\n")
        with tables.snapshot():
            for table, chain in (("log", "episode_id"), ("audit", "writer")):
                for name, seq, hashed in tables.execute(
                    f"SELECT {chain}, seq, hash FROM {table} JOIN (SELECT {chain}, max(seq) AS seq"
                    f" FROM {table} GROUP BY {chain}) AS last USING ({chain}, seq)"
                    f" ORDER BY {chain}"
                ):
                    row = {"table": table, "chain": name, "seq": seq, "hash": hashed.hex()}
                    file.write(json.dumps(row) + "\n")
                    n += 1
    return n


def read_anchors(paths: Iterable[Path]) -> Anchors:
    """Inverse of `write_anchors`, of any number of files. Raises ValueError for another file,
    OSError.
    """
    anchors: dict[Table, dict[str, list[Head]]] = {table: {} for table in CHAINED}
    for path in paths:
        with path.open() as file:
            try:
                if json.loads(file.readline())["format"] != _FORMAT:
                    raise ValueError
                for line in file:
                    row = json.loads(line)
                    head = Head(int(row["seq"]), bytes.fromhex(row["hash"]))
                    anchors[row["table"]].setdefault(str(row["chain"]), []).append(head)
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{path} is no file of anchors") from None
    return anchors
