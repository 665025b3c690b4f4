"""Run every benchmark, keep the results in docs/speed.json, and make docs/speed.md's table anew.

And the figure, docs/speed.png. A benchmark that runs replaces its own rows of that shape and
device; all others stay.

    python tests/benchmarks/all.py                          each at its own shape
    python tests/benchmarks/all.py --shape M --rounds 2 --only policy_step generate
    python tests/benchmarks/all.py --only                   none: table and figure alone
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from results import figure, write_table

HERE, DOCS = Path(__file__).parent, Path(__file__).parents[2] / "docs"
NO_BENCHMARKS = {"all", "results", "side_by_side"}
ON_A_CPU_ALONE = {"merge", "start_up"}
NAMES = sorted({path.stem for path in HERE.glob("*.py")} - NO_BENCHMARKS)


def main() -> None:
    """Parse the command line and do all of it. The exit status is 1 where a side failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", help="S, M or L (default: each benchmark's own)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs, in turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="*", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    arguments = parser.parse_args()
    names = NAMES if arguments.only is None else arguments.only
    if arguments.device != "cpu":
        print(f"left out, on a CPU alone: {', '.join(ON_A_CPU_ALONE.intersection(names))}")
        names = [name for name in names if name not in ON_A_CPU_ALONE]
    failed = [name for name in names if not measured(name, arguments)]
    draw()
    if failed:
        raise SystemExit(f"failed, in whole or in part: {', '.join(failed)}")


def measured(name: str, arguments: argparse.Namespace) -> bool:
    """Run a benchmark; whether all of its sides ran."""
    print(f"\n{name}.py", flush=True)
    flags = ["--rounds", str(arguments.rounds), "--device", arguments.device]
    flags += ["--shape", arguments.shape] if arguments.shape else []
    flags += ["--results", str(DOCS / "speed.json")]
    done = subprocess.run([sys.executable, HERE / f"{name}.py", *flags])
    draw()  # after each: a run of all of them takes long, and may be ended
    return done.returncode == 0


def draw() -> None:
    """Table and figure of all results."""
    results = json.loads((DOCS / "speed.json").read_text())
    write_table(results, DOCS / "speed.md")
    figure(results, DOCS / "speed.png")


if __name__ == "__main__":
    main()
