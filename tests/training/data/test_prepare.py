"""The command as a whole: work that is kept, thrown away, or not ours; gates that stop it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm4ehr.store import EpisodeStore, StoreError
from training.data import prepare as prepare_module
from training.data.prepare import prepare
from training.data.sources import SourceError
from training.data.spill import Spill


def write(folder: Path, *, died: str = "yes", hours: int = 30) -> Path:
    """A unit's own tables: six stays, of which the first one died."""
    folder.mkdir(exist_ok=True)
    stays = ["episode_id,subject_id,end_hours,los_hours,mortality,death_hours"]
    observed = ["episode_id,variable,hours,value,unit"]
    for i in range(6):
        fate = f"yes,{hours}" if i == 0 and died == "yes" else "no,"
        stays.append(f"e{i},s{i},{hours},{hours},{fate}")
        observed += [f"e{i},hr,{h}.25,{70 + i},/min" for h in range(hours - 1)]
    (folder / "stays.csv").write_text("\n".join(stays) + "\n")
    (folder / "observations.csv").write_text("\n".join(observed) + "\n")
    return folder


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tables that were passed over, one entry a pass with rows to read."""
    seen: list[str] = []
    fill = Spill.fill

    def counted(self: Spill, on_progress: object) -> None:
        before = self.rows
        fill(self, on_progress)  # type: ignore[arg-type]
        if self.rows > before:
            seen.append(self.scan.name)

    monkeypatch.setattr(Spill, "fill", counted)
    return seen


def stop_after_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "build_report", stopped)


def test_a_store_comes_with_its_report(tmp_path: Path) -> None:
    info = prepare("table", write(tmp_path / "unit"), tmp_path / "out", progress=False)
    assert EpisodeStore.open(tmp_path / "out", verify=True).info == info
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["waterfall"][-1]["stays"] == 6
    assert "<html" in (tmp_path / "out" / "report.html").read_text()
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("out", ["out", "unit/out"])
def test_a_run_that_was_stopped_goes_on(
    tmp_path: Path, out: str, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the store is written into the folder of the source."""
    source = write(tmp_path / "unit")
    with monkeypatch.context() as patch:
        stop_after_the_passes(patch)
        with pytest.raises(KeyboardInterrupt):
            prepare("table", source, tmp_path / out, progress=False)
    assert passes
    passes.clear()
    prepare("table", source, tmp_path / out, progress=False)
    assert passes == []


def test_work_of_another_source_is_thrown_away(
    tmp_path: Path, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "unit")
    with monkeypatch.context() as patch:
        stop_after_the_passes(patch)
        with pytest.raises(KeyboardInterrupt):
            prepare("table", source, tmp_path / "out", progress=False)
    passes.clear()
    write(source, hours=40)
    info = prepare("table", source, tmp_path / "out", progress=False)
    assert passes
    assert info.counts["observations"] == 6 * 39


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"out\.work: holds files of another origin"):
        prepare("table", write(tmp_path / "unit"), tmp_path / "out", progress=False)
    assert (tmp_path / "out.work" / "thesis.txt").read_text() == "mine"


def test_a_gate_that_fails_leaves_the_report_and_no_store(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"mortality.*report\.html"):
        prepare("table", write(tmp_path / "unit", died="no"), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.work" / "report.html").is_file()
