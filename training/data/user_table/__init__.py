"""A unit's own tables."""
