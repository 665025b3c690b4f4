"""The three scripts as a user runs them, on the toy world and on files, end to end in seconds.

And their error lines.
"""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import content, difference
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

import train_policy
import train_rm
import warp
from minalign import merge, rollout
from minalign.data import toy
from minalign.merge import liti, merge_policies
from minalign.models.loading import load_policy
from minalign.reward import RewardModel
from minalign.running.errors import one_line_errors
from minalign.running.run import Run
from minalign.tools import merge as merge_tool

ROOT = Path(__file__).parents[2]


def command(flags, **places):
    """The words of a command line on the CPU: `flags`, and --NAME PLACE for each of `places`."""
    given = [word for name, place in places.items() for word in (f"--{name}", str(place))]
    return [*flags.split(), *given, "--device", "cpu"]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder where the toy world's start policy is fitted and reward models are trained.

    Two of them are scalar (rm, rm-again), one is ordinal.
    """
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_rm.main(command("--out rm"))
        train_rm.main(command("--out rm-again --seed 1 --steps 60"))
        train_rm.main(command("--out ordinal --loss ordinal --rating-coef 0.5 --steps 60"))
    (folder / "toy_rules.py").write_text(
        "def no_and(prompts, completions):\n    return [-c.count(' and ') for c in completions]\n"
    )
    return folder


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def fails(main, argv, capsys):
    """The error line with which `main` refuses `argv`; it must be one, with exit status 2."""
    with pytest.raises(SystemExit) as error, one_line_errors():
        main(argv)
    assert error.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def test_the_reward_model_learns_the_raters_taste(here):
    last = metrics("rm")[-1]
    assert last["eval_accuracy"] > 0.68 and last["eval_loss"] < 0.6 < last["eval_floor"]
    assert metrics("ordinal")[-1]["eval_loss"] < metrics("ordinal")[-1]["eval_floor"]
    completions = [" utterly superb .", " utterly awful ."]
    scores = RewardModel.from_pretrained("rm").score(["overall , the plot is"] * 2, completions)
    assert scores[0] > scores[1] + 1


@pytest.mark.parametrize(("run", "labels"), [("rm", 1), ("ordinal", 10)])
def test_a_saved_reward_model_is_a_standard_classifier(here, run, labels):
    texts = [
        "overall , the plot is good .",
        "again , the cast is very dull and the music is fine .",
    ]
    tokenizer = AutoTokenizer.from_pretrained(f"{run}/model")
    model = AutoModelForSequenceClassification.from_pretrained(f"{run}/model").eval()
    batch = tokenizer([f"<s> {text} </s>" for text in texts], return_tensors="pt", padding=True)
    reward_model = RewardModel.from_pretrained(run)
    ours = reward_model.logits([reward_model.encode("", text) for text in texts])
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape == (2, labels)
    torch.testing.assert_close(logits, ours, atol=1e-5, rtol=1e-5)


def test_the_policy_learns_what_is_truly_better(here, capsys):
    train_policy.main(command("--rm rm --steps 70 --eval-every 35 --out learned"))
    results = json.loads(Path("learned/results.json").read_text())
    before, after = results["before"], results["after"]
    assert after["gold"] > before["gold"] + 1 and after["reward"] > before["reward"] + 0.5
    assert before["kl_sft"] == 0 and 0.2 < after["kl_sft"] < 10
    # a policy and its copy are one
    assert metrics("learned")[0]["kl_sft"] == pytest.approx(0, abs=1e-4)
    assert [row["step"] for row in metrics("learned") if "eval_gold" in row] == [35, 70]
    assert len(Path("learned/samples.jsonl").read_text().splitlines()) == 70
    config = json.loads(Path("learned/config.json").read_text())
    assert config["steps"] == 70 and config["mu"] is None and config["lr"] == 5e-4
    output = capsys.readouterr().out
    # four samples before and after, and the table
    assert output.count(" |") >= 8 and "grammatical" in output
    policy, tokenizer = load_policy("learned")
    assert AutoModelForCausalLM.from_pretrained("learned/model").config.vocab_size == len(tokenizer)


def card_of(folder):
    return (Path(folder) / "README.md").read_text()


def left(folder):
    """What a run left, but for the name of its folder."""
    found = content(folder)
    del found["config.json"]["out"]
    return found


def repeat(main, model, *more):
    """Run the command in a model's card, and `more` flags."""
    words = shlex.split(re.search(r"```bash\n(.*?)\n```", card_of(model), re.DOTALL)[1])
    assert words[0] == "python" and not {"--out", "--resume"} & set(words)
    main([*words[2:], *map(str, more)])


def test_the_command_of_a_policys_card_repeats_it_bit_for_bit(here, tmp_path):
    """Also where it is stopped, and --config resumes it."""
    short = "--rm rm --steps 4 --eval-every 2 --batch-size 8 --eval-prompts 8 --seed 7"
    train_policy.main(command(short, out="named"))
    again = ["--out", str(tmp_path / "again")]
    repeat(train_policy.main, "named/best", "--steps", 2, *again)
    train_policy.main(["--config", "named/config.json", "--resume", *again])
    assert difference(left("named"), left(tmp_path / "again")) == ""
    results = json.loads(Path("named/results.json").read_text())
    text = card_of("named/model")
    for name, row in (("start policy", results["before"]), ("step 4", results["after"])):
        cells = re.search(rf"^\| {name} \| (.*) \|$", text, re.MULTILINE)[1].split(" | ")
        assert cells == [f"{value:z.3f}" for value in row.values()]
    fingerprints = json.loads(Path("named/config.json").read_text())["fingerprints"]
    assert len(fingerprints) == 5
    assert all(f"- {name}: `{value}`" in text for name, value in fingerprints.items())
    assert "after 4 steps" in text and card_of("named/best")


@pytest.mark.slow
def test_the_commands_of_the_other_cards_repeat_them_bit_for_bit(here, tmp_path):
    train_rm.main(command("--steps 3 --eval-every 2 --max-pairs 64 --max-eval-pairs 20", out="one"))
    repeat(train_rm.main, "one/model", "--out", tmp_path / "again")
    assert difference(left("one"), left(tmp_path / "again")) == ""
    assert "text-classification" in card_of("one/model")
    short = "--rm rm --steps 1 --iterations 1 --batch-size 4 --eval-prompts 4 --etas 0,1"
    warp.main(command(f"{short} --keep-etas 0.5", out="war"))
    repeat(warp.main, "war/iteration-1/merged/model", "--out", tmp_path / "war")
    assert difference(left("war"), left(tmp_path / "war")) == ""
    for inner in ("iteration-1/run-2", "iteration-1/merged", "front/eta-0.5"):
        assert "python warp.py --rm rm --steps 1" in card_of(f"war/{inner}/model")
    start = toy.start_policy_folder()
    merge_tool.main(["--init", start, "--models", "war/iteration-1/run-1", "--out", "both"])
    text = card_of("both")
    assert f"--init {start} --models war/iteration-1/run-1 --out both" in text
    assert "iteration 1" not in text, "the card of a merge is its own, not that of a model in it"


VARIANTS = [
    "--rm rm --baseline rloo --group-size 2",
    "--rm rm --baseline ema --baseline-decay 0.5 --anchor ema --mu 0.1",
    "--rm rm --baseline none --reward-clip 0.5 --temperature 0.7",
    "--rm ordinal --uncertainty one_plus_std",
    "--rm rm --rm ordinal --rm-weights 1 0.5",
    "--rm rm rm-again --rm-average --standardize-rewards",
    "--rm toy_rules:no_and --lora-rank 2 --anchor ema",
]


@pytest.mark.slow
@pytest.mark.parametrize("flags", VARIANTS)
def test_every_variant_runs_and_repeats_itself(here, tmp_path, flags):
    for run in ("a", "b"):
        short = "--steps 3 --batch-size 8 --eval-prompts 8"
        train_policy.main(command(f"{flags} {short}", out=tmp_path / run))
    a, b = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    for row in a + b:
        del row["seconds"], row["tokens_per_second"]
    assert a == b
    assert len({row["entropy"] for row in a}) == 3  # fresh samples each step


def weights(folder):
    return load_policy(str(folder))[0].state_dict()


def test_micro_batches_change_nothing(here, tmp_path):
    """Completions of unequal length, split 1 and 4 ways: the divisor is the whole batch's."""
    for size in (16, 5):
        flags = f"--steps 3 --batch-size 16 --micro-batch-size {size} --lr 1e-3"
        policy_flags, rm_flags = f"--rm rm {flags} --eval-prompts 4", f"{flags} --max-eval-pairs 20"
        train_policy.main(command(policy_flags, out=tmp_path / f"policy-{size}"))
        train_rm.main(command(rm_flags, out=tmp_path / f"rm-{size}"))

    def column(run, name):
        return [row[name] for row in metrics(tmp_path / run)]

    whole, split = column("policy-16", "grad_norm"), column("policy-5", "grad_norm")
    assert whole == pytest.approx(split, rel=1e-3)
    assert column("rm-16", "loss") == pytest.approx(column("rm-5", "loss"), rel=1e-4)
    assert column("rm-16", "grad_norm") == pytest.approx(column("rm-5", "grad_norm"), rel=1e-3)


def test_a_step_is_the_update_that_the_equations_say(here, monkeypatch):
    """The second step's gradient, against one worked out from the samples that the loop drew.

    That one is worked out row by row, without padding. It is the second step's, because only then
    policy and anchor differ and the baseline has a past.
    """
    sizes = dict(steps=2, batch_size=12, micro_batch_size=5, max_new_tokens=8, eval_prompts=4)
    reward = dict(rm=["rm"], missing_eos_penalty=2.0, reward_clip=0.6)
    kl = dict(beta=0.3, anchor="ema", mu=0.25, temperature=0.7)
    given = train_policy.Config(**sizes, **reward, **kl, max_grad_norm=1e9)
    config = train_policy.resolve(given)
    out = here / "two-steps"
    out.mkdir()
    run = Run(out, config, torch.device("cpu"), torch.float32)
    task = train_policy.load(run)
    policy, tokenizer = load_policy(toy.start_policy_folder())
    rollouts, gradients, anchors, random_states = [], [], [], []
    real_generate = rollout.generate

    def recorded_generate(model, ids, mask, **keywords):
        random_states.append(keywords["uniforms"])
        rollouts.append((ids, mask, real_generate(model, ids, mask, **keywords)))
        return rollouts[-1][2]

    def fake_step(optimizer):  # the first step goes somewhere far, the second is looked at
        gradients.append([p.grad.clone() for p in policy.parameters()])
        if len(gradients) == 1:
            noise = torch.Generator().manual_seed(1)
            for parameter in policy.parameters():
                parameter.data += 0.03 * torch.randn(parameter.shape, generator=noise)

    def fake_ema_update_(ema, theta, mu):
        anchors.append((mu, ema, theta))

    monkeypatch.setattr(rollout, "generate", recorded_generate)
    monkeypatch.setattr(torch.optim.AdamW, "step", fake_step)
    monkeypatch.setattr(merge, "ema_update_", fake_ema_update_)
    train_policy.train(run, task, policy)

    def by_hand(ids, mask, drawn):
        """Scores, and log-probs of whole completions under policy and anchor.

        The anchor is the start policy: no EMA update was made.
        """
        scores, logprobs, anchor_logprobs = [], [], []
        lengths = drawn.mask.sum(1)
        for row, row_mask, completion, length in zip(ids, mask.bool(), drawn.tokens, lengths):
            prompt, completion = row[row_mask], completion[:length]
            whole = torch.cat([prompt, completion])
            for model, sums in ((policy, logprobs), (task.start, anchor_logprobs)):
                logits = model(whole[None]).logits[0, len(prompt) - 1 : -1].double() / 0.7
                sums.append(logits.log_softmax(1)[torch.arange(length), completion].sum())
            text = tokenizer.decode(whole, skip_special_tokens=True)
            score = task.reward.score([""], [text])[0].clamp(-0.6, 0.6)
            scores.append(score - 2.0 * (2 not in completion))
        return torch.stack(scores).double(), torch.stack(logprobs), torch.stack(anchor_logprobs)

    first_scores, _, _ = by_hand(*rollouts[0])
    scores, logprobs, anchor_logprobs = by_hand(*rollouts[1])
    kl = logprobs - anchor_logprobs
    advantages = (scores - 0.3 * kl - first_scores.mean()).detach()
    expected = torch.autograd.grad(-(advantages * logprobs).mean(), list(policy.parameters()))
    for got, want in zip(gradients[1], expected):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())

    first, second = metrics(out)
    assert first["kl_sft"] == pytest.approx(0, abs=1e-4)
    assert 0.02 < abs(second["kl_sft"]) == pytest.approx(abs(kl.mean().item()), rel=1e-3)
    assert second["baseline"] == pytest.approx(first_scores.mean().item(), rel=1e-4)
    assert second["shaped_reward"] == pytest.approx((scores - 0.3 * kl).mean().item(), rel=1e-3)
    assert 0 < second["ended"] < 1  # both kinds were there
    one, other, _ = random_states  # the last are the evaluation's
    assert not torch.equal(one, other)  # each step draws its own numbers
    assert [mu for mu, _, _ in anchors] == [0.25, 0.25]
    assert all(a.data_ptr() != p.data_ptr() for a, p in zip(anchors[0][1], policy.parameters()))


def test_the_samples_of_a_prompt_stand_side_by_side(here, tmp_path, monkeypatch):
    """What leave-one-out takes for a group must be one."""
    seen, real = [], RewardModel.encode_rollout

    def recorded(self, *args):
        seen.append(args[1:])
        return real(self, *args)

    monkeypatch.setattr(RewardModel, "encode_rollout", recorded)
    flags = "--rm rm --baseline rloo --group-size 4 --batch-size 16 --steps 1 --eval-prompts 4"
    train_policy.main(command(flags, out=tmp_path / "groups"))
    prompts, completions = next((p, c) for p, c in seen if len(p) == 16)
    groups = [prompts[i : i + 4] for i in range(0, 16, 4)]
    assert all(group == [group[0]] * 4 for group in groups)
    assert len({tuple(group[0].ids) for group in groups}) == 4
    assert len({tuple(completion) for completion in completions[:4]}) > 1


def test_an_ema_anchor_trails_the_policy(here, tmp_path):
    """mu = 1 makes the anchor the policy of the step before.

    kl_anchor stays near 0 while kl_sft grows.
    """
    flags = "--rm rm --steps 25 --anchor ema --mu 1 --lr 2e-3 --batch-size 32 --eval-prompts 4"
    train_policy.main(command(flags, out=tmp_path / "ema"))
    last = metrics(tmp_path / "ema")[-5:]
    assert sum(row["kl_sft"] for row in last) > 5 * abs(sum(row["kl_anchor"] for row in last))


def test_warp_runs_the_algorithm_and_resumes(here, tmp_path, capsys, monkeypatch):
    flags = command(
        "--rm rm --steps 3 --runs 2 --iterations 3 --batch-size 16 --eval-every 3 "
        "--eval-prompts 8 --etas 0,0.5,1 --keep-etas 0.5 --lr 2e-3 --eta 0.25"
    )
    started_from, real_train = [], train_policy.train

    def recorded_train(run, task, policy):
        started_from.append(warp.weights_of(policy))
        return real_train(run, task, policy)

    monkeypatch.setattr(train_policy, "train", recorded_train)
    warp.main([*flags, "--out", str(tmp_path / "whole")])
    results = json.loads((tmp_path / "whole/front.json").read_text())

    def saved(place):
        return weights(tmp_path / "whole" / place)

    def assert_same(state, expected):
        for name in expected.keys() & state.keys():
            torch.testing.assert_close(state[name], expected[name], rtol=1e-6, atol=1e-7)

    theta_sft = load_policy(toy.start_policy_folder())[0].state_dict()
    theta_init = theta_sft
    for i in (1, 2, 3):
        runs = [saved(f"iteration-{i}/run-{m}") for m in (1, 2)]
        for start in started_from[2 * i - 2 : 2 * i]:
            assert_same(start, theta_init)  # every policy starts at its iteration's theta_init
        for m in (1, 2):  # and so does its EMA anchor
            first = metrics(tmp_path / f"whole/iteration-{i}/run-{m}")[0]
            assert first["kl_anchor"] == pytest.approx(0, abs=1e-4)
        merged = saved(f"iteration-{i}/merged")
        # the policies are merged, not their EMAs
        assert_same(merged, merge_policies(theta_init, runs)[0])
        theta_init = liti(theta_init, merged, 0.25)
    # from the start policy to the last merge
    assert_same(saved("front/eta-0.5"), liti(theta_sft, merged, 0.5))
    assert results["front"][0]["kl_sft"] == 0
    assert [point["eta"] for point in results["front"]] == [0, 0.5, 1]
    assert results["front"][2]["reward"] == results["merges"][2]["reward"]
    firsts = set()
    for i in (1, 2):
        for m in (1, 2):
            samples = (tmp_path / f"whole/iteration-{i}/run-{m}/samples.jsonl").read_text()
            firsts.add(json.loads(samples.splitlines()[0])["prompt"])
    assert len(firsts) == 4  # the runs differ in their prompts
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "whole/front.png").exists() == has_matplotlib

    # Killed in the second iteration: the half-written run is not trusted, the finished ones are not
    # repeated.
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("config.json", "iteration-1", "iteration-2"):
        subprocess.run(["cp", "-r", tmp_path / "whole" / name, killed / name], check=True)
    (killed / "iteration-2/run-2/model").rename(killed / "iteration-2/run-2/model.new")
    subprocess.run(["rm", "-r", killed / "iteration-2/merged"], check=True)
    untouched = killed / "iteration-2/run-1/metrics.jsonl"
    written = untouched.stat().st_mtime_ns
    warp.main([*flags, "--out", str(killed), "--resume"])
    assert json.loads((killed / "front.json").read_text())["front"] == results["front"]
    assert untouched.stat().st_mtime_ns == written
    capsys.readouterr()
    other = [*flags, "--eta", "0.3", "--out", str(killed), "--resume"]
    assert "ran with --eta 0.25, now 0.3" in fails(warp.main, other, capsys)


@pytest.mark.slow
def test_runs_of_warp_with_a_reward_model_each(here, tmp_path, capsys):
    flags = command(
        "--rm-of-run rm rm-again --steps 2 --iterations 1 --batch-size 8 --eval-every 2 "
        "--eval-prompts 4 --etas 0,1 --method ram --standardize-rewards",
        out=tmp_path / "diverse",
    )
    warp.main(flags)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = next(i for i, words in enumerate(lines) if words[:2] == ["held-out", "means"])
    assert lines[table][2:] == "kl_sft reward reward rm reward rm-again".split()
    assert [words[:2] for words in lines[table + 1 : table + 5]][:3] == [
        ["start", "policy"],
        ["run", "1:"],
        ["run", "2:"],
    ]
    config = json.loads((tmp_path / "diverse/config.json").read_text())
    assert {"reward rm", "reward rm-again"} <= config["fingerprints"].keys()
    total = json.loads((tmp_path / "diverse/iteration-1/angles.json").read_text())["total"]
    assert 0 < total["overlap"] <= 1 and len(total["moved"]) == 2
    swapped = [{"rm": "rm-again", "rm-again": "rm"}.get(word, word) for word in flags]
    line = fails(warp.main, [*swapped, "--resume"], capsys)
    assert "--rm-of-run ['rm', 'rm-again'], now ['rm-again', 'rm']" in line or "--rm [" in line


def test_nonfinite_rewards_stop_the_run_and_keep_the_policy(here, tmp_path, capsys, monkeypatch):
    real, calls = RewardModel.read_out, []

    def broken(self, logits):
        calls.append(len(logits))
        third = len(logits) == 12 and calls.count(12) == 3
        return real(self, logits) * (float("nan") if third else 1)

    monkeypatch.setattr(RewardModel, "read_out", broken)
    out = tmp_path / "nan"
    argv = command("--rm rm --steps 9 --batch-size 12 --eval-prompts 4", out=out)
    assert "step 3" in fails(train_policy.main, argv, capsys)
    assert len(metrics(out)) == 2
    assert all(tensor.isfinite().all() for tensor in weights(out).values())


def test_uncertainty_needs_a_distribution_over_scores(here, tmp_path, capsys):
    argv = ["--rm", "rm", "--uncertainty", "inverse_std", "--out", str(tmp_path / "run")]
    line = fails(train_policy.main, [*argv, "--device", "cpu"], capsys)
    assert line.startswith("error: --uncertainty inverse_std: --rm rm: ")
    assert "no distribution over scores" in line


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_training_on_files_with_a_model_of_another_tokenizer(here, tmp_path):
    """The policy's reward model has another vocabulary: texts go from the one to the other."""
    pairs = [
        {"prompt": f"again , the {a} is", "chosen": f" {w} good .", "rejected": f" {w} bad ."}
        for a in toy.ASPECTS
        for w in toy.INTENSITY
    ]
    data = jsonl(tmp_path / "pairs.jsonl", pairs)
    tokenizer = toy.make_tokenizer()
    words = sorted(toy.VOCABULARY[4:], reverse=True)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<end>", "<unk>", *words])}
    other = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    other.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(eos_token="<end>", unk_token="<unk>")
    gpt2, rm = tmp_path / "gpt2", tmp_path / "rm"
    PreTrainedTokenizerFast(tokenizer_object=other, **special).save_pretrained(gpt2)
    sizes = dict(vocab_size=len(words) + 2, n_positions=40, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(gpt2)
    train_rm.main(command("--steps 60 --lr 1e-2 --batch-size 8", model=gpt2, dataset=data, out=rm))
    assert metrics(rm)[-1]["eval_accuracy"] == 1
    places = dict(model=toy.start_policy_folder(), rm=rm, dataset=data, out=tmp_path / "policy")
    train_policy.main(command("--steps 2 --max-new-tokens 16 --batch-size 8", **places))
    assert len(metrics(tmp_path / "policy")) == 2 and len(tokenizer) != len(other.get_vocab())


BAD_FLAGS = [
    (train_rm, "--loss ordinal --margin 1", "--margin"),
    (train_rm, "--ties half", "--ties"),
    (train_rm, "--loss ordinal --num-scores 2", "--num-scores"),
    (train_rm, "--learning-rate 1", "--learning-rate"),
    (train_rm, "--batch-size 0", "--batch-size"),
    (train_rm, "--batch-size many", "--batch-size"),
    (train_rm, "--model somewhere", "--dataset"),
    (train_policy, "--mu 0.1", "--anchor ema"),
    (train_policy, "--anchor ema --mu 0", "--mu"),
    (train_policy, "--baseline-decay 0.5", "--baseline ema"),
    (train_policy, "--baseline rloo --group-size 1", "--group-size"),
    (train_policy, "--batch-size 10 --group-size 4", "multiple"),
    (train_policy, "--beta -1", "--beta"),
    (train_policy, "--temperature 0", "--temperature"),
    (train_policy, "--dataset x.jsonl", "--model"),
    (train_policy, "--device warp9", "--device"),
    (train_policy, "--rm rm --uncertainty inverse_std", "--loss ordinal"),
    (train_policy, "--rm rm --max-new-tokens 80", "context"),
    (warp, "--runs 0", "--runs"),
    (warp, "--iterations 0", "--iterations"),
    (warp, "--eta 1.5", "--eta"),
    (warp, "--mu 2", "--mu"),
    (warp, "--etas 0,1,0.5", "rising"),
    (warp, "--etas ", "--etas"),  # an empty text
    (warp, "--etas a,b", "--etas"),
    (warp, "--etas 0,2", "[0, 1]"),
    (warp, "--resume", "--out"),
    (warp, "--resume --out rm/model", "--resume"),
]


@pytest.mark.parametrize(("script", "flags", "word"), BAD_FLAGS)
def test_flags_that_make_no_sense_end_with_one_line(here, tmp_path, script, flags, word, capsys):
    argv = flags.split(" ")
    if "--resume" not in argv:
        argv = [*argv, "--out", str(tmp_path / "run")]
    assert word in fails(script.main, argv, capsys)


GOOD = {"prompt": "again , the plot is", "chosen": " good .", "rejected": " bad ."}
BAD_DATA = {
    "no such file": (None, "no such file"),
    "empty": ([], "no rows"),
    "column": ([{"question": "a", "chosen": "b"}], "chosen"),
    "empty text": ([GOOD, *[GOOD | {"chosen": " "}] * 2], "row 2"),
    "number": ([GOOD, *[GOOD | {"rejected": 3}] * 2], "row 2"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_ends_with_one_line(here, tmp_path, case, capsys):
    rows, word = BAD_DATA[case]
    data = str(tmp_path / "missing.jsonl") if rows is None else jsonl(tmp_path / "data.jsonl", rows)
    argv = command("", model=toy.start_policy_folder(), dataset=data, out=tmp_path / "run")
    line = fails(train_rm.main, argv, capsys)
    assert word in line and Path(data).name in line
    if case == "column":
        assert "question" in line  # the columns that are there


def test_bad_models_end_with_one_line(here, tmp_path, capsys):
    def refusal(**places):
        return fails(train_policy.main, command("", out=tmp_path / "run", **places), capsys)

    assert "head" in refusal(rm=toy.start_policy_folder())
    prompts = [{"prompt": f"again , the {aspect} is"} for aspect in toy.ASPECTS]
    data = jsonl(tmp_path / "prompts.jsonl", prompts)
    assert "nowhere" in refusal(model="./nowhere", rm="rm", dataset=data)
    policy, tokenizer = load_policy(toy.start_policy_folder())
    tokenizer.eos_token = tokenizer.pad_token = None
    policy.save_pretrained(tmp_path / "endless")
    tokenizer.save_pretrained(tmp_path / "endless")
    assert "eos_token" in refusal(model=tmp_path / "endless", rm="rm", dataset=data)


def test_an_occupied_folder_is_refused(here, capsys):
    assert "holds another run" in fails(train_policy.main, ["--rm", "rm", "--out", "rm"], capsys)


def test_flags_are_parsed_before_the_heavy_imports():
    """--help and a wrong flag answer at once: importing torch and transformers takes seconds."""
    check = (
        "import sys, train_rm, train_policy, warp\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_command_line_ends_with_status_2_and_one_line(tmp_path):
    """Once in a process of its own: what a shell sees."""
    argv = [sys.executable, ROOT / "train_policy.py", "--no-such-flag"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--no-such-flag" in done.stderr
