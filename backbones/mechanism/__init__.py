"""The forward with a variable insert layer: installation, and each layer's rows, mask and cache."""
