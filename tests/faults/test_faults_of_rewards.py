"""Rewards of users: any number counts, any slip in a function is one line, no sample takes all."""

import decimal
import fractions
import json
import math

import numpy
import pytest
import tiny
import torch

import train_policy
from minalign.data.chat import TokenizedPrompt
from minalign.models.rewards import RewardFunction, RewardSum, load_rewards
from minalign.running.errors import UserError

TOKENIZER = tiny.tokenizer()
COUNT = 3
PROMPTS = [TokenizedPrompt(TOKENIZER("what is the film ?")["input_ids"])] * COUNT
COMPLETIONS = [TOKENIZER(text)["input_ids"] for text in (" good", " of this", " capital ?")]
ROLLOUT = TOKENIZER, PROMPTS, COMPLETIONS, 2
CPU = torch.device("cpu")
INDEX = range(1, COUNT + 1)  # the numbers that a good function returns here


def scored(function):
    return RewardFunction("rules:f", function).score_rollout(*ROLLOUT).rewards


def refusal(function):
    with pytest.raises(UserError) as caught:
        scored(function)
    message = str(caught.value)
    assert message.startswith("--rm rules:f: ") and len(message) < 400 and "\n" not in message
    return message


NUMBERS = {
    "float32 array": lambda: numpy.arange(1, 4, dtype=numpy.float32),
    "int64 array": lambda: numpy.arange(1, 4),
    "float16 scalars": lambda: [numpy.float16(i) for i in INDEX],
    "float64 array": lambda: numpy.arange(1.0, 4.0),
    "tensor": lambda: torch.arange(1, 4),
    "bfloat16 tensor": lambda: torch.arange(1, 4).bfloat16(),
    "tensor with gradient": lambda: torch.arange(1.0, 4.0).requires_grad_() * 1,
    "column of a reward head": lambda: torch.arange(1.0, 4.0)[:, None],
    "0-d tensors": lambda: [torch.tensor(float(i)) for i in INDEX],
    "decimals": lambda: [decimal.Decimal(i) for i in INDEX],
    "fractions": lambda: [fractions.Fraction(2 * i, 2) for i in INDEX],
    "tuple": lambda: tuple(INDEX),
    "range": lambda: INDEX,
    "generator": lambda: (i for i in INDEX),
    "map": lambda: map(float, INDEX),
    "mixed": lambda: [True, numpy.int8(2), torch.tensor([3])],
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_what_float_takes_is_a_number(kind):
    """B18."""
    rewards = scored(lambda prompts, completions: NUMBERS[kind]())
    assert rewards.tolist() == [1.0, 2.0, 3.0] and rewards.dtype == torch.float32


async def later():
    return [1.0] * COUNT


NO_NUMBERS = {
    "nothing": lambda: None,
    "one number for all": lambda: 1.0,
    "a mean as a tensor": lambda: torch.tensor(1.0),
    "a text of digits": lambda: "123",
    "bytes": lambda: b"123",
    "texts of digits": lambda: ["1", "2", "3"],
    "a dictionary": lambda: {1: "a", 2: "b", 3: "c"},
    "a set": lambda: {1, 2, 3},
    "lists": lambda: [[1.0, 2.0]] * COUNT,
    "rows of a matrix": lambda: torch.ones(3, 2),
    "too few": lambda: [1.0, 2.0],
    "too many": lambda: numpy.ones(4),
    "none at all": lambda: [],
    "an integer of 401 digits": lambda: [10**400] * COUNT,
    "complex numbers": lambda: [1j] * COUNT,
    "complex array": lambda: numpy.ones(3, dtype=numpy.complex64),
    "a coroutine": later,
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
@pytest.mark.filterwarnings("error")  # as for a coroutine that is never awaited
def test_what_is_no_number_is_one_line_that_says_what_was_got(kind):
    """B18, S18."""
    message = refusal(lambda prompts, completions: NO_NUMBERS[kind]())
    assert "got " in message and "for 3 completions, expected one number for each" in message
    assert kind != "a coroutine" or "it is async" in message


def fails_in_a_generator(prompts, completions):
    yield 1.0
    raise ValueError("no rule for this")


ERRORS = {
    "KeyError": lambda p, c: {}["missing"],
    "ZeroDivisionError": lambda p, c: [1 / 0],
    "AttributeError": lambda p, c: [x.foo for x in c],
    "SystemExit": lambda p, c: exit(3),
    "RecursionError": lambda p, c: ERRORS["RecursionError"](p, c),
    "RuntimeError": lambda p, c: torch.ones(2) @ torch.ones(3),
    "AssertionError": lambda p, c: (_ for _ in ()).throw(AssertionError("two\nlines")),
    "ValueError": fails_in_a_generator,
}


@pytest.mark.parametrize("kind", ERRORS)
def test_whatever_a_function_raises_is_one_line_with_its_place(kind):
    """B18: with the error's type, its text, and the line of the user's own code."""
    message = refusal(ERRORS[kind])
    assert f"{kind}: " in message and "test_faults_of_rewards.py:" in message


RULES = """
import torch
W = torch.nn.Linear(64, 1, bias=False)
torch.nn.init.constant_(W.weight, .1234567)
def short(p, c): return [-len(x) / 10 for x in c]
def one(p): return [0.0] * len(p)
def yields_now(p, c): yield from [0.0] * len(c)
async def yields(p, c): yield 0.0
class Later:
    async def __call__(self, p, c): return [0.0] * len(c)
later_object = Later()
def more(prompts, completions, scale=2.0, **kwargs): return [scale] * len(completions)
async def later(p, c): return [0.0] * len(c)
def embed(p, c):
    x = torch.tensor([[len(t) + i / 7 for i in range(64)] for t in c])
    y = W(x).squeeze(1)
    return [value + 100 * y.requires_grad for value in y.tolist()]
class Scorer:
    made = 0
    def __init__(self): Scorer.made += 1
    def __call__(self, prompts, completions): return [float(Scorer.made)] * len(completions)
    def method(self, prompts, completions): return [5.0] * len(completions)
class Needs:
    def __init__(self, weights): pass
scorer = Scorer()
number = 3
def mutates(p, c):
    values = [float(len(x)) for x in c]
    for x in p: x.append({"role": "assistant", "content": "!"})
    p.clear(), c.clear()
    return values
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "rules.py").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of(name):
    return load_rewards([name], CPU)[name].score_rollout(*ROLLOUT).rewards.tolist()


def test_a_path_works_as_a_module_does(folder):
    """B18, T-D: relative, absolute, in another folder, with a name that is no identifier."""
    expected = of("rules:short")
    assert expected == pytest.approx([-0.5, -0.8, -1.0])
    (folder / "sub dir").mkdir()
    for other in ("my-rules.v2.py", "sub dir/rules.py", "json.py"):
        (folder / other).write_text(RULES)
    names = ["rules.py:short", "./rules.py:short", f"{folder}/rules.py:short"]
    names += ["my-rules.v2.py:short", "sub dir/rules.py:short", "json.py:short"]
    assert [of(name) for name in names] == [expected] * len(names)
    assert json.loads("[1]") == [1]  # a file of that name hides no module


def test_a_file_is_read_as_it_is_now(folder, monkeypatch):
    """By its path also after an edit, by its module's name also in another folder."""
    before = of("rules:short")
    half = [x / 2 for x in before]
    assert of("rules.py:short") == before
    (folder / "rules.py").write_text(RULES.replace("/ 10", "/ 20"))
    assert of("rules.py:short") == pytest.approx(half)
    (folder / "new").mkdir()
    (folder / "new/rules.py").write_text(RULES.replace("/ 10", "/ 20"))
    monkeypatch.chdir(folder / "new")
    assert of("rules:short") == pytest.approx(half)


def test_objects_that_can_be_called_are_functions(folder):
    """Of a class an object is made, once; a method and further arguments with defaults will do."""
    assert of("rules.py:scorer") == [1.0] * COUNT
    assert of("rules.py:Scorer") == of("rules.py:Scorer") == [2.0] * COUNT
    assert of("rules:scorer.method") == [5.0] * COUNT
    assert of("rules:more") == [2.0] * COUNT


def test_a_function_may_import_its_neighbours_when_it_is_called(folder):
    (folder / "sub").mkdir()
    (folder / "sub/near_rules.py").write_text("VALUE = 4.0\n")
    code = "def f(p, c):\n    import near_rules\n    return [near_rules.VALUE] * len(c)\n"
    (folder / "sub/lazy.py").write_text(code)
    assert of("sub/lazy.py:f") == [4.0] * COUNT


BAD_NAMES = {
    "os:path": "got a module",
    "math:pi": "got a float",
    "rules:number": "got a int",
    "rules:one": "one with (p) (too many positional arguments)",
    "rules:later_object": "async",
    "rules:yields": "async",
    "rules:later": "async",
    "rules:Needs": "TypeError: Needs.__init__() missing 1 required positional argument",
    "rules:none": "AttributeError",
    "rules": None,  # a reward model's folder, not a function
    "rules.py": "file.py:function",
    "rules.py:": "file.py:function",
    ":short": "file.py:function",
    "no_rules:short": "No module named 'no_rules'",
    "no_rules.py:short": "No such file",
    "no/rules:short": "module:function or file.py:function",
    "broken:f": "SyntaxError",
    "broken.py:f": "broken.py, line 2",
    "raises:f": "ZeroDivisionError: division by zero, ",
    "raises.py:f": "raises.py:2",
    "leaves:f": "SystemExit: 3",
    "lacks:f": "No module named 'no_such_package', ",
    "zeros.py:f": "null bytes",
    "x" * 300 + ":f": "No module named",
    "x" * 300 + ".py:f": "File name too long",
}


@pytest.mark.parametrize("name", [name for name in BAD_NAMES if BAD_NAMES[name]])
def test_a_function_that_cannot_be_one_is_told_before_a_folder_is_made(folder, name):
    """S18, B18."""
    (folder / "broken.py").write_text("x = 1\ndef f(p, c) return 1\n")
    (folder / "raises.py").write_text("x = 1\ny = 1 / 0\n")
    (folder / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    (folder / "lacks.py").write_text("import no_such_package\n")
    (folder / "zeros.py").write_text("x = 1\0\n")
    argv = ["--model", "no-lm", "--dataset", "no.jsonl", "--rm", name, "--out", "made"]
    with pytest.raises(UserError) as caught:
        train_policy.main(argv)
    message = str(caught.value)
    assert message.startswith(f"--rm {name[:50]}") and BAD_NAMES[name] in message
    assert "\n" not in message and not (folder / "made").exists()


def test_functions_run_outside_autocast_and_without_gradients(folder):
    """B15: the numbers are those of float32, whatever the run's precision."""
    plain = RewardFunction.from_name("rules:embed")
    expected = plain.score_rollout(*ROLLOUT).rewards
    lengths = torch.tensor([[5.0], [8.0], [10.0]])
    exact = 0.1234567 * (64 * lengths + sum(i / 7 for i in range(64)))
    torch.testing.assert_close(expected, exact[:, 0], rtol=1e-6, atol=0)
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain.score_rollout(*ROLLOUT).rewards.tolist() == expected.tolist()
        assert torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")


def test_a_function_may_change_its_arguments(folder):
    """The run's own messages stay as they were."""
    messages = [tiny.U("what ?")]
    prompts = [TokenizedPrompt(prompt.ids, messages) for prompt in PROMPTS]
    reward = RewardFunction.from_name("rules:mutates")
    for _ in range(2):
        rewards = reward.score_rollout(TOKENIZER, prompts, COMPLETIONS, 2).rewards
        assert rewards.tolist() == [5.0, 8.0, 10.0]
    assert messages == [tiny.U("what ?")]


def parts_of(**scores):
    return {name: torch.tensor(values) for name, values in scores.items()}


def fitted(**scores):
    reward = RewardSum(dict.fromkeys(scores, RewardFunction("f", len)), [1.0] * len(scores))
    reward.fit(parts_of(**scores))
    return reward.means, reward.stds


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -1e-3, 12345.678])
def test_a_reward_that_is_constant_at_the_start_is_only_centred(constant, capsys):
    """B25: also where float32 cannot hold the constant, and its deviation comes out as 1e-8."""
    means, stds = fitted(a=[0.0, 4.0] * 100, b=[constant] * 200)
    assert means == pytest.approx([2.0, constant]) and stds == [2.0, 1.0]
    one, two = capsys.readouterr().out.splitlines()
    assert one.endswith("standardised by these") and "all alike: only centred" in two


def test_a_score_that_is_not_finite_does_not_spoil_the_standardising(capsys):
    """B21."""
    means, stds = fitted(a=[0.0, math.nan, 4.0, math.inf])
    assert (means, stds) == ([2.0], [2.0])
    assert "2 of 4 samples" in capsys.readouterr().out
    with pytest.raises(UserError, match="--rm a: no score of the start policy is finite"):
        fitted(a=[math.nan, -math.inf])


COUNTING = """
calls = []
def sometimes(p, c):
    calls.append(1)
    return [float("{value}") if i == 1 else float(i) for i in range(len(c))]
def short(p, c): return [-len(x) / 10 for x in c]
"""


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("value", "extra"), [("nan", ""), ("-inf", "--rm rules:short rules:sometimes")]
)
def test_one_bad_sample_does_not_erase_the_others(folder, value, extra, capsys):
    """B21: means are over the finite ones, the rest is counted, and every file is JSON."""
    (folder / "rules.py").write_text(COUNTING.replace("{value}", value))
    tiny.policy(folder / "lm")
    tiny.rows(folder / "p.jsonl", {"prompt": "what is the {n} film ?"})
    rm = extra or "--rm rules:sometimes"
    train_policy.main(
        f"--model lm {rm} --dataset p.jsonl --steps 2 --batch-size 4 --eval-prompts 3 --eval-every "
        "1 --max-new-tokens 2 --device cpu --on-nonfinite skip --out run".split()
    )
    shown = capsys.readouterr().out
    rows = [strict(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    for file in (folder / "run").glob("*.json"):
        strict(file.read_text())
    results = strict((folder / "run/results.json").read_text())
    part = "reward rules:sometimes" if extra else "reward"
    assert [row[part] for row in rows] == pytest.approx([5 / 3] * 2)  # of 0, 2 and 3
    assert [row["not_finite"] for row in rows] == [1, 1] and rows[-1]["skipped"] == 2
    assert results["after"][part] == rows[-1][f"eval_{part}"] == 1.0  # of 0 and 2
    assert results["after"]["not_finite"] == rows[-1]["eval_not_finite"] == 1
    assert "step 1: not finite in 1 of 4 completions, first: reward " in shown
    samples = [strict(line) for line in (folder / "run/samples.jsonl").read_text().splitlines()]
    assert [sample["reward"] for sample in samples] == [None, None]  # the culprit
