"""Whether training still pays: the best step by held-out prompts, and a decline from it.

What is judged is the held-out objective, reward - beta KL(policy || start), under the present beta.
`run.counts` keeps the best step's evaluation, and that of the start.
"""

from __future__ import annotations

import math
import typing

import torch
from tqdm import tqdm

if typing.TYPE_CHECKING:
    from ..running.run import Run
    from .policies import Measured


def objective(metrics: dict[str, float], run: Run) -> float:
    """Held-out reward - beta KL of an evaluation, under the present beta."""
    return metrics["reward"] - run.counts.get("beta", run.config.beta) * metrics["kl_sft"]


def paired_change(now: dict, before: dict, beta: float) -> tuple[float, float]:
    """By how much the objective changed, and the standard error of that.

        d_i = (r_i - beta KL_i) now - (r_i - beta KL_i) before;   mean d, sd(d) / sqrt(n)

    Args:
        now, before: evaluations of the same n prompts: lists `rewards`, and `kls` in nats.
    Returns:
        Over prompts whose numbers are finite; NaN where fewer than two are.
    """
    rows = [torch.tensor([one["rewards"], one["kls"]], dtype=torch.double) for one in (now, before)]
    objectives = [rewards - beta * kls for rewards, kls in rows]
    differences = objectives[0] - objectives[1]
    differences = differences[differences.isfinite()]
    if len(differences) < 2:
        return math.nan, math.nan
    return differences.mean().item(), differences.std().item() / len(differences) ** 0.5


def of_these_prompts(run: Run, name: str) -> dict | None:
    """The evaluation `name`, "best" or "start"; None where there is none of these prompts."""
    found = run.counts.get(name)
    same = isinstance(found, dict) and found["prompts"] == run.made_of.get("held-out data")
    return found if same else None


def judge(run: Run, measured: Measured) -> None:
    """Keep this evaluation if it is the best, and say where the objective has declined from it.

    Step 0 is the start, which no later step is saved in place of. A decline is an objective below
    the best, or the start's, by more than the standard error of paired differences, twice in a row.
    With --target-kl a step whose KL is above 1.2 times that is not the best. With --stop-on-decline
    the run ends there.
    """
    config, counts = run.config, run.counts
    now = {
        "step": run.step,
        "prompts": run.made_of.get("held-out data"),
        "metrics": measured.metrics,
        "rewards": [math.nan if s.reward is None else s.reward for s in measured.samples],
        "kls": [sample.kl for sample in measured.samples],
    }
    if run.step == 0:
        counts["start"] = now
        return
    if counts.get("best") and not of_these_prompts(run, "best"):
        print("other held-out prompts than before: the best step is sought anew")
        counts |= {"best": None, "best_step": None, "declines": 0}
    best, start = (of_these_prompts(run, name) for name in ("best", "start"))
    near = not config.target_kl or measured.metrics["kl_sft"] <= 1.2 * config.target_kl
    value = objective(measured.metrics, run) if near else -math.inf
    if value > (objective(best["metrics"], run) if best else -math.inf):
        counts |= {"best": now, "best_step": run.step}
    known = [one for one in (start, best) if one]
    if not known:
        return
    best = max(known, key=lambda one: objective(one["metrics"], run))
    change, error = paired_change(now, best, counts.get("beta", config.beta))
    counts["declines"] = counts.get("declines", 0) + 1 if change < -error else 0
    last = run.step == config.steps
    if counts["declines"] != 2 and not (last and counts["declines"] == 1):
        return
    place = f"step {best['step']}" if best["step"] else "the start"
    said = (
        f"step {run.step}: held-out reward - beta KL is {-change:.3g} (standard error {error:.2g}) "
        f"below that of {place}, the best: lower --lr {config.lr:g}"
    )
    said += f" or --mu {config.mu:g}" if config.anchor == "ema" else ""
    if best["step"] < 2 * config.eval_every or counts["declines"] == 1:
        said += f", and --eval-every {config.eval_every}, too coarse to see where it fell"
    if counts["declines"] == 2 and config.stop_on_decline:
        said += ": the run ends here"
        counts["ended"] = run.step
    tqdm.write(said)
