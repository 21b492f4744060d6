"""Backends of the engine: where a tick is computed."""
