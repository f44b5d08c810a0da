"""Makes an lmms-eval task of your questions: `python scripts/lmms_task.py --data my.json --out runs/task`.

Then `lmms_eval --include_path runs/task --tasks instructions --model deepinsert --batch_size 8`.
"""

from __future__ import annotations

import tyro

from deepinsert.controller.lmms.task import TaskOptions, write_task

if __name__ == "__main__":
    print(f"Task folder: {write_task(tyro.cli(TaskOptions, description=__doc__))}")
