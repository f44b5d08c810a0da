"""Readers of the benchmarks' published files."""
