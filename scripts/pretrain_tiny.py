"""Makes the embedded tiny backbone from nothing: `python scripts/pretrain_tiny.py --out runs/tiny`.

About half an hour on one CPU thread; `--quick` takes seconds and shows that everything works.
"""

from __future__ import annotations

import tyro

from deepinsert.controller.tiny.pretraining import PretrainTinyOptions, run

if __name__ == "__main__":
    run(tyro.cli(PretrainTinyOptions, description=__doc__))
