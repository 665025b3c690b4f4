"""The reference run's scripts: tests/experiments/reference/."""

import copy
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "experiments/reference"))
import compare

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
    x = torch.linspace(0, compare.T[df - 1], 100_001, dtype=torch.float64)
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
