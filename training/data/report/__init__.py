"""The report of an extraction, and its quality gates."""
