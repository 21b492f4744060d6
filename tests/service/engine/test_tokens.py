"""Rows of the event pass: which token a row is, and what depends on what."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.engine.tokens import TokenRows

WINDOWS = st.integers(1, 8).map(lambda half: 2 * half)


def seen_by(rows: TokenRows, row: int) -> range:
    """Tokens that a row reads: those of its window up to itself."""
    token = rows.token(row)
    return range(token - row % rows.window, token + 1)


@given(window=WINDOWS, n_tokens=st.integers(0, 60))
def test_every_token_counts_once_and_sees_what_the_model_says(window: int, n_tokens: int) -> None:
    rows, half = TokenRows(window), window // 2
    all_rows = range(rows.n_rows(n_tokens))
    counted = {rows.token(r): r for r in all_rows if rows.counts(r)}
    assert sorted(counted) == list(range(n_tokens))
    assert sum(map(rows.counts, all_rows)) == n_tokens
    for token, row in counted.items():
        assert seen_by(rows, row) == range(max(0, (token // half - 1) * half), token + 1)
    assert all(rows.token(r) < n_tokens for r in all_rows)


@given(window=WINDOWS, token=st.integers(0, 60), more=st.integers(1, 20))
def test_the_first_row_is_the_first_that_reads_the_token(
    window: int, token: int, more: int
) -> None:
    rows = TokenRows(window)
    readers = [r for r in range(rows.n_rows(token + more)) if token in seen_by(rows, r)]
    assert rows.first_row(token) == readers[0]
