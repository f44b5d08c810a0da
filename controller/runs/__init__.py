"""Run folders: what a command writes to `--out`, whole or not at all."""
