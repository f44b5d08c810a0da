"""Compares a policy's observations: `python scripts/observation_ablation.py --data FILE --out runs/ablation`.

FILE is in LLaVA's JSON. The same command continues an interrupted run.
"""

from __future__ import annotations

import tyro

from deepinsert.controller.studies.ablation import ObservationAblationOptions, run

if __name__ == "__main__":
    run(tyro.cli(ObservationAblationOptions, description=__doc__))
