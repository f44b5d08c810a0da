"""Finetuning a variant at a fixed insert layer: recipe, trainer, checkpoints, saving and publishing."""
