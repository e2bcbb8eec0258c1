"""Metrics, evaluation through seqio, and score tables."""
