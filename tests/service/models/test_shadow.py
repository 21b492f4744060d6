"""A model on trial: the differences that are reported are the true ones, and nothing else shows."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service.core import Draft, episode_at
from service.models import shadow
from service.models.shadow import Counts, Shadow, ShadowMetrics
from service.state import Scored
from tests.service.fakes import entries, fake_scores, stamp
from tests.service.models.house import House

pytestmark = pytest.mark.anyio

TASKS = ("decompensation", "mortality", "remaining_los", "phenotyping")
STAYS = ("a", "b", "c")


async def compared(house: House, n: int) -> dict[str, Any]:
    """The trial once so many answers were compared."""
    async with asyncio.timeout(60):
        while True:
            body = (await house.http.get("/models")).json()
            if body["shadow"]["compared"] + body["shadow"]["dropped"] >= n:
                return dict(body["shadow"])
            await asyncio.sleep(0.01)


async def test_the_differences_are_the_true_ones(house: House) -> None:
    for stay in STAYS:
        await house.post(stay, 0.5)
    await house.ready(2)
    started = await house.http.put("/models/shadow", json={"model": "tiny/2"})
    assert (started.status_code, started.json()["compared"]) == (200, 0)
    true: dict[str, list[float]] = {task: [] for task in TASKS}
    done = 0
    for hour in (1.5, 2.5, 3.5):
        for stay in STAYS:
            seq = (await house.post(stay, hour, 60 + 10 * hour)).json()["seq"]
            answer = await house.risk(stay)
            assert await house.check(answer) == 1
            assert "shadow" not in answer.text
            one, two = [(await house.expected(v, stay, seq)).hours[-1] for v in (1, 2)]
            true["decompensation"].append(abs(one.decompensation - two.decompensation))
            true["mortality"].append(abs(one.mortality - two.mortality))
            true["remaining_los"].append(abs(one.remaining_los_hours - two.remaining_los_hours))
            true["phenotyping"].append(
                max(abs(one.phenotypes[name] - two.phenotypes[name]) for name in one.phenotypes)
            )
            done += 1
            trial = await compared(house, done)
    assert (trial["compared"], trial["dropped"]) == (9, 0)
    for task, changes in true.items():
        found = trial["changes"][task]
        assert found["n"] == 9
        assert found["max"] == max(changes) > 0
        assert found["mean"] == pytest.approx(sum(changes) / 9)
    metrics = (await house.http.get("/metrics")).text
    assert 'llm4ehr_shadow_compared_total{model="tiny/2"} 9.0' in metrics
    assert 'llm4ehr_shadow_change_ratio_count{model="tiny/2",task="mortality"} 9.0' in metrics
    assert 'llm4ehr_shadow_change_hours_count{model="tiny/2"} 9.0' in metrics
    for stay in STAYS:
        assert f'"{stay}"' not in metrics


async def test_a_trial_ends_with_its_models(house: House) -> None:
    await house.post("a", 0.5)
    not_loaded = await house.http.put("/models/shadow", json={"model": "tiny/2"})
    assert not_loaded.json()["type"] == "/problems/model-not-loaded"
    active = await house.http.put("/models/shadow", json={"model": "tiny/1"})
    assert active.json()["type"] == "/problems/model-active"
    for version in (2, 3):
        await house.ready(version)

    async def trial() -> Any:
        body = (await house.http.get("/models")).json()
        return body["shadow"] and body["shadow"]["model"]

    await house.http.put("/models/shadow", json={"model": "tiny/2"})
    await house.http.put("/models/shadow", json={"model": "tiny/3"})
    assert await trial() == "tiny/3"
    await house.control(2, "activate")
    assert await trial() is None
    await house.http.put("/models/shadow", json={"model": "tiny/3"})
    await house.control(3, "unload")
    assert await trial() is None
    await house.http.put("/models/shadow", json={"model": "tiny/1"})
    assert await trial() == "tiny/1"
    assert (await house.http.delete("/models/shadow")).status_code == 204
    assert await trial() is None
    await house.post("a", 1.5)
    await house.risk("a")
    assert house.models.active.live.on_scored(None) is None


def scored(episode: str, seq: int, mortality: float = 0.5) -> Scored:
    """Of a stay with one hour of data."""
    admission = Draft(kind="admission", payload={"admitted_at": stamp(0), "statics": {}})
    view = replace(episode_at(entries(admission, episode=episode)), seq=seq, head_hour=0)
    scores = fake_scores(view, 1)
    hours = (replace(scores.hours[0], mortality=mortality),)
    return Scored(view=view, scores=replace(scores, seq=seq, hours=hours))


@pytest.fixture
def trial() -> Shadow:
    return Shadow(Counts(ShadowMetrics(CollectorRegistry()), "tiny/2"))


def test_only_equal_entries_are_compared(trial: Shadow) -> None:
    trial.active_scored(scored("a", 2, 0.1))
    trial.active_scored(scored("a", 3, 0.2))  # the other was too slow for 2
    trial.trial_scored(scored("b", 3, 0.9))
    assert (trial.compared, trial.dropped) == (0, 1)
    trial.trial_scored(scored("a", 3, 0.5))
    assert (trial.compared, trial.dropped) == (1, 1)
    assert trial.changes["mortality"].largest == pytest.approx(0.3)
    assert trial.changes["decompensation"].largest == 0
    trial.trial_scored(scored("a", 4, 0.5))
    trial.active_scored(scored("a", 4, 0.6))  # whoever is first
    assert (trial.compared, trial.dropped) == (2, 1)
    assert trial.changes["mortality"].mean == pytest.approx(0.2)


def test_what_waits_is_bounded(trial: Shadow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "_MAX_WAITING", 3)
    for i in range(5):
        trial.active_scored(scored(f"e{i}", 2))
    assert (len(trial._waiting), trial.dropped) == (3, 2)
    for i in (2, 3, 4):
        trial.trial_scored(scored(f"e{i}", 2))
    assert (trial.compared, len(trial._waiting)) == (3, 0)
