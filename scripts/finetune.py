"""Finetunes under torchrun: `torchrun --nproc_per_node 4 scripts/finetune.py --data DATA --out RUN`.

The options are those of `deepinsert finetune`. `scripts/accelerate` has configurations for
`accelerate launch`.
"""

from __future__ import annotations

import sys

from deepinsert.controller.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
