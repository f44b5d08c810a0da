"""lmms-eval's benchmarks on DeepInsert backbones: the entry point, the model, and tasks of a user's data.

lmms-eval is not a dependency, so no other room imports this one.
"""
