"""Event tokens as rows of the slots of the event pass.

The model reads a long sequence of tokens in windows of W that overlap by half (`encode_events`):

    tokens   |0 .......... W-1|
                    |h ......... h+W-1|          h = W / 2
                            |2h ....... 2h+W-1|
    rows     |0 .......... W-1|W ....... 2W-1|2W ....

A token is a row of every window that it stands in: row r is token (r // W) h + r % W, at position
r % W. Of the first window all rows count, of the others the second half; the first half is context,
computed again from a new beginning. So the state of a token comes from the first of its rows.
"""

from __future__ import annotations


class TokenRows:
    """The arithmetic between tokens and rows, for windows of an even number of tokens.

    A model that reads all tokens at once has a single window and no tokens beyond it.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._half = window // 2

    def n_rows(self, n_tokens: int) -> int:
        """Rows that `n_tokens` tokens take."""
        if n_tokens <= self.window:
            return n_tokens
        last = -(-n_tokens // self._half) - 2  # number of the last window, from 0
        return last * self.window + n_tokens - last * self._half

    def first_row(self, token: int) -> int:
        """The first row that depends on a token."""
        window = max(token // self._half - 1, 0)
        return window * self.window + token - window * self._half

    def token(self, row: int) -> int:
        """The token of a row."""
        return row // self.window * self._half + row % self.window

    def counts(self, row: int) -> bool:
        """Whether the state of the row's token is that of this row."""
        return row < self.window or row % self.window >= self._half
