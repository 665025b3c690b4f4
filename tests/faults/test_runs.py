"""--resume knows what the run was made of; a folder belongs to one process; machines agree.

This file is also what two launchers of torchrun start in two folders: a list of commands.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(HERE)]

import tiny  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import train_policy  # noqa: E402
import train_rm  # noqa: E402
import warp  # noqa: E402
from minalign.running import flags as limits  # noqa: E402

POLICY = (
    "--model lm --dataset p.jsonl --steps 2 --batch-size 4 --eval-prompts 3 "
    "--max-new-tokens 4 --lr 1e-2 --warmup-steps 1 --device cpu --save-every 1 --keep 9 --out o"
).split()
PAIRS = (
    "--model lm --dataset d.jsonl --steps 2 --batch-size 4 --device cpu --lr 1e-2 --out o".split()
)
NAMED, SAVED = [*POLICY, "--rm", "rules:short"], [*POLICY, "--rm", "rm"]
WARP = [*SAVED, *"--steps 1 --runs 1 --iterations 1 --etas 0,1".split()]
RULE = "def short(p, c):\n    return [-len(x) / 10 for x in c]\n"
SCRIPTS = {
    "policy": lambda *more: train_policy.main([*SAVED, *more]),
    "rules": lambda *more: train_policy.main([*NAMED, *more]),
    "rm": lambda *more: train_rm.main([*PAIRS, *more]),
    "warp": lambda *more: warp.main([*WARP, *more]),
}


def write_inputs(folder):
    tiny.policy(folder / "lm")
    tiny.reward_model(folder / "rm")
    tiny.rows(folder / "p.jsonl", {"prompt": "what is the {n} film ?"})
    pair = {"prompt": "What is {n}?", "chosen": "good {n}", "rejected": "bad {n}"}
    tiny.rows(folder / "d.jsonl", pair)
    (folder / "rules.py").write_text(RULE)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@contextlib.contextmanager
def inside(folder):
    before, path = Path.cwd(), list(sys.path)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path
        sys.modules.pop("rules", None)


@pytest.fixture
def place(inputs, tmp_path):
    """A folder of its own with the inputs, in which the test runs."""
    shutil.copytree(inputs, tmp_path / "place")
    with inside(tmp_path / "place"):
        yield tmp_path / "place"


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """kind -> a folder with the inputs and a finished run o, made when it is first asked for."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "place"
            shutil.copytree(inputs, made[kind])
            with inside(made[kind]):
                SCRIPTS[kind]()
        return made[kind]

    return of


@pytest.fixture
def resumed(finished, tmp_path):
    """kind -> copies a finished run and its inputs, and enters that folder."""
    with contextlib.ExitStack() as stack:

        def enter(kind):
            shutil.copytree(finished(kind), tmp_path / "place")
            stack.enter_context(inside(tmp_path / "place"))

        yield enter


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def edit(path, change):
    """Change the rows of a file of JSON lines, or a JSON object."""
    path = Path(path)
    if path.suffix == ".jsonl":
        changed = change(rows_of(path))
        path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    else:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))


def one_weight(folder):
    """Another value of a single weight, saved by safetensors."""
    state = load_file(f"{folder}/model.safetensors")
    next(iter(state.values())).view(-1)[3] += 1e-3
    save_file(state, f"{folder}/model.safetensors", metadata={"format": "pt"})


def without_fingerprints(config):
    config.pop("fingerprints", None)
    return config


def state_of(step, folder="o"):
    return torch.load(f"{folder}/checkpoints/step-{step:07d}/state.pt", weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def refusal(capsys, run, *more):
    """The one line that a script ends with."""
    from minalign.running.errors import one_line_errors

    capsys.readouterr()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end, one_line_errors():
            run(*more)
    finally:
        signal.signal(signal.SIGTERM, handler)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert end.value.code == 2 and len(said) == 1
    return said[0]


# --- what a resumed run was made of


def longer(text):
    return lambda rows: [*rows[:-1], rows[-1] | {"prompt": text}]


CHANGES = {  # (kind of run, what is changed, what the line names)
    "B12 prompts in reverse": ("policy", lambda: edit("p.jsonl", lambda r: r[::-1]), "data"),
    "B12 a prompt less": ("policy", lambda: edit("p.jsonl", lambda r: r[1:]), "data"),
    "B12 a word of a prompt": ("policy", lambda: edit("p.jsonl", longer("what ?")), "data"),
    "B12 twenty-five other prompts": (
        "policy",
        lambda: tiny.rows("p.jsonl", {"prompt": "is {n} good ?"}, 25),
        "held-out data, training data",
    ),
    "S4 start model of another seed": ("policy", lambda: tiny.policy("lm", seed=1), "lm"),
    "S4 start model of another size": (
        "policy",
        lambda: tiny.policy("lm", num_hidden_layers=1),
        "start model lm",
    ),
    "S4 one weight of the start model": ("policy", lambda: one_weight("lm"), "start model lm"),
    "S4 one weight of the reward model": ("policy", lambda: one_weight("rm"), "reward rm"),
    "S4 reward model of another seed": ("policy", lambda: tiny.reward_model("rm", seed=1), "rm"),
    "S4 another end token": (
        "policy",
        lambda: edit("lm/generation_config.json", lambda c: c | {"eos_token_id": [3, 9]}),
        "start model lm",
    ),
    "S4 the reward model's template": (
        "policy",
        lambda: Path("rm/chat_template.jinja").write_text(tiny.TEMPLATES["think"]),
        "reward rm",
    ),
    "S4 a reward function": ("rules", lambda: edit_text("rules.py", "/ 10", "/ 9"), "rules:short"),
    "S4 pairs in reverse": ("rm", lambda: edit("d.jsonl", lambda r: r[::-1]), "training data"),
    "S4 an answer": (
        "rm",
        lambda: edit("d.jsonl", lambda r: [r[0] | {"chosen": "fine"}, *r[1:]]),
        "data",
    ),
    "S4 what a reward model starts from": ("rm", lambda: one_weight("lm"), "start model lm"),
    "S4 warp's prompts": ("warp", lambda: edit("p.jsonl", lambda r: r[::-1]), "training data"),
    "S4 warp's start model": ("warp", lambda: one_weight("lm"), "start model lm"),
}


def edit_text(path, old, new):
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_input_is_refused_in_one_line_also_of_a_finished_run(case, resumed, capsys):
    kind, change, named = CHANGES[case]
    resumed(kind)
    before = {path: path.read_bytes() for path in Path("o").rglob("*") if path.is_file()}
    change()
    said = refusal(capsys, SCRIPTS[kind], "--resume")
    assert "o began with other content of: " in said and named in said
    after = {path: path.read_bytes() for path in Path("o").rglob("*") if path.is_file()}
    assert before == after


def resave():
    """The same weights and rows, written again."""
    for name in ("lm", "rm"):
        state = load_file(f"{name}/model.safetensors")
        save_file(state, f"{name}/model.safetensors", metadata={"format": "pt"})
        Path(name, "README.md").write_text("a note\n")
        Path(name, "checkpoint-3").mkdir()
    edit("p.jsonl", lambda rows: [row | {"id": i} for i, row in enumerate([*rows, rows[5]])])


@pytest.mark.parametrize("more", [[], ["--gradient-checkpointing"], ["--micro-batch-size", "2"]])
def test_what_is_the_same_goes_on(more, resumed):
    """B16: machine flags. Files written anew, a note, a double prompt: nothing has changed."""
    resumed("policy")
    resave()
    before = state_of(2)
    SCRIPTS["policy"]("--resume", *more)
    assert same(before, state_of(2))


@pytest.mark.parametrize("change", [without_fingerprints, lambda c: c | {"fingerprints": "x"}])
def test_a_folder_of_before_goes_on_with_a_line_that_says_so(change, resumed, capsys):
    """B12: once. From then on there are fingerprints."""
    resumed("policy")
    edit("o/config.json", change)
    SCRIPTS["policy"]("--resume")
    assert "o/config.json has no fingerprints: whether data or models changed is unknown" in (
        capsys.readouterr().out
    )
    one_weight("lm")
    assert "start model lm" in refusal(capsys, SCRIPTS["policy"], "--resume")


def test_another_version_of_the_code_is_said_and_goes_on(resumed, capsys):
    """B12: a mended bug must not end a run."""
    resumed("policy")
    edit("o/config.json", lambda c: c | {"fingerprints": c["fingerprints"] | {"code": "0"}})
    SCRIPTS["policy"]("--resume")
    assert "the code of minalign has changed since o ran" in capsys.readouterr().out


def test_data_that_an_older_version_hashed_otherwise_are_said_to_be_unknown(resumed, capsys):
    resumed("policy")
    older = {"training data": "0" * 16}
    edit("o/config.json", lambda c: c | {"fingerprints": c["fingerprints"] | older})
    SCRIPTS["policy"]("--resume")
    line = "--resume: whether training data changed is unknown: o/config.json is older\n"
    assert line in capsys.readouterr().out
    tiny.rows(Path("p.jsonl"), {"prompt": "who made the {n} film ?"})
    assert "training data" in refusal(capsys, SCRIPTS["policy"], "--resume")


# --- flags that may change


@pytest.mark.parametrize("anchor", [[], ["--anchor", "ema", "--mu", "0.2", "--baseline", "ema"]])
def test_a_finished_policy_run_grows_to_what_one_long_run_makes(anchor, place):
    """B17: bit for bit, also when it grows twice."""
    flags = [*anchor, "--seed", "3"]
    SCRIPTS["policy"](*flags, "--steps", "4", "--out", "long")
    for steps, more in (("1", []), ("2", ["--resume"]), ("4", ["--resume"])):
        SCRIPTS["policy"](*flags, "--steps", steps, *more)
        assert json.loads(Path("o/config.json").read_text())["steps"] == int(steps)
    long, grown = state_of(4, "long"), state_of(4)
    for state in (long, grown):
        state.pop("counts")  # each end was evaluated
    assert same(long, grown)
    results = [json.loads(Path(out, "results.json").read_text()) for out in ("long", "o")]
    assert results[0] == results[1]
    models = [load_file(f"{out}/model/model.safetensors") for out in ("long", "o")]
    assert same(*models)
    assert [row["step"] for row in rows_of("o/metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "kind, flags, why",
    [
        ("policy", ["--steps", "1"], "ran with --steps 2, now 1: give the same or more"),
        ("rm", ["--steps", "4"], "its learning rate ends with the steps"),
        ("rm", ["--steps", "1"], "its learning rate ends with the steps"),
        ("warp", ["--steps", "2"], "its finished runs would be of two lengths"),
        ("warp", ["--eval-prompts", "2"], "of two sets of prompts"),
        ("policy", ["--lr", "0.5"], "ran with --lr 0.01, now 0.5"),
    ],
)
def test_steps_that_may_not_change_are_refused_with_the_reason(kind, flags, why, resumed, capsys):
    """B17"""
    resumed(kind)
    assert why in refusal(capsys, SCRIPTS[kind], "--resume", *flags)


def test_other_held_out_prompts_seek_the_best_step_anew(resumed, capsys):
    """B17: the best of before was measured on others."""
    resumed("policy")
    SCRIPTS["policy"]("--resume", "--steps", "3", "--eval-prompts", "2", "--eval-every", "1")
    assert "other held-out prompts than before" in capsys.readouterr().out
    assert state_of(3)["counts"]["best_step"] == 3
    SCRIPTS["policy"]("--resume", "--steps", "3", "--eval-prompts", "2")
    assert "other held-out prompts" not in capsys.readouterr().out


def test_a_flag_that_is_younger_than_the_run_had_its_default(resumed, capsys):
    resumed("policy")
    edit("o/config.json", lambda config: config.pop("missing_eos_penalty") and config)
    SCRIPTS["policy"]("--resume")
    edit("o/config.json", lambda config: config.pop("missing_eos_penalty") and config)
    assert "--missing-eos-penalty 1.0, now 2.0" in refusal(
        capsys, SCRIPTS["policy"], "--resume", "--missing-eos-penalty", "2"
    )


# --- whose folder it is

HOLD = """
import sys, time
from types import SimpleNamespace
from minalign.running.run_folder import claimed_folder
out, resume = sys.argv[1], len(sys.argv) > 2
with claimed_folder(SimpleNamespace(out=out, resume=resume), "policy") as (folder, _):
    print(folder, flush=True)
    time.sleep(60)
"""


def hold(*arguments):
    """A process that has claimed a folder, and its name."""
    command = [sys.executable, "-c", HOLD, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    return process, process.stdout.readline().splitlines()[-1]


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_second_process_in_one_folder_is_refused_at_once(place, capsys, resume):
    """B13, S23: before anything is loaded. The lock dies with its process."""
    process, _ = hold("o")
    try:
        shutil.rmtree("lm")  # what it would load: it does not come to that
        said = refusal(capsys, SCRIPTS["policy"], *resume)
        assert f"--out o: process {process.pid} on " in said and "running there" in said
    finally:
        process.kill()
        process.wait()
    tiny.policy("lm")
    SCRIPTS["policy"](*resume)
    assert Path("o/results.json").exists() and not Path("o/lock").exists()


def test_automatic_numbers_are_claimed_too(place):
    """B13, S22: two at once, beside a folder whose number is none."""
    for name in ("policy-²", "policy-٣x", "policy-", "policy-1x"):
        Path("runs", name).mkdir(parents=True)
    one, first = hold("")
    two, second = hold("")
    for process in (one, two):
        process.kill()
        process.wait()
    assert [first, second] == ["runs/policy-1", "runs/policy-2"]
    SCRIPTS["policy"]("--out", "")
    assert Path("runs/policy-3/model").exists()


@pytest.mark.parametrize("out", [["--out", "o"], ["--out", "a/b"], ["--out", ""]])
def test_a_folder_in_which_nothing_ran_is_removed_again(place, capsys, out):
    """B13: what cannot be loaded leaves nothing; files of others stay."""
    shutil.rmtree("rm")
    refusal(capsys, SCRIPTS["policy"], *out)
    assert not Path("o").exists() and not Path("a/b").exists() and not [*Path().glob("runs/*")]
    Path("o").mkdir()
    Path("o/log.txt").write_text("a log\n")
    refusal(capsys, SCRIPTS["policy"])
    assert [path.name for path in Path("o").iterdir()] == ["log.txt"]


@pytest.mark.parametrize("name", ["log.txt", "slurm-12.out", ".nfs01", "wandb/run/x", "lock"])
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_folder_that_holds_only_logs_of_others_is_no_run(place, name, resume):
    """B23"""
    from minalign.running.run_folder import claimed_folder

    Path("o", name).parent.mkdir(parents=True)
    Path("o", name).touch()
    config = train_policy.Config(out="o", resume=bool(resume))
    with claimed_folder(config, "policy") as (folder, require_in_place):
        require_in_place()
        assert folder == Path("o")


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "model", "checkpoints", "best"])
def test_what_a_run_has_written_makes_a_folder_a_run(place, capsys, name):
    """B23, the other way round."""
    Path("o").mkdir()
    Path("o", name).touch()
    assert "o: holds another run" in refusal(capsys, SCRIPTS["policy"])


DELETES = """
import os, shutil
calls = []
def short(p, c):
    calls.append(1)
    if len(calls) == 3:
        shutil.rmtree("o")
        if os.path.exists("replace"):
            os.mkdir("o"), open("o/lock", "w").close()
    return [-len(x) / 10 for x in c]
"""


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_deleted_during_the_run_ends_it_in_one_line(place, capsys, replaced):
    """S25: nothing is written there any more, so that --resume begins anew."""
    Path("rules.py").write_text(DELETES)
    if replaced:  # by another run with the same --out
        Path("replace").touch()
    run = SCRIPTS["rules"]
    assert "o: was deleted or replaced during the run" in refusal(capsys, run, "--steps", "6")
    assert [path.name for path in Path().glob("o/*")] == ["lock"] * replaced
    Path("rules.py").write_text(RULE)
    run("--resume")
    assert "no run in o yet" in capsys.readouterr().out and Path("o/results.json").exists()


def test_a_reward_models_folder_that_is_deleted_is_not_made_again(place, capsys, monkeypatch):
    """S25: train_rm.py saves its model on the way."""
    real = train_rm.pair_losses

    def losses(*args):
        shutil.rmtree("o", ignore_errors=True)
        return real(*args)

    monkeypatch.setattr(train_rm, "pair_losses", losses)
    assert "o: was deleted" in refusal(capsys, SCRIPTS["rm"], "--eval-every", "1")
    assert not Path("o").exists()


def test_rows_that_a_log_has_lost_are_said(resumed, capsys):
    """S25: deleted, or broken in the middle."""
    resumed("policy")
    edit("o/metrics.jsonl", lambda rows: [{"step": rows[1]["step"]}])  # without its seconds
    text = Path("o/samples.jsonl").read_text().splitlines()
    Path("o/samples.jsonl").write_text("\n".join(['{"step": 1', *text[1:]]) + "\n")
    SCRIPTS["policy"]("--resume", "--steps", "3")
    said = capsys.readouterr().out
    assert "o/metrics.jsonl: 1 of the first 2 steps are missing" in said
    assert "o/samples.jsonl: 1 of the first 2 steps are missing" in said


def test_a_run_without_its_checkpoints_says_that_it_begins_anew(resumed, capsys):
    resumed("policy")
    shutil.rmtree("o/checkpoints")
    SCRIPTS["policy"]("--resume")
    assert "no checkpoint in o: beginning from the start" in capsys.readouterr().out


LINKS = ["checkpoints/step-0000001", "model"]
LINKS += [pytest.param(name, marks=pytest.mark.slow) for name in ("checkpoints", "best")]


@pytest.mark.parametrize("name", LINKS)
def test_folders_may_be_symbolic_links_to_another_disk(resumed, tmp_path, name):
    """S21: the link is replaced or followed, and what it leads to is left alone."""
    resumed("policy")
    shutil.move(f"o/{name}", tmp_path / "disk")
    Path("o", name).symlink_to(tmp_path / "disk")
    there = sorted(path.name for path in (tmp_path / "disk").iterdir())
    for steps in ("3", "4"):
        SCRIPTS["policy"]("--resume", "--steps", steps, "--keep", "1")
    assert (tmp_path / "disk").is_dir()
    if name != "checkpoints":
        assert there == sorted(path.name for path in (tmp_path / "disk").iterdir())
    left = sorted(path.name for path in Path("o").iterdir())
    expected = "best checkpoints config.json metrics.jsonl model results.json samples.jsonl"
    assert left == expected.split()


# --- damaged folders


def another_state(change):
    path = Path("o/checkpoints/step-0000002/state.pt")
    state = torch.load(path, weights_only=True)
    torch.save(change(state), path)


def broadcastable(state):
    """Of the first matrix one row, which copy_ would spread over all."""
    return state | {"policy": [state["policy"][0][:1], *state["policy"][1:]]}


def moments(state):
    state["optimizer"]["state"][0]["exp_avg"] = state["optimizer"]["state"][0]["exp_avg"][:1]
    return state


DAMAGED = {  # (kind, damage, what the line has)
    "S20 config nested 100,000 deep": (
        "policy",
        lambda: Path("o/config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
        "o/config.json: cannot be read",
    ),
    "S20 config that is a list": ("rm", lambda: Path("o/config.json").write_text("[]"), "config"),
    "S20 config that is no text": (
        "warp",
        lambda: Path("o/config.json").write_bytes(b"\xff\xfe\x00"),
        "o/config.json: cannot be read",
    ),
    "S20 state of a reward model": (
        "policy",
        lambda: another_state(lambda s: {"trained": s["policy"], "optimizer": s["optimizer"]}),
        "step-0000002: not of this run: policy",
    ),
    "S20 state without anchor": (
        "policy",
        lambda: another_state(lambda s: {k: v for k, v in s.items() if k != "anchor"}),
        "not of this run: anchor",
    ),
    "S20 baseline of another kind": (
        "policy",
        lambda: another_state(lambda s: s | {"baseline": [1.0]}),
        "not of this run: baseline",
    ),
    "S20 optimizer of another model": (
        "policy",
        lambda: another_state(lambda s: s | {"optimizer": {"state": {}, "param_groups": []}}),
        "not of this run: optimizer",
    ),
    "S20 counts that are none": (
        "policy",
        lambda: another_state(lambda s: s | {"counts": 7}),
        "not of this run: counts",
    ),
    "S4 weights that would broadcast": (
        "policy",
        lambda: another_state(broadcastable),
        "not of this run: policy: shape (1, 32), expected (287, 32)",
    ),
    "S4 moments that would broadcast": (
        "policy",
        lambda: another_state(moments),
        "not of this run: optimizer: exp_avg",
    ),
    "S20 results without kl_sft": (
        "warp",
        lambda: edit("o/iteration-1/run-1/results.json", lambda r: {"reward": 1.0}),
        "run-1/results.json: not what a run wrote: expected an object with reward, kl_sft",
    ),
    "S20 results cut in half": (
        "warp",
        lambda: Path("o/iteration-1/merged/results.json").write_text('{"rew'),
        "merged/results.json: cannot be read",
    ),
    "S20 a broken line in a finished run's log": (
        "warp",
        lambda: Path("o/iteration-1/run-1/metrics.jsonl").write_text('{"step": 1\n'),
        "run-1/metrics.jsonl: line 1: no JSON object",
    ),
    "S20 a finished run's log is gone": (
        "warp",
        lambda: Path("o/iteration-1/run-1/metrics.jsonl").unlink(),
        "run-1/metrics.jsonl: cannot be read",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_run_folder_ends_with_one_line(case, resumed, capsys):
    kind, damage, named = DAMAGED[case]
    resumed(kind)
    models = [path.read_bytes() for path in Path("o").rglob("model.safetensors")]
    damage()
    assert named in refusal(capsys, SCRIPTS[kind], "--resume")
    assert models == [path.read_bytes() for path in Path("o").rglob("model.safetensors")]


@pytest.mark.parametrize("state", [[1, 2], torch.ones(3)], ids=["list", "tensor"])
def test_a_state_that_is_no_dict_is_passed_over(resumed, capsys, state):
    """S20: the checkpoint before is taken."""
    resumed("policy")
    another_state(lambda _: state)
    SCRIPTS["policy"]("--resume")
    assert "step-0000002: cannot be read" in capsys.readouterr().out and state_of(2)["policy"]


# --- the best step

WORSE = """
calls = []
def short(p, c):
    calls.append(1)
    return [-float(len(calls))] * len(c)
"""


@pytest.mark.parametrize(
    "lora", [[], ["--lora-rank", "2"], ["--lora-rank=2", "--lora-save=adapter"]]
)
def test_the_best_step_is_a_model_beside_the_last_ones(place, capsys, lora):
    """B19: every tool loads it; the end of the run says that the last step is worse."""
    from transformers import AutoModelForCausalLM

    from minalign.models.loading import load_policy

    Path("rules.py").write_text(WORSE)
    SCRIPTS["rules"](*lora, "--steps", "3", "--eval-every", "1", "--lr", "0.05", "--keep", "1")
    rows = rows_of("o/metrics.jsonl")
    values = [row["eval_reward"] - 0.1 * row["eval_kl_sft"] for row in rows]
    said = capsys.readouterr().out
    assert f"worse than {values[0]:.3f} at step 1, which is o/best" in said
    last = json.loads(Path("o/results.json").read_text())["after"]
    assert f"{last['reward'] - 0.1 * last['kl_sft']:.3f} at the last step" in said
    best, last = (load_policy(f"o/{name}")[0] for name in ("best", "model"))
    assert not same(best.state_dict(), last.state_dict())
    kept, end = state_of(1)["policy"], state_of(3)["policy"]
    if not lora:
        assert same(kept, [p.detach() for p in best.parameters()])
        assert same(end, [p.detach() for p in last.parameters()])
        bare = AutoModelForCausalLM.from_pretrained("o/best", dtype=torch.float32)
        assert same(bare.state_dict(), best.state_dict())
    else:
        start = load_policy("lm")[0].state_dict()
        name = "model.layers.0.self_attn.q_proj.weight"
        delta = 2.0 * kept[1] @ kept[0]  # alpha / rank = 2
        torch.testing.assert_close(best.state_dict()[name], start[name] + delta)
    assert Path("o/best/tokenizer.json").exists() or lora


def test_weights_that_are_all_1_are_named(place, capsys):
    """--importance changes nothing where no rounded weights draw."""
    SCRIPTS["policy"]("--importance", "token", "--importance-limit", "3", "--out", "a")
    said = capsys.readouterr().out
    assert "--importance, --importance-limit: in float32 the policy itself draws" in said
    for flags in ([], ["--importance", "token", "--sampler-dtype", "bfloat16"]):
        SCRIPTS["policy"](*flags, "--out", f"b{len(flags)}")
        assert "the policy itself draws" not in capsys.readouterr().out


def test_with_a_target_the_best_step_may_be_below_the_last(place, capsys):
    """What is beyond 1.2 times the target is not the best, and the end of the run says so."""
    Path("rules.py").write_text(WORSE.replace("-float(len(calls))", "float(len(calls))"))
    flags = ["--steps", "3", "--eval-every", "1", "--lr", "0.05"]
    SCRIPTS["rules"](*flags, "--out", "free")
    near, *_, far = [row["eval_kl_sft"] for row in rows_of("free/metrics.jsonl")]
    assert 0 < 2 * near < far
    capsys.readouterr()
    SCRIPTS["rules"](*flags, "--target-kl", str(near), "--out", "o")
    said = capsys.readouterr().out
    assert (
        "at the last step, with a KL above 1.2 x" in said and "at step 1, which is o/best" in said
    )
    results = json.loads(Path("o/results.json").read_text())
    assert results["best"]["step"] == 1 and results["best"]["reward"] < results["after"]["reward"]


def test_a_last_step_that_is_the_best_has_a_best_model_too(resumed):
    """B19: best/ is there whatever step it is of."""
    resumed("policy")
    best = state_of(2)["counts"]["best_step"]
    saved = list(load_file("o/best/model.safetensors").values())
    kept = {tuple(tensor.shape): 1 for tensor in state_of(best)["policy"]}
    assert saved and {tuple(tensor.shape) for tensor in saved} == set(kept)


def test_keep_does_not_promise_a_best_reward_model(capsys):
    """B19: train_rm.py keeps none among its checkpoints; its model/ is the best one."""
    with pytest.raises(SystemExit):
        train_rm.main(["--help"])
    assert "beside the best one" not in " ".join(capsys.readouterr().out.split())


# --- reward models that are none


@pytest.mark.parametrize("mode", ["stop", "skip"])
@pytest.mark.parametrize("lr", ["1e38", "3e38"])
def test_a_reward_model_whose_scores_are_not_finite_ends_with_one_line(
    place, capsys, monkeypatch, lr, mode
):
    """S8: and no word of a good model where none is kept."""
    monkeypatch.setitem(limits.LARGEST, float, "(-inf, inf)")
    given = ["--lr", lr, "--warmup", "0", "--eval-every", "1", "--on-nonfinite", mode]
    said = refusal(capsys, SCRIPTS["rm"], *given)
    assert "lower --lr" in said and "no model is kept" in said
    assert not Path("o/model").exists()


# --- the environment


@pytest.mark.parametrize("size", ["2", "x", "0", "-1", "1.5", "", "²"])
def test_world_size_without_torchrun_is_one_line(place, capsys, monkeypatch, size):
    """S24"""
    monkeypatch.setenv("WORLD_SIZE", size)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    said = refusal(capsys, SCRIPTS["policy"])
    assert f"WORLD_SIZE={size}" in said and "torchrun" in said
    assert not Path("o").exists()


def test_main_runs_in_a_thread(place):
    """S32: without Ctrl-C's handling, which the main thread keeps."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    failures = []

    def run():
        try:
            SCRIPTS["policy"]()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == [] and Path("o/results.json").exists()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("layout", ["loose", "packed", "detached", "worktree", "installed", "none"])
def test_the_commit_is_asked_of_git(tmp_path, monkeypatch, layout):
    """B22: refs are not only loose files. A repository around an installed package is not its."""
    from minalign.running import run

    def git(*words, at=tmp_path / "repo"):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(at), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    here = tmp_path / "repo"
    here.mkdir()
    if layout != "none":
        git("init", "-q")
        git("commit", "-q", "--allow-empty", "-m", "first")
        expected = git("rev-parse", "HEAD")
    if layout == "packed":
        git("pack-refs", "--all")
    if layout == "detached":
        git("checkout", "-q", "--detach")
    if layout == "worktree":
        git("worktree", "add", "-q", str(tmp_path / "tree"))
        here = tmp_path / "tree"
    if layout == "installed":
        here = here / "venv" / "site-packages"
    if layout in ("installed", "none"):
        expected = None
    (here / "minalign/running").mkdir(parents=True)
    monkeypatch.setattr(run, "__file__", str(here / "minalign/running/run.py"))
    assert run._git_revision() == expected


# --- several machines: two launchers, two working folders that share nothing

SLOW_EVALUATION = """
import os, time
def short(p, c):
    if len(c) == 3 and os.environ.get("RANK") == "0":
        time.sleep(4)
    return [-len(x) / 10 for x in c]
"""
COMMANDS = [  # (what is changed on the second machine, command, what both say)
    ("", ["train_policy", *NAMED, "--lr", "NODE"], "--lr: 1.0 on rank 0"),
    ("", ["train_policy", *NAMED, "--resume-on-1"], "--resume: False on rank 0"),
    ("data", ["train_policy", *NAMED], "training data: "),
    ("model", ["train_policy", *NAMED], "start model lm: "),
    ("model", ["train_rm", *PAIRS], "start model lm: "),
    ("data", ["train_rm", *PAIRS], "training data: "),
    ("reward", ["train_policy", *NAMED], "reward rules:short: "),
    ("reward model", ["train_policy", *SAVED], "reward rm: "),
    ("code", ["train_policy", *SAVED], "code: "),
    ("", ["warp", *WARP], "--out o: expected a folder that all machines share"),
    ("slow", ["train_policy", *NAMED, "--out", "s"], ""),
    ("", ["train_policy", *NAMED, "--out", "p"], ""),
    ("", ["train_policy", *NAMED, "--out", "p", "--resume", "--steps", "4"], ""),
    ("", ["train_policy", *NAMED, "--out", "p", "--resume", "--steps", "4"], ""),
    ("", ["train_policy", *NAMED, "--out", "p"], "--out p: holds another run"),
    (
        "",
        ["train_policy", *NAMED, "--out", "p", "--resume", "--steps", "4", "--lr", "9"],
        "--lr 0.01, now 9",
    ),
    ("", ["train_rm", *PAIRS, "--out", "q"], ""),
    ("", ["train_rm", *PAIRS, "--out", "q", "--resume"], ""),
]


@contextlib.contextmanager
def changed(what, node):
    """Something is not the same on the second machine."""
    from minalign.running import fingerprints

    kept, package = Path("kept"), fingerprints.__file__
    if what == "slow":
        Path("rules.py").write_text(SLOW_EVALUATION)
    elif what and node == 1:
        shutil.copytree(".", kept, ignore=shutil.ignore_patterns("kept", "said*", "[opqs]"))
        if what == "data":
            edit("p.jsonl", lambda rows: rows[::-1])
            edit("d.jsonl", lambda rows: rows[::-1])
        elif what == "reward":
            edit_text("rules.py", "/ 10", "/ 11")
        elif what == "code":
            shutil.copytree(ROOT / "minalign", "copy/minalign")
            edit_text("copy/minalign/losses.py", "import torch", "import torch  # another commit")
            fingerprints.__file__ = str(Path("copy/minalign/running/fingerprints.py").resolve())
        else:
            one_weight({"model": "lm", "reward model": "rm"}[what])
    yield
    fingerprints.__file__ = package
    Path("rules.py").write_text(RULE)
    if kept.exists():
        shutil.copytree(kept, ".", dirs_exist_ok=True)
        shutil.rmtree(kept)


def machine(node):
    """What each of two machines does: all commands, one after the other."""
    from datetime import timedelta

    from minalign.running.errors import UserError

    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=90))
    torch.distributed.barrier()
    # Whatever waits for more than two seconds must do so in the run's own group.
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
    said = []
    for what, (script, *flags), _ in COMMANDS:
        flags = [flag.replace("NODE", str(node + 1)) for flag in flags]
        flags = [flag for flag in flags if flag != "--resume-on-1"] + ["--resume"] * (
            node == 1 and "--resume-on-1" in flags
        )
        out = io.StringIO()
        with changed(what, node), contextlib.redirect_stdout(out):
            try:
                {"train_policy": train_policy, "train_rm": train_rm, "warp": warp}[script].main(
                    flags
                )
                said.append("")
            except UserError as error:
                said.append(str(error))
        sys.modules.pop("rules", None)
    Path("said.json").write_text(json.dumps(said))
    torch.distributed.new_group(timeout=timedelta(seconds=90))  # until both are here
    os._exit(0)  # gloo's threads may abort a process at exit


def launch(folder, node, port, *words):
    """torchrun on one of two machines."""
    torchrun = "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --master-addr 127.0.0.1"
    command = [sys.executable, *torchrun.split(), "--node-rank", str(node)]
    command += ["--master-port", str(port), *map(str, words)]
    names = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests:."}
    log = open(folder / "log.txt", "w")
    pipes = dict(stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    return subprocess.Popen(command, cwd=folder, env=os.environ | names, **pipes)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def end(processes):
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def machines(inputs, tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        shutil.copytree(inputs, folder)
    return folders


@pytest.mark.slow
def test_two_machines_without_a_shared_folder_run_as_one_or_say_what_differs(machines):
    """S27, S28, B11: what differs is named on both; --resume hands over the state of rank 0."""
    port = free_port()
    jobs = [launch(folder, i, port, Path(__file__), i) for i, folder in enumerate(machines)]
    try:
        codes = [job.wait(timeout=150) for job in jobs]
    finally:
        end(jobs)
    assert codes == [0, 0], (machines[0] / "log.txt").read_text()[-3000:]
    for folder in machines:
        said = json.loads((folder / "said.json").read_text())
        for (what, _, expected), line in zip(COMMANDS, said, strict=True):
            assert (expected in line) if expected else line == "", (what, expected, line)
            assert not expected.endswith((": ", "rank 0")) or "on rank 1 (" in line
    first, second = machines
    assert not list(second.glob("[opqs]"))  # rank 0 alone writes
    rows = rows_of(first / "p/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    with inside(first):  # as one process from the start: two policies would come apart
        SCRIPTS["rules"]("--steps", "4", "--out", "one")
    for one, two in zip(rows_of(first / "one/metrics.jsonl"), rows):
        for name in ("reward", "kl_sft", "grad_norm", "baseline"):
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-5), (name, one["step"])


@pytest.mark.slow
def test_ranks_end_when_their_launcher_is_killed_alone(machines):
    """S23: after a step, with a checkpoint; those of the other machine, too."""
    for folder in machines:
        text = RULE.replace("return", "time.sleep(0.05)\n    return")
        (folder / "rules.py").write_text("import time\n" + text)
    command = [ROOT / "train_policy.py", *NAMED, "--steps", "3000"]
    port = free_port()
    jobs = [launch(folder, i, port, *command) for i, folder in enumerate(machines)]
    try:
        until = time.monotonic() + 120
        log = machines[0] / "o/metrics.jsonl"
        while not (log.exists() and log.stat().st_size) and time.monotonic() < until:
            time.sleep(0.1)
        os.kill(jobs[1].pid, signal.SIGKILL)
        jobs[0].wait(timeout=60)
        said = (machines[0] / "log.txt").read_text()
        assert "stopped: after step" in said and "--out o --resume" in said
        last = rows_of(log)[-1]["step"]
        assert (machines[0] / f"o/checkpoints/step-{last:07d}/state.pt").exists()
    finally:
        end(jobs)


@pytest.mark.slow
def test_each_machine_makes_the_toy_world(machines):
    """S29: the same bits, or a line; train_rm.py makes its start policy."""
    flags = "--steps 2 --max-pairs 20 --max-eval-pairs 10 --device cpu --out o".split()
    port = free_port()
    jobs = [
        launch(folder, i, port, ROOT / "train_rm.py", *flags) for i, folder in enumerate(machines)
    ]
    try:
        codes = [job.wait(timeout=150) for job in jobs]
    finally:
        end(jobs)
    assert codes == [0, 0], (machines[1] / "log.txt").read_text()[-3000:]
    worlds = [next(folder.glob("runs/*/start-policy/model.safetensors")) for folder in machines]
    assert worlds[0].read_bytes() == worlds[1].read_bytes()
    assert (machines[0] / "o/model").exists() and not (machines[1] / "o").exists()


def test_configs_that_are_compared_are_those_of_the_scripts():
    """Every flag that may not change, though one may think so, is a flag of that script."""
    from minalign.running.run_folder import FREE_TO_CHANGE, WHY_NOT

    configs = {"rm": train_rm.Config, "warp": warp.Config}
    for kind, name in WHY_NOT:
        assert name in {field.name for field in dataclasses.fields(configs[kind])}
        assert name not in FREE_TO_CHANGE


if __name__ == "__main__":
    machine(int(sys.argv[1]))
