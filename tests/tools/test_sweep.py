"""A sweep runs what is missing, names what failed, and its table says what the runs logged.

Most runs here are those of a script that takes no time, and has flags and a folder as ours have.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minalign.running.errors import one_line_errors
from minalign.tools import sweep

ROOT = Path(__file__).parents[2]
SCRIPT = '''
import dataclasses, json, os, pathlib, sys, time
from dataclasses import dataclass
from minalign.running.errors import one_line_errors, require
from minalign.running.flags import flag, parse_flags
from minalign.running.run import stop_after_step

@dataclass
class Config:
    """A script's."""
    out: str = flag("", "folder")
    resume: bool = flag(False, "go on")
    seed: int = flag(0, "seed")
    eta: float = flag(0.5, "how far", "[0, 1]")
    name: str = flag("", "a text")
    rm: list[str] | None = flag(None, "rewards")
    fails: bool = flag(False, "seed 1 fails")
    waits: float = flag(0.0, "seconds")

def resolve(config):
    require(config.name != "bad", "--name bad: expected a good one")
    return config

def main():
    config = resolve(parse_flags(Config, "A script."))
    folder = pathlib.Path(config.out)
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    with open(folder / "starts", "a") as file:
        file.write(f"{config.resume} {os.getpid()}\\n")
    if config.waits:
        with stop_after_step(folder) as stop:
            stop.wait(config.waits)
            time.sleep(0.5)  # the rest of the step; a second signal would end it at once
            raise KeyboardInterrupt("after its step")
    require(not (config.fails and config.seed == 1), "--seed 1: it fails")
    rows = [{"step": s, "reward": 0.0, "kl_sft": 0.0} for s in (1, 2, 3)]
    for row in rows:
        kl = row["step"] * (1 + config.eta)
        row |= {"eval_kl_sft": kl, "eval_reward": config.eta * kl + config.seed}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))

if __name__ == "__main__":
    with one_line_errors():
        main()
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("script.py").write_text(SCRIPT)
    return tmp_path


def starts(folder):
    return len(Path(folder, "starts").read_text().splitlines())


def test_every_setting_runs_with_every_seed_once_and_the_table_says_what_they_logged(here, capsys):
    command = "script.py --eta .25,1 --rm=a,b/c --seeds 2 --out s --jobs 3 -- --name x".split()
    sweep.main(command)
    folders = [
        f"eta-{e}_rm-{r}_seed-{s}" for e in ("0.25", "1.0") for r in ("a", "b_c") for s in (0, 1)
    ]
    assert sorted(path.name for path in Path("s").iterdir() if path.is_dir()) == sorted(folders)
    config = json.loads(Path("s/eta-1.0_rm-b_c_seed-1/config.json").read_text())
    assert (config["eta"], config["rm"], config["seed"], config["name"]) == (1.0, ["b/c"], 1, "x")
    rows = json.loads(Path("s/sweep.json").read_text())
    assert [row["setting"] for row in rows] == [
        f"eta-{e}_rm-{r} (n=2)" for e in ("0.25", "1.0") for r in ("a", "b_c")
    ]
    # Last: KL 3 (1 + eta), reward eta KL + seed. All reach KL 3.75: there it is 3.75 eta + seed.
    first, last = rows[0], rows[-1]
    assert first["kl_sft"]["values"] == [3.75, 3.75] and last["kl_sft"]["mean"] == 6
    assert last["reward"]["values"] == [6, 7] and last["reward"]["mean"] == 6.5
    assert last["reward"]["deviation"] == pytest.approx(0.5**0.5)
    assert last["reward at KL 3.75"]["values"] == pytest.approx([3.75, 4.75])
    assert first["reward at KL 3.75"]["values"] == pytest.approx([0.9375, 1.9375])
    assert "6.500 +- 0.707" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert Path("s/sweep.png").stat().st_size > 1000

    Path("s/eta-1.0_rm-a_seed-0/finished").unlink()  # as if it had been killed
    sweep.main(command)
    assert "8 runs, 7 of them finished" in capsys.readouterr().out
    again = {name: starts(f"s/{name}") for name in folders}
    assert again.pop("eta-1.0_rm-a_seed-0") == 2 and set(again.values()) == {1}


def test_a_run_that_failed_is_named_and_the_others_go_on(here, capsys):
    with pytest.raises(SystemExit) as exit, one_line_errors():
        sweep.main("script.py --eta 0.5,1 --seeds 3 --out s -- --fails".split())
    assert exit.value.code == 1
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line]
    assert lines[0] == "failed: 2 of 6"
    assert lines[1] == "  s/eta-0.5_seed-1: error: --seed 1: it fails"
    assert [row["seeds"] for row in json.loads(Path("s/sweep.json").read_text())] == [2, 2]
    assert not Path("s/eta-0.5_seed-1/finished").exists()


def test_one_run_of_one_setting(here):
    sweep.main("script.py --seeds 1 --out s".split())
    (row,) = json.loads(Path("s/sweep.json").read_text())
    assert row["setting"] == "script (n=1)" and row["reward"]["deviation"] is None


BAD = {
    "script.py --eta 0.5,2 -- --name x": "--eta 2.0: expected a number in [0, 1]",
    "script.py --eta 0.5,": "--eta 0.5,: expected values with commas",
    "script.py --fails --seeds 2": "--fails --seeds: expected values",
    "script.py --eta": "--eta --: expected values",
    "script.py --eta 0.5,.5": "a value is given twice",
    "script.py --eta 0.5 --eta 1": "--eta: given twice",
    "script.py --eta 0.5,1 -- --eta 0.3": "--eta: both before and after --",
    "script.py --eta 0.5,1 -- --eta=0.3": "--eta: both before and after --",
    "script.py -- --out x": "--out: the sweep's own: leave it out after --",
    "script.py -- --seed 3": "--seed: the sweep's own",
    "script.py --seed 3,4": "--seed: the sweep's own: leave it out",
    "script.py -- --resume": "--resume: the sweep's own",
    "script.py --etta 0.5,1": "unrecognized arguments: --etta 0.5",
    "script.py -- --etta 1": "unrecognized arguments: --etta 1",
    "script.py --name a,bad": "--name bad: expected a good one",
    "script.py --eta nan,1": "--eta nan: expected a number",
    "script.py --seeds 0": "--seeds 0: expected a number in [1, 1000]",
    "script.py --jobs 0": "--jobs 0: expected",
    "none.py --eta 1": "none.py: no such script",
    "script.py other.py --eta 1": "script.py other.py: expected one script",
    "--eta 0.5,1": "the following arguments are required: SCRIPT",
    "rules.py --eta 1": "rules.py: has no Config",
    "broken.py --eta 1": "broken.py: cannot be imported",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_sweeps_are_one_line_before_anything_runs(here, capsys, command):
    Path("rules.py").write_text("x = 1\n")
    Path("broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(SystemExit) as exit, one_line_errors():
        sweep.main(command.split())
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and BAD[command] in lines[0]
    assert not Path("runs").exists()


def test_a_finished_run_with_other_flags_is_not_taken_for_one_of_these(here, capsys):
    sweep.main("script.py --eta 0.5 --seeds 1 --out s".split())
    with pytest.raises(SystemExit) as exit, one_line_errors():
        sweep.main("script.py --eta 0.5 --seeds 1 --out s -- --name other".split())
    assert exit.value.code == 2 and "s/eta-0.5_seed-0 ran with --name" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_reaches_every_run_once_and_the_same_command_goes_on(here, number):
    words = "-m minalign sweep script.py --eta 0.5,1 --seeds 1 --out s --jobs 2 -- --waits".split()
    job = subprocess.Popen(
        [sys.executable, *words, "60"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    folders = [Path("s/eta-0.5_seed-0"), Path("s/eta-1.0_seed-0")]
    deadline = time.monotonic() + 60
    while not all((f / "starts").exists() for f in folders) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(job.pid, number)  # as a terminal does: to all of the group
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 130 and errors == "stopped: the same command goes on\n"
    for folder in folders:
        assert "stopped: after its step: go on" in Path(f"{folder}.log").read_text()
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / "starts").read_text().split()[1]), 0)
        assert not (folder / "finished").exists()


@pytest.mark.slow
def test_real_scripts_are_swept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = "--batch-size 4 --eval-prompts 4 --max-new-tokens 4 --device cpu".split()
    rm = "--steps 4 --batch-size 4 --eval-every 2 --max-eval-pairs 8 --device cpu".split()
    script = {name: str(ROOT / f"{name}.py") for name in ("train_rm", "train_policy", "warp")}
    sweep.main([script["train_rm"], *"--lr 1e-4,1e-3 --seeds 2 --out rms --".split(), *rm])
    (row, _) = json.loads(Path("rms/sweep.json").read_text())
    assert row["setting"] == "lr-0.0001 (n=2)" and 0 < row["loss"]["mean"] < 2
    rewards = "rms/lr-0.0001_seed-0,rms/lr-0.0001_seed-1"
    sweep.main(
        [script["train_policy"], "--rm", rewards, *"--seeds 1 --out p -- --steps 2".split(), *tiny]
    )
    assert len(json.loads(Path("p/sweep.json").read_text())) == 2
    a, b = rewards.split(",")
    flags = ["--rm-of-run", f"{a} {b},{b} {a}", "--method", "ram,slerp", "--seeds", "2"]
    more = "--out w -- --steps 2 --iterations 1 --etas 0,1".split()
    sweep.main([script["warp"], *flags, *more, *tiny])
    rows = json.loads(Path("w/sweep.json").read_text())
    assert [row["seeds"] for row in rows] == [2] * 4 and Path("w/sweep.png").exists()
