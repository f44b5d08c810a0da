"""Finetuning a variant at a fixed insert layer, its checkpoints, and what is saved and published of it."""
