"""The command line: parses options, runs a command, and reports a user's mistake in one clear line.

Commands are imported only when they run, so that `--help` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union

import tyro

from deepinsert import __version__

from . import options as command_options
from .option_checks import check


@dataclass(frozen=True)
class Command:
    """One subcommand: its options, the module whose `run` it calls, and an example that runs as written."""

    options: type[Any]
    module: str
    example: str


# The examples run as written after `deepinsert demo`, because they use its data and results.
COMMANDS = {
    "demo": Command(command_options.DemoOptions, "demo", "deepinsert demo"),
    "sweep": Command(
        command_options.SweepOptions,
        "policy.sweep",
        "deepinsert sweep --data runs/demo/data/train/instructions.json --sources coco,textvqa "
        "--insert-layers 0-7 --out runs/sweep",
    ),
    "train-policy": Command(
        command_options.TrainPolicyOptions,
        "learning.train_policy",
        "deepinsert train-policy --data runs/demo/data/train/instructions.json --fraction 0.5 "
        "--skip-weight 0.5 --out runs/policy",
    ),
    "recommend": Command(
        command_options.RecommendOptions,
        "policy.recommend",
        'deepinsert recommend --policy runs/demo/train-policy --prompt "What digit is drawn?" '
        "--out runs/recommend",
    ),
    "finetune": Command(
        command_options.FinetuneOptions,
        "finetuning.finetune",
        "deepinsert finetune --data runs/demo/data/train/instructions.json --insert-layer 3 --steps 100 "
        "--global-batch-size 32 --out runs/variant",
    ),
    "evaluate": Command(
        command_options.EvaluateOptions,
        "evaluation.evaluate",
        "deepinsert evaluate --data runs/demo/data/held_out/instructions.json "
        "--variants runs/demo/finetune-baseline runs/demo/finetune --out runs/evaluate",
    ),
    "layer-study": Command(
        command_options.LayerStudyOptions,
        "studies.layer_study",
        "deepinsert layer-study --data runs/demo/data/train/instructions.json --insert-layers 0,3,6 "
        "--steps 60 --jobs 2 --out runs/layer-study",
    ),
    "report": Command(
        command_options.ReportOptions,
        "evaluation.report",
        "deepinsert report --runs runs/demo/evaluate runs/evaluate --out runs/report",
    ),
    "score": Command(
        command_options.ScoreOptions,
        "metrics.score",
        "deepinsert score --data runs/demo/data/held_out/instructions.json "
        "--answers runs/demo/evaluate/predictions/finetune.jsonl --out runs/score",
    ),
    "bench": Command(
        command_options.BenchOptions,
        "performance.bench",
        "deepinsert bench --out runs/bench",
    ),
    "predict": Command(
        command_options.PredictOptions,
        "performance.predict",
        "deepinsert predict --device-name H100 --text-tokens 16 --batch-size 8 --out runs/predict",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that `arguments` name; by default they are the arguments of the process.

    The process ends with status 2 and one line on stderr after a mistake in the command, and with status 130
    after an interrupt. `--debug`, or `DEEPINSERT_TRACEBACK=1` in the environment, adds the traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("DEEPINSERT_TRACEBACK", "") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    if words == ["--version"]:
        print(f"deepinsert {__version__}")
        return
    options: Any = None
    try:
        name, options = parse(words or ["--help"])
        check(options)
        quieten()
        importlib.import_module(f".{COMMANDS[name].module}", __package__).run(options)
        print(f"Run folder: {options.out}")
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as error:
        fail(error, debug)
    except OSError as error:
        # The hub's own errors do not name the model.
        is_from_hub = type(error) is OSError and error.filename is None and hasattr(options, "backbone")
        fail(f"--backbone {options.backbone}: {error}" if is_from_hub else error, debug)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        memory = "batch-tokens or --batch-size" if hasattr(options, "batch_tokens") else "batch-size"
        fail(f"{str(error).splitlines()[0]} Try a smaller --{memory}.", debug)


def parse(words: Sequence[str]) -> tuple[str, Any]:
    """Return the command's name and its options; `--help` and options that do not parse end the process."""
    if words[0] in COMMANDS:
        command = COMMANDS[words[0]]
        description = f"{command.options.__doc__}\n\nExample:\n  {command.example}"
        options = tyro.cli(
            command.options, prog=f"deepinsert {words[0]}", description=description, args=words[1:]
        )
        return words[0], options
    commands: Any = tuple(
        Annotated[command.options, tyro.conf.subcommand(name, description=command.options.__doc__)]
        for name, command in COMMANDS.items()
    )
    any_command: Any = Union[commands]  # noqa: UP007 - the tuple is made at run time
    tyro.cli(
        any_command,
        prog="deepinsert",
        description=(
            "Learn at which decoder layer image or audio tokens should enter a multimodal language model, "
            "and finetune that model. Start with: deepinsert demo. Each command has its own --help. "
            "--debug adds the traceback to errors."
        ),
        args=words,
    )
    raise ValueError(f"{words[0]}: not a command; the commands are {', '.join(COMMANDS)}")


def quieten() -> None:
    """Keep messages that libraries write for developers off the terminal, unless the user wants them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def fail(error: Exception | str, debug: bool) -> None:
    """Print the error in one line and exit with status 2."""
    if debug:
        import traceback

        traceback.print_exc()
    print(f"deepinsert: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
