"""FLOPs and bytes of a prompt at an insert layer, counted from a model's modules."""

from .cost_model import CostModel, eq5_flops

__all__ = ["CostModel", "eq5_flops"]
