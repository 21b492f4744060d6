"""Event codes: fitting, deciles, scales, and what a bundle keeps of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from llm4ehr.vocabulary import N_DECILES, CodeEntry, Vocabulary, fit_vocabulary

NAN = float("nan")


def fit(values: NDArray[np.float64] | list[float]) -> CodeEntry:
    made = fit_vocabulary({"LOINC/1": np.asarray(values, float)}, {"LOINC/1": ("a code", "mg/dL")})
    return made.entries[0]


def test_deciles_are_the_inner_edges_of_the_training_values() -> None:
    entry = fit(np.arange(101.0))
    assert_allclose(entry.deciles, [10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert (entry.scale, entry.n, entry.unit) == ("linear", 101, "mg/dL")
    assert (entry.low, entry.high) == pytest.approx((0.5, 99.5))


def test_repeated_edges_are_kept_once() -> None:
    assert fit([1.0] * 70 + [2.0] * 31).deciles == (1.0, 2.0)


@pytest.mark.parametrize(
    "values",
    [
        list(np.arange(49.0)),  # too few
        [*np.arange(49.0), NAN, NAN],  # too few numbers
        [*np.arange(49.0), np.inf],  # too few finite numbers
        [5.0] * 200,  # always the same
        [NAN] * 200,
        [],
    ],
)
def test_a_code_without_enough_different_numbers_has_no_deciles(values: list[float]) -> None:
    entry = fit(values)
    assert (entry.deciles, entry.mean, entry.std, entry.n) == ((), 0.0, 1.0, len(values))
    vocabulary = Vocabulary([entry])
    code = np.zeros(2, np.int64)
    assert vocabulary.decile_tokens(code, np.array([1.0, NAN])).tolist() == [-1, -1]
    assert vocabulary.normalise(code, np.array([1.0, 5.0])).tolist() == [0, 0]


def test_fifty_different_numbers_are_enough() -> None:
    assert len(fit(np.arange(50.0)).deciles) == 9


def test_a_long_positive_tail_is_put_on_a_log_scale() -> None:
    tail = np.exp(np.random.default_rng(0).normal(0, 2, 2000))
    assert fit(tail).scale == "log"
    tail[:20] = 0
    assert fit(tail).scale == "linear"  # zero has no logarithm
    assert fit(np.random.default_rng(0).normal(140, 5, 2000)).scale == "linear"


@pytest.mark.parametrize("shape", ["normal", "lognormal"])
def test_normalised_training_values_have_mean_0_and_spread_1(shape: str) -> None:
    x = getattr(np.random.default_rng(1), shape)(3, 2, 5000)
    entry = fit(x)
    z = Vocabulary([entry]).normalise(np.zeros(len(x), np.int64), x)
    assert (z.mean(), z.std()) == pytest.approx((0, 1), abs=1e-9)
    beyond = Vocabulary([entry]).normalise(np.zeros(2, np.int64), np.array([-1e9, 1e9]))
    assert_allclose(beyond, [z.min(), z.max()])


@given(
    edges=st.lists(st.integers(-5, 5), min_size=1, max_size=9, unique=True),
    value=st.integers(-6, 6) | st.floats(-6, 6),
)
def test_the_decile_is_the_number_of_edges_strictly_below(edges: list[int], value: float) -> None:
    entry = CodeEntry(
        code="c", descriptor="c", unit=None, n=50, deciles=tuple(float(e) for e in sorted(edges))
    )
    code = np.zeros(1, np.int64)
    token = Vocabulary([entry]).decile_tokens(code, np.array([float(value)]))
    assert token.tolist() == [sum(e < value for e in edges)]


def test_codes_of_different_length_do_not_share_edges(vocabulary: Vocabulary) -> None:
    code = np.array([0, 1, 2, 0, 1])
    value = np.array([1e9, 1e9, 1e9, NAN, 1.0])
    assert vocabulary.decile_tokens(code, value).tolist() == [9, 3, -1, -1, 0]


def test_the_most_frequent_codes_are_kept_and_sorted() -> None:
    values = {"LOINC/b": np.ones(3), "LOINC/a": np.ones(2), "LOINC/c": np.ones(2)}
    descriptors = {code: (code.lower(), None) for code in values}
    made = fit_vocabulary(values, descriptors, max_codes=2)
    assert [e.code for e in made.entries] == ["LOINC/a", "LOINC/b"]  # a before c by name
    assert [e.n for e in made.entries] == [2, 3]


def test_fitting_does_not_depend_on_the_order_of_codes_or_values() -> None:
    rng = np.random.default_rng(2)
    values = {code: rng.normal(size=80) for code in ("x", "y", "z")}
    descriptors = {code: (code, None) for code in values}
    again = {code: values[code] for code in ("z", "x", "y")}
    assert fit_vocabulary(values, descriptors).digest == fit_vocabulary(again, descriptors).digest


def test_tokens_are_ten_deciles_and_then_the_codes(vocabulary: Vocabulary) -> None:
    assert vocabulary.n_tokens == N_DECILES + 3 == 13
    assert vocabulary.code_tokens(np.array([0, 2])).tolist() == [10, 12]
    texts = vocabulary.descriptors()
    assert (texts[0], texts[9]) == ("first decile", "tenth decile")
    assert texts[10:] == ["creatinine", "lactate", "mechanical ventilation"]


def test_unknown_codes_have_no_index(vocabulary: Vocabulary) -> None:
    assert vocabulary.indices(["SNOMED/40617009", "LOCAL/x", "LOINC/2160-0"]).tolist() == [2, -1, 0]
    assert vocabulary.entry("LOCAL/x") is None
    assert vocabulary.entry("LOINC/2160-0") is vocabulary.entries[0]
    assert len(Vocabulary().indices([])) == 0


def test_a_code_cannot_stand_twice(vocabulary: Vocabulary) -> None:
    with pytest.raises(ValueError, match="twice"):
        Vocabulary([*vocabulary.entries, vocabulary.entries[0]])


def test_a_vocabulary_survives_json(vocabulary: Vocabulary) -> None:
    text = json.dumps(vocabulary.to_json(), allow_nan=False)
    again = Vocabulary.from_json(json.loads(text))
    assert again.entries == vocabulary.entries
    assert again.digest == vocabulary.digest
    code, value = np.array([0, 1, 1, 2]), np.array([0.3, 3.0, NAN, 7.0])
    assert_array_equal(again.normalise(code, value), vocabulary.normalise(code, value))
    assert_array_equal(again.decile_tokens(code, value), vocabulary.decile_tokens(code, value))


def test_another_version_is_refused(vocabulary: Vocabulary) -> None:
    with pytest.raises(ValueError, match="version 7, expected 1"):
        Vocabulary.from_json(vocabulary.to_json() | {"version": 7})


def test_the_digest_changes_when_anything_does(vocabulary: Vocabulary) -> None:
    first, *others = vocabulary.entries
    changes = [
        {"code": "LOINC/0"},
        {"descriptor": "x"},
        {"unit": "g/L"},
        {"n": 1},
        {"deciles": (0.5,)},
        {"scale": "log"},
        {"mean": 0.6},
        {"std": 0.6},
        {"low": -1.0},
        {"high": 2.0},
    ]
    digests = [Vocabulary([replace(first, **change), *others]).digest for change in changes]
    digests += [vocabulary.digest, Vocabulary(others).digest, Vocabulary([*others, first]).digest]
    assert len(set(digests)) == len(digests)
