"""Trains the embedded tiny backbone from scratch: `python scripts/pretrain_tiny.py --out runs/tiny`.

The training takes about half an hour on one CPU thread; `--quick` takes seconds and tries every step.
"""

from __future__ import annotations

import tyro

from deepinsert.controller.tiny.pretraining import PretrainTinyOptions, run

if __name__ == "__main__":
    run(tyro.cli(PretrainTinyOptions, description=__doc__))
