"""A tiny bundle on disk, as for the other tests with processes."""

from __future__ import annotations

from tests.end_to_end.conftest import repository

__all__ = ["repository"]
