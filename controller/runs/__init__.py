"""Run folders, atomic writes, manifests, storage errors, and the processes that share a run."""
