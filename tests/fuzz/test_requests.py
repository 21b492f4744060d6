"""Paths, query strings and headers through the whole service: an answer or a named problem."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.tracing_otel import OtelTracing
from tests.fuzz.hostile import damaged, long_texts, marked
from tests.fuzz.house import MARK, Asked, asked, examples, tried
from tests.service.fakes import hr, stamp, three_hours

PATHS = [
    *["/episodes", "/episodes/e", "/episodes/e/risk", "/episodes/e/embeddings", "/models"],
    *["/models/llm4ehr/versions/1", "/operator/summary", "/v2", "/v2/health/ready", "/metrics"],
    *["/v2/models/llm4ehr", "/v2/models/llm4ehr/versions/1/ready", "/openapi.json"],
]
PARAMETERS = [
    *["as_of", "min_seq", "hour", "from", "to", "model_version", "sort", "order", "limit"],
    *["cursor", "min_risk", "status", "unknown"],
]
HEADERS = [
    *["if-none-match", "prefer", "traceparent", "tracestate", "x-request-id", "authorization"],
    *["x-forwarded-for", "x-client-subject", "x-gateway-secret", "accept", "host", "cookie"],
    *["content-length", "range", "origin", "access-control-request-method", "baggage"],
]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Asked]:
    with asked(tmp_path, requests_per_second_per_client=None) as service:
        service.run(three_hours(service.client))
        yield service


_numbers = st.integers().map(str) | st.sampled_from(
    ["1", "2", "3", "-1", "1.0", "1e3", "nan", "inf", "9" * 5000, "0x1", " 1", "1_0"]
)
_words = st.sampled_from(
    ["risk", "episode_id", "asc", "open", "llm4ehr/1", "1", "2/1", stamp(1), stamp(9), "", "+"]
)
_values = marked | long_texts | _numbers | _words
_queries = st.lists(st.tuples(st.sampled_from(PARAMETERS), _values), max_size=4)


def test_query_strings(service: Asked) -> None:
    @examples(300)
    @given(st.sampled_from(PATHS), _queries, st.booleans())
    def check(path: str, query: list[tuple[str, str]], raw: bool) -> None:
        tried("query strings")
        safe = "+&;=%\x00" if raw else ""
        parts = [f"{name}={quote(value, safe=safe, errors='replace')}" for name, value in query]
        service.request("GET", f"{path}?{'&'.join(parts)}".replace("\x00", "%00"))

    check()


_latin = st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=60)
_header_values = st.one_of(
    marked.map(lambda text: text.encode("utf-8", "replace").decode("latin-1")),
    _latin,
    _numbers,
    st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", fullmatch=True),
    st.sampled_from(["wait=0", "wait=1", "*", "Bearer x", "Bearer", "Basic eDp5", "a" * 9000, ""]),
)


def test_headers(service: Asked) -> None:
    @examples(300)
    @given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(HEADERS), _header_values))
    def check(path: str, headers: dict[str, str]) -> None:
        tried("headers")
        # Zero seconds are not enough where there is something to wait for.
        late = ["deadline-exceeded"] if "wait=0" in headers.get("prefer", "") else []
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        service.request("GET", path, may_be=late, headers=raw)

    check()


_trace_parents = st.one_of(
    damaged(b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").map(
        lambda data: data.decode("latin-1")
    ),
    _header_values,
)


def test_trace_parents(tmp_path: Path) -> None:
    """With tracing on, where the header is read."""
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    with asked(tmp_path, tracing=OtelTracing(provider)) as service:

        @examples(200)
        @given(st.lists(_trace_parents, max_size=2))
        def check(values: list[str]) -> None:
            tried("trace parents")
            raw = [(b"traceparent", value.encode("latin-1")) for value in values]
            assert service.request("GET", "/episodes", headers=raw).status_code == 200
            assert MARK not in str([span.to_json() for span in spans.get_finished_spans()])
            spans.clear()

        check()


_ids = st.text(max_size=140) | st.sampled_from(["e", "E", "..", "%2e%2e", "e%2Frisk", "e\n", "-"])


def test_episode_ids(service: Asked) -> None:
    methods = st.sampled_from(
        [("GET", ""), ("GET", "/risk"), ("PUT", ""), ("DELETE", ""), ("POST", "/observations")]
    )

    @examples(200)
    @given(methods, _ids | marked)
    def check(method: tuple[str, str], episode_id: str) -> None:
        tried("episode ids")
        path = f"/episodes/{quote(episode_id, safe='', errors='replace')}{method[1]}"
        items = {"observations": [hr()]} if method[0] == "POST" else {}
        body = {"admitted_at": stamp(0), **items}
        before = service.rows()
        response = service.request(method[0], path, json=body)
        if response.status_code >= 400 or method[0] == "GET":
            assert service.rows() == before

    check()


_segments = st.lists(marked | st.sampled_from(["episodes", "e", "v2", "models", "..", "", "."]))


def test_paths(service: Asked) -> None:
    verbs = st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"])

    @examples(200)
    @given(verbs, _segments)
    def check(verb: str, segments: list[str]) -> None:
        tried("paths")
        parts = [quote(segment, safe=".", errors="replace") for segment in segments]
        before = service.rows()
        http = service.client.http
        answer = service.run(http.request(verb, "http://test/" + "/".join(parts)))
        assert answer.status_code < 500
        assert service.rows() == before

    check()
