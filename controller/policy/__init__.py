"""Layer policies: baselines, frontier, advice, files, and the command `recommend`."""

from .layer_policy import LayerPolicy

__all__ = ["LayerPolicy"]
