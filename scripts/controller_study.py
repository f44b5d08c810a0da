"""Fills docs/controller.md: `python scripts/controller_study.py --data easy_vqa/train.json --out runs/study`.

Sweep, policies of every algorithm, ablations, recommendation, evaluation; what is finished is kept.
"""

from __future__ import annotations

import tyro

from deepinsert.controller.studies.controller_study import ControllerStudyOptions, run

if __name__ == "__main__":
    run(tyro.cli(ControllerStudyOptions, description=__doc__))
