"""Benchmarks: readers of their published files, and their published scoring rules."""
