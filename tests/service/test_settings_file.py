"""Settings from a file that the environment names."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.__main__ import main
from service.settings import SETTINGS_FILE, Settings


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "settings.env"
    monkeypatch.setenv(SETTINGS_FILE, str(file))
    return file


def test_the_environment_wins(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("# Measured.\nLLM4EHR_ENGINE_ROWS=64\nLLM4EHR_TORCH_THREADS=3\n")
    monkeypatch.setenv("LLM4EHR_TORCH_THREADS", "2")
    settings = Settings()
    assert (settings.engine_rows, settings.torch_threads) == (64, 2)
    assert Settings(engine_rows=8).engine_rows == 8


def test_no_value(file: Path) -> None:
    file.write_text("LLM4EHR_STALENESS_LIMIT_HOURS=none\n")
    assert Settings().staleness_limit is None


@pytest.mark.parametrize("line", ["LLM4EHR_ENGINE_ROW=64", "LLM4EHR_PORT=http"])
def test_mistakes_are_errors_that_name_the_setting(
    file: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(line + "\n")
    with pytest.raises(ValidationError):
        Settings()
    assert main(["serve"]) == 1
    name = line.partition("=")[0].removeprefix("LLM4EHR_")
    assert capsys.readouterr().err.startswith(f"error: LLM4EHR_{name} ")


def test_a_file_that_is_not_there_stops_the_start(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve"]) == 1
    assert SETTINGS_FILE in capsys.readouterr().err


def test_there_must_be_time_to_stop() -> None:
    with pytest.raises(ValidationError, match="DRAIN_GRACE"):
        Settings(drain_grace_seconds=20, drain_timeout_seconds=20)
