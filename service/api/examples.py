"""One stay, told through the worked examples of the API description."""

from __future__ import annotations

from typing import Any

_EPISODE = "icu-2041"
_MODEL: dict[str, Any] = {
    "model": "llm4ehr",
    "version": "1",
    "digest": "9f2c41d8a1b7c3e05d6f8091a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5",
    "preprocessing_digest": "41d8a1b7c3e05d6f8091a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d59f2c",
    "numerics": {
        "precision": "fp32",
        "backend": "torch-cpu",
        "rows": 32,
        "threads": 1,
        "kernel": "compiled",
        "gate": None,
    },
}
_HOUR: dict[str, Any] = {
    "hour": 1,
    "hour_start": "2026-03-01T09:00:00Z",
    "hour_end": "2026-03-01T10:00:00Z",
    "status": "preliminary",
    "imputed_share": 0.909,
    "data_age_hours": 0.75,
    "score_withheld": None,
}
_PROVENANCE: dict[str, Any] = {
    **_MODEL,
    "seq": 4,
    "as_of": None,
    "newest_data_at": "2026-03-01T09:15:00Z",
}

POST_REQUEST: dict[str, Any] = {
    "admitted_at": "2026-03-01T08:00:00Z",
    "statics": {"age_years": 67, "sex": "female", "unit_type": "medical"},
    "observations": [
        {"id": "mon-1", "variable": "hr", "value": 92, "time": "2026-03-01T08:05:00Z"},
        {
            "id": "mon-2",
            "code": "8480-6",
            "system": "http://loinc.org",
            "value": 15.2,
            "unit": "kPa",
            "time": "2026-03-01T09:15:00Z",
        },
        {"id": "mon-3", "variable": "glucose", "value": 7.1, "time": "2026-03-01T09:15:00Z"},
    ],
    "events": [
        {
            "id": "lab-1",
            "code": "2160-0",
            "system": "http://loinc.org",
            "display": "Creatinine",
            "value": 1.4,
            "unit": "mg/dL",
            "time": "2026-03-01T08:40:00Z",
            "available_at": "2026-03-01T09:10:00Z",
        }
    ],
}
POST_CORRECTION: dict[str, Any] = {
    "observations": [
        {
            "id": "mon-1b",
            "corrects": "mon-1",
            "variable": "hr",
            "value": 29,
            "time": "2026-03-01T08:05:00Z",
        }
    ],
    "withdrawals": [{"withdraws": "lab-1"}],
}


def _item(list_: str, index: int, status: str, item_id: str, seq: int | None) -> dict[str, Any]:
    return {
        "list": list_,
        "index": index,
        "status": status,
        "item_id": item_id,
        "seq": seq,
        "flags": [],
    }


POST_ANSWER: dict[str, Any] = {
    "episode_id": _EPISODE,
    "seq": 4,
    "admission": "created",
    "accepted": 3,
    "duplicates": 0,
    "rejected": 1,
    "items": [
        _item("observations", 0, "accepted", "mon-1", 2),
        _item("observations", 1, "accepted", "mon-2", 3),
        _item("observations", 2, "rejected", "mon-3", None)
        | {"error": {"type": "unit-missing", "detail": "accepted: mg/dL, mmol/L"}},
        _item("events", 0, "accepted", "lab-1", 4),
    ],
}
PUT_REQUEST: dict[str, Any] = {
    "admitted_at": "2026-03-01T08:00:00Z",
    "statics": {"age_years": 67, "sex": "female", "unit_type": "medical", "weight_kg": 71.5},
}
PATCH_DISCHARGE: dict[str, Any] = {"discharged_at": "2026-03-04T11:30:00Z"}
PATCH_ADMISSION: dict[str, Any] = {
    "admitted_at": "2026-03-01T07:40:00Z",
    "statics": {"height_cm": 168},
}
EPISODE: dict[str, Any] = {
    "episode_id": _EPISODE,
    "seq": 4,
    "admitted_at": "2026-03-01T08:00:00Z",
    "discharged_at": None,
    "updated_at": "2026-03-01T09:16:02.120411Z",
    "statics": {"age_years": 67, "sex": "female", "unit_type": "medical"},
    "head_hour": 1,
    "newest_data_at": "2026-03-01T09:15:00Z",
    "counts": {"observations": 2, "events": 1, "corrected": 0, "withdrawn": 0},
    "ignored": {},
}
RISK: dict[str, Any] = {
    "episode_id": _EPISODE,
    "seq": 4,
    "score_withheld": None,
    "hours": [
        {
            **_HOUR,
            "decompensation": 0.0312,
            "mortality": 0.118,
            "remaining_los_hours": 92.4,
            "remaining_los_interval_hours": {"low": 31.7, "high": 226.0, "coverage": 0.9},
            "phenotypes": {"Septicemia (except in labor)": 0.204},
        }
    ],
    "provenance": _PROVENANCE,
}
EMBEDDINGS: dict[str, Any] = {
    "episode_id": _EPISODE,
    "seq": 4,
    "score_withheld": None,
    "hours": [{**_HOUR, "embedding": [0.0127, -0.431, 0.0884]}],
    "provenance": _PROVENANCE,
}
EPISODES: dict[str, Any] = {
    "episodes": [
        {
            "episode_id": _EPISODE,
            "seq": 4,
            "admitted_at": "2026-03-01T08:00:00Z",
            "discharged_at": None,
            "updated_at": "2026-03-01T09:16:02.120411Z",
            "newest_data_at": "2026-03-01T09:15:00Z",
            "hour": 1,
            "status": "preliminary",
            "risk": 0.0312,
            "decompensation": 0.0312,
            "mortality": 0.118,
            "remaining_los_hours": 92.4,
            "scored_seq": 4,
            "score_withheld": None,
        }
    ],
    "next_cursor": None,
    "complete": True,
    "provenance": _MODEL,
}

OPERATOR_SUMMARY: dict[str, Any] = {
    "service": {
        "version": "0.1.0",
        "uptime_seconds": 86412.7,
        "ready": True,
        "draining": False,
        "scoring_enabled": True,
        "authentication": "required",
    },
    "model": {
        "name": _MODEL["model"],
        "version": _MODEL["version"],
        "digest": _MODEL["digest"],
        "preprocessing_digest": _MODEL["preprocessing_digest"],
    },
    "engine": {
        "threads": 3,
        "slot_kernel": "compiled",
        "models": [
            {
                "model": "llm4ehr/1",
                "backend": "torch-cpu",
                "tick_sizes": [4, 8, 16, 32],
                "slots_used": 212,
                "slots_free": 443,
                "slots_lost": 0,
                "stays": 212,
                "pending_stays": 0,
            }
        ],
    },
    "log": {"available": True, "waiting_writes": 0},
    "catch_up": {"complete": True, "episodes": 1204, "to_score": 212, "scored": 212},
    "last": {
        "seconds": 300.4,
        "figures": {
            "commit": {"per_second": 3.2, "p50": 0.0031, "p99": 0.0089},
            "engine_queue": {"per_second": 3.3, "p50": 0.0016, "p99": 0.0064},
            "engine_tick": {"per_second": 3.4, "p50": 0.0015, "p99": 0.0047},
            "engine_answer": {"per_second": 3.3, "p50": 0.0017, "p99": 0.0071},
            "score_published": {"per_second": 3.2, "p50": 0.0018, "p99": 0.0081},
            "event_loop_lag": {"per_second": 2.0, "p50": 0.0003, "p99": 0.0012},
        },
    },
    "since_start": {
        "evictions": 0,
        "out_of_memory": 0,
        "model_faults": 0,
        "audits": 1430,
        "mismatches": 0,
        "rows": {"new": 96120, "correction": 1033, "rebuild": 7210, "past": 312},
        "refusals": {"overloaded": 0, "deadline-exceeded": 0},
    },
}
_VERSION: dict[str, Any] = {
    "name": "llm4ehr",
    "version": "2",
    "state": "ready",
    "since": "2026-03-01T09:20:00Z",
    "digest": "b7c3e05d6f8091a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d59f2c41d8a1",
    "preprocessing_digest": _MODEL["preprocessing_digest"],
    "slots": {"used": 61, "free": 594, "lost": 0},
    "progress": {"scored": 61, "total": 61, "behind": 0, "failed": 0},
    "failure": None,
}
_NOT_LOADED: dict[str, Any] = {
    "digest": None,
    "preprocessing_digest": None,
    "slots": None,
    "progress": None,
}
PUT_SHADOW: dict[str, Any] = {"model": "llm4ehr/2"}
SHADOW: dict[str, Any] = {
    "model": "llm4ehr/2",
    "against": "llm4ehr/1",
    "since": "2026-03-01T09:25:00Z",
    "until": None,
    "compared": 912,
    "dropped": 3,
    "failed": 0,
    "changes": {
        "decompensation": {"n": 912, "mean": 0.0041, "max": 0.083},
        "remaining_los": {"n": 912, "mean": 3.2, "max": 29.7},
    },
}
MODEL_READY = _VERSION
MODEL_LOADING = _VERSION | _NOT_LOADED | {"state": "loading"}
MODEL_ACTIVE = _VERSION | {"state": "active"}
MODELS: dict[str, Any] = {
    "active": "llm4ehr/1",
    "shadow": SHADOW,
    "trials": [SHADOW],
    "versions": [
        _VERSION
        | {"version": "1", "digest": _MODEL["digest"]}
        | {"state": "active", "since": "2026-03-01T06:00:00Z"},
        _VERSION,
        _VERSION
        | _NOT_LOADED
        | {
            "version": "3",
            "state": "failed",
            "failure": {
                "type": "bundle-invalid",
                "detail": "llm4ehr/3/model.safetensors: SHA-256 differs from the manifest",
            },
        },
    ],
}
