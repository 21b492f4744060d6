"""A bundle is damaged before, while, or after it is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llm4ehr.bundle import Network
from service.__main__ import main
from tests.online import save_tiny
from tests.service.models.house import serving

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def sound(tiny_network: Callable[..., Network], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository that holds `tiny/1`."""
    path = tmp_path_factory.mktemp("sound")
    save_tiny(tiny_network, path)
    return path


@pytest.fixture
def repository(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(sound, tmp_path / "repository")
    return tmp_path / "repository"


def damage(repository: Path, file: str) -> None:
    path = repository / "tiny" / "1" / file
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors", "preprocessing.json"])
def test_a_service_does_not_start_with_a_damaged_bundle(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
) -> None:
    damage(repository, file)
    for name, value in (
        ("MODEL_REPOSITORY", repository), ("BUNDLE", "tiny/1"), ("PORT", 0), ("KV_MEMORY_MIB", 1),
        ("LOG_PATH", tmp_path / "log.sqlite"), ("AUTHENTICATION", "open"),
    ):  # fmt: skip
        monkeypatch.setenv(f"LLM4EHR_{name}", str(value))
    assert main(["serve"]) == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert file in line


async def test_what_happens_to_the_files_later_changes_no_answer(
    repository: Path, log_path: Path, anyio_backend: str
) -> None:
    async with serving(repository, log_path, authentication="open") as house:
        for hour in range(3):
            await house.post("e", hour, 70 + hour)
        before = (await house.risk("e")).json()
        damage(repository, "model.safetensors")
        damage(repository, "config.json")
        house.app.state.context.service._memory.drop("e")
        assert (await house.risk("e")).json() == before
        await house.post("e", 3)
        assert (await house.risk("e")).status_code == 200
        damage(repository, "manifest.json")
        assert (await house.http.get("/models")).status_code == 200
        shutil.rmtree(repository)
        assert (await house.http.get("/models")).status_code == 200
        assert (await house.risk("e")).status_code == 200
        assert (await house.http.get("/v2/health/ready")).status_code == 200
        # The next start would not find it: what is on disk is no part of what answers.


async def test_a_damaged_version_is_not_loaded_and_stops_nothing(
    repository: Path, log_path: Path, anyio_backend: str
) -> None:
    shutil.copytree(repository / "tiny" / "1", repository / "tiny" / "2")
    async with serving(repository, log_path, authentication="open") as house:
        await house.post("e", 0)
        assert (await house.control(2, "load")).status_code == 202
        state = await house.until(2, "failed", "ready")
        assert (state["state"], state["failure"]["type"]) == ("failed", "bundle-invalid")
        assert str(repository) not in str(state)
        assert (await house.risk("e")).json()["provenance"]["version"] == "1"
