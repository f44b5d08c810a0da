"""Makes the embedded tiny backbone from nothing: `python scripts/pretrain_tiny.py --out runs/tiny`.

About half an hour on one CPU thread; `--quick` takes seconds and shows that everything works.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from controller.tiny.pretraining import PretrainTinyOptions, run

if __name__ == "__main__":
    run(tyro.cli(PretrainTinyOptions, description=__doc__))
