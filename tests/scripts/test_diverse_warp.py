"""warp.py --rm-of-run: each run of an iteration has its own reward; all are measured by all."""

import dataclasses
import json
import os
import threading

import pytest
import tiny_runs
import torch
from tiny_runs import content, difference, new_run, reward, run_warp, warp_config

import train_policy
import warp
from minalign.models.loading import load_policy
from minalign.models.rewards import RewardFunction, RewardSum
from minalign.running.errors import UserError

A, B = "a:f", "b:g"


def other(prompts, completions):
    """Another reward: short words, a hundred times as large."""
    return [100 * sum(len(word) < 4 for word in text.split()) for text in completions]


def two_rewards(first=reward, second=other):
    parts = {A: RewardFunction(A, first), B: RewardFunction(B, second)}
    return tiny_runs.tiny_task()._replace(reward=RewardSum(parts, [0.5, 0.5]))


def config(**changes):
    return dataclasses.replace(warp_config(), rm_of_run=[A, B], rm=[A, B], **changes)


def diverse(out, stop=None, task=None, **changes):
    run = new_run(out, config(**changes), torch.float32, stop)
    return warp.run_warp(run, task or two_rewards())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("diverse") / "whole"
    return out, diverse(out)


@pytest.fixture(autouse=True, scope="module")
def no_sync():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def weights(folder):
    return load_policy(str(folder))[0].state_dict()


def test_run_m_of_every_iteration_is_trained_on_reward_m(whole, tmp_path):
    """In the first iteration to the bit as a WARP in which every run has that reward."""
    out, results = whole
    for m, function in ((1, reward), (2, other)):
        small = {"iterations": 1, "steps": 3, "etas": "1", "keep_etas": ""}
        run_warp(tmp_path / f"only-{m}", function=function, **small)
        ours = weights(out / f"iteration-1/run-{m}")
        theirs = weights(tmp_path / f"only-{m}/iteration-1/run-{m}")
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for i in (1, 2):
        means = [
            [
                json.loads(row)["reward"]
                for row in open(out / f"iteration-{i}/run-{m}/metrics.jsonl")
            ]
            for m in (1, 2)
        ]
        assert max(means[0]) < 10 < min(means[1])  # the second's scale is its own


def test_merge_and_runs_and_start_are_measured_by_every_reward(whole):
    out, results = whole
    rows = results["table"]
    assert [(row["iteration"], row["policy"]) for row in rows] == [
        (i, name)
        for i in (1, 2)
        for name in ("start policy", f"run 1: {A}", f"run 2: {B}", "slerp")
    ]
    folders = ["", "run-1", "run-2", "merged"]
    for row, part in zip(rows, 2 * folders):
        task = two_rewards()
        policy = (
            load_policy(str(out / f"iteration-{row['iteration']}" / part))[0]
            if part
            else task.start
        )
        for name, function in ((A, reward), (B, other)):
            alone = task._replace(reward=RewardFunction(name, function))
            run = new_run(out, config(), torch.float32)
            expected = train_policy.evaluate(run, alone, policy)[0]
            assert row[f"reward {name}"] == pytest.approx(expected["reward"], rel=1e-6)
            assert row["kl_sft"] == pytest.approx(expected["kl_sft"], abs=1e-6)
        assert row["reward"] == pytest.approx((row[f"reward {A}"] + row[f"reward {B}"]) / 2)
        if part.startswith("run"):
            kept = json.loads(
                (out / f"iteration-{row['iteration']}/{part}/results.json").read_text()
            )
            assert kept.items() <= row.items()
    assert json.loads((out / "front.json").read_text())["table"] == rows
    for run in results["runs"]:  # along a curve, a reward is called by its name
        assert all(f"reward {(A, B)[run['run'] - 1]}" in point for point in run["curve"])
        assert all("reward" not in point for point in run["curve"][:-1])


@pytest.mark.slow
@pytest.mark.parametrize("call", [2, 5, 8, 11])
def test_it_resumes_in_the_middle_of_every_run(tmp_path, whole, call):
    stop, calls = threading.Event(), []

    def stopping(function):
        def score(prompts, completions):
            calls.extend([1] * (len(completions) == 4))  # a batch; evaluation has three
            if len(calls) == call:
                stop.set()
            return function(prompts, completions)

        return score

    with pytest.raises(KeyboardInterrupt):
        diverse(tmp_path / "cut", stop, two_rewards(stopping(reward), stopping(other)))
    diverse(tmp_path / "cut", resume=True)
    assert not difference(content(whole[0]), content(tmp_path / "cut"))


def test_with_standardised_rewards_each_is_standardised_alone():
    total = RewardSum({A: RewardFunction(A, reward), B: RewardFunction(B, other)}, [0.5, 0.5])
    total.fit({A: torch.tensor([1.0, 3.0]), B: torch.tensor([100.0, 500.0])})
    task = tiny_runs.tiny_task()
    batch = (task.tokenizer, task.eval_prompts[:2], [[5, 6, 7], [8]], 2)
    raw = [part.score_rollout(*batch).rewards for part in total.rewards.values()]
    assert torch.equal(total.alone(A).score_rollout(*batch).rewards, (raw[0] - 2) / 1)
    assert torch.equal(total.alone(B).score_rollout(*batch).rewards, (raw[1] - 300) / 200)


def test_one_reward_may_be_that_of_several_runs():
    given = {"runs": 3, "rm_of_run": ["x", "y", "x"]}
    resolved = warp.resolve(warp.Config(**given))
    assert resolved.rm == ["x", "y"] and resolved.rm_weights == pytest.approx([2 / 3, 1 / 3])


BAD = [
    ({"rm": ["c"]}, "leave --rm out"),
    ({"rm_weights": [1.0, 2.0]}, "leave --rm-weights out"),
    ({"rm_average": True}, "leave --rm-average out"),
    ({"runs": 3}, "got 2, expected one reward for each of --runs 3"),
    ({"rm_of_run": ["a", "b", "c"]}, "got 3, expected one reward for each of --runs 2"),
    ({"rm_of_run": ["a"], "dataset": "d", "model": "m"}, "got 1, expected one"),
]


@pytest.mark.parametrize("given, message", BAD, ids=[message for _, message in BAD])
def test_what_does_not_go_with_it_is_refused_by_name(given, message):
    with pytest.raises(UserError, match=message):
        warp.resolve(warp.Config(**{"rm_of_run": ["a", "b"]} | given))
