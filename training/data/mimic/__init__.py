"""MIMIC-III and MIMIC-IV."""
