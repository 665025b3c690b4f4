"""Runs of a script for every combination of flag values and seeds, a table and a figure of them.

    python -m minalign sweep warp.py --eta 0.3,0.5 --mu 0.01,0.05 --seeds 3 --out runs/sweep \\
        -- --steps 60
    python -m minalign sweep train_policy.py --beta 0.05,0.1,0.3 --out runs/betas -- --rm runs/rm-1

Before `--` stand the flags that vary, their values with commas between them, behind it those that
all runs share. A value of a flag that takes several (--rm-of-run) may have spaces: "a b,c d". Each
run has a folder, named by its values. What is finished there stays as it is, what was stopped goes
on, so the same command again does only what is missing. In the end the folder has sweep.json and,
with matplotlib, sweep.png.
"""

from __future__ import annotations

import itertools
import math
import signal
import statistics
import subprocess
import sys
import time
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..models.functions import import_module, told
from ..running.errors import UserError, require
from ..running.files import write_json
from ..running.flags import flag, parse_flags
from ..running.run_folder import FREE_TO_CHANGE, require_same_flags
from .logged import Group, at_equal_kl, read_run

FINISHED = "finished"  # the file in a run's folder that says that it came to its end
OWN = ("--out", "--seeds", "--jobs", "--help", "--version")  # flags of the sweep
OURS = ("--out", "--seed", "--resume")  # flags of the script that the sweep gives


@dataclass
class Config:
    """What runs, and where to."""

    script: list[str] | None = flag(
        None, "train_rm.py, train_policy.py or warp.py", positional=True
    )
    out: str = flag("runs/sweep", "folder of the runs, the table and the figure")
    seeds: int = flag(3, "runs of each setting, with the seeds 0, 1, ...", "[1, 1000]")
    jobs: int = flag(1, "runs at a time", "[1, 1000]")


class Planned(NamedTuple):
    """A run of the sweep: the values that vary in words, its folder, the flags of the script."""

    setting: str
    folder: Path
    argv: list[str]


def split_command(argv: list[str]) -> tuple[Config, dict[str, list[str]], list[str]]:
    """The sweep's own flags, the values of those that vary, and the flags that all runs share.

    Raises:
        UserError: a flag that varies has no values, is given twice, or is the sweep's to give.
    """
    own, varied = [], {}
    end = argv.index("--") if "--" in argv else len(argv)
    words, shared = iter(argv[:end]), argv[end + 1 :]
    for word in words:
        name, equals, text = word.partition("=")
        if not name.startswith("--") or name in OWN:
            own.append(word)
        else:
            text = text if equals else next(words, "--")
            values = [value.strip() for value in text.split(",")]
            fix = "expected values with commas between them: a switch stands after --"
            require(not text.startswith("--") and all(values), f"{name} {text}: {fix}")
            require(name not in varied, f"{name}: given twice")
            varied[name] = values
    given = [word.partition("=")[0] for word in shared]
    for name in (*OURS, *varied):
        require(name not in OURS or name not in varied, f"{name}: the sweep's own: leave it out")
        both = "the sweep's own" if name in OURS else "both before and after --"
        require(name not in given, f"{name}: {both}: leave it out after --")
    return parse_flags(Config, __doc__, own, "minalign sweep"), varied, shared


def plan(config: Config, varied: dict[str, list[str]], shared: list[str]) -> list[Planned]:
    """Every run, its flags checked by the script itself before any of them starts.

    Raises:
        UserError: the script is none of ours, flags make no sense, or a folder has a run with
            others.
    """
    require(len(config.script) == 1, f"{' '.join(config.script)}: expected one script")
    path = Path(config.script[0])
    require(path.suffix == ".py" and path.is_file(), f"{path}: no such script")
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        script = import_module(str(path))
    except Exception as error:
        raise UserError(f"{path}: cannot be imported ({told(error)})") from error
    require(hasattr(script, "Config") and hasattr(script, "resolve"), f"{path}: has no Config")
    planned, kinds = [], typing.get_type_hints(script.Config)
    fields = {name: name[2:].replace("-", "_") for name in varied}
    several = {name for name in varied if "list[" in str(kinds.get(fields[name]))}
    for values in itertools.product(*varied.values()):
        parts = zip(varied, values)
        words = [[name, *(v.split() if name in several else [v])] for name, v in parts]
        for seed in range(config.seeds):
            argv = [*shared, *itertools.chain(*words), "--seed", str(seed)]
            flags = parse_flags(script.Config, script.__doc__, argv, str(path))
            parts = [f"{name[2:]}-{shown(getattr(flags, fields[name]))}" for name in varied]
            folder = Path(config.out, "_".join([*parts, f"seed-{seed}"]))
            flags.out = str(folder)
            flags = script.resolve(flags)
            if (folder / "config.json").is_file():
                require_same_flags(folder / "config.json", flags, "", FREE_TO_CHANGE)
            setting = "_".join(parts) or path.stem
            planned.append(Planned(setting, folder, [*argv, "--out", str(folder)]))
    names = [run.folder for run in planned]
    require(len({*names}) == len(names), "a value is given twice: leave one out")
    return planned


def shown(value: object) -> str:
    """A flag's value as a part of a folder's name."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return "+".join(str(one).replace("/", "_") for one in values)


def run_all(script: str, planned: list[Planned], jobs: int) -> dict[Path, str]:
    """Run what is not finished, `jobs` at a time, each into <folder>.log.

    On Ctrl-C or SIGTERM each run is told once, ends after its step, and is waited for.

    Returns:
        The last line of each run that failed, by folder.
    """
    waiting = [run for run in planned if not (run.folder / FINISHED).exists()]
    print(f"{len(planned)} runs, {len(planned) - len(waiting)} of them finished")
    running, failed, began = {}, {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                _, folder, argv = waiting.pop(0)
                folder.parent.mkdir(parents=True, exist_ok=True)
                print(f"{folder}: running, see {folder}.log", flush=True)
                with open(f"{folder}.log", "ab") as log:
                    # A session of its own: Ctrl-C in the terminal reaches it through us, once.
                    command = [sys.executable, script, *argv, "--resume"]
                    running[folder] = subprocess.Popen(
                        command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                    )
                began[folder] = time.monotonic()
            for folder in [one for one, process in running.items() if process.poll() is not None]:
                said = f"finished in {time.monotonic() - began[folder]:.0f} s"
                if not running.pop(folder).returncode:
                    (folder / FINISHED).touch()
                else:
                    lines = Path(f"{folder}.log").read_text(errors="replace").split("\n")
                    failed[folder] = next((line for line in reversed(lines) if line.strip()), "")
                    said = f"FAILED: {failed[folder]}"
                print(f"{folder}: {said}", flush=True)
            time.sleep(0.1)
    finally:
        while running:  # only where we were stopped; a second Ctrl-C is passed on, too
            try:
                for process in running.values():
                    process.send_signal(signal.SIGINT)
                for folder in list(running):
                    running[folder].wait()
                    del running[folder]
            except KeyboardInterrupt:
                pass
    return failed


def table(groups: list[Group]) -> list[dict]:
    """For each setting the last held-out measures: mean, deviation and values of the seeds.

    Of policies and fronts also the reward at the largest KL that every run reaches. Of reward runs
    they are those of the model that was kept.
    """
    runs = [run for group in groups for run in group.runs]
    curves = [[(p.get("kl_sft"), p.get("reward")) for p in run.points] for run in runs]
    curves = [[point for point in curve if all(map(is_number, point))] for curve in curves]
    grid, at_kl = at_equal_kl(curves, 2) if all(curves) else ([], [])
    measured = {}
    for i, run in enumerate(runs):
        last = dict(run.points[-1]) if run.points else {}
        if losses := run.columns.get("eval_loss", ((), ()))[1]:
            kept = min(range(len(losses)), key=lambda i: (math.isnan(losses[i]), losses[i]))
            last = {k[5:]: v[kept] for k, (_, v) in run.columns.items() if k.startswith("eval_")}
        measured[run.path] = last | ({f"reward at KL {grid[-1]:.2f}": at_kl[i][-1]} if grid else {})
    rows = []
    for group in groups:
        of_seeds = [measured[run.path] for run in group.runs]
        row = {"setting": group.label, "seeds": len(of_seeds)}
        for name in of_seeds[0]:
            values = [one.get(name, math.nan) for one in of_seeds]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            row[name] = {"mean": statistics.fmean(values), "deviation": deviation, "values": values}
        rows.append(row)
    return rows


def is_number(value: float | None) -> bool:
    """Whether a measure is there, and finite."""
    return value is not None and math.isfinite(value)


def show(rows: list[dict]) -> str:
    """The table as text: the measures that tell most, mean +- deviation over the seeds."""
    names = ["kl_sft", "reward", "gold", "accuracy", "loss", "ece"]
    names += [name for name in rows[0] if name.startswith("reward at KL")]
    names = [name for name in names if all(name in row for row in rows)]
    width = max(len(row["setting"]) for row in rows)
    lines = [" " * width + "".join(f"  {name:>17}" for name in names)]
    for row in rows:
        cells = [(row[name]["mean"], row[name]["deviation"]) for name in names]
        texts = [f"{a:z.3f}" if b is None else f"{a:z.3f} +- {b:.3f}" for a, b in cells]
        lines.append(f"{row['setting']:{width}}" + "".join(f"  {text:>17}" for text in texts))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Check every run, run what is missing, show what came out. Exit status 1 if a run failed."""
    config, varied, shared = split_command(sys.argv[1:] if argv is None else argv)
    planned = plan(config, varied, shared)
    try:
        failed = run_all(config.script[0], planned, config.jobs)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on") from None
    of_setting: dict[str, list] = {}
    for run in (run for run in planned if run.folder not in failed):
        of_setting.setdefault(run.setting, []).append(read_run(str(run.folder)))
    if of_setting:
        groups = [Group(f"{name} (n={len(runs)})", runs) for name, runs in of_setting.items()]
        rows, out = table(groups), Path(config.out)
        print("\n" + show(rows))
        write_json(out / "sweep.json", rows)
        saved = [str(out / "sweep.json")]
        try:
            from .figures import plot_groups

            plot_groups(groups, out / "sweep.png")
            saved.append(str(out / "sweep.png"))
        except ImportError:
            print("sweep.png was not drawn: pip install matplotlib")
        print(f"\nsaved {', '.join(saved)}")
    if failed:
        print(f"\nfailed: {len(failed)} of {len(planned)}", file=sys.stderr)
        print("\n".join(f"  {folder}: {line}" for folder, line in failed.items()), file=sys.stderr)
        raise SystemExit(1)
