"""Rules by which benchmarks score answers."""
