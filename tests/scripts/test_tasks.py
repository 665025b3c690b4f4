"""Real models and real data as people have them, on local stand-ins of the same formats.

Tasks A and B of docs/tasks.md as whole runs, several rewards, the tools on their results, and the
one line that bad input gets.
"""

import json
import random
import re
import runpy
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from standins import helpsteer_rows, write_all
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import train_policy
import train_rm
import warp
from minalign.data.chat import encode_whole
from minalign.data.prompts import load_prompts
from minalign.data.splits import Split
from minalign.reward import RewardModel
from minalign.running.errors import UserError
from minalign.tools import generate, score

ROOT = Path(__file__).parents[2]
SCRIPTS = {"train_rm.py": train_rm, "train_policy.py": train_policy, "warp.py": warp}
SMALL = "--batch-size 4 --max-new-tokens 8 --eval-prompts 4"
SHORT = {
    "train_rm.py": "--steps 6 --batch-size 8 --max-pairs 60 --max-eval-pairs 20 --lr 1e-3",
    "train_policy.py": f"--steps 2 {SMALL}",
    "warp.py": f"--steps 1 {SMALL} --iterations 1 --etas 0,1",
}
TASK_A = "--model ./gpt2-imdb --dataset ./imdb"
TASK_B = "--model ./SmolLM2-135M-Instruct --dataset helpsteer.jsonl"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_all(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def run(command: str) -> None:
    """A command of docs/tasks.md, made short, with its hub ids replaced by local folders."""
    script, *argv = shlex.split(command.removeprefix("python ").rstrip("&\\ "))
    owners = r"^(distilbert|stanfordnlp|lvwerra|esfrankel17|HuggingFaceTB)/"
    argv = [re.sub(owners, "./", word) for word in argv]
    SCRIPTS[script].main([*argv, *SHORT[script].split(), "--device", "cpu"])


def commands(title: str) -> list[str]:
    """The commands in the section of docs/tasks.md on a task."""
    section = (ROOT / "docs/tasks.md").read_text().split(f"**{title}")[1].split("\n**")[0]
    block = section.split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
    return [line for line in block.splitlines() if line.startswith("python")]


def metrics(folder: str) -> list[dict]:
    return rows_of(Path(folder) / "metrics.jsonl")


def rows_of(path: str | Path) -> list[dict]:
    with open(path) as file:  # splitlines would cut at other characters, too
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("title", ["Task A", "Task B"])
def test_the_tasks_run_by_the_commands_of_the_docs(here, title):
    ran = commands(title)
    second = "warp.py" if title == "Task A" else "train_policy.py"
    assert [line.split()[1] for line in ran] == ["train_rm.py", second]
    for command in ran:
        run(command)
        out = re.search(r"--out (\S+)", command)[1]
        assert (here / out / "config.json").exists()
        if "warp" not in command:
            assert (here / out / "model" / "config.json").exists()
        if "train_policy" in command:  # the start policy is its own anchor
            assert metrics(out)[0]["kl_sft"] == pytest.approx(0, abs=1e-4)


def test_a_task_b_reward_model_reads_what_its_template_makes(here):
    """transformers alone, with apply_chat_template, gives the scores of RewardModel.score."""
    run(f"train_rm.py {TASK_B} --out chat-rm")
    model = AutoModelForSequenceClassification.from_pretrained("chat-rm/model")
    tokenizer = AutoTokenizer.from_pretrained("chat-rm/model")
    ours = RewardModel.from_pretrained("chat-rm")
    dialogue = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Plot?"},
    ]
    answers = ["It is good.", "It is bad. It is dull."]
    turns = [{"role": "assistant", "content": answer} for answer in answers]
    texts = [tokenizer.apply_chat_template([*dialogue, turn], tokenize=False) for turn in turns]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        expected = model(**batch).logits[:, 0]
    assert torch.allclose(ours.score([dialogue] * 2, answers), expected, atol=1e-5)
    # a text is one user's turn
    text, turn = (ours.score([prompt], ["It is good."]) for prompt in ("Plot?", [dialogue[-1]]))
    assert torch.equal(text, turn)


def test_a_reward_model_of_plain_text_keeps_no_template(here):
    """With it, score("text") would be read as a user's turn."""
    run(f"train_rm.py {TASK_B} --format plain --out plain-rm")
    ours = RewardModel.from_pretrained("plain-rm")
    assert not ours.tokenizer.chat_template
    question = [{"role": "user", "content": "Plot?"}]
    plain = encode_whole(ours.tokenizer, "\n\nHuman: Plot?\n\nAssistant:", " Good.")
    assert ours.encode(question, "Good.") == plain


def test_several_rewards_are_standardised_and_weighted(here, capsys):
    """A classifier with another tokenizer, and a rule.

    The sum is 2 z - 0.5 z', with z of the start policy's own scores.
    """
    (here / "rules.py").write_text(
        "def length(prompts, completions):\n    return [len(c) for c in completions]\n"
    )
    run(
        f"train_policy.py {TASK_A} --rm ./distilbert-imdb rules:length --rm-weights 2 -0.5 "
        "--missing-eos-penalty 0 --lr 1e-9 --out two-rewards"
    )
    found = re.findall(r"reward (\S+): (\S+) \+- (\S+) on", capsys.readouterr().out)
    assert [name for name, _, _ in found] == ["./distilbert-imdb", "rules:length"]
    (_, m1, s1), (_, m2, s2) = found
    for row in metrics("two-rewards"):
        z1 = (row["reward ./distilbert-imdb"] - float(m1)) / float(s1)
        z2 = (row["reward rules:length"] - float(m2)) / float(s2)
        assert row["reward"] == pytest.approx(2 * z1 - 0.5 * z2, abs=0.05)
    ran = json.loads((here / "two-rewards" / "config.json").read_text())
    assert ran["rm"] == ["./distilbert-imdb", "rules:length"]


def test_averaged_reward_models_are_one_model_between_them(here):
    """WARM: bodies and heads of one start are averaged. The parts stay as they were on disk."""
    from minalign.models.rewards import load_rewards

    for seed in (0, 1):
        run(f"train_rm.py {TASK_A} --seed {seed} --out warm-{seed}")
    loaded = load_rewards(["warm-0", "warm-1"], torch.device("cpu"), average=True)
    reward = next(iter(loaded.values()))
    parts = [RewardModel.from_pretrained(f"warm-{seed}").model.state_dict() for seed in (0, 1)]
    # both started from one head, whatever the seed
    heads = [part["score.weight"] for part in parts]
    assert 0 < (heads[0] - heads[1]).abs().max() < 0.05 < heads[0].abs().max()
    for name, weight in reward.model.state_dict().items():
        assert torch.allclose(weight, (parts[0][name] + parts[1][name]) / 2)
        assert "score" not in name or not torch.equal(parts[0][name], parts[1][name])
    run(f"train_policy.py {TASK_A} --rm warm-0 warm-1 --rm-average --out averaged")
    assert "reward warm-0" not in metrics("averaged")[0]


def test_beta_means_the_same_for_a_scaled_reward(here):
    """--standardize-rewards: 1000 r + 5 trains exactly as r does."""
    (here / "scaled.py").write_text(
        "def small(prompts, completions):\n    return [len(set(c)) for c in completions]\n"
        "def large(prompts, completions):\n"
        "    return [1000 * len(set(c)) + 5 for c in completions]\n"
    )
    for name in ("small", "large"):
        run(
            f"train_policy.py {TASK_A} --rm scaled:{name} --standardize-rewards "
            f"--missing-eos-penalty 0 --out scaled-{name}"
        )
    for small, large in zip(metrics("scaled-small"), metrics("scaled-large"), strict=True):
        assert small["reward"] == pytest.approx(large["reward"], abs=1e-4)
        assert small["grad_norm"] == pytest.approx(large["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("save", ["merged", "adapter"])
def test_lora_runs_of_both_scripts_leave_models_that_load(here, save):
    rm, policy = f"lora-rm-{save}", f"lora-policy-{save}"
    run(
        f"train_rm.py {TASK_B} --loss ordinal --rating-coef 0.5 --rating-range 0 4 "
        f"--lora-rank 4 --lora-dropout 0.1 --lora-save {save} --gradient-checkpointing --out {rm}"
    )
    run(
        f"train_policy.py {TASK_B} --rm {rm} --uncertainty inverse_std --anchor ema --mu 0.5 "
        f"--lora-rank 4 --lora-targets q_proj v_proj --lora-save {save} --lr 0.1 "
        f"--warmup-steps 0 --out {policy}"
    )
    assert (here / policy / "model" / "adapter_config.json").exists() == (save == "adapter")
    first, last = metrics(policy)
    assert first["kl_sft"] == pytest.approx(0, abs=1e-4) and last["eval_kl_sft"] > 1e-4
    flags = f"--model {policy} --rm {rm} --prompt Plot? --max-new-tokens 4 --device cpu"
    generate.main(flags.split())
    if save == "merged":
        AutoModelForSequenceClassification.from_pretrained(here / rm / "model")
        trained = AutoModelForCausalLM.from_pretrained(here / policy / "model").state_dict()
        base = "./SmolLM2-135M-Instruct"
        start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
        moved = {name for name, weight in trained.items() if not torch.equal(weight, start[name])}
        targets = [f"model.layers.{i}.self_attn.{n}_proj.weight" for i in range(2) for n in "qv"]
        assert moved == set(targets)


def test_warp_merges_the_products_of_adapters(here):
    """Its policies are saved dense, so the merge on disk is that of the dense task vectors."""
    from minalign.merge import merge_policies
    from minalign.models.loading import load_policy

    run(f"warp.py {TASK_A} --rm ./distilbert-imdb --lora-rank 2 --lr 1e-2 --out lora-warp")
    paths = ["./gpt2-imdb", "lora-warp/iteration-1/run-1", "lora-warp/iteration-1/run-2"]
    init, *thetas = (dict(load_policy(path)[0].named_parameters()) for path in paths)
    merged, report = merge_policies(init, thetas, "slerp", "layer")
    saved = dict(load_policy("lora-warp/iteration-1/merged")[0].named_parameters())
    assert all(torch.allclose(merged[name], saved[name], atol=1e-6) for name in merged)
    assert any(group["angle"] and group["angle"] > 1 for group in report.values())


def test_the_fixed_anchor_of_a_lora_run_in_warp_is_theta_init(here):
    """In the first iteration theta_init is the start policy, a model of its own.

    Both KLs are the same, and not 0.
    """
    flags = (
        f"{TASK_A} --rm ./distilbert-imdb --lora-rank 2 --lr 0.1 --warmup-steps 0 --anchor fixed "
        f"--steps 3 {SMALL} --iterations 1 --runs 1 --etas 1 --device cpu --out fixed-warp"
    )
    warp.main(flags.split())
    rows = metrics("fixed-warp/iteration-1/run-1")
    from_anchor, from_start = ([row[name] for row in rows] for name in ("kl_anchor", "kl_sft"))
    assert from_anchor == pytest.approx(from_start, abs=1e-4)
    assert abs(rows[2]["kl_sft"]) > 1e-3


def test_generate_refuses_a_row_that_is_no_prompt(here):
    row = {"prompt": [{"role": "assistant", "content": "Good."}]}
    (here / "answer-only.jsonl").write_text(json.dumps(row) + "\n")
    flags = "--model ./SmolLM2-135M-Instruct --data answer-only.jsonl --device cpu"
    with pytest.raises(UserError, match="1 of 1 .*nothing is asked .first: row 1"):
        generate.main(flags.split())


def test_generate_and_score_agree(here, capsys):
    """What generate writes beside a completion is what score finds for it, in chat and in text."""
    run(f"train_rm.py {TASK_B} --out tools-rm")
    for name, model in (("chat", "./SmolLM2-135M-Instruct"), ("text", "./gpt2-imdb")):
        rows = [{"prompt": row["prompt"].split("\n")[0]} for row in helpsteer_rows(5)]
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rm = "tools-rm" if name == "chat" else "./distilbert-imdb"
        data, answered, result = (f"{name}{part}.jsonl" for part in ("", "-answers", "-scored"))
        flags = f"--model {model} --rm {rm} --data {data} --out {answered} --device cpu"
        generate.main([*flags.split(), "--samples", "6", "--max-new-tokens", "6"])
        score.main(f"--rm {rm} --data {answered} --out {result} --device cpu".split())
        answers, scored = rows_of(answered), rows_of(result)
        assert len(answers) == len(scored) == 30
        assert len({row["completion"] for row in answers}) > 5
        assert isinstance(answers[0]["prompt"], list) == (name == "chat")
        if name == "chat":  # byte-level text of a random model does not always survive decoding
            whole = [i for i, row in enumerate(answers) if "\ufffd" not in row["completion"]]
            assert len(whole) > 2
            gaps = [abs(answers[i]["reward"] - scored[i]["reward"]) for i in whole]
            # some are spelled with other tokens than sampled
            assert sum(gap < 1e-4 for gap in gaps) > 1 and max(gaps) < 0.2
    flags = "--rm tools-rm --data helpsteer.jsonl --out pairs-scored.jsonl --device cpu"
    score.main(flags.split())
    rows, reward_model = rows_of("pairs-scored.jsonl"), RewardModel.from_pretrained("tools-rm")
    prompts = [row["prompt"] for row in rows]
    for name in ("chosen", "rejected"):  # each row has its own, in the order of the file
        expected = reward_model.score(prompts, [row[name][1]["content"] for row in rows])
        assert [row[f"{name}_reward"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-4)


def test_generate_draws_fresh_samples_for_each_batch_and_the_same_for_a_seed(here, capsys):
    answers = []
    flags = "--model ./gpt2-imdb --batch-size 2 --max-new-tokens 8 --device cpu".split()
    for seed in ("0", "0", "1"):
        out = f"seed-{len(answers)}.jsonl"
        generate.main([*flags, *["--prompt", "The plot"] * 4, "--seed", seed, "--out", out])
        answers.append([row["completion"] for row in rows_of(out)])
    assert answers[0] == answers[1] != answers[2] and len(set(answers[0])) == 4


@pytest.mark.slow
def test_gradient_checkpointing_reaches_all_three_scripts_and_changes_no_step(here, monkeypatch):
    from minalign.models import activations

    calls, real = [], activations._checkpointed

    def counted(*args, **keywords):
        calls.append(1)
        return real(*args, **keywords)

    monkeypatch.setattr(activations, "_checkpointed", counted)
    for name, flags in (("kept", ""), ("recomputed", "--gradient-checkpointing")):
        counts = []
        for script, kind in (
            ("train_rm.py", "rm"),
            ("train_policy.py --rm kept-rm", "policy"),
            ("warp.py --rm kept-rm", "warp"),
        ):
            run(f"{script} {TASK_A} {flags} --out {name}-{kind}")
            counts.append(len(calls))
        assert counts == [0, 0, 0] if not flags else 0 < counts[0] < counts[1] < counts[2]
    for kind in ("rm", "policy", "warp/iteration-1/run-2"):
        for a, b in zip(metrics(f"kept-{kind}"), metrics(f"recomputed-{kind}"), strict=True):
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_generate_keeps_a_dialogue_in_the_terminal(here, monkeypatch, capsys):
    lines = iter(["Hello", "Tell me more", "", "Plot?"])
    seen, real = [], generate.tokenize

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def recorded(tokenizer, prompt):
        seen.append(prompt)
        return real(tokenizer, prompt)

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(generate, "tokenize", recorded)
    generate.main("--model ./SmolLM2-135M-Instruct --max-new-tokens 4 --device cpu".split())
    roles = [[message["role"] for message in prompt] for prompt in seen]
    assert roles == [["user"], ["user", "assistant", "user"], ["user"]]
    assert len(capsys.readouterr().out.strip("\n").splitlines()) >= 3


# --- bad input

PLAIN = f"{TASK_A} --rm ./distilbert-imdb"
CHAT = f"{TASK_B} --rm ./distilbert-imdb"
ELSEWHERE = "--model ./SmolLM2-135M-Instruct --dataset ./imdb"
BAD = {
    "--eval-split is not there": (train_rm, f"{ELSEWHERE} --eval-split dev", "dev"),
    "--split of one file": (train_rm, f"{TASK_B} --split test", "Should be one of"),
    "chat without a template": (
        train_rm,
        "--model ./gpt2-imdb --dataset helpsteer.jsonl",
        "--format plain",
    ),
    "--format chat without a template": (
        train_policy,
        f"{PLAIN} --format chat",
        "no chat template",
    ),
    "ratings outside": (
        train_rm,
        f"{TASK_B} --loss ordinal --rating-coef 1 --rating-range 1 4",
        "--rating-range",
    ),
    "--crop-words": (train_rm, f"{TASK_B} --crop-words 9-5", "--crop-words 9-5"),
    "--lora-targets": (train_rm, f"{TASK_B} --lora-rank 2 --lora-targets query", "q_proj"),
    "--lora-alpha alone": (train_rm, f"{TASK_B} --lora-alpha 2", "--lora-rank"),
    "--lora-dropout of a policy": (
        train_policy,
        f"{PLAIN} --lora-rank 2 --lora-dropout 0.1",
        "--lora-dropout",
    ),
    "--lora-save of a merge": (warp, f"{PLAIN} --lora-rank 2 --lora-save adapter", "whole weights"),
    "--prompt-tokens": (train_policy, f"{PLAIN} --prompt-tokens five", "--prompt-tokens five"),
    "--prompt-tokens of chat": (train_policy, f"{CHAT} --prompt-tokens 5", "chat prompts"),
    "--max-prompt-tokens": (train_policy, f"{CHAT} --max-prompt-tokens 2", "--max-prompt-tokens"),
    "--columns": (train_policy, f"{PLAIN} --columns prompt=review", "review"),
    "--columns of no name": (train_policy, f"{PLAIN} --columns review=prompt", "review=prompt"),
    "--max-new-tokens": (train_policy, f"{PLAIN} --max-new-tokens 300", "no room"),
    "--rm-weights": (train_policy, f"{PLAIN} --rm-weights 1 2", "--rm-weights"),
    "--rm-average of one": (train_policy, f"{PLAIN} --rm-average", "several"),
    "--rm twice": (train_policy, f"{PLAIN} --rm ./distilbert-imdb", "given twice"),
    "a function that is not there": (
        train_policy,
        f"{TASK_A} --rm math:cosh_of_text",
        "module:function",
    ),
    "a function of another shape": (
        train_policy,
        f"{TASK_A} --rm wrong:one",
        "one number for each",
    ),
    "a constant reward": (
        train_policy,
        f"{TASK_A} --rm wrong:constant --standardize-rewards",
        "standardised",
    ),
    "--rm is a language model": (train_policy, f"{TASK_A} --rm ./gpt2-imdb", "classification head"),
    "--model is an encoder": (
        train_policy,
        "--model ./distilbert-imdb --dataset ./imdb --rm ./distilbert-imdb",
        "cannot be loaded",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line(here, case, tmp_path):
    (here / "wrong.py").write_text(
        "def one(p, c):\n    return [1.0]\ndef constant(p, c):\n    return [1.0] * len(c)\n"
    )
    script, flags, word = BAD[case]
    if script is not train_rm and "--max-new-tokens" not in flags:
        flags += " --max-new-tokens 8"
    argv = f"{flags} --device cpu --batch-size 4".split()
    with pytest.raises((UserError, SystemExit)) as error:
        script.main([*argv, "--out", str(tmp_path / "out")])
    if isinstance(error.value, UserError):
        assert word in str(error.value) and "\n" not in str(error.value)
    else:
        assert error.value.code == 2


def test_models_that_must_not_or_cannot_be_loaded(here, tmp_path):
    """Code of a checkpoint is never run, and a pickle is only ever read as weights.

    A tokenizer must fit its model.
    """
    import pickle
    import shutil

    from minalign.models.loading import load_policy

    def copy(name):
        shutil.copytree(here / "gpt2-imdb", tmp_path / name)
        return tmp_path / name

    custom = copy("custom")
    config = json.loads((custom / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    (custom / "config.json").write_text(json.dumps(config))
    (custom / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="needs code of its own, which is never run"):
        load_policy(str(custom))
    assert not (tmp_path / "ran").exists()

    weights = AutoModelForCausalLM.from_pretrained(here / "gpt2-imdb").state_dict()
    pickled = copy("pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")  # tensors alone: safe to read
    loaded, _ = load_policy(str(pickled))
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in weights.items())

    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({**weights, "trap": Trap()}, pickled / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_policy(str(pickled))
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()

    other = copy("other-tokenizer")
    AutoTokenizer.from_pretrained(here / "SmolLM2-135M-Instruct").save_pretrained(other)
    message = "the tokenizer has .* tokens that the model has no embedding for"
    with pytest.raises(UserError, match=message):
        load_policy(str(other))


def test_a_hub_id_without_a_network_says_what_to_do(here, no_waiting):
    from minalign.models.loading import load_policy

    with pytest.raises(UserError, match="--model nobody/no-such-model.*local copy") as error:
        load_policy("nobody/no-such-model")
    assert "\n" not in str(error.value)


# --- docs/sums.py


def test_sums_that_are_held_out_are_in_no_training_data(tmp_path, monkeypatch, capsys):
    """The commands of docs/tasks.md in their first steps, and the reward by hand."""
    monkeypatch.chdir(tmp_path)
    sums = runpy.run_path(str(ROOT / "docs/sums.py"))
    section = (ROOT / "docs/tasks.md").read_text().split("## A task whose answers")[1]
    block = section.split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
    first, second = block.strip().split("&&\n")
    assert first.strip() == "python docs/sums.py"
    seen = []
    sums["make_start_policy"].__globals__["random"] = SimpleNamespace(Random=watched(seen))
    sums["main"](steps=6)
    argv = shlex.split(second.replace("docs/sums.py", str(ROOT / "docs/sums.py")))[2:]
    assert " ".join(shlex.split(second)) in " ".join(sums["__doc__"].replace("\\\n", " ").split())
    train_policy.main([*argv, "--steps", "2", "--eval-prompts", "4", "--device", "cpu"])
    assert "2259 training and 241 held-out prompts" in capsys.readouterr().out
    _, held, *_ = load_prompts(Split("runs/sums/sums.jsonl"))
    read = {row["prompt"] for row in seen}
    assert len(held) == 241 and len(read) > 600 and read.isdisjoint(held)
    rows = [json.loads(line) for line in Path("runs/sums/sums.jsonl").read_text().splitlines()]
    assert all(
        int(row["prompt"][:2]) + int(row["prompt"][3:5]) == int(row["answer"]) for row in rows
    )
    assert sums["exact"]([""] * 3, ["42", "42 ", "24"], ["42"] * 3) == [1.0, 0.0, 0.0]
    assert all(sums["slip"]("42", random.Random(n)) not in ("42", "24") for n in range(50))


def watched(seen):
    """random.Random, whose choices are kept."""

    class Rng(random.Random):
        def choices(self, rows, k):
            drawn = super().choices(rows, k=k)
            seen.extend(drawn)
            return drawn

    return Rng
