"""What says who a client is: recognised, or refused; never broken, never repeated."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from service.access.clients import Client, Clients, parse
from service.access.gateway import Gateways
from service.access.keys import digest, new_key
from service.access.opening import Configured
from service.access.principal import Scope
from service.api import limits
from tests.fuzz.hostile import damaged, marked
from tests.fuzz.house import MARK, asked, attempt, examples, tried

KEY = new_key("client")
_latin = st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=80)
_tokens = st.lists(st.text("abcXYZ019-_=+/.", max_size=40), min_size=1, max_size=5).map(".".join)
_keys = damaged(KEY.encode()).map(lambda data: data.decode("latin-1"))
_values = st.one_of(
    _latin,
    marked.map(lambda text: text.encode("utf-8", "replace").decode("latin-1")),
    st.tuples(
        st.sampled_from(["Bearer ", "bearer ", "Bearer  ", "Bearer\t", "Basic ", ""]),
        _keys | _tokens | st.just("a" * 20_000),
    ).map("".join),
)
HEADERS = ["authorization", "x-client-subject", "x-gateway-secret", "x-forwarded-for"]


def test_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FAILURES_AT_ONCE", 1e9)
    client = Client(id="client", scopes=frozenset(Scope), key_sha256=(digest(KEY),))
    authenticator = Configured(lambda: Clients([client]), None, Gateways((), ()))
    with asked(tmp_path, authenticator=authenticator) as service:

        @examples(300)
        @given(st.lists(st.tuples(st.sampled_from(HEADERS), _values), max_size=4))
        def check(headers: list[tuple[str, str]]) -> None:
            tried("credentials")
            raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
            said = [value.strip().partition(" ") for name, value in headers if name == HEADERS[0]]
            right = len(said) == 1 and said[0][0].lower() == "bearer" and said[0][2].strip() == KEY
            answer = service.request("GET", "/episodes", headers=raw)
            assert right or answer.status_code == 401

        check()
        good = {"authorization": f"Bearer {KEY}"}
        assert service.request("GET", "/episodes", headers=good).status_code == 200


_SOUND = yaml.safe_dump(
    {"clients": [{"id": "a", "scopes": ["read"], "key_sha256": [digest(KEY)], "episodes": ["*"]}]}
)
_names = st.sampled_from(["clients", "id", "scopes", "key_sha256", "units", "episodes", "expires"])
_bodies = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | marked | st.just("read"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names | marked, inner, max_size=5),
)


@examples(300)
@example("a: &a [x]\nb: [*a, *a]")
@example("!!python/object/apply:os.system ['true']")
@example("[" * 5000)
@given(
    damaged(_SOUND.encode()).map(lambda data: data.decode("utf-8", "replace"))
    | _bodies.map(lambda body: yaml.safe_dump({"clients": [body]}, allow_unicode=True))
    | _bodies.map(yaml.safe_dump)
    | st.text()
)
def test_clients_files(text: str) -> None:
    tried("clients files")
    found = attempt(ValueError, lambda: Clients(parse(text)))
    if isinstance(found, ValueError):
        assert MARK not in str(found)
    else:
        assert all(client.scopes for client in found.entries)
