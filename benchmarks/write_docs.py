"""Write `docs/performance.md` and its pictures from finished runs of `bench` and `benchmarks/gpu.py`.

python benchmarks/write_docs.py runs/bench-full runs/bench-gpu
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deepinsert.controller.performance.performance_page import write_document

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Write the page; a user's mistake ends with status 2 and a message of one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write to")
    arguments = parser.parse_args()
    try:
        print(write_document(arguments.runs, arguments.docs))
    except (FileNotFoundError, ValueError) as error:
        print(f"benchmarks/write_docs.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
