"""Variants beside the baseline: figures, measured times, tables and pictures."""
