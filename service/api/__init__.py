"""The HTTP interface: one module a resource."""

from __future__ import annotations

from service.api.app import Dependencies, create_app

__all__ = ["Dependencies", "create_app"]
