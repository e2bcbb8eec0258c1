"""Whole runs: what is trained on what, from which base, and comparisons between runs."""
