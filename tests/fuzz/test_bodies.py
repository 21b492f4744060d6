"""Bodies that nobody should send: answered by name, never recorded in part, never repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from pydantic_core import from_json

from service.api import examples as worked
from service.ingest import Batch, Known, Rules, Validator
from tests.fuzz.hostile import arrays, damaged, json_texts, marked, mild, objects, scalars
from tests.fuzz.house import MARK, Asked, asked, attempt, examples, tried
from tests.service.fakes import T0, VOCABULARY, Clock, at, hr, stamp

JSON = {"content-type": "application/json"}
POST = "/episodes/e/observations"
ROUTES = [("POST", POST), ("PUT", "/episodes/e"), ("PATCH", "/episodes/e")]
NAMES = ["observations", "events", "withdrawals", "admitted_at", "discharged_at", "statics", "id"]

_good = {
    "id": '"i"',
    "variable": '"hr"',
    "code": '"2160-0"',
    "system": '"http://loinc.org"',
    "value": "80.5",
    "unit": '"mg/dL"',
    "time": json.dumps(stamp(0.5)),
    "available_at": json.dumps(stamp(0.75)),
    "corrects": '"other"',
    "withdraws": '"other"',
    "display": '"Creatinine"',
}


@st.composite
def items(draw: st.DrawFn, values: st.SearchStrategy[str] = mild) -> str:
    """An item that is good but for some of its fields."""
    names = draw(
        st.sampled_from(
            [
                ["variable", "value", "time"],
                ["code", "system", "value", "unit", "time"],
                ["withdraws", "id"],
            ]
        )
    )
    more = draw(st.lists(st.sampled_from(sorted(_good)), max_size=3))
    fields = [(json.dumps(name), _good[name]) for name in dict.fromkeys([*names, *more])]
    for _ in range(draw(st.integers(0, 2))):
        fields.append((draw(st.sampled_from(sorted(_good)).map(json.dumps)), draw(values)))
    return "{" + ",".join(f"{key}:{value}" for key, value in fields) + "}"


_lists = arrays(items()) | arrays(items() | items(json_texts) | json_texts)
_structured = st.tuples(_lists, _lists, _lists).map(
    lambda lists: "{" + ",".join(map('"{}":{}'.format, NAMES[:3], lists)) + "}"
)
_admissions = objects(NAMES, json_texts | st.sampled_from([json.dumps(stamp(0)), "null", "{}"]))
_statics = objects(
    ["age_years", "sex", "unit_type", "height_cm", "weight_kg"],
    scalars | st.sampled_from(['"female"', "67", '"medical"']),
).map(lambda statics: f'{{"admitted_at":{json.dumps(stamp(0))},"statics":{statics}}}')
_sound = [json.dumps(body).encode() for body in (worked.POST_REQUEST, worked.PUT_REQUEST)]
_any = st.one_of(
    json_texts.map(str.encode), st.sampled_from(_sound).flatmap(damaged), st.binary(max_size=200)
)
requests = st.one_of(
    st.tuples(st.just(("POST", POST)), _structured.map(str.encode)),
    st.tuples(st.sampled_from(ROUTES), _statics.map(str.encode) | _admissions.map(str.encode)),
    st.tuples(st.sampled_from(ROUTES), _any),
)


def _holds(service: Asked, method: str, path: str, content: bytes) -> None:
    before = service.rows()
    response = service.request(method, path, content=content, headers=JSON)
    added = service.rows() - before
    if response.status_code >= 400:
        assert added == 0
        return
    body = response.json()
    if method == "POST":
        n_admissions = 1 if body["admission"] == "created" else 0
        assert added == body["accepted"] + n_admissions
        for item in body["items"]:
            item.pop("item_id")
            assert MARK not in json.dumps(item)
    for read in ("/episodes/e", "/episodes/e/risk", "/episodes"):
        assert service.request("GET", read).status_code == 200


def test_bodies(tmp_path: Path) -> None:
    with asked(tmp_path) as service:
        service.run(service.client.admit())

        @examples(400)
        @given(requests)
        def check(request: tuple[tuple[str, str], bytes]) -> None:
            tried("bodies")
            route, content = request
            _holds(service, *route, content)

        check()


def test_bodies_of_model_control(tmp_path: Path) -> None:
    with asked(tmp_path, model_control=True) as service:

        @examples(60)
        @given(objects(["model"], json_texts | marked.map(json.dumps)) | json_texts)
        def check(content: str) -> None:
            tried("bodies")
            response = service.request(
                "PUT", "/models/shadow", content=content.encode(), headers=JSON
            )
            assert response.status_code >= 400

        check()


def test_headers_of_bodies(tmp_path: Path) -> None:
    with asked(tmp_path) as service:
        names = st.sampled_from(["content-type", "content-encoding", "content-length", "expect"])
        values = st.one_of(
            st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=40),
            st.integers(0).map(str),
            st.sampled_from(["9" * 5000, "application/json", "gzip", "-1", "application/x+json"]),
        ).map(lambda text: text.encode("latin-1"))
        content = json.dumps({"admitted_at": stamp(0), "observations": [hr()]}).encode()

        @examples(150)
        @example({b"content-type": b"application/json", b"content-length": b"9" * 5000})
        @given(st.dictionaries(names.map(str.encode), values))
        def check(headers: dict[bytes, bytes]) -> None:
            tried("headers")
            service.request("POST", POST, content=content, headers=list(headers.items()))

        check()


_raw = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | marked,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(sorted(_good)) | marked, inner, max_size=6)
    ),
    max_leaves=12,
)
_parsed = (
    items()
    .map(lambda text: attempt(ValueError, lambda: from_json(text)))
    .filter(lambda item: not isinstance(item, ValueError))
)
_clock = Clock(at(1))


@examples(300)
@given(st.lists(_parsed | _raw, max_size=4), st.integers(-200, 200))
def test_items(raw: list[Any], hours: int) -> None:
    """Without the parser before: every item is judged, whatever it is made of."""
    tried("items")
    rules = Rules(
        vocabulary=VOCABULARY,
        future_tolerance=_clock.now - T0,
        allowed_lateness=_clock.now - T0,
    )
    known = Known(admitted_at=at(hours), discharged_at=None, seq=3, by_id={}, by_content={})
    validator = Validator(known, rules, _clock.now)
    validator.check(Batch(observations=raw, events=raw, withdrawals=raw))
    assert len(validator.results) == 3 * len(raw)
    accepted = [result for result in validator.results if result.status == "accepted"]
    assert len(accepted) == len(validator.drafts)
    for result in validator.results:
        assert result.error is None or MARK not in result.error.detail
        assert MARK not in "".join(result.flags)
