"""Several processes make the step that one makes.

The three scripts run under torchrun, and with the same flags without it.

This file is also what torchrun starts:

    torchrun --nproc-per-node 2 tests/running/test_ranks.py COMMANDS.json

runs the scripts' main functions one after the other, so that the heavy imports are paid for once.
"""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

POLICY = (
    "--steps 3 --batch-size 8 --max-new-tokens 8 --eval-prompts 4 --lr 1e-4 "
    "--warmup-steps 0 --rm words:score --model start --dataset prompts.jsonl --device cpu"
)
PAIRS = "--model start --dataset pairs --eval-split test --steps 4 --lr 1e-4 --device cpu"
COMMANDS = {
    "moving": f"train_policy {POLICY} --micro-batch-size 3 --anchor ema --mu 0.3 --save-every 1 "
    "--keep 3",
    "rloo": f"train_policy {POLICY} --baseline rloo --group-size 2 --lora-rank 2 --temperature 0.8",
    # Seven pairs in batches of four: an epoch's last batch has three, one rank more than the other.
    "rm": f"train_rm {PAIRS} --batch-size 4",
    # ... and one of one pair: a rank without any.
    "rm-one": f"train_rm {PAIRS} --batch-size 3 --loss ordinal",
    # more runs than ranks
    "warp": f"warp {POLICY} --runs 3 --iterations 2 --etas 0,1",
    # more ranks than runs
    "warp-one": f"warp {POLICY} --runs 1 --iterations 2 --etas 0,1",
}
COMMANDS = {name: command.split() for name, command in COMMANDS.items()}
SHARDED = {  # two processes with --shard: as what one process does without it
    "shard": ("moving", ["--shard"]),
    # from the one process's checkpoint of step 2
    "shard-resumed": ("moving", ["--shard", "--resume"]),
    "shard-rm": ("rm", ["--shard", "--gradient-checkpointing"]),
    # One rank has two pairs (or one) and the other one (or none), one pair per pass: passes that
    # count nothing.
    "shard-rm-one": ("rm-one", ["--shard", "--micro-batch-size", "1"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with every command's run by one process (one-NAME) and by two (two-NAME)."""
    from minalign.data import toy

    folder = tmp_path_factory.mktemp("ranks")
    tokenizer = toy.make_tokenizer()
    toy.make_model(tokenizer, seed=0).save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    # Sorted: the vocabulary has no order of its own, prompts would be others each time.
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())

    def text(place):
        return " ".join(words[place % 30 :][:4])

    def texts(first, count, **columns):
        rows = [
            {name: text(first + shift + i) for name, shift in columns.items()} for i in range(count)
        ]
        return "".join(json.dumps(row) + "\n" for row in rows)

    (folder / "prompts.jsonl").write_text(texts(0, 30, prompt=0))
    (folder / "pairs").mkdir()
    (folder / "pairs/train.jsonl").write_text(texts(0, 7, chosen=3, rejected=9))
    (folder / "pairs/test.jsonl").write_text(texts(20, 2, chosen=3, rejected=9))
    (folder / "words.py").write_text(
        "def score(prompts, completions):\n    return [len(c) % 7 / 3 for c in completions]\n"
    )
    start(folder, into_folders("one", COMMANDS), processes=1)
    sharded = {name: [*COMMANDS[like], *flags] for name, (like, flags) in SHARDED.items()}
    cut(folder / "one-moving", folder / "two-shard-resumed")
    flags = "--shard --lr 1e30 --on-nonfinite skip --save-every 9 --eval-every 1".split()
    skips = {"skips": [*COMMANDS["moving"], *flags]}
    start(folder, into_folders("two", COMMANDS | sharded | skips), processes=2)
    return folder


def into_folders(prefix, commands):
    """Each command with --out PREFIX-NAME."""
    return [[*command, "--out", f"{prefix}-{name}"] for name, command in commands.items()]


def cut(run, copied):
    """A copy of a run as it was after its second step."""
    shutil.copytree(run, copied)
    shutil.rmtree(copied / "checkpoints/step-0000003")


def launcher(processes):
    """The command that starts this file."""
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
    return [sys.executable, *(torchrun if processes > 1 else []), __file__]


def environment(folder):
    """That of a process that finds the scripts, and the reward function in `folder`."""
    path = {"PYTHONPATH": f"{ROOT}:{folder}"}
    return os.environ | path | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def start(folder, commands, processes):
    """Run `commands`, a list of lists of words, in `folder`, by so many processes."""
    (folder / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run(
        [*launcher(processes), "commands.json"],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(row):
    numeric = {name: value for name, value in row.items() if isinstance(value, int | float)}
    return {k: v for k, v in numeric.items() if k not in ("seconds", "tokens_per_second")}


def assert_same_weights(one, two, within):
    """The saved weights differ by `within` at most.

    Adam divides by the size of the gradient. Where that is rounding alone, a weight may go a part
    of lr the other way.
    """
    from safetensors.torch import load_file

    first, second = (load_file(path / "model.safetensors") for path in (one, two))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=within)


@pytest.mark.parametrize("name", ["moving", "rloo", "rm", "rm-one", *SHARDED])
def test_two_processes_train_as_one(runs, name):
    like = SHARDED[name][0] if name in SHARDED else name
    one, two = runs / f"one-{like}", runs / f"two-{name}"
    rows = lines(one / "metrics.jsonl"), lines(two / "metrics.jsonl")
    assert len(rows[0]) == len(rows[1]) == (4 if "rm" in name else 3)
    for a, b in zip(*rows):
        assert numbers(a) == pytest.approx(numbers(b), rel=1e-5, abs=1e-5)
    assert_same_weights(one / "model", two / "model", within=1e-5)
    if "rm" not in name:
        for a, b in zip(lines(one / "samples.jsonl"), lines(two / "samples.jsonl")):
            assert a["completion"] == b["completion"]
            assert numbers(a) == pytest.approx(numbers(b), abs=1e-5)
        assert any(row["kl_sft"] != 0 for row in rows[0]) and rows[0][-1]["grad_norm"] > 0


def test_a_checkpoint_of_a_sharded_run_is_that_of_one_process(runs, monkeypatch, capsys):
    from tiny_runs import difference

    import train_policy

    one, two = (
        torch.load(runs / name / "checkpoints/step-0000003/state.pt")
        for name in ("one-moving", "two-shard")
    )
    assert difference(one, two, tolerance=1e-5) == ""
    assert one["optimizer"]["state"][0]["exp_avg"].abs().max() > 1e-3
    cut(runs / "two-shard", runs / "alone")
    monkeypatch.chdir(runs)
    monkeypatch.syspath_prepend(runs)
    train_policy.main([*COMMANDS["moving"][1:], "--resume", "--out", "alone"])
    assert_same_weights(runs / "alone/model", runs / "one-moving/model", within=1e-5)
    assert [row["step"] for row in lines(runs / "alone/metrics.jsonl")] == [1, 2, 3]


def test_a_sharded_run_skips_a_step_that_is_not_finite(runs):
    rows = lines(runs / "two-skips/metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 1, 2] and rows[1]["grad_norm"] is None


@pytest.mark.parametrize("script", ["train_policy", "train_rm", "warp"])
def test_shard_is_refused_where_it_makes_no_sense(script, monkeypatch):
    from minalign.running.errors import UserError

    script = importlib.import_module(script)
    with pytest.raises(UserError, match="^--shard: "):
        script.resolve(script.Config(shard=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="^--shard: "):
        script.resolve(script.Config(shard=True, lora_rank=2))
    if script.__name__ != "warp":
        assert script.resolve(script.Config(shard=True)).shard


def test_out_of_memory_ends_a_sharded_run_with_one_line(monkeypatch):
    from minalign.data import toy
    from minalign.running import shard
    from minalign.running.errors import UserError
    from minalign.running.optimizer import Optimizer
    from minalign.running.ranks import Ranks

    monkeypatch.setattr(shard, "sharded_copy", lambda model, ranks: model)
    model = toy.make_model(toy.make_tokenizer(), seed=0)
    config = SimpleNamespace(lr=1e-3, max_grad_norm=1.0, micro_batch_size=8, shard=True)
    optimizer = Optimizer(model, list(model.parameters()), config, Ranks())
    message = "tried to allocate 2 GiB.*--resume with --micro-batch-size 4"
    with pytest.raises(UserError, match=message):
        for _ in optimizer.micro_batches([3] * 8):
            with optimizer.retry_in_halves():
                raise torch.OutOfMemoryError("tried to allocate 2 GiB")


def test_runs_of_warp_are_spread_over_processes(runs):
    one, two = runs / "one-warp", runs / "two-warp"
    for i in (1, 2):
        for part in ("run-1", "run-2", "run-3", "merged"):
            place = f"iteration-{i}/{part}/model"
            assert_same_weights(one / place, two / place, within=0)  # a run belongs to one rank
    fronts = [json.loads((folder / "front.json").read_text())["front"] for folder in (one, two)]
    assert fronts[0] == fronts[1]
    assert not list(two.glob("iteration-*/run-*/checkpoints"))


def test_ranks_share_a_run_of_warp_where_there_are_more_of_them(runs):
    one, two = runs / "one-warp-one", runs / "two-warp-one"
    for place in ("iteration-1/run-1/model", "iteration-2/merged/model"):
        assert_same_weights(one / place, two / place, within=1e-5)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_it_resumes(runs):
    command = [*COMMANDS["moving"], "--save-every", "1", "--steps", "400", "--out", "killed"]
    (runs / "commands.json").write_text(json.dumps([command]))
    job = subprocess.Popen(
        [*launcher(2), "commands.json"],
        cwd=runs,
        env=environment(runs),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list((runs / "killed").glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    listed = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True)
    children = listed.stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    killed = time.monotonic()
    _, errors = job.communicate(timeout=60)
    assert job.returncode != 0 and time.monotonic() - killed < 60 and "SIGKILL" in errors
    done = len(lines(runs / "killed/metrics.jsonl"))
    assert done < 400
    config = json.loads((runs / "killed/config.json").read_text())
    config["steps"] = done + 2  # not 400 of them
    (runs / "killed/config.json").write_text(json.dumps(config))
    start(runs, [[*command, "--steps", str(done + 2), "--resume"]], processes=2)
    assert [row["step"] for row in lines(runs / "killed/metrics.jsonl")] == list(range(1, done + 3))


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch, tmp_path):
    import train_policy
    from minalign.running.errors import UserError

    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "run"
    with pytest.raises(UserError, match="expected a multiple of 2 processes x --group-size 4"):
        train_policy.main(["--batch-size", "12", "--baseline", "rloo", "--out", str(out)])
    assert not out.exists()  # and no folder is left behind


def test_shares_and_groups():
    from minalign.running.errors import UserError
    from minalign.running.ranks import Ranks

    assert [Ranks(i, 3).share(12) for i in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    rows = [Ranks(i, 3).rows([5, 6, 7, 8]) for i in range(3)]
    assert rows == [([5, 8], 1.0), ([6], 1.0), ([7], 1.0)]
    assert Ranks(2, 3).rows([5, 6]) == ([5], 0.0)  # one that counts nothing
    with pytest.raises(UserError, match="--batch-size 7: expected a multiple of 2"):
        Ranks(0, 2).share(7)  # in warp.py, too, where groups of processes share a run
    alone = Ranks()
    assert alone.first and alone.split(5) == (0, alone) and alone.from_first(lambda: "x") == "x"
    tensor = torch.arange(3.0)
    alone.sum_([tensor])
    assert torch.equal(alone.gather(tensor), torch.arange(3.0))


if __name__ == "__main__":
    from minalign.models import padding
    from minalign.running.errors import one_line_errors

    for name in ("minalign.reward", "minalign.rollout"):
        importlib.import_module(name)  # before `short` is there: they keep the real tokens_per_pass
    as_it_is = padding.tokens_per_pass

    def short(model):
        return 30 >> int(os.environ.get("RANK", 0))

    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    with one_line_errors():
        for script, *flags in json.loads(Path(sys.argv[1]).read_text()):
            # With `short` the second rank makes more gradient passes. Not for warp.py: its results
            # are compared to the last bit.
            padding.tokens_per_pass = as_it_is if script == "warp" else short
            importlib.import_module(script).main(flags)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()  # gloo's threads may abort a process at exit
