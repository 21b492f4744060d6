"""Labels and predictions as MEDS, and the commands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import meds
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm4ehr.episode import Statics
from llm4ehr.store import (
    EpisodeStore,
    Outcome,
    StoreError,
)
from tests.training.data.meds_source import STAYS, record, write_store
from training.cli import _parser, main
from training.data.meds.calendar import EPOCH, places, subject_numbers
from training.data.meds.dataset import write_dataset
from training.data.meds.export import task_folder, write_labels, write_predictions
from training.data.phenotypes import PHENOTYPES


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", STAYS)


class TestCalendar:
    def test_stays_of_a_subject_do_not_overlap(self, store: Path) -> None:
        rows = places(EpisodeStore.open(store)).select("episode_id", "subject_id", "start").rows()
        # Known of stay b until hour 50, on the third day: a starts on the fifth.
        assert rows == [
            ("a", 12, EPOCH + timedelta(days=4)),
            ("b", 12, EPOCH),
            ("c", 3, EPOCH),
        ]

    def test_stays_that_ended_in_death_come_last_and_the_nearest_to_it_at_the_end(
        self, tmp_path: Path
    ) -> None:
        died = {
            name: Outcome(
                mortality=True,
                death_hours_low=hours,
                death_hours_high=float(np.nextafter(hours, 999)),
            )
            for name, hours in (("near", 10.5), ("far", 58.5))
        }
        old = Statics(age_years=91.4)  # as data sets give the age of everybody above 89
        records = [
            record("unknown", "1", statics=old),
            record("near", "1", n_hours=11, statics=old, outcome=died["near"]),
            record("far", "1", n_hours=48, statics=old, outcome=died["far"]),
            record("first", "1", statics=old, outcome=Outcome(mortality=False)),
        ]
        order = places(EpisodeStore.open(write_store(tmp_path / "store", records)))
        assert order.sort("start")["episode_id"].to_list() == ["first", "unknown", "far", "near"]

    def test_numbers_of_subjects(self) -> None:
        assert subject_numbers(["3", "-7", "12"]) == {"3": 3, "-7": -7, "12": 12}
        hashed = subject_numbers(["3", "p7"])
        assert hashed == subject_numbers(["p7", "3"])
        assert all(0 <= n < 2**63 for n in hashed.values())
        assert hashed["3"] != 3
        assert subject_numbers(["007", "7"])["007"] != 7


class TestLabels:
    @pytest.fixture
    def labels(self, store: Path, tmp_path: Path) -> Path:
        write_labels(store, tmp_path / "labels")
        return tmp_path / "labels"

    def test_every_task_validates(self, labels: Path) -> None:
        files = sorted(labels.glob("**/labels.parquet"))
        assert len(files) == 3 + len(PHENOTYPES)
        for file in files:
            meds.LabelSchema.validate(pq.read_table(file))

    def test_times_are_the_last_microsecond_of_what_may_be_used(self, labels: Path) -> None:
        risk = pl.read_parquet(labels / "decompensation" / "labels.parquet")
        start = EPOCH + timedelta(days=4)
        of_last = risk.filter(pl.col("prediction_time") >= start, subject_id=12)
        first = start + timedelta(hours=5, microseconds=-1)  # after the first four hours
        assert of_last["prediction_time"].min() == first
        assert of_last["prediction_time"].max() == start + timedelta(hours=59, microseconds=-1)
        # Death at hour 60.5: true from time 37 (at 36 it is 24.5 hours away) on.
        onset = of_last.filter("boolean_value")["prediction_time"].min()
        assert onset == start + timedelta(hours=37, microseconds=-1)

    def test_mortality_is_asked_once_at_48_hours(self, labels: Path) -> None:
        rows = pl.read_parquet(labels / "mortality" / "labels.parquet")
        at_48 = timedelta(hours=48, microseconds=-1)
        assert rows.rows() == [
            (12, EPOCH + timedelta(days=4) + at_48, True),
            (12, EPOCH + at_48, False),
        ]

    def test_phenotypes_at_the_end_of_coded_stays(self, labels: Path) -> None:
        rows = pl.read_parquet(labels / task_folder("Shock") / "labels.parquet").rows()
        assert rows == [
            (12, EPOCH + timedelta(days=4, hours=60, microseconds=-1), True),
            (12, EPOCH + timedelta(hours=50, microseconds=-1), False),
        ]

    def test_remaining_stay(self, labels: Path) -> None:
        rows = pl.read_parquet(labels / "remaining_los" / "labels.parquet")
        first = rows.filter(subject_id=12).row(0)
        assert first == (12, EPOCH + timedelta(days=4, hours=5, microseconds=-1), 54.5)

    def test_the_folder_must_be_free(self, labels: Path, store: Path) -> None:
        with pytest.raises(StoreError, match="not an empty folder"):
            write_labels(store, labels)

    @pytest.mark.parametrize("write", [write_labels, write_dataset])
    def test_nothing_is_left_of_a_run_that_failed(
        self, store: Path, tmp_path: Path, write: Callable[[Path, Path], Any]
    ) -> None:
        before = sorted(tmp_path.iterdir())
        path = store / "observations.parquet"
        with path.open("r+b") as file:  # the pages, not the footer
            file.seek(4)
            file.write(b"\xff" * 200)
        with pytest.raises((OSError, StoreError)):
            write(store, tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == before

    def test_names_of_tasks_are_distinct(self) -> None:
        assert len({task_folder(name) for name in PHENOTYPES}) == len(PHENOTYPES)
        assert task_folder("Gastrointestinal hemorrhage") == "phenotype/gastrointestinal_hemorrhage"


class TestPredictions:
    @pytest.fixture
    def scores(self, tmp_path: Path) -> Path:
        """What `service score` writes: here the probability tells stay and hour."""
        rows = [
            {"episode_id": name, "hour": hour, "decompensation": k / 10 + hour / 1000}
            | {"mortality": 0.5, "phenotype_Shock": hour / 100}
            for k, (name, n) in enumerate([("a", 60), ("b", 50), ("c", 5)])
            for hour in range(n)
        ]
        schema = {"hour": pl.Int16, "decompensation": pl.Float32, "mortality": pl.Float32}
        frame = pl.DataFrame(rows, schema_overrides=schema | {"phenotype_Shock": pl.Float32})
        frame.write_parquet(tmp_path / "scores.parquet")
        return tmp_path / "scores.parquet"

    def test_answers_beside_their_labels(self, store: Path, scores: Path, tmp_path: Path) -> None:
        counts = write_predictions(scores, store, tmp_path / "out")
        assert set(counts) == {"decompensation", "mortality", "phenotype/shock"}
        table = pq.read_table(tmp_path / "out" / "decompensation.parquet")
        assert [(f.name, f.type) for f in table.schema] == [
            ("subject_id", pa.int64()),
            ("prediction_time", pa.timestamp("us")),
            ("boolean_value", pa.bool_()),
            ("predicted_boolean_value", pa.bool_()),
            ("predicted_boolean_probability", pa.float32()),
        ]
        meds.LabelSchema.validate(table.select(["subject_id", "prediction_time", "boolean_value"]))
        write_labels(store, tmp_path / "labels")
        assert counts["decompensation"] == len(
            pq.read_table(tmp_path / "labels" / "decompensation" / "labels.parquet")
        )
        rows = pl.DataFrame(table)
        time = EPOCH + timedelta(hours=11, microseconds=-1)  # hour bin 10 of stay b
        answer = rows.filter(prediction_time=time)["predicted_boolean_probability"].item()
        assert answer == pytest.approx(0.11)
        assert rows["predicted_boolean_value"].any() is False
        mortality = pl.read_parquet(tmp_path / "out" / "mortality.parquet")
        assert mortality["predicted_boolean_value"].to_list() == [True, True]

    def test_a_phenotype_has_the_last_answer(
        self, store: Path, scores: Path, tmp_path: Path
    ) -> None:
        cut = tmp_path / "cut.parquet"
        pl.read_parquet(scores).filter(pl.col("hour") < 55).write_parquet(cut)
        write_predictions(cut, store, tmp_path / "out")
        rows = pl.read_parquet(tmp_path / "out" / "phenotype" / "shock.parquet")
        assert rows["predicted_boolean_probability"].to_list() == pytest.approx([0.54, 0.49])

    def test_no_predictions(self, store: Path, tmp_path: Path) -> None:
        pl.DataFrame({"episode_id": ["a"], "hour": [0]}).write_parquet(tmp_path / "s.parquet")
        with pytest.raises(StoreError, match="holds no predictions"):
            write_predictions(tmp_path / "s.parquet", store, tmp_path / "out")


class TestCommand:
    """`python -m training meds`."""

    def run(self, capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
        assert main(["meds", *map(str, words)]) == 0
        return capsys.readouterr().out

    def test_dataset(self, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.run(capsys, "dataset", "--store", store, "--out", tmp_path / "out")
        n = len(pl.read_parquet(tmp_path / "out" / "data" / "*.parquet"))
        assert out == f"{n} events\n"

    def test_labels(self, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.run(capsys, "labels", "--store", store, "--out", tmp_path / "out")
        assert json.loads(out)["mortality"] == 2
        assert len(pl.read_parquet(tmp_path / "out" / "mortality" / "labels.parquet")) == 2

    def test_predictions(
        self, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["predictions", "--store", store, "--out", tmp_path / "out"]
        assert main(["meds", *map(str, words)]) == 1
        assert "--predictions is missing" in capsys.readouterr().err
        scores = {"episode_id": ["a", "b"], "hour": [47, 47], "mortality": [0.3, 0.2]}
        pl.DataFrame(scores).write_parquet(tmp_path / "scores.parquet")
        words += ["--predictions", tmp_path / "scores.parquet", "--threshold", "0.25"]
        assert json.loads(self.run(capsys, *words)) == {"mortality": 2}
        rows = pl.read_parquet(tmp_path / "out" / "mortality.parquet")
        assert rows["predicted_boolean_value"].to_list() == [True, False]

    def test_an_error_is_one_line(
        self, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["meds", "labels", "--store", str(store), "--out", str(store)]) == 1
        assert "exists and is not an empty folder" in capsys.readouterr().err

    def test_the_documented_commands_exist(self) -> None:
        page = Path(__file__).parents[3] / "docs" / "datasets" / "meds.md"
        lines = re.findall(r"^python -m training (meds .*)$", page.read_text(), re.MULTILINE)
        parsed = [_parser().parse_args(line.split()) for line in lines]
        assert [a.what for a in parsed] == ["dataset", "labels", "predictions"]
