"""Experiments: many runs planned, run once, and set beside what the LLM4EHR paper printed."""
