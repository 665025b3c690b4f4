"""Thirty SIGKILLs at random instants, spread over the three scripts.

Does each run, started again, end as an undisturbed one?

    python tests/experiments/kill.py [--kills 30] [--seed 0]

Each run is killed twice and saves every step. "identical" compares every file that it left
(weights, optimizer, generator, logs without their times) with the undisturbed run's.
"""

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # the forkserver's
KILLS_PER_RUN = 2


def main() -> None:
    """Print a line for each run, then the table."""
    import tiny_runs

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    context, rng = multiprocessing.get_context("forkserver"), random.Random(args.seed)
    context.set_forkserver_preload(["tiny_runs"])
    folder, table = Path(tempfile.mkdtemp()), []
    model = tiny_runs.start_model_folder(folder / "model")
    for script in tiny_runs.SCRIPTS:
        for name in ("first", "whole"):  # the first one waits for the forkserver's imports
            began = time.monotonic()
            arguments = (script, str(folder / f"{script}-{name}"), model)
            process = context.Process(target=tiny_runs.child, args=arguments)
            process.start()
            process.join()
        seconds = time.monotonic() - began
        killed, runs, identical = 0, 0, 0
        whole = tiny_runs.content(folder / f"{script}-whole")
        while killed < args.kills / len(tiny_runs.SCRIPTS):
            out = folder / f"{script}-{runs}"
            how = (context, script, out, model, KILLS_PER_RUN, rng, seconds)
            instants = tiny_runs.kill_and_resume(*how)
            different = tiny_runs.difference(whole, tiny_runs.content(out))
            killed, runs, identical = killed + len(instants), runs + 1, identical + (not different)
            after = ", ".join(map(str, instants))
            print(f"{script}: killed after {after} s: {different or 'identical'}", flush=True)
        table.append((script, f"{seconds:.1f} s", killed, runs, identical))
    print(f"\n{'':14}{'undisturbed':>12}{'kills':>8}{'runs':>8}{'identical':>11}")
    for script, seconds, *numbers in table:
        print(f"{script:14}{seconds:>12}{numbers[0]:>8}{numbers[1]:>8}{numbers[2]:>11}")


if __name__ == "__main__":
    main()
