"""The reference run's scripts: tests/experiments/reference/."""

import copy
import json
import math
import shlex
import statistics
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import train_policy
import train_rm
import warp
from minalign.data.rows import read_rows
from minalign.models.loading import end_token_ids, load_policy
from minalign.running.flags import parse_flags
from minalign.tools import evaluate

sys.path.insert(0, str(Path(__file__).parent / "experiments/reference"))
import compare
import prepare
import run

REFERENCE = Path(run.__file__).parent
SHARED = Path(__file__).parents[2] / "shared/data"
STORIES, SNIPPETS = SHARED / "stories260k", SHARED / "movie_snippets.jsonl"

NAMES = ("rm: accuracy", "policy: reward, step 2", "policy: kl_sft, step 2", "warp: reward, eta 1")


def record(*of_seeds, first=0):
    """results.json of run.py with these values of each seed, one for every one of NAMES."""
    seeds = {
        str(first + i): {
            "measured": {name: value + n for n, name in enumerate(NAMES)},
            "fingerprints": {"rm: training data": f"pairs-{first + i}", "rm: code": "1"},
        }
        for i, value in enumerate(of_seeds)
    }
    flags = {"rm": {"lr": 1e-3, "seed": 0}, "policy": {"beta": 0.3, "steps": 2, "seed": 0}}
    return {
        "seeds": seeds,
        "settings": flags,
        "machine": "x86_64, threads: 1",
        "versions": {"torch": "2.13.0"},
    }


def status(tmp_path, capsys, new, published):
    """Exit status and output of compare.py."""
    for name, content in (("new", new), ("published", published)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    code = compare.main([str(tmp_path / "new"), str(tmp_path / "published")])
    return code, capsys.readouterr().out


PUBLISHED = record(1.0, 2.0, 3.0)  # mean 2, deviation 1: 4.303 sqrt(2/3) = 3.513 to either side


@pytest.mark.parametrize(("shift", "code"), [(0.0, 0), (3.5, 0), (3.53, 1), (-3.53, 1)])
def test_three_new_seeds_are_in_the_band_or_outside(tmp_path, capsys, shift, code):
    new = record(*(value + shift for value in (1.0, 2.0, 3.0)), first=7)
    found, out = status(tmp_path, capsys, new, PUBLISHED)
    assert found == code
    assert f"{4 * code} of 4 quantities are outside; 0.2 would be by chance" in out


@pytest.mark.parametrize(("seeds", "edge"), [(1, 4.969), (2, 3.928), (6, 3.043)])
def test_the_band_of_the_mean_narrows_with_the_number_of_new_seeds(tmp_path, capsys, seeds, edge):
    for shift, code in ((edge - 0.01, 0), (edge + 0.01, 1)):
        new = record(*[2.0 + shift] * seeds, first=7)
        assert status(tmp_path, capsys, new, PUBLISHED)[0] == code


def test_the_band_holds_95_of_100_means_of_new_seeds():
    draws = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0)).tolist()
    inside = 0
    for values in draws:
        low, high = compare.band(values[:3], k=2)
        inside += low <= statistics.mean(values[3:]) <= high
    assert abs(inside / len(draws) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / len(draws))


@pytest.mark.parametrize("df", range(1, 10))
def test_students_quantiles(df):
    """The density, summed up to the quantile, is .975."""
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    x = torch.linspace(0, compare.T[df - 1], 20_001, dtype=torch.float64)
    density = scale * (1 + x**2 / df) ** (-(df + 1) / 2)
    assert 0.5 + torch.trapezoid(density, x).item() == pytest.approx(0.975, abs=2e-5)


def test_seeds_without_a_deviation_have_a_band_for_rounding(tmp_path, capsys):
    assert status(tmp_path, capsys, record(2.001, first=7), record(2.0, 2.0))[0] == 0
    assert status(tmp_path, capsys, record(2.003, first=7), record(2.0, 2.0))[0] == 1


def test_the_same_seed_is_said_to_be_equal_or_how_far_it_is(tmp_path, capsys):
    new = copy.deepcopy(PUBLISHED)
    new["seeds"]["1"]["measured"][NAMES[2]] += 0.25
    code, out = status(tmp_path, capsys, new, PUBLISHED)
    assert code == 0
    assert "seed 0: equal to the last digit\n" in out
    assert "seed 1: 3 of 4 equal to the last digit; the largest difference is 0.25" in out
    assert NAMES[2] in out.split("largest")[1]


@pytest.mark.parametrize("lost", ["removed", "null"])
def test_what_is_missing_is_outside(tmp_path, capsys, lost):
    new = copy.deepcopy(PUBLISHED)
    measured = new["seeds"]["2"]["measured"]
    measured.pop(NAMES[0]) if lost == "removed" else measured.update({NAMES[0]: None})
    code, out = status(tmp_path, capsys, new, PUBLISHED)
    assert code == 1
    assert "OUT (missing)" in out and "1 of 4" in out and "more than half of rm" in out


def test_one_of_two_quantities_of_a_stage_is_not_more_than_half(tmp_path, capsys):
    new = copy.deepcopy(PUBLISHED)
    for of in new["seeds"].values():
        of["measured"][NAMES[1]] += 100
    code, out = status(tmp_path, capsys, new, PUBLISHED)
    assert code == 0 and "1 of 4" in out and "OUT" in out


def test_a_quantity_without_a_number_in_the_published_run_is_left_out(tmp_path, capsys):
    published = copy.deepcopy(PUBLISHED)
    published["seeds"]["0"]["measured"][NAMES[3]] = None
    code, out = status(tmp_path, capsys, PUBLISHED, published)
    assert code == 0 and "left out" in out and "0 of 3" in out


def test_a_quantity_that_only_the_new_run_has_is_named(tmp_path, capsys):
    new = copy.deepcopy(PUBLISHED)
    new["seeds"]["0"]["measured"]["warp: reward, eta 2"] = 1.0
    assert (
        "not in the published run: warp: reward, eta 2"
        in status(tmp_path, capsys, new, PUBLISHED)[1]
    )


@pytest.mark.parametrize("kind", ["another flag", "another stage's", "a flag more", "other pairs"])
def test_other_flags_and_other_ratings_are_refused_by_name(tmp_path, capsys, kind):
    new = copy.deepcopy(PUBLISHED)
    if kind == "another flag":
        new["settings"]["policy"]["beta"] = 0.1
        said = "policy: --beta is 0.1 here, 0.3 in the published run"
    elif kind == "another stage's":
        new["settings"].pop("rm")
        said = "rm: --lr is None here"
    elif kind == "a flag more":
        new["settings"]["rm"]["lora_rank"] = 8
        said = "rm: --lora-rank is 8 here, None in"
    else:
        new["seeds"]["1"]["fingerprints"]["rm: training data"] = "pairs-0"
        said = "seed 1, rm: training data: other ratings, or another tokenizer"
    code, out = status(tmp_path, capsys, new, PUBLISHED)
    assert code == 2 and out.startswith("not comparable: ") and said in out


def test_other_versions_machines_and_code_are_named_and_compared(tmp_path, capsys):
    new = copy.deepcopy(PUBLISHED)
    new["versions"]["torch"], new["machine"] = "2.10.0", "arm64, threads: 8"
    new["seeds"]["0"]["fingerprints"]["rm: code"] = "2"
    code, out = status(tmp_path, capsys, new, PUBLISHED)
    assert code == 0
    for said in ("torch 2.10.0 here, 2.13.0 published", "machine: arm64", "content of rm: code"):
        assert said in out


def test_one_published_seed_has_no_band(tmp_path, capsys):
    assert status(tmp_path, capsys, PUBLISHED, record(1.0))[0] == 2


def test_the_exit_status_reaches_the_shell(tmp_path, capsys):
    status(tmp_path, capsys, record(9.0, first=7), PUBLISHED)
    command = [sys.executable, compare.__file__, tmp_path / "new", tmp_path / "published"]
    assert subprocess.run(command, capture_output=True).returncode == 1


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_is_measured_of_a_seed(tmp_path):
    """Of the reward model the step that is kept; of the rest, what each stage's files say."""
    held_out = [(10, None, 0.9), (20, 0.5, 0.6), (30, 0.4, 0.7), (40, 0.45, 0.8)]
    logged = [{"step": s, "eval_loss": loss, "eval_accuracy": a} for s, loss, a in held_out]
    write_lines(tmp_path / "rm/metrics.jsonl", [{"step": 5, "loss": 0.1}, *logged])
    logged = [{"step": 1, "reward": 9.0}, {"step": 2, "eval_reward": 1.5, "eval_kl_sft": 0.25}]
    write_lines(tmp_path / "policy/metrics.jsonl", logged)
    before = {"before": {"reward": 0.5, "kl_sft": 0.0}, "after": {"reward": 1.5}}
    write_lines(tmp_path / "policy/results.json", [before])
    front = [{"eta": eta, "reward": eta + 1, "kl_sft": 2 * eta} for eta in (0.0, 0.5)]
    write_lines(tmp_path / "warp/front.json", [{"front": front}])
    best = [{"n": 1, "reward": 0.5, "kl_bound": 0.0}, {"n": 16, "reward": None, "kl_bound": 1.8}]
    write_lines(tmp_path / "evaluation/results.json", [{"best_of": best}])
    assert run.measured(tmp_path) == {
        "rm: accuracy": 0.7,
        "rm: loss": 0.4,
        "policy: reward, step 0": 0.5,
        "policy: reward, step 2": 1.5,
        "policy: kl_sft, step 2": 0.25,
        "warp: reward, eta 0.5": 1.5,
        "warp: kl_sft, eta 0.5": 1.0,
        "best of n: reward, n = 1": 0.5,
        "best of n: reward, n = 16": None,
    }


def test_settings_are_flags_without_paths_seed_and_commit():
    config = {"lr": 1e-3, "seed": 3, "model": "/a", "rm": ["b"], "dataset": "/c", "start": "/d"}
    config |= {
        "git": "1",
        "machine": "m",
        "versions": {},
        "fingerprints": {},
        "argv": [],
        "out": "e",
    }
    config |= {"device": "cpu", "lora_rank": None, "steps": 0}
    assert run.settings(config) == {"lr": 1e-3, "steps": 0}


def test_the_best_the_median_and_the_worst_samples(tmp_path):
    rewards = {"start": [3, 9, 1, 7, None, 5, 2, 8], "policy": [4, 6, 5, 7]}
    rows = [
        {"model": model, "reward": reward, "prompt": "p", "completion": str(reward), "length": 1}
        for model, of in rewards.items()
        for reward in of
    ]
    write_lines(tmp_path / "evaluation/samples.jsonl", rows)
    found = [(row["model"], row["rank"], row["completion"]) for row in run.extremes(tmp_path, 1)]
    assert found == [
        *(("start", "best", "9"), ("start", "median", "5"), ("start", "worst", "1")),
        *(("policy", "best", "7"), ("policy", "median", "6"), ("policy", "worst", "4")),
    ]


@pytest.mark.parametrize("size", [size for size in run.SIZES if size != "smoke"])
def test_the_commands_of_each_size_have_flags_that_exist_and_go_together(size):
    for stage, command in run.commands("some/model", "rated.jsonl", "p.jsonl", size, 7).items():
        words = shlex.split(command)
        if stage == "evaluation":
            evaluate.resolve(parse_flags(evaluate.Config, "", words[3:]))
        else:
            script = {"rm": train_rm, "policy": train_policy, "warp": warp}[stage]
            config = script.resolve(parse_flags(script.Config, "", words[1:]))
            assert (config.seed, config.format) == (7, "plain")


def test_a_command_that_fails_leaves_no_record_and_one_that_ended_is_not_run_again(tmp_path):
    record = tmp_path / "done.json"
    with pytest.raises(SystemExit, match="exit status 3: see .*done.log"):
        run.run("-c 'print(1 + 1); raise SystemExit(3)'", tmp_path, record)
    assert not record.exists() and (tmp_path / "done.log").read_text() == "2\n"
    for _ in range(2):
        run.run('-c \'open("grown", "a").write("x")\'', tmp_path, record)
    assert (tmp_path / "grown").read_text() == "x"
    with pytest.raises(SystemExit, match="another command ran"):
        run.run("-c 'print(2)'", tmp_path, record)


def test_peak_memory_and_seconds_are_those_of_the_command(tmp_path):
    """Measured from a fresh process, since a child begins with its parent's peak."""
    use = "run.run('-c \"held = bytes(range(256)) * (300 << 12)\"', Path(), Path('a.json'))"
    program = f"import sys; sys.path.insert(0, {str(REFERENCE)!r}); import run; {use}"
    program = f"from pathlib import Path; {program}"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    took = json.loads((tmp_path / "a.json").read_text())
    assert 300 < took["peak_mib"] < 400 and not took["resumed"]
    assert 0 < took["cpu_seconds"] < took["seconds"] + 0.2


class Llama2C:
    """A forward pass in llama2.c's own terms, and a checkpoint of random weights for it.

    Two heads share a key; RoPE turns neighbours; one matrix embeds and unembeds.
    """

    dim, layers, heads, kv_heads, hidden, vocabulary = 24, 2, 4, 2, 40, 270

    def __init__(self):
        shapes = {"tok_embeddings": (self.vocabulary, self.dim), "norm": (self.dim,)}
        kv = self.dim * self.kv_heads // self.heads
        for i in range(self.layers):
            shapes |= {f"layers.{i}.attention.wq": (self.dim, self.dim)}
            shapes |= {f"layers.{i}.attention.w{k}": (kv, self.dim) for k in "kv"}
            shapes |= {f"layers.{i}.attention.wo": (self.dim, self.dim)}
            shapes |= {f"layers.{i}.feed_forward.w{n}": (self.hidden, self.dim) for n in (1, 3)}
            shapes |= {f"layers.{i}.feed_forward.w2": (self.dim, self.hidden)}
            shapes |= {f"layers.{i}.{name}_norm": (self.dim,) for name in ("attention", "ffn")}
        self.weights = {name: torch.randn(shape) / 3 for name, shape in shapes.items()}
        self.weights["output"] = self.weights["tok_embeddings"]

    def checkpoint(self):
        """What train.py saves, compiled as it is by default."""
        args = dict(dim=self.dim, n_layers=self.layers, n_heads=self.heads)
        args |= dict(n_kv_heads=self.kv_heads, vocab_size=self.vocabulary, multiple_of=4)
        args |= dict(max_seq_len=32, dropout=0.05)
        model = {f"_orig_mod.{name}.weight": weight for name, weight in self.weights.items()}
        return {"model": model, "model_args": args, "iter_num": 7, "best_val_loss": torch.ones(())}

    def norm(self, name, x):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * self.weights[name]

    def turn(self, x):
        """RoPE on (positions, heads, width): complex numbers of neighbours."""
        width = x.shape[-1]
        speed = 10000 ** (-torch.arange(0, width, 2) / width)
        angles = torch.arange(len(x))[:, None, None] * speed
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    def logits(self, ids):
        x, count = self.weights["tok_embeddings"][ids], len(ids)
        future = torch.full((count, count), float("-inf")).triu(1)
        for i in range(self.layers):
            w = {n.removeprefix(f"layers.{i}."): weight for n, weight in self.weights.items()}
            y = self.norm(f"layers.{i}.attention_norm", x)
            q = self.turn((y @ w["attention.wq"].T).view(count, self.heads, -1))
            k = self.turn((y @ w["attention.wk"].T).view(count, self.kv_heads, -1))
            v = (y @ w["attention.wv"].T).view(count, self.kv_heads, -1)
            heads = []
            for head in range(self.heads):
                shared = head * self.kv_heads // self.heads
                scores = q[:, head] @ k[:, shared].T / math.sqrt(q.shape[-1]) + future
                heads.append(scores.softmax(-1) @ v[:, shared])
            x = x + torch.cat(heads, -1) @ w["attention.wo"].T
            y = self.norm(f"layers.{i}.ffn_norm", x)
            gate = torch.nn.functional.silu(y @ w["feed_forward.w1"].T)
            x = x + (gate * (y @ w["feed_forward.w3"].T)) @ w["feed_forward.w2"].T
        return self.norm("norm", x) @ self.weights["output"].T


def tokenizer_file(pieces):
    """A llama2.c .bin file of these pieces behind the special ones, as its tokenizer.py exports."""
    exported = ["<unk>", "\n<s>\n", "\n</s>\n", *map(chr, range(256)), *pieces]
    content = struct.pack("<I", max(len(piece.encode()) for piece in exported))
    for i, piece in enumerate(exported):
        piece = piece.replace("▁", " ").encode()
        content += struct.pack("<fI", -float(max(0, i - 259)), len(piece)) + piece
    return content


PIECES = ("▁t", "he", "▁the", "▁", "t", "h", "e", "c", "a")


def test_a_checkpoint_of_llama2c_gives_the_logits_of_its_own_forward_pass(tmp_path, capsys):
    theirs = Llama2C()
    torch.save(theirs.checkpoint(), tmp_path / "stories.pt")
    (tmp_path / "tok.bin").write_bytes(tokenizer_file([*PIECES, "x", "y"]))
    line = f"llama2c {tmp_path}/stories.pt --tokenizer {tmp_path}/tok.bin --out {tmp_path}/model"
    prepare.main(line.split())
    count = sum(weight.numel() for name, weight in theirs.weights.items() if name != "output")
    assert f"{count} parameters" in capsys.readouterr().out
    model, tokens = load_policy(str(tmp_path / "model"))
    ids = torch.tensor(tokens("the cat")["input_ids"] + [9, 100, 269, 4])
    ours = model(ids[None]).logits[0]
    assert torch.allclose(ours, theirs.logits(ids), atol=1e-4), (ours - theirs.logits(ids)).abs()
    assert sorted(end_token_ids(model, tokens)) == [1, 2]


def test_a_tokenizer_of_llama2c_merges_in_the_order_of_its_pieces():
    made = prepare.tokenizer(tokenizer_file(PIECES), 32)
    pieces = made.convert_ids_to_tokens(made("the cath é")["input_ids"])
    assert pieces == ["<s>", "▁the", "▁", "c", "a", "t", "h", "▁", "<0xC3>", "<0xA9>"]
    assert made.decode(made("the cath é")["input_ids"], skip_special_tokens=True) == "the cath é"


def test_the_tokenizer_of_stories260k_is_made_anew_from_its_pieces():
    """Merges, normalizer, decoder: what the folder in ../shared has, from a .bin file."""
    if not (STORIES / "tokenizer.json").exists():
        pytest.skip("no ../shared/data")
    known = json.loads((STORIES / "tokenizer.json").read_text())
    pieces = sorted(known["model"]["vocab"], key=known["model"]["vocab"].get)[259:]
    made = json.loads(prepare.tokenizer(tokenizer_file(pieces), 512)._tokenizer.to_str())
    for part in ("model", "normalizer", "decoder", "post_processor", "added_tokens"):
        assert made[part] == known[part], part


TABLE = (
    "1\t2.26666666667\tThe Rock is destined to be the 21st Century's new ''Conan''.\n"
    "2\t-0.333333333333\tIn Imax 3 D, the clichés disappear    into the vertiginous &amp; on.\n"
    "3\t1.0\tAn  old\ttab. \n"
)
INDIVIDUAL = (
    "1\t2.266666667\t1.06249\t[3, 2, 2, 2, 0, 4, 3, 1, 2, 2, 4, 3, 3, 1, 2]\n"
    "2\t-0.333333333\t0.94281\t[-1, 1, -1]\n"
)


def test_tables_of_ratings_become_rows_that_a_reward_model_reads(tmp_path):
    (tmp_path / "table.txt").write_bytes(TABLE.encode())
    (tmp_path / "single.txt").write_bytes(INDIVIDUAL.encode())
    line = f"ratings {tmp_path}/table.txt --individual {tmp_path}/single.txt"
    prepare.main(f"{line} --out {tmp_path}/rated.jsonl".split())
    rows = list(read_rows(str(tmp_path / "rated.jsonl")))
    text = "The Rock is destined to be the 21st Century's new ''Conan''."
    assert rows[0] == {"text": text, "rating": 2.2667, "rating_std": 1.06249}
    assert "clichés disappear    into" in rows[1]["text"] and rows[1]["rating"] == -0.3333
    assert rows[2]["text"] == "An  old\ttab." and not rows[2].get("rating_std")


def test_the_rows_have_the_form_of_the_data_that_were_developed_on():
    if not SNIPPETS.exists():
        pytest.skip("no ../shared/data")
    with open(SNIPPETS) as file:
        first = json.loads(next(file))
    made = prepare.ratings(f"1\t2.26666666667\t{first['text']}\n", INDIVIDUAL)
    assert made == [first]


@pytest.mark.slow
def test_a_reference_run_is_made_resumed_and_equal_to_itself(tmp_path):
    """A tiny model, two seeds; one evaluation and a policy's log are lost in between."""
    model = tiny.policy(tmp_path / "tiny", template="plain")
    rated = [{"text": f"{n} good films", "rating": n % 5} for n in range(60)]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    prompts = tiny.rows(tmp_path / "prompts.jsonl", {"prompt": "film {n} is"}, 60)
    command = [sys.executable, Path(compare.__file__).with_name("run.py"), "--model", model]
    command += ["--ratings", tmp_path / "rated.jsonl", "--prompts", prompts, "--size", "smoke"]

    def repeat(out, *more):
        done = [*command, "--seeds", "2", "--out", tmp_path / out, *more]
        return subprocess.run(done, capture_output=True, text=True)

    done = repeat("a", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best of n: reward, n = 2" in done.stdout and done.stdout.count("--seed 1") == 4
    record = json.loads((tmp_path / "a/record/results.json").read_text())
    assert str(tmp_path) not in (tmp_path / "a/record/results.json").read_text()
    for of in record["seeds"].values():
        assert len(of["measured"]) == 13 and None not in of["measured"].values()
        assert all(took["peak_mib"] > 100 and took["seconds"] > 0 for took in of["took"].values())
    samples = (tmp_path / "a/record/samples.jsonl").read_text().splitlines()
    assert len(samples) == 2 * 3 * 3 * 2
    assert (tmp_path / "a/record/figure.png").stat().st_size > 10_000

    # the same command again runs nothing; without two of its records, those two stages alone
    assert repeat("a").stdout.count("(cd ") == 0
    for stage in ("policy", "evaluation"):
        (tmp_path / f"a/seed-1/{stage}.json").unlink()
    again = repeat("a").stdout
    assert again.count("(cd ") == 2 and "--out policy --resume" in again
    assert json.loads((tmp_path / "a/record/results.json").read_text())["seeds"] != {}
    other = repeat("a", "--size", "small")
    assert other.returncode == 1 and "another command ran" in other.stderr

    assert repeat("b").returncode == 0
    folders = [tmp_path / name / "record" for name in ("b", "a")]
    done = subprocess.run(
        [sys.executable, compare.__file__, *folders], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count("equal to the last digit") == 2
