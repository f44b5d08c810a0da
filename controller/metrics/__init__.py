"""Whether answers are right: metrics as their benchmarks define them."""
