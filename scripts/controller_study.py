"""Fills docs/controller.md: `python scripts/controller_study.py --data easy_vqa/train.json --out runs/study`.

It runs the sweep, the policies of every algorithm, the ablations, the recommendation and the evaluation.
Finished parts are not repeated.
"""

from __future__ import annotations

import tyro

from deepinsert.controller.studies.controller_study import ControllerStudyOptions, run

if __name__ == "__main__":
    run(tyro.cli(ControllerStudyOptions, description=__doc__))
