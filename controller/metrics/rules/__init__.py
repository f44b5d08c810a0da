"""The benchmarks' scoring rules, each as its published script or paper defines it."""
