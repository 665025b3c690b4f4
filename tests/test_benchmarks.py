"""The benchmarks' own machinery: sides, ratios, floors, the table and the figure."""

import inspect
import json
import runpy
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests/benchmarks"
FILES = sorted({*FOLDER.glob("*.py")} - {FOLDER / f"{x}.py" for x in ("all", "side_by_side")})
FILES.remove(FOLDER / "results.py")
MARKED = (
    "before\n<!-- results: made by tests/benchmarks/all.py -->\nold\n<!-- end of results -->\nend\n"
)


@pytest.fixture
def module(monkeypatch):
    """name -> a file of the benchmarks, as a module; its names are gone again after the test."""
    monkeypatch.syspath_prepend(FOLDER)
    shadowed = {path.stem: sys.modules.pop(path.stem, None) for path in FOLDER.glob("*.py")}
    yield lambda name: types.SimpleNamespace(**runpy.run_path(str(FOLDER / f"{name}.py")))
    for name in shadowed:
        sys.modules.pop(name, None)
    sys.modules.update({name: old for name, old in shadowed.items() if old})


def result(benchmark="generate", shape="S", work="", who="ours", **other):
    numbers = dict(seconds=0.5, peak=3 * 2**20, ratios=[1.0, 1.0], rounds=2, facts={})
    where = dict(benchmark=benchmark, device="cpu", shape=shape, machine="a CPU")
    return where | dict(work=work, who=who) | numbers | other


def test_a_table_has_a_line_per_side(module, tmp_path):
    """A floor, a spread, a GPU apart, a side without ratio, shares of a step; and nothing twice."""
    spent = {"spent": {"sampling": 60, "forward": 40}}
    results = [
        result(floor=0.123, facts=spent),
        result(who="HF", seconds=1.25, ratios=[2.0, 2.5, 4.0]),
        result(device="cuda", machine="a GPU"),
        result(benchmark="merge", shape="M", machine="another CPU"),
        result(work="early", peak=None),
        result(work="early", who="HF", ratios=[]),
    ]
    page = tmp_path / "speed.md"
    page.write_text(MARKED)
    for _ in range(2):
        module("results").write_table(results, page)
        head = "| benchmark | side | seconds | MiB | times the first | floor, seconds |\n"
        head += "|---|---|---|---|---|---|\n"
        assert page.read_text() == (
            "before\n<!-- results: made by tests/benchmarks/all.py -->\n\n"
            f"a CPU:\n\n{head}"
            "| `generate.py` S | ours | 0.5 | 3 |  | 0.12 |\n"
            "|  | HF | 1.25 | 3 | 2.50 [2.00, 4.00] |  |\n"
            "| `generate.py` S, early | ours | 0.5 |  |  |  |\n"
            "|  | HF | 0.5 | 3 | - |  |\n\n"
            "- `generate.py` S, ours: sampling 60%, forward 40%\n\n"
            f"a GPU:\n\n{head}"
            "| `generate.py` S | ours | 0.5 | 3 |  |  |\n\n"
            f"another CPU:\n\n{head}"
            "| `merge.py` M | ours | 0.5 | 3 |  |  |\n\n"
            "<!-- end of results -->\nend\n"
        )


def test_a_page_without_marks_is_left_alone(module, tmp_path):
    page = tmp_path / "speed.md"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="expected each of these lines once"):
        module("results").write_table([result()], page)
    assert page.read_text() == "no marks"


def test_a_run_replaces_its_own_results_alone(module, tmp_path):
    """Also a side that no longer ran, so that all sides of a row were measured in turn."""
    path, store = tmp_path / "speed.json", module("results").store
    store([result(), result(who="HF")], path)
    store([result(shape="M")], path)
    store([result(device="cuda")], path)
    store([result(seconds=9.0)], path)
    keys = ("device", "shape", "who", "seconds")
    assert [[one[key] for key in keys] for one in json_of(path)] == [
        ["cpu", "S", "ours", 9.0],
        ["cpu", "M", "ours", 0.5],
        ["cuda", "S", "ours", 0.5],
    ]


def json_of(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("results", [[], [result(floor=0.1), result(who="HF", ratios=[1e3])]])
def test_a_figure_is_drawn(module, tmp_path, results):
    """Without any result, too, and in spite of a bar that would dwarf all others."""
    plt = pytest.importorskip("matplotlib.pyplot")
    module("results").figure(results, tmp_path / "speed.png")
    height, width, _ = plt.imread(tmp_path / "speed.png").shape
    assert 50 < height < 600 < width < 1500


def test_the_page_is_made_of_the_results_that_lie_beside_it(module):
    page, results = (ROOT / "docs/speed.md").read_text(), json_of(ROOT / "docs/speed.json")
    assert module("results").table(results) in page


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_benchmark_has_sides_and_a_floor(module, file, monkeypatch):
    """Every side takes a shape; the first of each work, which others are held against, is ours."""
    given, signature = [], inspect.signature(module("side_by_side").compare)
    monkeypatch.setattr(
        "side_by_side.compare", lambda *args, **kwargs: given.append((args, kwargs))
    )
    runpy.run_path(str(file), run_name="__main__")
    (args, kwargs), seen = given[0], set()
    bound = signature.bind(*args, **kwargs).arguments
    assert bound["file"] == str(file) and bound["description"]
    for side, function in bound["sides"].items():
        inspect.signature(function).bind("S")
        work, _, who = side.rpartition(": ")
        assert work in seen or who in ("ours", "parts", "x1"), side
        seen.add(work)
    if "floor" in bound and file.stem != "merge":  # whose floor is the size of its files
        for work in seen:
            assert all(len(phase) == 2 for phase in bound["floor"]("M", work))
        assert sum(map(sum, bound["floor"]("M", ""))) > 1e9


@pytest.mark.parametrize("shape", ["S", "M", "L"])
def test_weights_are_those_of_the_model(module, shape):
    """All matrices of the model, the embedding once: it is the LM head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sides = module("side_by_side")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sides.SHAPES[shape], tie_word_embeddings=True))
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert sides.weights(shape) == matrices
    assert sides.forward_flops(shape, 1, 1) == 2 * matrices
    body = matrices - model.lm_head.weight.numel()
    assert sides.forward_flops(shape, 3, 1) - sides.forward_flops(shape, 1, 1) == 4 * body


def test_sampling_reads_all_weights_for_each_token(module):
    """Three prompts of five tokens, six completions of four, of which the first is the prompt's."""
    sides = module("side_by_side")
    prefill, decode = sides.sampling_floor("S", "bfloat16, early", 3, 6, 5, 4)
    assert (prefill[1], decode[1]) == (2 * sides.weights("S"), 6 * sides.weights("S"))
    assert prefill[0] == sides.forward_flops("S", 15, 3)
    assert decode[0] == sides.forward_flops("S", 18, 18)


def test_a_floor_is_the_slower_of_products_and_memory_in_each_phase(module, capsys):
    sides = module("side_by_side")
    sides.add_floors.__globals__["rates"] = lambda dtype, block: (
        {"float32": 10.0, "bfloat16": 20.0}[dtype],
        5.0,
    )
    records = [result(), result(who="HF"), result(work="bfloat16"), result(work="early")]
    sides.add_floors(records, lambda _, work: [] if work == "early" else [(100, 20), (30, 40)])
    assert records[0]["floor"] == 10 + 8 and records[2]["floor"] == 5 + 8
    assert "floor" not in records[1] and "floor" not in records[3]
    assert "floor of bfloat16: 100 operations at 20 per second: 5.000 s" in capsys.readouterr().out


BENCHMARK = """
import sys
sys.path.insert(0, {folder!r})
from side_by_side import compare, report

def side(seconds):
    return lambda shape: report([9.0, seconds], 2**20, shape=shape)

def fails(shape):
    report([1.0], 0)
    raise SystemExit("out of everything")

SIDES = {{
    "ours": side(2.0), "TRL": side(3.0), "TRL, sorted": fails,
    "early: ours": side(0.5), "early: TRL": side(2.0), "late: ours": fails, "late: TRL": side(1.0),
}}
if __name__ == "__main__":
    compare(__file__, "made up", SIDES, lambda shape, work: [(1e6, 1e6)] if not work else [])
"""


def test_sides_run_in_turn_and_are_held_against_the_own_side_of_their_work(
    module, tmp_path, monkeypatch, capsys
):
    """The real thing, in fresh processes. A side that fails is named and has no place."""
    file, path = tmp_path / "made_up.py", tmp_path / "speed.json"
    file.write_text(BENCHMARK.format(folder=str(FOLDER)))
    flags = ["--shape", "M", "--rounds", "2", "--results", str(path)]
    monkeypatch.setattr(sys, "argv", [str(file), *flags])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(file), run_name="__main__")
    assert stopped.value.code == 1
    found = {(one["work"], one["who"]): one for one in json_of(path)}
    ratios = {side: one["ratios"] for side, one in found.items()}
    assert ratios == {
        ("", "ours"): [1.0, 1.0],
        ("", "TRL"): [1.5, 1.5],
        ("early", "ours"): [1.0, 1.0],
        ("early", "TRL"): [4.0, 4.0],
        ("late", "TRL"): [],
    }
    own = found["", "ours"]
    assert own["seconds"] == 2.0 and own["facts"] == {"shape": "M"} and own["rounds"] == 2
    assert 0 < own["floor"] < 1 and "torch" in own["machine"] and own["benchmark"] == "made_up"
    out, err = capsys.readouterr()
    assert err.count("failed:") == 2 and "TRL, sorted failed:\nout of everything" in err
    assert "early: TRL" in out


def test_all_of_them_run_and_the_page_is_made(module, tmp_path, monkeypatch):
    """A benchmark with a side that fails is in the page, and the exit status says it."""
    (tmp_path / "made_up.py").write_text(BENCHMARK.format(folder=str(FOLDER)))
    (tmp_path / "speed.md").write_text(MARKED)
    main = module("all").main
    assert set(main.__globals__["NAMES"]) == {file.stem for file in FILES}
    main.__globals__.update(HERE=tmp_path, DOCS=tmp_path, NAMES=["made_up"])
    flags = ["all.py", "--rounds", "1", "--shape", "L", "--only"]
    monkeypatch.setattr(sys, "argv", [*flags, "made_up"])
    with pytest.raises(SystemExit, match="failed, in whole or in part: made_up"):
        main()
    page = (tmp_path / "speed.md").read_text()
    assert "| `made_up.py` L, early | ours | 0.5 | 1 |" in page and "| 4.00 |" in page
    (tmp_path / "speed.md").write_text(MARKED)
    (tmp_path / "speed.png").unlink()
    monkeypatch.setattr(sys, "argv", flags)
    main()
    assert (tmp_path / "speed.md").read_text() == page and (tmp_path / "speed.png").exists()


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--device", "cuda"], ["--shape", "XL"]])
def test_a_flag_that_makes_no_sense_ends_the_program(flags, module, tmp_path, monkeypatch, capsys):
    file = tmp_path / "made_up.py"
    file.write_text(BENCHMARK.format(folder=str(FOLDER)))
    monkeypatch.setattr(sys, "argv", [str(file), *flags])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(file), run_name="__main__")
    assert stopped.value.code == 2 and flags[0] in capsys.readouterr().err


def test_timers_measure_and_are_gone_again(module):
    thing = types.SimpleNamespace(double=lambda x: 2 * x)
    plain = thing.double
    with module("policy_step").timed({"doubling": (thing, "double")}) as spent:
        assert thing.double(4) == 8 and thing.double(x=1) == 2
    assert len(spent["doubling"]) == 2 and min(spent["doubling"]) >= 0
    assert thing.double is plain
