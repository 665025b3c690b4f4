"""A reference run: rated sentences -> reward model -> REINFORCE -> WARP -> best of n, three seeds.

    python tests/experiments/reference/run.py --model path-or-id --ratings rated.jsonl \\
        --out runs/reference

Each seed is run by the commands that a user would type; they are printed as they begin. The
prompts are openings that the model itself writes, or those of --prompts. What has ended is not run
again: the same command goes on where a killed one stopped.

--out gets seed-N/ with the runs, and record/, which is what is published, and what compare.py
compares: results.json (what was measured, flags, versions, seconds, peak memory), figure.png,
samples.jsonl, and of each seed config and log (rows with held-out numbers, and every fifth other).

Of --size small, the learning rates and beta are those of earlier runs (docs/experiments.md). KL was
looked at on seed 100, which counts nowhere, with a reward model of 600 steps: 2.2 nats after 40
steps of REINFORCE, then 6.8 at the end of WARP's front. Between the two looks WARP's steps were cut
from 50 to 40, for time; since then no flag was changed. Of 135m and 500m nothing has been tried.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
from minalign.running.files import write_json, write_json_lines
from minalign.tools.logged import NOT_A_SETTING

ROOT = Path(__file__).parents[3]
SIZES = {  # --size -> group of flags -> flags
    "smoke": {
        "rm": "--steps 4 --batch-size 4 --eval-every 2 --max-pairs 200 --max-eval-pairs 50",
        "asked": "--max-new-tokens 8 --eval-prompts 4",
        "trained": "--batch-size 4 --lr 1e-3 --beta 0.3 --missing-eos-penalty 0",
        "policy": "--steps 4 --eval-every 2",
        "warp": "--iterations 1 --runs 2 --steps 2 --eval-every 2 --etas 0,0.5,1",
        "best of": "--best-of 1 2",
    },
    "small": {
        "rm": "--steps 400 --lr 1e-3 --eval-every 100",
        "asked": "--max-new-tokens 48 --eval-prompts 64",
        "trained": "--batch-size 32 --lr 1e-4 --beta 0.3 --missing-eos-penalty 0",
        "policy": "--steps 100 --eval-every 20",
        "warp": "--iterations 2 --runs 2 --steps 40 --eval-every 20",
        "best of": "--best-of 1 2 4 8 16",
    },
    "135m": {
        "rm": "--steps 600 --lr 5e-5 --eval-every 100 --crop-words 5-60 --micro-batch-size 16",
        "asked": "--max-new-tokens 48 --eval-prompts 128",
        "trained": "--batch-size 64 --lr 1e-5 --beta 0.1 --missing-eos-penalty 0"
        " --micro-batch-size 16",
        "policy": "--steps 200 --eval-every 20",
        "warp": "--iterations 2 --runs 2 --steps 100 --eval-every 50",
        "best of": "--best-of 1 2 4 8 16",
    },
}
SIZES["500m"] = {
    k: flags.replace("batch-size 16", "batch-size 8") for k, flags in SIZES["135m"].items()
}
STAGES = ("rm", "policy", "warp", "evaluation")
# of config.json, of each machine its own: what they stand for is compared by fingerprints
PLACES = {"model", "rm", "dataset", "start"}


def quoted(text: str) -> str:
    """A local path from the root, since commands run in folders of their own; a hub id as it is."""
    return shlex.quote(str(Path(text).resolve()) if Path(text).exists() else text)


def commands(model: str, ratings: str, prompts: str, size: str, seed: int) -> dict[str, str]:
    """Stage -> the command, which is run in the seed's folder."""
    of, seeded = SIZES[size], f"--format plain --seed {seed}"
    merged = f"warp/iteration-{of['warp'].split()[1]}/merged"
    task = f"--rm rm --standardize-rewards --dataset {prompts} {of['asked']} {seeded}"
    return {
        "rm": f"train_rm.py --model {model} --dataset {ratings} {of['rm']} {seeded} --out rm",
        "policy": f"train_policy.py --model {model} {task} {of['trained']} {of['policy']}"
        " --out policy",
        "warp": f"warp.py --model {model} {task} {of['trained']} {of['warp']} --out warp",
        "evaluation": f"-m minalign evaluate --start {model} --model policy {merged} {task}"
        f" {of['best of']} --out evaluation",
    }


def run(command: str, folder: Path, record: Path, resume: bool = False) -> None:
    """Run a Python command in `folder`, its output to a .log file beside `record`.

    The record has the command, seconds, and peak memory in MiB. Where it is there, nothing runs.
    """
    if record.exists():
        before = json.loads(record.read_text())["command"]
        if before != command:
            sys.exit(f"{record}: another command ran: {before}: give another --out")
        return
    words = [*shlex.split(command), *["--resume"] * resume]
    if words[0].endswith(".py"):
        words[0] = str(ROOT / words[0])
    print(f"(cd {folder} && python {shlex.join(words)})", flush=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # one thread: how sums are split among threads changes their last bits
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": path}
    began = time.monotonic()
    with open(record.with_suffix(".log"), "a") as log:
        streams = {"stdout": log, "stderr": subprocess.STDOUT}
        child = subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, **streams)
        # its peak begins with the size of this process, which is small: torch is not imported
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"exit status {child.returncode}: see {record.with_suffix('.log')}")
    seconds, per_mib = time.monotonic() - began, 2**20 if sys.platform == "darwin" else 2**10
    took = {"seconds": round(seconds, 1), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1)}
    took |= {"peak_mib": round(usage.ru_maxrss / per_mib), "resumed": resume}
    write_json(record, {"command": command} | took)


def run_seed(given: argparse.Namespace, prompts: str, seed: int) -> None:
    """All commands of a seed."""
    folder = given.out / f"seed-{seed}"
    folder.mkdir(exist_ok=True)
    made = commands(quoted(given.model), quoted(given.ratings), prompts, given.size, seed)
    for stage, command in made.items():
        record = folder / f"{stage}.json"
        resume = stage != "evaluation" and (folder / stage).exists()
        if stage == "evaluation" and not record.exists():  # it does not resume
            shutil.rmtree(folder / stage, ignore_errors=True)
        run(command, folder, record, resume)


def rows(path: Path) -> list[dict]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured(folder: Path) -> dict[str, float | None]:
    """All that compare.py compares of one seed: "stage: quantity" -> number.

    Of the reward model the step with the lowest held-out loss, which is the one that is kept.
    """
    kept = [row for row in rows(folder / "rm/metrics.jsonl") if "eval_loss" in row]
    kept = min(kept, key=lambda row: math.inf if row["eval_loss"] is None else row["eval_loss"])
    found = {f"rm: {name}": kept[f"eval_{name}"] for name in ("accuracy", "loss")}
    curve = [{"step": 0} | json.loads((folder / "policy/results.json").read_text())["before"]]
    for row in rows(folder / "policy/metrics.jsonl"):
        held_out = {k.removeprefix("eval_"): v for k, v in row.items() if k.startswith("eval_")}
        curve += [{"step": row["step"]} | held_out] if held_out else []
    found["policy: reward, step 0"] = curve[0]["reward"]  # the KL there is 0
    for point in curve[1:]:
        for name in ("reward", "kl_sft"):
            found[f"policy: {name}, step {point['step']}"] = point[name]
    for point in json.loads((folder / "warp/front.json").read_text())["front"]:
        for name in ("reward", "kl_sft") if point["eta"] else ():
            found[f"warp: {name}, eta {point['eta']:g}"] = point[name]
    for point in json.loads((folder / "evaluation/results.json").read_text())["best_of"]:
        found[f"best of n: reward, n = {point['n']}"] = point["reward"]
    return found


def extremes(folder: Path, each: int = 2) -> list[dict]:
    """Best, median and worst samples by reward, of the start policy, REINFORCE and WARP."""
    samples, chosen = rows(folder / "evaluation/samples.jsonl"), []
    for model in dict.fromkeys(row["model"] for row in samples):
        ranked = [row for row in samples if row["model"] == model and row["reward"] is not None]
        ranked.sort(key=lambda row: -row["reward"])
        middle = max(0, (len(ranked) - each) // 2)
        places = {"best": slice(each), "median": slice(middle, middle + each)}
        for rank, place in (places | {"worst": slice(-each, None)}).items():
            texts = (
                {k: row[k] for k in ("reward", "prompt", "completion")} for row in ranked[place]
            )
            chosen += [{"model": model, "rank": rank} | text for text in texts]
    return chosen


def settings(config: dict) -> dict:
    """What of a config.json must agree for two runs to be comparable."""
    names = config.keys() - NOT_A_SETTING - PLACES
    return {name: config[name] for name in sorted(names) if config[name] not in (None, "")}


def write_record(given: argparse.Namespace) -> dict:
    """Fill --out/record; returns results.json."""
    record = given.out / "record"
    record.mkdir(exist_ok=True)
    local = (given.model, given.ratings, given.prompts or "../openings.jsonl")
    short = [Path(path).name if Path(path).exists() else path for path in local]
    results, samples = {"size": given.size, "seeds": {}}, []
    for seed in range(given.seeds):
        folder, kept = given.out / f"seed-{seed}", record / f"seed-{seed}"
        configs = {
            stage: json.loads((folder / stage / "config.json").read_text()) for stage in STAGES
        }
        hashes = {}
        for stage, config in configs.items():  # paths in the names of models are left out
            for name, value in (config.get("fingerprints") or {}).items():
                hashes[f"{stage}: {' '.join(name.split()[:2])}"] = value
        took = {stage: json.loads((folder / f"{stage}.json").read_text()) for stage in STAGES}
        for stage, command in commands(*short, given.size, seed).items():
            took[stage]["command"] = command
        numbers = {"measured": measured(folder), "fingerprints": hashes, "took": took}
        results["seeds"][str(seed)] = numbers
        results["settings"] = {stage: settings(config) for stage, config in configs.items()}
        results |= {name: configs["rm"][name] for name in ("machine", "versions")}
        samples += [{"seed": seed} | sample for sample in extremes(folder)]
        kept.mkdir(exist_ok=True)
        for stage in ("rm", "policy"):
            logged = rows(folder / stage / "metrics.jsonl")
            held_out = [any(k.startswith("eval_") for k in row) for row in logged]
            thin = [row for i, row in enumerate(logged) if held_out[i] or row["step"] % 5 == 0]
            write_json_lines(kept / f"{stage}-metrics.jsonl", thin)
        shutil.copy(folder / "warp/front.json", kept / "warp-front.json")
        shutil.copy(folder / "evaluation/results.json", kept / "evaluation-results.json")
    write_json(record / "results.json", results)
    write_json_lines(record / "samples.jsonl", samples)
    shutil.copy(given.out / "figure.png", record / "figure.png")
    return results


def table(results: dict) -> str:
    """A line for each quantity: of every seed, and their mean; then what the commands took."""
    seeds = results["seeds"]
    lines = ["".join([f"{'':32}", *(f"{'seed ' + seed:>10}" for seed in seeds), f"{'mean':>10}"])]
    for name in next(iter(seeds.values()))["measured"]:
        values = [seeds[seed]["measured"].get(name) for seed in seeds]
        values = [math.nan if value is None else value for value in values]
        values.append(sum(values) / len(values))
        lines.append(f"{name:32}" + "".join(f"{value:10.3f}" for value in values))
    for unit in ("seconds", "cpu_seconds", "peak_mib"):
        for stage in STAGES:
            values = "".join(f"{seeds[seed]['took'][stage][unit]:10.0f}" for seed in seeds)
            lines.append(f"{stage + ': ' + unit:32}{values}")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run what is missing, write the record, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a pretrained language model")
    parser.add_argument("--ratings", required=True, help="data with columns text and rating")
    parser.add_argument("--prompts", help="data with prompts (default: openings by the model)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="small", help="flags for such a model")
    parser.add_argument("--seeds", type=int, default=3, help="so many: 0, 1, ...")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    given = parser.parse_args()
    given.out = given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    prompts = quoted(given.prompts) if given.prompts else "../openings.jsonl"
    if not given.prompts:
        drawing = f"tests/experiments/story_openings.py --model {quoted(given.model)} --count 4000"
        run(f"{drawing} --out openings.jsonl", given.out, given.out / "openings.json")
    with ThreadPoolExecutor(given.jobs) as pool:
        for done in [pool.submit(run_seed, given, prompts, s) for s in range(given.seeds)]:
            done.result()
    runs = [f"seed-{s}/{stage}" for stage in STAGES[1:] for s in range(given.seeds)]
    drawing = f"-m minalign plot {' '.join(runs)} --out figure.png"
    run(drawing, given.out, given.out / "figure.json")
    print(table(write_record(given)))
    print(f"saved {given.out}/record")


if __name__ == "__main__":
    main()
