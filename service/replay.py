"""Replay the stays of an episode store into a running service, hour by hour, over HTTP.

For demonstrations and load tests. A stay of n hours is admitted n hours before now, so that none of
its items lies in the future, however fast it is replayed.
"""

from __future__ import annotations

import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from llm4ehr.episode import Episode
from llm4ehr.hourly import hour_of
from llm4ehr.store import EpisodeStore
from llm4ehr.variables import VARIABLES

_log = logging.getLogger(__name__)

DEMO_STORE = Path(__file__).parent / "demo" / "store"
"""Stays that come with the service."""

_SYSTEM_URIS = {"LOINC": "http://loinc.org", "SNOMED": "http://snomed.info/sct"}


def admission(episode: Episode, admitted_at: datetime) -> dict[str, Any]:
    """Body of `PUT /episodes/{id}`."""
    facts = {
        name: getattr(episode.statics, name)
        for name in ("age_years", "sex", "unit_type", "height_cm", "weight_kg")
        if getattr(episode.statics, name) is not None
    }
    return {"admitted_at": admitted_at.isoformat(), "statics": facts}


def hourly_bodies(
    episode: Episode, admitted_at: datetime, units: dict[str, str | None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Bodies of `POST /episodes/{id}/observations`, one for each hour that has items."""
    items: dict[int, dict[str, Any]] = {}

    def into(hours: float) -> dict[str, Any]:
        hour = int(hour_of(hours))
        return items.setdefault(hour, {"observations": [], "events": []})

    for v, hours, value, priority in zip(
        episode.obs_variable.tolist(),
        episode.obs_hours.tolist(),
        episode.obs_value.tolist(),
        episode.obs_priority.tolist(),
        strict=True,
    ):
        variable = VARIABLES[v]
        # A second-choice source (a cuff beside an arterial line) says so by its code.
        what = {"variable": variable.name}
        if priority and variable.loinc_fallback:
            what = {"code": variable.loinc_fallback[0], "system": _SYSTEM_URIS["LOINC"]}
        time_of = (admitted_at + timedelta(hours=hours)).isoformat()
        item = what | {"value": value, "unit": variable.unit, "time": time_of}
        into(hours)["observations"].append(item)
    for code, hours, value in zip(
        episode.ev_code.tolist(), episode.ev_hours.tolist(), episode.ev_value.tolist(), strict=True
    ):
        system, _, local = code.partition("/")
        item = {
            "code": local,
            "system": _SYSTEM_URIS.get(system, system),
            "time": (admitted_at + timedelta(hours=hours)).isoformat(),
        }
        if not np.isnan(value):
            item |= {"value": value, "unit": units[code]}
        into(hours)["events"].append(item)
    yield from sorted(items.items())


def replay(
    data: Path, url: str, *, seconds_per_hour: float, head_start_hours: int, key: str | None = None
) -> None:
    """Replay every stay of a store side by side, as the client that has the API key.

    The first `head_start_hours` are sent at once, then one hour every `seconds_per_hour`. Raises
    OSError when the service cannot be reached.
    """
    store = EpisodeStore.open(data)
    units = {code: info.unit for code, info in store.codes.items()}
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    now = datetime.now(UTC)
    queues: dict[str, dict[int, dict[str, Any]]] = {}
    for record in store:
        episode = record.episode
        admitted_at = now - timedelta(hours=episode.n_hours)
        path = f"{url}/episodes/{episode.episode_id}"
        _send(path, "PUT", admission(episode, admitted_at), headers)
        bodies = hourly_bodies(episode, admitted_at, units)
        # The record may end with items at its very last minute, in an hour that has not come yet.
        queues[episode.episode_id] = {h: b for h, b in bodies if h < episode.n_hours}
    last_hour = max((max(q, default=0) for q in queues.values()), default=0)
    for hour in range(last_hour + 1):
        for episode_id, bodies_of in queues.items():
            if hour in bodies_of:
                path = f"{url}/episodes/{episode_id}/observations"
                _send(path, "POST", bodies_of[hour], headers)
        if hour >= head_start_hours:
            time.sleep(seconds_per_hour)
    _log.info("replayed %d stays", len(queues))


def _send(url: str, method: str, body: dict[str, Any], headers: dict[str, str]) -> None:
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), method=method, headers=headers
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        answer = json.load(error)
        # A refusal of every item is an answer about the data, not a failure to replay.
        if "items" not in answer:
            raise OSError(f"{method} was answered {error.code}: {answer.get('detail')}") from error
    if answer.get("rejected"):
        kinds = {item["error"]["type"] for item in answer["items"] if "error" in item}
        _log.warning("refused items: %s", ", ".join(sorted(kinds)))
