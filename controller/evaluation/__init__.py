"""Comparison of variants with a baseline: figures, measured times, tables and pictures."""
