"""The core that training and serving share: what an ICU stay is and how it becomes model input."""

from __future__ import annotations

__version__ = "0.1.0"
