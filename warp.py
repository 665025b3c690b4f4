"""Prompts + reward model -> I x M policies, merged, and the KL-reward front: WARP (Rame et al. 2024, arXiv 2406.16768).

    python warp.py                                          the toy review world, two iterations of two runs
    python warp.py --rm runs/rm-1 --runs 3 --eta 0.3
    python warp.py --rm path --model path-or-id --dataset prompts.jsonl --out runs/mine
    python warp.py ... --out runs/mine --resume             goes on where a killed run stopped

Algorithm 1. Each iteration trains M policies from theta_init by train_policy.py's loop, with an EMA anchor that starts
at theta_init; merges their task vectors by SLERP; and moves theta_init a step eta towards the merge. At the end, the
front from the start policy to the last merge is evaluated for a list of eta.

The run's folder: iteration-I/run-M/ (metrics.jsonl, model/), iteration-I/merged/model/, iteration-I/angles.json,
front.json, front.png, and front/eta-E/model/ for each of --keep-etas.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import sys
import threading
import typing
from dataclasses import dataclass
from pathlib import Path

import train_policy
from minalign.common import (
    checkpoint_activations_, one_line_errors, pick_device, pick_dtype, require, show_config, stop_after_step,
)  # fmt: skip
from minalign.flags import flag, parse_flags
from minalign.ranks import Ranks, process_group
from minalign.runs import open_run, write_config, write_whole

if typing.TYPE_CHECKING:  # heavy imports come after parsing: --help and a wrong flag answer at once
    import torch


@dataclass
class Config(train_policy.Config):
    """Merging: the flags of WARP itself."""

    out: str = flag("", "folder of the run (default: the next free runs/warp-N)")
    steps: int = flag(100, "optimizer steps of each policy", within="[1, inf)")
    anchor: str = flag("ema", "what the KL is measured from: theta_init, or an average of the policy", ("fixed", "ema"))
    eval_every: int = flag(20, "steps between evaluations: the points of the training curves", within="[1, inf)")
    iterations: int = flag(2, "I: how often to train, merge and start again", within="[1, inf)")
    runs: int = flag(2, "M: policies per iteration; they differ in the order of prompts and in sampling", within="[1, inf)")
    eta: float = flag(0.5, "how far theta_init moves towards the merge between iterations, in [0, 1]", within="[0, 1]")
    method: str = flag("slerp", "how task vectors are merged", ("slerp", "slerp-symmetric", "lerp"))
    scope: str = flag(
        "layer", "what shares an angle: a transformer layer, a tensor, the whole model", ("layer", "tensor", "model")
    )
    etas: str = flag("0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1", "points of the front: 0 is the start policy, 1 the last merge")
    keep_etas: str = flag("", "points of the front to save as models, such as 0.3,0.5")


def resolve(config: Config) -> Config:
    """train_policy's checks and WARP's own."""
    require(not config.shard, "--shard: of train_policy.py and train_rm.py alone: here processes train runs side by side")
    config = train_policy.resolve(config)
    etas = numbers("--etas", config.etas)
    require(bool(etas), "--etas: expected at least one number")
    require(all(a < b for a, b in zip(etas, etas[1:])), f"--etas {config.etas}: expected rising numbers")
    require(
        all(0 <= eta <= 1 for eta in etas + numbers("--keep-etas", config.keep_etas)),
        "--etas, --keep-etas: expected numbers in [0, 1]",
    )
    require(config.lora_save != "adapter", "--lora-save adapter: merging needs whole weights: leave it out")
    return config


def numbers(name: str, text: str) -> list[float]:
    """[0.3, 0.5] from "0.3,0.5"."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        require(False, f"{name} {text}: expected numbers with commas between them, such as 0,0.5,1")


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the parameters; tied ones once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def set_weights_(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy `weights` into the parameters of `model`."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])


def run_warp(
    config: Config, task, out: Path, dtype: torch.dtype, stop: threading.Event | None = None, ranks: Ranks = Ranks()
) -> dict:
    """Algorithm 1 into the folder `out`; returns what front.json holds.

    Of several processes, groups train the runs of an iteration side by side; all merge, and the first measures and writes.
    """
    import torch

    from minalign.checkpoint import load_policy, save_policy
    from minalign.lora import add_lora_, merge_lora_
    from minalign.merge import liti, merge_policies
    from minalign.merge_folders import angle_summary

    theta_sft = weights_of(task.start)
    policy = copy.deepcopy(task.start).requires_grad_(True)  # the one model that all weights pass through
    if config.gradient_checkpointing:
        checkpoint_activations_(policy)
    results = {"runs": [], "merges": []}
    groups = min(config.runs, ranks.count)
    group, members = ranks.split(groups)

    def measure(name: str, place: Path | None = None) -> dict[str, float]:
        """Evaluate `policy` as it is and print its line; what was measured already is read back."""
        if stop is not None and stop.is_set():  # nothing is lost: all that came before is saved
            raise KeyboardInterrupt(f"before {name} was measured")
        cached = place / "results.json" if place else None
        if not ranks.first:
            return {}
        if cached and cached.exists():
            metrics = json.loads(cached.read_text())
        else:
            metrics, _ = train_policy.evaluate(config, task, policy, dtype)
            if cached:
                write_whole(cached, json.dumps(metrics) + "\n")
        print(f"  {name:<22}" + "".join(f"  {key} {metrics[key]:7.3f}" for key in metrics if key != "distinct_2"))
        return metrics

    theta_init = theta_sft
    for i in range(1, config.iterations + 1):
        print(f"\niteration {i} of {config.iterations}")
        folders = [out / f"iteration-{i}" / f"run-{m}" for m in range(1, config.runs + 1)]
        for m, folder in enumerate(folders, 1):
            if (m - 1) % groups == group and not (folder / "model").exists():  # written last and whole: a run that has finished
                folder.mkdir(parents=True, exist_ok=True)
                set_weights_(policy, theta_init)  # theta^m <- theta_init; train() starts the EMA anchor there, too
                run_seed = config.seed + 1_000_003 * ((i - 1) * config.runs + m)  # another order of prompts, other samples
                if config.lora_rank:
                    torch.manual_seed(run_seed)
                    add_lora_(policy, config.lora_rank, config.lora_alpha, targets=config.lora_targets)
                train_policy.train(dataclasses.replace(config, seed=run_seed), task, policy, folder, dtype, stop, members)
                merge_lora_(policy)  # what is merged below is always W + BA: the mean of As times that of Bs is another matrix
                if members.first:
                    save_policy(policy, task.tokenizer, folder / "model")
        ranks.wait()

        thetas = []
        for m, folder in enumerate(folders, 1):
            set_weights_(policy, weights_of(load_policy(str(folder))[0]))
            thetas.append(weights_of(policy))
            if ranks.first:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of a run that has ended
            curve = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            points = [{k.removeprefix("eval_"): row[k] for k in row if k == "step" or k.startswith("eval_")} for row in curve]
            results["runs"].append({"iteration": i, "run": m, "curve": [p for p in points if "kl_sft" in p]})
            measure(f"policy {m}", folder)

        # theta_slerp <- theta_init + slerp of the task vectors: the policies are merged, not their EMAs
        theta_merged, report = merge_policies(theta_init, thetas, config.method, config.scope)
        folder = out / f"iteration-{i}" / "merged"
        set_weights_(policy, theta_merged)
        if ranks.first:
            write_whole(out / f"iteration-{i}" / "angles.json", json.dumps(report, indent=1) + "\n")
            print(f"  {angle_summary(report)}")
        if ranks.first and not (folder / "model").exists():
            save_policy(policy, task.tokenizer, folder / "model")
        results["merges"].append({"iteration": i} | measure(f"{config.method} of {config.runs}", folder))

        # theta_init <- (1 - eta) theta_init + eta theta_slerp, for the next iteration
        theta_init = liti(theta_init, theta_merged, config.eta)

    # The front goes to the *start policy*, and its other end is the last merge, not the last theta_init.
    if not ranks.first:
        return results
    print("\nfront: (1 - eta) theta_sft + eta theta_merged")
    results["front"] = []
    keep_etas = numbers("--keep-etas", config.keep_etas)
    for eta in sorted({*numbers("--etas", config.etas), *keep_etas}):
        set_weights_(policy, liti(theta_sft, theta_merged, eta))
        results["front"].append({"eta": eta} | measure(f"eta {eta:g}"))
        if eta in keep_etas:
            save_policy(policy, task.tokenizer, out / "front" / f"eta-{eta:g}" / "model")
    write_whole(out / "front.json", json.dumps(results, indent=1) + "\n")
    return results


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and run, as one process or as one of torchrun's."""
    config = resolve(parse_flags(Config, __doc__, argv))
    device, reason = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    with process_group(device, patience_hours=24 * 30) as (ranks, device):  # a group may wait for another's whole run
        run(config, device, reason, dtype, ranks)


def run(config: Config, device: torch.device, reason: str, dtype: torch.dtype, ranks: Ranks) -> None:
    """Open or reopen the run, run WARP, draw the front."""
    from minalign.task import load_task

    out = Path(ranks.from_first(lambda: str(open_run(config, "warp"))))
    show_config(config, device, reason, dtype)
    with ranks.first_before_others():
        task = load_task(config, train_policy.rewards_of(config, device, dtype), device, dtype)
    if ranks.first:
        write_config(out, config, device, dtype)
    with stop_after_step(out) as stop:
        results = run_warp(config, task, out, dtype, stop, ranks)
    if not ranks.first:
        return

    print(f"\nsaved {out}/iteration-{config.iterations}/merged/model, {out}/front.json", end="")
    try:
        from minalign.plot import plot_front
    except ImportError:
        print("\nfront.png was not drawn: pip install matplotlib")
    else:
        plot_front(results, out / "front.png")
        print(f", {out}/front.png")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
