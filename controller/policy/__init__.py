"""Choosing a layer: rewards swept, a policy trained and judged beside simple choices, its advice."""

from .layer_policy import LayerPolicy

__all__ = ["LayerPolicy"]
