"""Whether a log still says what was written to it: every hash, every number, and the anchors.

A chain shows a row that was changed, removed from the middle, swapped or put in between. It does
not show that its last rows are gone, nor that somebody with the whole database in hand computed it
anew. An anchor does: where every chain had got to, kept in another place.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

from service.log.base import LogCorrupt
from service.log.rows import FIRST, Row, chain_hash, from_audit_row
from service.log.tables import CHAINED, Table, Tables, counted, text_of

Problem = Literal["changed", "missing", "not-as-anchored", "not-removed", "not-told", "unreadable"]

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
    """Episode id, or writer of the audit trail; empty if it is not known. Bytes that are no text
    are escaped."""
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
        """The same rows, each of them checked before it is passed on. Text that cannot be decoded
        is found and made into some that can.
        """
        try:
            for row in rows:
                try:
                    self._check(row)
                except TypeError:  # bytes in place of text
                    row = (*map(text_of, row[:-1]), row[-1])
                    self._find(row[0], row[1], "unreadable")
                    self.heads[row[0]] = Head(row[1], row[-1])
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
        fits = chain_hash(last.hash, row[:-1]) == hashed
        if seq != last.seq + 1:
            self._find(chain, last.seq + 1, "missing")
        elif not fits:
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
    with tables.snapshot():
        return follow(tables, anchors, advance, lambda table, rows: deque(rows, maxlen=0))


def follow(
    tables: Tables,
    anchors: Anchors,
    advance: Callable[[int], None],
    take: Callable[[Table, Iterator[Row]], object],
) -> list[Finding]:
    """Hand all rows of the chained tables to `take`; returns what is wrong with them."""
    findings: list[Finding] = []
    retired, told = retired_heads(tables), set[str]()
    for table in CHAINED:
        chains = Chains(table, anchors.get(table, {}))
        rows = chains.follow(counted(tables.rows(table), advance))
        take(table, _removals(rows, told) if table == "audit" else rows)
        findings += chains.end(retired if table == "log" else {})
    return findings + _of_retired(retired, told, anchors.get("retired", {}))


def retired_heads(tables: Tables) -> dict[str, Head]:
    """Where the episodes ended whose entries were removed."""
    return {str(text_of(row[0])): Head(row[1], row[2]) for row in tables.rows("retired")}


def _removals(lines: Iterable[Row], told: set[str]) -> Iterator[Row]:
    """The same lines of the audit trail; `told` gains the episodes they say were removed."""
    for row in lines:
        if '"retain"' in row[3]:  # few are worth to be read
            with suppress(LogCorrupt):
                record = from_audit_row(row)
                if (record.operation, record.action) == ("retain", "delete"):
                    told.update(record.episodes)
        yield row


def _of_retired(
    retired: Mapping[str, Head], told: set[str], anchors: Mapping[str, Sequence[Head]]
) -> list[Finding]:
    """A removal that nothing tells of would be a way to remove anything."""
    findings = [
        Finding("retired", episode_id, retired[episode_id].seq, "not-told")
        for episode_id in sorted(retired.keys() - told)
    ]
    for episode_id, known in anchors.items():
        head = retired.get(episode_id)
        if head is None:
            findings.append(Finding("retired", episode_id, known[0].seq, "missing"))
        elif any(anchor != head for anchor in known):
            findings.append(Finding("retired", episode_id, head.seq, "not-as-anchored"))
    return findings


def write_anchors(tables: Tables, out: Path) -> int:
    """Write where every chain has got to, and what was removed, into a new file that its owner
    alone can read; returns how many there are. What fails leaves no file.

    One JSON object a line. Raises FileExistsError, LogUnavailable, OSError.
    """
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            return _write_anchors(tables, file)
    except BaseException:
        out.unlink(missing_ok=True)
        raise


def _write_anchors(tables: Tables, file: TextIO) -> int:
    n = 0
    file.write(json.dumps({"format": _FORMAT}) + "\n")
    with tables.snapshot():
        for table, chain in (("log", "episode_id"), ("audit", "writer")):
            for name, seq, hashed in tables.execute(
                f"SELECT {chain}, seq, hash FROM {table} JOIN (SELECT {chain}, max(seq) AS seq"
                f" FROM {table} GROUP BY {chain}) AS last USING ({chain}, seq)"
                f" ORDER BY {chain}"
            ):
                file.write(_anchor(table, name, Head(seq, hashed)))
                n += 1
        for name, head in retired_heads(tables).items():
            file.write(_anchor("retired", name, head))
            n += 1
    return n


def _anchor(table: str, chain: str, head: Head) -> str:
    row = {"table": table, "chain": chain, "seq": head.seq, "hash": head.hash.hex()}
    return json.dumps(row) + "\n"


def read_anchors(paths: Iterable[Path]) -> Anchors:
    """Inverse of `write_anchors`, of any number of files. Raises ValueError for another file,
    OSError.
    """
    anchors: dict[Table, dict[str, list[Head]]] = {"log": {}, "audit": {}, "retired": {}}
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
