"""The models that are loaded: which one answers, which follow, and what they differ in."""
