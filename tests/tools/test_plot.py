"""Runs are read, grouped and drawn as logged. Folders that lack something are refused by name."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_policy
from minalign.data import toy
from minalign.running.errors import one_line_errors
from minalign.running.run import describe
from minalign.tools import plot
from minalign.tools.logged import NOT_A_SETTING, at_equal_kl, curve, group_runs, read_run, smooth

ROOT = Path(__file__).parents[2]


def write_run(folder, rows, config=None, results=None):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in (("config.json", config), ("results.json", results)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return str(folder)


def policy_rows(steps=40, slope=0.1, every=10):
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "reward": slope * step, "kl_sft": 0.02 * step, "length": 9.0}
        row |= {"entropy": 1.2, "grad_norm": 2.0 + step % 3}
        if step % every == 0:
            row |= {"eval_reward": slope * step, "eval_kl_sft": 0.1 * step, "eval_length": 9.5}
        rows.append(row)
    return rows


def write_warp(folder, height=1.0, config=None):
    folder.mkdir(parents=True)
    front = [
        {"eta": eta, "kl_sft": 10 * eta, "reward": height * eta, "gold": eta} for eta in (0, 0.5, 1)
    ]
    curve = [
        {"step": 20, "kl_sft": 4.0, "reward": 0.3, "gold": 0.2},
        {"step": 40, "kl_sft": 9.0, "reward": 0.8, "gold": 0.7},
    ]
    merges = [{"iteration": 1, "kl_sft": 10.0, "reward": height, "gold": 1.0}]
    runs = [{"iteration": 1, "run": 1, "curve": curve}]
    (folder / "front.json").write_text(json.dumps({"runs": runs, "merges": merges, "front": front}))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def write_rm(folder, seed=0):
    rows = [{"step": step, "loss": 0.6, "grad_norm": 1.0} for step in range(1, 21)]
    for row in rows[9::10]:
        row |= {"eval_loss": 0.55 + 0.01 * seed, "eval_floor": math.log(2)}
        row |= {"eval_accuracy": 0.7, "eval_ece": 0.04}
    return write_run(folder, rows, {"seed": seed, "loss": "bradley-terry"})


def fails(argv, capsys):
    with pytest.raises(SystemExit) as error, one_line_errors():
        plot.main(argv)
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(lines) == 1
    return lines[0]


def test_a_torn_last_line_is_ignored_and_another_broken_line_is_not(tmp_path, capsys):
    folder = Path(write_run(tmp_path / "a", policy_rows(20)))
    log = folder / "metrics.jsonl"
    whole = log.read_text()
    for torn in (whole[:-7], whole + '{"step": 21, "rew', whole + "17"):
        log.write_text(torn)
        whole_rows = 19 if torn == whole[:-7] else 20
        rows = read_run(str(folder)).columns
        assert rows["step"][1].tolist() == list(range(1, whole_rows + 1))
    log.write_text(whole[:30] + "\n" + whole)
    line = fails([str(folder), "--out", str(tmp_path / "x.png")], capsys)
    assert f"{log}: line 1: no JSON object" in line
    log.write_text('{"step": 1, "kl_sft": null, "reward": 1.0}\n')
    assert math.isnan(read_run(str(folder)).columns["kl_sft"][1][0])


def test_the_points_of_a_policy_begin_at_the_start_policy(tmp_path):
    results = {"before": {"reward": 0.25, "kl_sft": 0.0}, "after": {}}
    run = read_run(write_run(tmp_path / "a", policy_rows(20), results=results))
    points = [(point["kl_sft"], point["reward"]) for point in run.points]
    assert points == [(0.0, 0.25), (1.0, 1.0), (2.0, 2.0)]
    assert run.kind == "policy" and read_run(write_rm(tmp_path / "rm")).kind == "rm"
    warp = read_run(write_warp(tmp_path / "warp"))
    assert warp.kind == "warp" and [point["kl_sft"] for point in warp.points] == [0, 5, 10]


def test_runs_that_differ_in_their_seed_alone_are_one_group(tmp_path):
    def make(name, **config):
        config = {"device": "cpu", "beta": 0.1, "out": name} | config
        return read_run(write_run(tmp_path / name, policy_rows(), config))

    def labels(runs):
        return [group.label for group in group_runs(runs)]

    runs = [
        make("fixed-seed-0", seed=0),
        make("other", seed=0, beta=0.3),
        make("fixed-seed-1", seed=1, device="cuda", git="another"),
    ]
    runs += [read_run(write_run(tmp_path / name, policy_rows())) for name in ("bare", "bare2")]
    assert labels(runs) == ["fixed (n=2)", "other", "bare", "bare2"]
    assert group_runs(runs)[0].runs == [runs[0], runs[2]]
    alike = [make("x/run", seed=0), make("y/run", seed=0, beta=1)]
    assert labels(alike) == ["x/run", "y/run"]
    with pytest.raises(ValueError, match="the same flags and the same seed"):
        group_runs([*runs, make("again", seed=1)])


def test_what_is_written_beside_the_flags_is_no_setting():
    config = train_policy.Config()
    written = describe(config, torch.device("cpu"), torch.float32) | {"fingerprints": {}}
    flags = {field.name for field in dataclasses.fields(config)}
    assert written.keys() - flags - {"device", "dtype"} <= NOT_A_SETTING


def test_curves_hold_the_steps_that_all_seeds_have(tmp_path):
    folders = [
        write_run(tmp_path / f"r{n}", policy_rows(n, slope), {"seed": n})
        for n, slope in ((30, 0.1), (20, 0.3))
    ]
    (group,) = group_runs([read_run(folder) for folder in folders])
    steps, values = curve(group, "eval_reward")
    assert steps.tolist() == [10, 20]
    assert [one.tolist() for one in values] == [[1.0, 2.0], [3.0, 6.0]]
    assert curve(group, "reward")[0].tolist() == list(range(1, 21))
    assert [len(one) for one in (curve(group, "nothing")[0], *curve(group, "nothing")[1])] == [
        0
    ] * 3


def test_smoothing_is_a_mean_of_neighbours():
    assert smooth([1.0, 4.0, 1.0, 4.0], 1) == [1.0, 4.0, 1.0, 4.0]
    assert smooth([0.0, 3.0, 6.0, 0.0, 0.0], 3) == [1.5, 3.0, 3.0, 2.0, 0.0]
    assert smooth([2.0] * 9, 5) == [2.0] * 9


def test_fronts_are_compared_at_equal_kl():
    in_no_order, other = [(2, 20), (0, 0), (4, 40)], [(1, 0), (3, 2)]
    grid, values = at_equal_kl([in_no_order, other], count=3)
    assert grid == [1, 2, 3] and values == [[10, 20, 30], [0, 1, 2]]
    assert at_equal_kl([[(0, 0), (1, 1)], [(2, 0), (3, 1)]]) == ([], [[], []])


@pytest.fixture
def figures():
    """The module that draws, which alone needs matplotlib."""
    pytest.importorskip("matplotlib")
    from minalign.tools import figures

    return figures


@pytest.fixture
def axes_drawn(figures, monkeypatch):
    """The axes of every figure that is drawn, after it was saved."""
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    yield lambda: [axis for figure in drawn for axis in figure.axes if axis.get_visible()]
    monkeypatch.undo()
    for figure in drawn:
        figures.plt.close(figure)


def texts(axis):
    return {text.get_text(): text.xy[1] for text in axis.texts}


def of_held_out_reward(axes):
    """Two of them: against steps, and against KL."""
    return [axis for axis in axes if axis.get_ylabel() == "reward, held-out prompts"]


def test_every_panel_shows_what_was_logged(tmp_path, axes_drawn, capsys):
    out = tmp_path / "x.png"
    runs = [
        write_run(tmp_path / name, policy_rows(slope=slope))
        for name, slope in (("a", 0.1), ("b", 0.2))
    ]
    runs += [write_rm(tmp_path / "rm"), write_warp(tmp_path / "w")]
    plot.main([*runs, "--out", str(out)])
    assert out.stat().st_size > 10_000
    assert "4 runs, 4 lines" in capsys.readouterr().out
    by_name = {axis.get_ylabel().split("\n")[0]: axis for axis in axes_drawn()}
    assert list(by_name) == [
        "reward, training batch",
        "reward, held-out prompts",
        "KL(policy || start)",
        "length (tokens)",
        "entropy (nats per token)",
        "gradient norm",
        "loss, held-out pairs",
        "accuracy, held-out pairs",
        "calibration error (ECE)",
        "gold reward (the truth)",
    ]
    assert len(axes_drawn()) == 11
    step_axis, plane = of_held_out_reward(axes_drawn())
    for line, slope in zip(step_axis.lines, (0.1, 0.2), strict=True):
        expected = [[step, pytest.approx(slope * step)] for step in (10, 20, 30, 40)]
        assert line.get_xydata().tolist() == expected
    assert step_axis.get_xlabel() == "optimizer steps" and "nats per sequence" in plane.get_xlabel()
    kls = [line.get_xdata().tolist() for line in plane.lines]
    assert kls == [[1, 2, 3, 4], [1, 2, 3, 4], [0, 5, 10]]
    assert set(texts(by_name["loss, held-out pairs"])) == {"rm", "constant model"}
    assert set(texts(plane)) == {"a", "b", "w"} and by_name["gradient norm"].get_yscale() == "log"
    for axis in axes_drawn():  # no label on another
        heights = sorted(texts(axis).values())
        assert all(high - low > 0.07 for low, high in zip(heights, heights[1:]))
        assert max(heights) <= 1 + 1e-9


@pytest.mark.parametrize(
    "values", [(0.0, 0.0, 0.01, 0.5), (1.0, 1.0, 0.99, 0.5), (0.5,) * 5, (0.0, 0.4, 0.8, 1.0)]
)
def test_labels_keep_apart_and_beside_the_axes(values, figures):
    figure, axis = figures.plt.subplots()
    axis.set_ylim(0, 1)
    figures.label_ends(axis, [(value, str(i), "black") for i, value in enumerate(values)])
    heights = list(texts(axis).values())
    line = figures.STYLE["font.size"] / axis.get_window_extent().height * figure.dpi / 72
    figures.plt.close(figure)
    ordered = sorted(heights)
    assert 0 <= ordered[0]
    assert ordered[-1] <= 1
    assert all(b - a > 1.2 * line for a, b in zip(ordered, ordered[1:]))
    if values == (0.0, 0.4, 0.8, 1.0):  # where there is room, none moves
        assert heights == pytest.approx(values)


def test_seeds_become_a_mean_in_a_band(tmp_path, axes_drawn):
    runs = []
    for seed, (slope, height) in enumerate(((0.1, 1.0), (0.4, 3.0))):
        rows, config = policy_rows(slope=slope), {"seed": seed}
        runs.append(write_run(tmp_path / f"r-{seed}", rows, config))
        runs.append(write_warp(tmp_path / f"w-{seed}", height, config))
    plot.main([*sorted(runs), "--out", str(tmp_path / "x.svg")])
    step_axis, plane = of_held_out_reward(axes_drawn())
    (line,) = step_axis.lines
    assert line.get_ydata().tolist() == pytest.approx([2.5, 5, 7.5, 10])
    (band,) = step_axis.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.round(6).tolist()}
    assert {(40.0, 4.0), (40.0, 16.0), (10.0, 1.0), (10.0, 4.0)} <= corners
    means = [line for line in plane.lines if line.get_linestyle() == "-"]
    assert [line.get_ydata()[-1] for line in means] == pytest.approx([10, 2])
    assert means[1].get_xdata()[-1] == 10
    assert set(texts(plane)) == {"r (n=2)", "w (n=2)"} and len(plane.collections) == 2


def test_more_than_five_lines_get_a_legend(tmp_path, axes_drawn):
    runs = [write_run(tmp_path / f"r{i}", policy_rows()) for i in range(9)]
    plot.main([*runs, "--out", str(tmp_path / "x.png")])
    assert not any(texts(axis) for axis in axes_drawn())
    (legend,) = axes_drawn()[0].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"r{i}" for i in range(9)]
    looks = {(line.get_color(), line.get_linestyle()) for line in axes_drawn()[1].lines}
    assert len(looks) == 9


def test_one_warp_run_is_drawn_with_its_policies_and_merges(tmp_path, axes_drawn):
    plot.main([write_warp(tmp_path / "w"), "--out", str(tmp_path / "x.png")])
    axes = axes_drawn()
    assert len(axes) == 2 and len(axes[0].lines) == 3  # a policy in training, the front, a merge


def test_a_real_run_can_be_drawn(tmp_path, monkeypatch, axes_drawn):
    (tmp_path / "rules_of_plot.py").write_text(
        "def words(prompts, texts):\n    return [len(t.split()) for t in texts]\n"
    )
    monkeypatch.chdir(tmp_path)
    tokenizer = toy.make_tokenizer()
    for part in (toy.make_model(tokenizer, seed=0), tokenizer):  # not fitted: that takes seconds
        part.save_pretrained(toy.folder() / "start-policy")
    flags = "--rm rules_of_plot:words --steps 6 --eval-every 3 --batch-size 8 --eval-prompts 8"
    for seed in ("0", "1"):
        more = f"--seed {seed} --out run-{seed} --device cpu"
        train_policy.main([*flags.split(), *more.split()])
    plot.main(["run-0", "run-1", "--out", "x.pdf"])
    assert Path("x.pdf").stat().st_size > 5_000 and len(axes_drawn()) == 9
    assert all(set(texts(axis)) == {"run (n=2)"} for axis in axes_drawn())


def test_what_cannot_be_drawn_is_refused_in_one_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "x.png")]
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "iteration-1").mkdir(parents=True)
    cases = {
        "nowhere": "no such folder",
        "empty": "no metrics.jsonl and no front.json",
        "half": "no front.json: warp.py",
        write_run(tmp_path / "none", []): "has no whole line",
        write_run(tmp_path / "odd", [{"step": 1, "x": 2}]): "neither kl_sft",
        write_run(tmp_path / "young", [{"step": 1, "loss": 0.7}]): "nothing to draw yet",
    }
    for name, reason in cases.items():
        path = str(tmp_path / name)
        line = fails([path, *out], capsys)
        assert line.startswith(f"error: {path}: ") and reason in line
    good = write_run(tmp_path / "good", policy_rows())
    assert "expected a name that ends in .png" in fails([good, "--out", "x.txt"], capsys)
    assert "no folder" in fails([good, "--out", str(tmp_path / "no/x.png")], capsys)
    assert "the same seed" in fails([good, good, *out], capsys)
    (tmp_path / "good" / "results.json").write_text("{")
    assert "results.json: cannot be read" in fails([good, *out], capsys)
    with pytest.raises(SystemExit) as error:
        plot.main([])
    assert error.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_without_matplotlib_the_command_line_says_so(tmp_path):
    """And the import fails as an ImportError: warp.py does without its figure."""
    run = write_run(tmp_path / "a", policy_rows())
    setup = (
        "import sys, runpy; sys.modules['matplotlib'] = None\n"
        "sys.argv = ['minalign', 'plot', *sys.argv[1:]]\n"
    )
    code = setup + "runpy.run_module('minalign', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", code, run, "--out", "x.png"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    assert "pip install matplotlib" in ran.stderr
    code = "try:\n    import minalign.tools.figures\nexcept ImportError:\n    print('as expected')"
    code = setup + code
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout == "as expected\n"
