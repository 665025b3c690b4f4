"""The README's first run, and the same without the KL penalty: what their tables are made of.

    python tests/experiments/first_run.py

One seed, and two threads, as the numbers depend on both in their last digits. It takes about two
minutes on two idle cores. results/first_run.json holds each run's results.json and the completion
of its first held-out prompt.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from seeds import RESULTS

sys.path.insert(0, str(Path(__file__).parents[2]))
import train_policy

torch.set_num_threads(2)
runs = {}
for beta in ("0.1", "0"):
    with tempfile.TemporaryDirectory() as folder:
        train_policy.main(["--beta", beta, "--out", f"{folder}/run"])
        runs[f"beta {beta}"] = json.loads(Path(folder, "run/results.json").read_text())
RESULTS.mkdir(exist_ok=True)
(RESULTS / "first_run.json").write_text(json.dumps(runs, indent=1) + "\n")
