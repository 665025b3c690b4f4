"""Held-out pair accuracy of reward models on rated texts.

    python tests/experiments/rm_accuracy.py --rm runs/a runs/b --dataset rated.jsonl

Every held-out text is scored once. Accuracy is over all pairs whose ratings differ by at least
--min-rating-gap. The bootstrap is over texts, since pairs share texts.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from minalign.data.rows import read_rows
from minalign.data.splits import held_out
from minalign.reward import RewardModel


def accuracy(scores: np.ndarray, ratings: np.ndarray, gap: float) -> float:
    """Share of pairs in rating order, a tie half."""
    better = ratings[:, None] - ratings[None, :] >= gap
    difference = scores[:, None] - scores[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0))[better].mean())


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--rm", nargs="+", required=True)
parser.add_argument("--dataset", required=True)
parser.add_argument("--min-rating-gap", type=float, default=1.0)
arguments = parser.parse_args()

rows = [row for row in read_rows(arguments.dataset) if held_out(row["text"], seed=0, share=0.1)]
ratings = np.array([row["rating"] for row in rows])
rng = np.random.default_rng(0)
resamples = [rng.integers(len(rows), size=len(rows)) for _ in range(1000)]
means = {}
for path in arguments.rm:
    reward_model, gap = RewardModel.from_pretrained(path), arguments.min_rating_gap
    scores = reward_model.score([""] * len(rows), [row["text"] for row in rows]).numpy()
    means[path] = np.array([accuracy(scores[i], ratings[i], gap) for i in resamples])
    low, high = np.quantile(means[path], [0.025, 0.975])
    overall = accuracy(scores, ratings, gap)
    print(f"{path}: accuracy {overall:.4f} [{low:.4f}, {high:.4f}] on {len(rows)} held-out texts")
first, *others = arguments.rm
for path in others:
    low, high = np.quantile(means[path] - means[first], [0.025, 0.975])
    print(f"{path} minus {first}: [{low:+.4f}, {high:+.4f}]")
