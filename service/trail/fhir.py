"""Lines of the audit trail as FHIR R4 AuditEvent, after IHE BALP for RESTful operations.

BALP describes operations that succeeded on one object; only such events claim its profile. What
was refused or failed, lists, and the control of models have the same form without the claim. The
codes are those of https://profiles.ihe.net/ITI/BALP.
"""

from __future__ import annotations

from typing import Any

from service.entries import from_us
from service.times import format_time
from service.trail.record import Action, AuditRecord

_BALP = "https://profiles.ihe.net/ITI/BALP"
_HL7 = "http://terminology.hl7.org/CodeSystem"
_DICOM = "http://dicom.nema.org/resources/ontology/DCM"
_INTERACTIONS = "http://hl7.org/fhir/restful-interaction"

_CODES: dict[Action, str] = {
    "create": "C", "read": "R", "update": "U", "delete": "D", "execute": "E",
}  # fmt: skip
_SUBTYPES: dict[Action, str] = {
    "create": "create", "read": "read", "update": "update", "delete": "delete",
    "execute": "operation",
}  # fmt: skip
_OUTCOMES = {"success": "0", "refused": "4", "failed": "8"}
_SEARCHES = frozenset({"listEpisodes", "listModels"})

_SOURCE = {"system": _DICOM, "code": "110153", "display": "Source Role ID"}
_DESTINATION = {"system": _DICOM, "code": "110152", "display": "Destination Role ID"}
_APPLICATION = {"system": _DICOM, "code": "110150", "display": "Application"}
_CUSTODIAN = {
    "system": f"{_HL7}/provenance-participant-type", "code": "custodian", "display": "Custodian",
}  # fmt: skip


def audit_event(event_id: str, record: AuditRecord, server: str) -> dict[str, Any]:
    """An AuditEvent as JSON. `server` is the name by which clients know the service."""
    search = record.operation in _SEARCHES
    subtype = "search-type" if search else _SUBTYPES[record.action]
    event: dict[str, Any] = {
        "resourceType": "AuditEvent",
        "id": event_id,
        "type": {
            "system": f"{_HL7}/audit-event-type", "code": "rest", "display": "RESTful Operation",
        },
        "subtype": [{"system": _INTERACTIONS, "code": subtype, "display": subtype}],
        "action": "E" if search else _CODES[record.action],
        "recorded": format_time(from_us(record.at_us)),
        "outcome": _OUTCOMES[record.outcome],
        "agent": _agents(record, server),
        "source": {
            "observer": {"display": server},
            "type": [
                {
                    "system": f"{_HL7}/security-source-type", "code": "4",
                    "display": "Application Server",
                }
            ],
        },
        "entity": [*map(_episode, record.episodes), _request(record)],
    }  # fmt: skip
    if _is_balp(record, search):
        profile = f"{_BALP}/StructureDefinition/IHE.BasicAudit.{record.action.capitalize()}"
        event["meta"] = {"profile": [profile]}
    return event


def _is_balp(record: AuditRecord, search: bool) -> bool:
    return (
        record.outcome == "success"
        and record.action != "execute"
        and not search
        and len(record.episodes) == 1
        and record.address != ""
    )


def _agents(record: AuditRecord, server: str) -> list[dict[str, Any]]:
    """The client, who asked for it, and the service."""
    deletion = record.action == "delete"
    client: dict[str, Any] = {
        "type": {"coding": [_APPLICATION if deletion else _SOURCE]},
        "who": {"identifier": {"value": record.principal}},
        "requestor": True,
    }
    if record.address:
        client["network"] = {"address": record.address, "type": "2"}  # an IP address
    service = {
        "type": {"coding": [_CUSTODIAN if deletion else _DESTINATION]},
        "who": {"display": server},
        "requestor": False,
        "network": {"address": server, "type": "1"},  # a name
    }
    return [client, service]


def _episode(episode_id: str) -> dict[str, Any]:
    return {
        "what": {"type": "Encounter", "identifier": {"value": episode_id}},
        "type": {
            "system": f"{_HL7}/audit-entity-type", "code": "2", "display": "System Object",
        },
        "role": {"system": f"{_HL7}/object-role", "code": "4", "display": "Domain Resource"},
    }  # fmt: skip


def _request(record: AuditRecord) -> dict[str, Any]:
    return {
        "what": {"identifier": {"value": record.request_id}},
        "type": {
            "system": f"{_BALP}/CodeSystem/BasicAuditEntityType", "code": "XrequestId",
        },
        "detail": [
            {"type": "operation", "valueString": record.operation},
            {"type": "authentication", "valueString": record.method},
        ],
    }  # fmt: skip
