"""What the experiments share: a JSON file per seed, intervals over seeds, the command line.

A seed whose file is there is not run again.
"""

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

# NAME.json and NAME.png of each experiment are kept there.
RESULTS = Path(__file__).parent / "results"


def bootstrap(values, draws: int = 10_000) -> dict[str, float]:
    """Mean of per-seed values or differences, its 95% bootstrap interval, and of how many seeds.

    NaN is left out.
    """
    values = np.asarray([value for value in values if np.isfinite(value)], dtype=float)
    if not len(values):
        return dict(mean=float("nan"), low=float("nan"), high=float("nan"), seeds=0)
    means = np.random.default_rng(0).choice(values, (draws, len(values))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return dict(mean=float(values.mean()), low=float(low), high=float(high), seeds=len(values))


def show(result: dict[str, float]) -> str:
    """mean [low, high] (seeds)."""
    interval = f"[{result['low']:+.3f}, {result['high']:+.3f}]"
    return f"{result['mean']:+.3f} {interval} ({result['seeds']} seeds)"


def panels(columns: int, height: float = 3.2, **how):
    """A figure and its row of axes, as plt.subplots makes them, in the style of all figures."""
    from minalign.tools.figures import STYLE, plt

    plt.rcParams.update(STYLE)
    return plt.subplots(1, columns, figsize=(7, height), **how)


def save(figure, name: str) -> None:
    """RESULTS/NAME.png."""
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png")


def _one(work: Callable[[int], dict], seed: int, path: Path) -> None:
    torch.set_num_threads(1)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(work(seed)) + "\n")
    os.replace(partial, path)


def main(
    name: str,
    description: str,
    work: Callable[[int], dict],
    report: Callable[[dict[int, dict]], dict],
    seeds: int,
) -> None:
    """Parse the command line, run `work(seed)` for the seeds that have no file yet, report.

    `report` gets {seed: result}, prints a table, draws RESULTS/NAME.png and returns the summary.
    That is kept in RESULTS/NAME.json.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=seeds, help="run so many seeds: 0, 1, ...")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments") / name)
    only = "only the table and the figure, from what is there"
    parser.add_argument("--report", action="store_true", help=only)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        missing = [(seed, arguments.out / f"{seed}.json") for seed in range(arguments.seeds)]
        missing = [(seed, path) for seed, path in missing if not path.exists()]
        with ProcessPoolExecutor(arguments.workers) as pool:
            for done in [pool.submit(_one, work, seed, path) for seed, path in missing]:
                done.result()
    paths = arguments.out.glob("*.json")
    results = {int(path.stem): json.loads(path.read_text()) for path in paths}
    results = {seed: results[seed] for seed in sorted(results)[: arguments.seeds]}
    RESULTS.mkdir(exist_ok=True)
    summary = json.dumps({"seeds": list(results)} | report(results), indent=1)
    (RESULTS / f"{name}.json").write_text(summary.replace("NaN", "null") + "\n")
