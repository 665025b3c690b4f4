"""The best step and a decline from it: by hand, and in runs that drift."""

import json
import math
from types import SimpleNamespace

import pytest
from tiny_runs import content, difference, run_policy

import train_policy
from minalign.measuring.policies import Measured, Sample
from minalign.measuring.progress import judge, objective, paired_change
from minalign.running.errors import UserError


def measured(rewards, kls):
    samples = [Sample("", "", reward, kl) for reward, kl in zip(rewards, kls)]
    mean = {"reward": sum(rewards) / len(rewards), "kl_sft": sum(kls) / len(kls)}
    return Measured(mean, samples, [])


def new_run(beta=0.1, **flags):
    given = dict(steps=9, eval_every=1, lr=1e-3, beta=beta, target_kl=None, anchor="fixed", mu=0.01)
    given["stop_on_decline"] = False
    config = SimpleNamespace(**given | flags)
    return SimpleNamespace(config=config, counts={}, made_of={"held-out data": "h"}, step=0)


def told(run, capsys, *evaluations):
    """What is said at each evaluation of a run, from the next step on."""
    said = []
    for rewards, kls in evaluations:
        judge(run, measured(rewards, kls))
        said.append(capsys.readouterr().out.strip())
        run.step += 1
    return said


START = ([0.0, 0.2, 0.4], [0.0, 0.0, 0.0])
GOOD = ([1.0, 1.2, 1.4], [1.0, 1.0, 1.0])  # objective .9, 1.1, 1.3
WORSE = ([1.0, 1.2, 1.4], [4.0, 5.0, 6.0])  # .6, .7, .8: by .3, .4, .5: error .1 / sqrt(3)


def test_paired_change_by_hand():
    now, before = ({"rewards": r, "kls": k} for r, k in (WORSE, GOOD))
    change, error = paired_change(now, before, 0.1)
    assert change == pytest.approx(-0.4) and error == pytest.approx(0.1 / 3**0.5)
    now["rewards"] = [1.0, math.nan, 1.4]  # that prompt is in neither
    assert paired_change(now, before, 0.1)[0] == pytest.approx(-0.4)
    now["kls"] = [4.0, 5.0, math.inf]
    assert all(map(math.isnan, paired_change(now, before, 0.1)))


def test_a_decline_is_told_once_when_it_is_seen_twice(capsys):
    run = new_run()
    said = told(run, capsys, START, GOOD, GOOD, WORSE, WORSE, WORSE)
    assert [bool(line) for line in said] == [0, 0, 0, 0, 1, 0]
    line = "held-out reward - beta KL is 0.4 (standard error 0.058) below that of step 1, the best"
    assert said[4].startswith(f"step 4: {line}: lower --lr 0.001")
    assert run.counts["best_step"] == 1 and "ended" not in run.counts
    assert told(run, capsys, GOOD, WORSE) == ["", ""]  # once in between is none


def test_with_a_moving_anchor_its_rate_is_named_too(capsys):
    said = told(new_run(anchor="ema"), capsys, START, GOOD, WORSE, WORSE)
    assert "lower --lr 0.001 or --mu 0.01" in said[3]


def test_a_change_within_the_error_is_no_decline(capsys):
    """Lower on average, by less than the deviation of three paired differences over sqrt(3)."""
    noise = ([1.6, 0.4, 1.2], [1.0, 1.0, 1.0])
    run = new_run()
    assert not any(told(run, capsys, START, GOOD, noise, noise, noise))


def test_the_start_counts_and_is_no_best_step(capsys):
    run = new_run(eval_every=50)
    said = told(
        run, capsys, START, ([-1.0, -0.8, -0.6], [1.0] * 3), ([-1.0, -0.8, -0.6], [1.0] * 3)
    )
    assert "below that of the start, the best" in said[2]
    assert "and --eval-every 50, too coarse to see where it fell" in said[2]
    assert run.counts["best_step"] == 1


def test_a_single_fall_at_the_end_is_told_with_the_coarse_evaluations(capsys):
    run = new_run(steps=2, eval_every=1)
    said = told(run, capsys, START, GOOD, WORSE)
    assert "lower --lr 0.001, and --eval-every 1, too coarse" in said[2]


def test_with_a_target_the_best_is_near_it_under_the_present_beta(capsys):
    run = new_run(target_kl=2.0)
    far, near = ([9.0, 9.0, 9.0], [2.5] * 3), ([1.0, 1.0, 1.1], [2.3] * 3)
    run.counts["beta"] = 0.1
    told(run, capsys, START, far, near)
    assert run.counts["best_step"] == 2  # 2.5 > 1.2 * 2
    run.counts["beta"] = 10.0  # now the nearest is the best
    told(run, capsys, ([0.9, 0.9, 0.9], [0.5] * 3))
    assert run.counts["best_step"] == 3
    assert objective({"reward": 1.0, "kl_sft": 0.5}, run) == -4.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_never_the_best_nor_a_decline(capsys, bad):
    run = new_run()
    broken = Measured({"reward": math.nan, "kl_sft": 1.0}, [Sample("", "", bad, 1.0)] * 3, [])
    told(run, capsys, START, GOOD)
    for _ in range(3):
        judge(run, broken)
    assert capsys.readouterr().out == "" and run.counts["best_step"] == 1


def test_prompts_without_a_reward_are_not_compared(capsys):
    run, some = new_run(), [Sample("", "", None, 0.0), *measured(*START).samples]
    judge(run, Measured({"reward": 0.2, "kl_sft": 0.0}, some, []))
    assert math.isnan(run.counts["start"]["rewards"][0])


def test_one_prompt_has_no_error_and_no_guard(capsys):
    run = new_run()
    assert not any(told(run, capsys, ([1.0], [0.0]), ([0.0], [0.0]), ([0.0], [0.0])))


def test_other_prompts_begin_anew(capsys):
    run = new_run()
    told(run, capsys, START, GOOD)
    run.made_of = {"held-out data": "others"}
    assert "other held-out prompts" in told(run, capsys, WORSE)[0]
    assert run.counts["best_step"] == 2


# --- in runs


def falling(prompts, completions):
    """Scores fall with every call, by another amount for each prompt."""
    falling.calls += 1
    return [-falling.calls - 0.01 * (len(text) % 3) for text in completions]


def test_a_declining_run_ends_there_and_is_finished(tmp_path, capsys):
    falling.calls = 0
    flags = dict(steps=20, eval_every=2, save_every=50, stop_on_decline=True)
    run_policy(tmp_path, function=falling, **flags)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "the run ends here" in capsys.readouterr().out
    assert rows[-1]["step"] == 6  # best 2, lower 4 and 6
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-0000002", "step-0000006"]
    before = content(tmp_path)
    run_policy(tmp_path, function=falling, resume=True, **flags)
    assert difference(before, content(tmp_path)) == ""


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_a_target_resumes_to_the_same_bits(tmp_path, steps):
    """Beta, the peak of the KL, the declines and the best evaluation."""
    flags = dict(target_kl=0.01, eval_every=1, lr=0.05, beta=0.02, kl_horizon=8)
    run_policy(tmp_path / "whole", **flags)
    run_policy(tmp_path / "cut", **flags | {"steps": steps})
    run_policy(tmp_path / "cut", resume=True, **flags)
    whole, cut = content(tmp_path / "whole"), content(tmp_path / "cut")
    assert difference(whole["metrics.jsonl"], cut["metrics.jsonl"]) == ""
    state = "checkpoints/step-0000006/state.pt"
    assert difference(whole[state]["counts"], cut[state]["counts"]) == ""
    rows = whole["metrics.jsonl"]
    for row, after in zip(rows, rows[1:]):
        error = max(-0.2, min(0.2, row["kl_anchor"] / 0.01 - 1))
        assert after["beta"] == pytest.approx(max(0.02, row["beta"] * (1 + error * 4 / 8)))
    assert rows[-1]["beta"] > 0.02
    peaks = [max(row["kl_sft"] for row in rows[: i + 1]) for i in range(len(rows))]
    assert [row["kl_peak"] for row in rows] == pytest.approx([max(0.0, peak) for peak in peaks])


@pytest.mark.parametrize(
    "flags, why",
    [
        (dict(kl_horizon=100), "--kl-horizon needs --target-kl"),
        (dict(target_kl=1.0, anchor="ema"), "--target-kl needs --anchor fixed"),
        (dict(target_kl=1.0, beta=0.0), "expected --beta above 0"),
        (dict(target_kl=1.0, kl_horizon=8), "--kl-horizon 8: expected --batch-size 64 or more"),
        (dict(baseline="rloo", group_size=1), "--baseline rloo needs --group-size 2"),
        (dict(baseline="shrink", group_size=1), "--baseline shrink needs --group-size 2"),
        (dict(baseline="shrink", group_size=64), "leans on other prompts"),
        (dict(baseline="rloo", baseline_decay=0.5), "needs --baseline ema, prompt or shrink"),
        (dict(standardize_advantages=True, batch_size=1), "one has no deviation"),
    ],
)
def test_flags_that_make_no_sense_together(flags, why):
    with pytest.raises(UserError, match=why):
        train_policy.resolve(train_policy.Config(**flags))


@pytest.mark.parametrize("flag", ["--target-kl", "--kl-horizon", "--importance-limit"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e31", "x"])
def test_values_out_of_range(flag, value, capsys):
    with pytest.raises(SystemExit) as ended:
        train_policy.main([flag, value])
    assert ended.value.code == 2 and flag in capsys.readouterr().err


def test_the_horizon_is_five_batches_and_the_limit_that_of_its_kind():
    config = train_policy.resolve(train_policy.Config(target_kl=1.0, batch_size=8))
    assert config.kl_horizon == 40 and config.importance_limit == 2.0
    assert train_policy.resolve(train_policy.Config(importance="mask")).importance_limit == 3.0


@pytest.mark.parametrize("baseline", ["prompt", "shrink"])
def test_baselines_with_a_memory_resume_to_the_same_bits(tmp_path, baseline):
    flags = dict(baseline=baseline, group_size=2, standardize_advantages=True)
    run_policy(tmp_path / "whole", **flags)
    run_policy(tmp_path / "cut", **flags | {"steps": 4})
    run_policy(tmp_path / "cut", resume=True, **flags)
    both = [content(tmp_path / name)["metrics.jsonl"] for name in ("whole", "cut")]
    assert difference(*both) == "" and both[0][-1]["grad_norm"] > 0
