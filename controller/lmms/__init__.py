"""lmms-eval's benchmarks on our backbones: its entry point, the model, and tasks of one's own data.

lmms-eval is no dependency: nothing else imports this room.
"""
