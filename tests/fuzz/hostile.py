"""Strategies for what clients should not send: texts, numbers, and JSON that no library writes."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from tests.fuzz.house import MARK

_TEXTS = st.text(max_size=30) | st.sampled_from(
    [
        "",
        " ",
        "\x00",
        "\x7f",
        "\u202e",
        "'; DROP TABLE log; --",
        "../../etc/passwd",
        "%00",
        "{{7*7}}",
    ]
)
marked = _TEXTS.map(lambda text: MARK + text)
"""Texts that begin with the mark."""

long_texts = st.integers(200, 20_000).map(lambda n: MARK + "a" * n)

# As they stand in JSON, or would if it had them.
_NUMBERS = st.one_of(
    st.sampled_from(
        [
            *["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "-0", "-0.0", "1E400"],
            *["9" * 400, "-" + "9" * 4400, "0." + "3" * 400, "9007199254740993", "1e308"],
            *["5e-324", "true", "false", "null"],
        ]
    ),
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
)
_ODD_STRINGS = st.sampled_from(
    ['"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\\u202e"', '"12"', '"NaN"', '""', '"1e3"']
)
_STRINGS = (marked | long_texts).map(json.dumps)
scalars = _NUMBERS | _ODD_STRINGS | _STRINGS
mild = st.integers(-(10**30), 10**30).map(str) | marked.map(json.dumps) | _NUMBERS
"""What parses, but for a number of thousands of digits."""


def _nested(depth: int) -> str:
    return "[" * depth + "]" * depth


_nests = st.integers(1, 400).map(_nested) | st.integers(1, 400).map(
    lambda depth: '{"a":' * depth + "1" + "}" * depth
)


def _array(parts: list[str]) -> str:
    return f"[{','.join(parts)}]"


def _object(pairs: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"


def objects(names: list[str], values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """JSON objects of these names, of others, and of the same one twice."""
    keys = st.sampled_from(names).map(json.dumps) | marked.map(json.dumps)
    return st.lists(st.tuples(keys, values), max_size=8).map(_object)


def arrays(values: st.SearchStrategy[str], max_size: int = 6) -> st.SearchStrategy[str]:
    """JSON arrays."""
    return st.lists(values, max_size=max_size).map(_array)


json_texts = st.recursive(
    scalars | _nests, lambda inner: arrays(inner) | objects(["a", "id"], inner), max_leaves=12
)
"""Any JSON value, as text."""


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with some of them changed, inserted, dropped or cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["change", "insert", "drop", "cut", "repeat"])):
            case "change" if data:
                data[place] = draw(st.integers(0, 255))
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=4))
            case "drop":
                del data[place : place + draw(st.integers(1, 8))]
            case "repeat":
                data[place:place] = data[place : place + draw(st.integers(1, 40))]
            case _:
                del data[place:]
    return bytes(data)
