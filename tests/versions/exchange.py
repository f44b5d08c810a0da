"""Writes a variant, an adapter, a policy and a reward table to a folder, or prints their results.

    python exchange.py write DATA FOLDER
    python exchange.py read DATA FOLDER

`test_between_versions.py` runs it under two versions of transformers. Its last printed line is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from deepinsert.backbones import load_backbone
from deepinsert.controller import cli
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.prompts import encode, prompts_from
from deepinsert.envs.rewards.table import RewardTable


def write(data: Path, folder: Path) -> None:
    """Run the commands that write to `folder`, on the prompts of the file `data`."""
    prompts = ["--data", str(data), "--fraction", "0.3", "--backbone", "tiny"]
    run = ["--steps", "3", "--batch-size", "4", "--global-batch-size", "4"]
    cli.main(["finetune", *prompts, *run, "--insert-layer", "3", "--out", str(folder / "variant")])
    cli.main(["sweep", *prompts, "--insert-layers", "0,3,7", "--out", str(folder / "sweep")])
    table = ["--table", str(folder / "sweep" / "table"), "--steps", "600", "--algorithm", "full-info"]
    cli.main(["train-policy", *prompts, *table, "--insert-layers", "0,3,7", "--out", str(folder / "policy")])


def read(data: Path, folder: Path) -> dict[str, Any]:
    """Return the results of each part, or the message with which it is refused."""
    prompts = prompts_from(load_instructions(data))[:4]
    results: dict[str, Any] = {}
    for part in ("checkpoint", "adapter"):
        try:
            backbone = load_backbone(folder / "variant" / part, device="cpu")
        except OSError as error:
            results[part] = str(error)
            continue
        inputs = encode(backbone.processor, prompts)
        with torch.no_grad():
            logits = backbone.model(**inputs).logits[inputs["labels"] != -100]
        results[part] = [backbone.insert_layer, logits.float().mean(0).tolist()]
    tiny = load_backbone("tiny", device="cpu")
    policy = LayerPolicy.load(folder / "policy", tiny)
    results["policy"] = policy.probabilities(policy.observation(tiny, prompts, 4)).tolist()
    table = RewardTable.load(folder / "sweep" / "table")
    results["table"] = table.losses.tolist()
    return results


if __name__ == "__main__":
    job, data, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    result = write(data, folder) if job == "write" else read(data, folder)
    print(json.dumps(result))
