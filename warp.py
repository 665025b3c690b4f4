"""Prompts + reward model -> I x M policies, merged, and the KL-reward front: WARP.

    python warp.py                              the toy review world, two iterations of two runs
    python warp.py --rm runs/rm-1 --runs 3 --eta 0.3
    python warp.py --rm path --model path-or-id --dataset prompts.jsonl --out runs/mine
    python warp.py ... --out runs/mine --resume      goes on where a killed run stopped

Algorithm 1 of Ramé et al. 2024 (arXiv 2406.16768). Each iteration trains M policies from theta_init
by train_policy.py's loop, with an EMA anchor that starts at theta_init. It merges their task
vectors by SLERP, and moves theta_init a step eta towards the merge. At the end, the front from the
start policy to the last merge is evaluated for a list of eta.

The run's folder: iteration-I/run-M/ (metrics.jsonl, model/), iteration-I/merged/model/,
iteration-I/angles.json, front.json, front.png, and front/eta-E/model/ for each of --keep-etas.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import train_policy
from minalign.models.functions import check_functions
from minalign.running.errors import one_line_errors, require
from minalign.running.files import read_json, read_json_lines, write_json
from minalign.running.flags import dashed, flag, parse_flags
from minalign.running.run import Run, open_run

if typing.TYPE_CHECKING:  # heavy imports come after parsing: --help and a wrong flag answer at once
    import torch

    from minalign.running.ranks import Ranks
    from minalign.task import Task


@dataclass
class Config(train_policy.Config):
    """Merging: the flags of WARP itself."""

    out: str = flag("", "folder of the run (default: the next free runs/warp-N)")
    steps: int = flag(100, "optimizer steps of each policy", "[1, inf)")
    anchor: str = flag(
        "ema",
        "what the KL is measured from: theta_init, or an average of the policy",
        ("fixed", "ema"),
    )
    eval_every: int = flag(
        20, "steps between evaluations: the points of the training curves", "[1, inf)"
    )
    iterations: int = flag(2, "I: how often to train, merge and start again", "[1, 1000]")
    runs: int = flag(
        2,
        "M: policies per iteration; they differ in the order of prompts and in sampling",
        "[1, 1000]",
    )
    rm_of_run: list[str] | None = flag(
        None,
        "in place of --rm: M rewards, one for each run of an iteration; each keeps its own scale, "
        "with --standardize-rewards none does",
    )
    eta: float = flag(
        0.5, "how far theta_init moves towards the merge between iterations", "[0, 1]"
    )
    method: str = flag(
        "slerp", "how task vectors are merged", ("slerp", "slerp-symmetric", "lerp", "ram")
    )
    ram_threshold: float = flag(
        1e-5, "a run has moved a weight by more than this: for the report, and for ram", "[0, inf)"
    )
    scope: str = flag(
        "layer",
        "what shares an angle, and a line of the report: a layer, a tensor, the whole model",
        ("layer", "tensor", "model"),
    )
    etas: str = flag(
        "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1",
        "points of the front: 0 is the start policy, 1 the last merge",
    )
    keep_etas: str = flag("", "points of the front to save as models, such as 0.3,0.5")


def resolve(config: Config) -> Config:
    """train_policy's checks and WARP's own."""
    require(
        not config.shard,
        "--shard: of train_policy.py and train_rm.py alone: here processes train runs side by side",
    )
    if names := config.rm_of_run:
        for field in dataclasses.fields(config):
            given = field.name.startswith("rm") and getattr(config, field.name) != field.default
            require(
                not given or field.name == "rm_of_run",
                f"--rm-of-run: each run has one reward: leave {dashed(field.name)} out",
            )
        require(
            len(names) == config.runs,
            f"--rm-of-run: got {len(names)}, expected one reward for each of --runs {config.runs}",
        )
        # All of them are loaded. `reward` of a merge is their mean over the runs.
        config.rm = list(dict.fromkeys(names))
        config.rm_weights = [names.count(name) / len(names) for name in config.rm]
    config = train_policy.resolve(config)
    etas = numbers("--etas", config.etas)
    require(bool(etas), "--etas: expected at least one number")
    require(
        all(a < b for a, b in zip(etas, etas[1:])), f"--etas {config.etas}: expected rising numbers"
    )
    require(
        all(0 <= eta <= 1 for eta in etas + numbers("--keep-etas", config.keep_etas)),
        "--etas, --keep-etas: expected numbers in [0, 1]",
    )
    require(
        config.lora_save != "adapter",
        "--lora-save adapter: merging needs whole weights: leave it out",
    )
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


def run_warp(run: Run, task: Task) -> dict:
    """Algorithm 1 into the run's folder; returns what front.json holds.

    Of several processes, groups train the runs of an iteration side by side. All merge, and the
    first measures and writes.
    """
    from minalign.merge import liti, merge_policies
    from minalign.models.activations import checkpoint_activations_
    from minalign.models.loading import load_policy
    from minalign.models.saving import save_policy
    from minalign.running.card import policy_card
    from minalign.tools.task_vectors import angle_summary, with_moves

    config, results = run.config, {"runs": [], "merges": [], "front": []}
    theta_sft = weights_of(task.start)
    policy = copy.deepcopy(task.start).requires_grad_(True)  # all weights pass through this one
    if config.gradient_checkpointing:
        checkpoint_activations_(policy)
    groups = min(config.runs, run.ranks.count)
    group, members = run.ranks.split(groups)

    if config.rm_of_run:
        start, results["table"] = measure(run, task, policy, "start policy"), []
    theta_init = theta_sft
    for i in range(1, config.iterations + 1):
        print(f"\niteration {i} of {config.iterations}")
        iteration = run.folder / f"iteration-{i}"

        # theta^m <- theta_init, then REINFORCE with an EMA anchor that starts there, too
        runs = [run_of(run, iteration, i, m, members) for m in range(1, config.runs + 1)]
        for m, one in enumerate(runs):
            if m % groups == group and not (one.folder / "model").exists():  # it is written last
                set_weights_(policy, theta_init)
                own = config.rm_of_run and task.reward.alone(config.rm_of_run[m])
                task_of_run = task._replace(reward=own or task.reward)
                name = f"Policy {m + 1} of WARP's iteration {i}"
                train_one(one, task_of_run, policy, run.ran, name)
        run.ranks.wait()

        thetas, rows = [], []
        for m, one in enumerate(runs, 1):
            set_weights_(policy, weights_of(load_policy(str(one.folder))[0]))
            thetas.append(weights_of(policy))
            if run.first:
                shutil.rmtree(one.folder / "checkpoints", ignore_errors=True)
            curve = curve_of(one.folder)
            metrics = measure(run, task, policy, f"policy {m}", one.folder)
            if config.rm_of_run:  # along the curve `reward` was the run's own
                name = config.rm_of_run[m - 1]
                curve = [{f"reward {name}": point.pop("reward")} | point for point in curve]
                curve[-1] |= metrics
                rows.append({"policy": f"run {m}: {name}"} | metrics)
            results["runs"].append({"iteration": i, "run": m, "curve": curve})

        # theta_slerp <- theta_init + slerp of the task vectors: of the policies, not of their EMAs
        scope, threshold = config.scope, config.ram_threshold
        theta_merged, report = merge_policies(
            theta_init, thetas, config.method, scope, ram_threshold=threshold
        )
        set_weights_(policy, theta_merged)
        folder = iteration / "merged"
        if run.first:
            report = with_moves(report, theta_init, thetas, scope, threshold)
            write_json(iteration / "angles.json", report)
            print(f"  {angle_summary(report)}")
            folder.mkdir(exist_ok=True)
        metrics = measure(run, task, policy, f"{config.method} of {config.runs}", folder)
        if run.first and not (folder / "model").exists():
            last = {f"policy {r['run']}": r["curve"][-1] for r in results["runs"][-config.runs :]}
            last["merge"] = metrics
            card = policy_card(run.ran, f"WARP's merge of iteration {i}", folder, 0, last)
            save_policy(policy, task.tokenizer, folder / "model", card=card)
        results["merges"].append({"iteration": i} | metrics)
        if config.rm_of_run and run.first:
            rows = [{"policy": "start policy"} | start, *rows, {"policy": config.method} | metrics]
            results["table"] += [{"iteration": i} | row for row in rows]
            print(reward_table(rows))

        # theta_init <- (1 - eta) theta_init + eta theta_slerp, for the next iteration
        theta_init = liti(theta_init, theta_merged, config.eta)

    if not run.first:
        return results
    # The front goes to the *start policy*; its other end is the last merge, not the last theta_init
    print("\nfront: (1 - eta) theta_sft + eta theta_merged")
    keep_etas = numbers("--keep-etas", config.keep_etas)
    for eta in sorted({*numbers("--etas", config.etas), *keep_etas}):
        set_weights_(policy, liti(theta_sft, theta_merged, eta))
        results["front"].append({"eta": eta} | measure(run, task, policy, f"eta {eta:g}"))
        if eta in keep_etas:
            front = {f"eta {point['eta']:g}": point for point in results["front"]}
            folder = run.folder / "front" / f"eta-{eta:g}"
            card = policy_card(run.ran, f"WARP's front at eta {eta:g}", folder, 0, front)
            save_policy(policy, task.tokenizer, folder / "model", card=card)
    write_json(run.folder / "front.json", results)
    return results


def reward_table(rows: list[dict]) -> str:
    """What start policy, runs and merge of an iteration are worth by every reward."""
    names = ["kl_sft", "reward", *(name for name in rows[0] if name.startswith("reward "))]
    width = max(len(row["policy"]) for row in rows)
    lines = [f"  {'held-out means':{width}}" + "".join(f"  {name:>8}" for name in names)]
    for row in rows:
        values = (f"  {row[name]:z{max(8, len(name))}.3f}" for name in names)
        lines.append(f"  {row['policy']:{width}}" + "".join(values))
    return "\n".join(lines)


def run_of(run: Run, iteration: Path, i: int, m: int, members: Ranks) -> Run:
    """The m-th of an iteration's runs, with a seed of its own: other prompts, other samples."""
    seed = run.config.seed + 1_000_003 * ((i - 1) * run.config.runs + m)
    config = dataclasses.replace(run.config, seed=seed)
    return dataclasses.replace(run, folder=iteration / f"run-{m}", config=config, ranks=members)


def train_one(run: Run, task: Task, policy: torch.nn.Module, ran: dict, title: str) -> None:
    """One of the M runs, into its own folder, from the weights that `policy` has.

    Adapters are added to the weights at its end: what is merged later is W + BA, since the mean of
    As times the mean of Bs is another matrix.
    """
    import torch

    from minalign.measuring.progress import judge
    from minalign.models.lora import add_lora_, merge_lora_
    from minalign.models.saving import save_policy
    from minalign.running.card import policy_card

    config = run.config
    run.folder.mkdir(parents=True, exist_ok=True)
    if config.lora_rank:
        torch.manual_seed(config.seed)
        add_lora_(policy, config.lora_rank, config.lora_alpha, targets=config.lora_targets)
    if run.first and not run.stop.is_set():
        judge(run, train_policy.evaluate(run, task, policy))  # where a decline is measured from
    train_policy.train(run, task, policy)
    merge_lora_(policy)
    if run.first:
        begins = {"theta_init": run.counts["start"]["metrics"]} if "start" in run.counts else {}
        card = policy_card(ran, title, run.folder, int(run.last["step"]), begins)
        save_policy(policy, task.tokenizer, run.folder / "model", card=card)


def measure(
    run: Run, task: Task, policy: torch.nn.Module, name: str, place: Path | None = None
) -> dict[str, float]:
    """Metrics of `policy` on the held-out prompts, with a line that says them.

    With a folder `place` they are kept there, and read back where they are there already.
    """
    if run.stop.is_set():  # nothing is lost: all that came before is saved
        raise KeyboardInterrupt(f"before {name} was measured")
    if not run.first:
        return {}
    run.require_in_place()
    cached = place / "results.json" if place else None
    if cached and cached.exists():
        read = read_json(cached, "reward", "kl_sft")
        metrics = {key: math.nan if read[key] is None else read[key] for key in read}
    else:
        metrics = train_policy.evaluate(run, task, policy)[0]
        if cached:
            write_json(cached, metrics)
    shown = "".join(f"  {key} {metrics[key]:z7.3f}" for key in metrics if key != "distinct_2")
    print(f"  {name:<22}{shown}")
    return metrics


def curve_of(folder: Path) -> list[dict[str, float]]:
    """The held-out metrics along a run, with their steps."""
    rows = read_json_lines(folder / "metrics.jsonl", "step")
    held_out = [{k: v for k, v in row.items() if k.startswith("eval_")} for row in rows]
    return [
        {"step": row["step"]} | {name.removeprefix("eval_"): point[name] for name in point}
        for row, point in zip(rows, held_out)
        if "eval_kl_sft" in point
    ]


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, run WARP, draw the front."""
    config = resolve(parse_flags(Config, __doc__, argv))
    check_functions(config.rm, config.dataset)
    with open_run(config, "warp") as run:
        run.require_shared_folder()
        task = train_policy.load(run)
        with run.begun():
            results = run_warp(run, task)
        if run.first:
            last = f"{run.folder}/iteration-{config.iterations}/merged/model"
            print(f"\nsaved {last}, {run.folder}/front.json", end="")
            draw(results, run.folder / "front.png")


def draw(results: dict, path: Path) -> None:
    """The front as a figure, where matplotlib is installed; the line on what was saved is ended."""
    try:
        from minalign.tools.figures import plot_front
    except ImportError:
        print("\nfront.png was not drawn: pip install matplotlib")
    else:
        plot_front(results, path)
        print(f", {path}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
