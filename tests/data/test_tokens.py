"""Token ids made in batches are those made one by one, and those on disk are the same again."""

import json
import multiprocessing
import os
import random
import resource
import time

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from minalign.data import chat, tokens
from minalign.data.chat import Text, encode, encode_batch, encode_prompt, encode_whole
from minalign.data.columns import Pair
from minalign.data.pairs import encode_pairs
from minalign.data.prompts import tokenize_prompts
from minalign.running.errors import UserError
from minalign.running.fingerprints import fingerprints

WORDS = "the film plot good dull <s> </s> é 你好 [INST] a".split()
LIMITS = dict(max_tokens=60, max_pairs=10**6, seed=0)


@pytest.fixture(autouse=True)
def everything_goes_to_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokens, "KEPT_FROM", 0)
    monkeypatch.setattr(tokens, "BATCH", (7, 10**6))


def texts(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, 9))) for _ in range(count)]


def pairs(count=40, prompt="p "):
    one, two = texts(count), texts(count, seed=1)
    return [Pair(prompt, f"{a} {n}", b, float(n), 0.5) for n, (a, b) in enumerate(zip(one, two))]


def words(kind=PreTrainedTokenizerFast, template=None, bos="<s>", frame=False, **options):
    """One token per word; with `frame`, the tokenizer adds begin and end tokens by itself."""
    vocabulary = ["<s>", "</s>", "<unk>", "p", *WORDS, *map(str, range(50))]
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if frame:
        ends = [("<s>", 0), ("</s>", 1)]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, ends)
    fast = kind(tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    return fast


class Shouting(PreTrainedTokenizerFast):
    """Has a way of its own, as CodeLlama's."""

    def _encode_plus(self, text, *args, **kwargs):
        lower = text.replace("good", "dull") if isinstance(text, str) else text
        return super()._encode_plus(lower, *args, **kwargs)


def cut_and_padded():
    tokenizer = words(frame=True)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=12)
    return tokenizer


class OneByOne:
    """A tokenizer that takes no lists, and that raises for a text."""

    bos_token_id, eos_token_id, chat_template = 0, None, None

    def __call__(self, text):
        if "boom" in text:
            raise ZeroDivisionError(text)
        return {"input_ids": tuple(map(ord, text))}


# --- in batches as one by one


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        words,
        lambda: words(frame=True),
        lambda: words(bos=None),
        lambda: words(Shouting),
        cut_and_padded,
        OneByOne,
        lambda: tiny.tokenizer("plain"),
    ],
)
def test_a_batch_is_the_texts_one_by_one(make, end):
    """The rule is spelled out here: one begin token, the end token only if asked for."""
    tokenizer, some = make(), ["", "<s>", "<s> <s> a </s> </s>", "</s>", "good 你好", *texts(30)]
    got = list(encode_batch(tokenizer, [Text(text, False) for text in some], end))
    begin, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for text, ids in zip(some, got, strict=True):
        alone = list(make()(text)["input_ids"])
        while alone and alone[-1] == eos:
            del alone[-1]
        while alone and alone[0] == begin is not None:
            del alone[0]
        alone = [begin] * (begin is not None) + alone + [eos] * (end and eos is not None)
        assert ids == alone == encode(make(), text, end)


def test_rendered_texts_get_no_other_frame():
    tokenizer = words(frame=True)
    some = [Text("<s> a", True), Text("a", True), Text("a", False), Text("<s> </s> </s>", True)]
    got = [tokenizer.decode(ids) for ids in encode_batch(tokenizer, some, end=True)]
    assert got == ["<s> a", "<s> a", "<s> a </s>", "<s> </s> </s>"]


def test_what_is_wrong_with_a_text_is_raised():
    with pytest.raises(ZeroDivisionError, match="^boom$"):
        list(encode_batch(OneByOne(), [Text(text, False) for text in ("a", "boom", "b")], True))


# --- on disk


def made(tokenizer, capsys, some=None, **options):
    """The examples, what is printed but for the line of the store, and that line."""
    capsys.readouterr()
    examples = encode_pairs(some or pairs(), tokenizer, **LIMITS | options)
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith("  tokens of")]
    return examples, [line for line in lines if line not in said], said


def in_memory(monkeypatch, *given, **options):
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "KEPT_FROM", 10**9)
        return made(*given, **options)


STRICT = "chatml", "strict"
TALK = [
    [{"role": "user", "content": "a"}],
    [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
]


def talks():
    return [pair._replace(prompt=TALK[max(0, n - 30) % 3]) for n, pair in enumerate(pairs())]


@pytest.mark.parametrize("crop", [None, (1, 3)])
@pytest.mark.parametrize("form", ["text", "bare", *STRICT])
def test_examples_are_the_same_from_memory_anew_and_again(form, crop, capsys, monkeypatch):
    some = {"text": pairs(), "bare": pairs(prompt="")}.get(form, talks())
    make = (lambda: tiny.tokenizer(form)) if form in STRICT else words
    expected, printed, said = in_memory(
        monkeypatch, make(), capsys, some, crop_words=crop, max_pairs=35
    )
    assert not said and len(expected) > 15
    if form == "strict":
        assert "pairs dropped" in str(printed) and "note" in str(printed)
    for done in ("written to", "read from"):
        if done == "read from":  # nothing is tokenised again, but what says notes
            monkeypatch.setattr(tokens, "_encode", None)
        got, lines, (line,) = made(make(), capsys, some, crop_words=crop, max_pairs=35)
        assert lines == printed and line.startswith(f"  tokens of pairs {done} runs/tokens/")
        assert list(got) == list(expected) and got.fingerprint() == expected.fingerprint()
        assert got.lengths.tolist() == [[len(text) for text in e.texts] for e in expected]
        assert got.extras == expected.extras
    if crop is None:
        fine = [p for p in some if form != "strict" or p.prompt != TALK[2]]
        by_hand = [encode_whole(make(), p.prompt, p.chosen) for p in fine]
        assert all(example.texts[0] in by_hand for example in got)


def test_all_are_refused_for_reasons_of_their_own(capsys):
    turns = [("user", "user"), ("system", "system"), ("user", "user", "user")]
    asked = [[{"role": role, "content": "a"} for role in roles] for roles in turns]
    for _ in range(2):
        with pytest.raises(UserError, match="3 of 3 are of no use: 1 pairs dropped: .*; 1 pairs"):
            encode_pairs(
                [Pair(talk, "x", "y") for talk in asked], tiny.tokenizer("strict"), **LIMITS
            )


def test_prompts_are_the_same_from_memory_anew_and_again(capsys, monkeypatch):
    for span in (None, (2, 3)):
        for some in ([text or "a" for text in texts(40)], [*TALK] * 9):
            if span and isinstance(some[0], list):
                continue
            found = []
            for size in (10**9, 0, 0):
                monkeypatch.setattr(tokens, "KEPT_FROM", size)
                tokenizer = tiny.tokenizer("strict" if isinstance(some[0], list) else "plain")
                got = tokenize_prompts(tokenizer, some, 40, span, "odd")
                lines = capsys.readouterr().out.splitlines()
                found.append((list(got), [x for x in lines if "runs/tokens" not in x]))
                assert len(lines) - len(found[-1][1]) == (size == 0)
                kept = [p for p in some if p != TALK[2]]
                for row in got:
                    assert row.ids in [encode_prompt(tokenizer, prompt) for prompt in kept]
                    assert row.messages is None or row.messages in kept
            assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    "changed",
    [
        lambda: (pairs()[:-1], words(), {}),
        lambda: ([*pairs()[:-1], pairs()[-1]._replace(rejected="a a")], words(), {}),
        lambda: (pairs(), words(bos=None), {}),
        lambda: (pairs(), words(frame=True), {}),
        lambda: (pairs(), words(Shouting), {}),
        lambda: (pairs(), words(), {"crop_words": (1, 3)}),
        lambda: (pairs(), words(), {"crop_words": (1, 4)}),
        lambda: (pairs(), words(), {"crop_words": (1, 2), "seed": 1}),
        lambda: (talks(), words(template="{{ messages }}"), {}),
        lambda: (talks(), words(template="{{ messages }} "), {}),
    ],
)
def test_what_ids_depend_on_makes_them_anew(changed, capsys):
    def run():
        some, tokenizer, options = changed()
        return made(tokenizer, capsys, some, **options)[2]

    made(words(), capsys)
    made(words(), capsys, crop_words=(1, 2))
    for done in ("written to", "read from"):
        (line,) = run()
        assert done in line


def test_a_template_that_writes_the_date_is_rendered_each_day(capsys, monkeypatch):
    template = "{{ strftime_now('%d') }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
    for day, done in (("2026-01-01", "written"), ("2026-01-01", "read"), ("2026-01-02", "written")):
        monkeypatch.setattr(time, "strftime", lambda form, day=day: day)
        assert done in made(words(template=template), capsys, talks()[:20])[2][0]


# --- what goes wrong with disks


def cut(folder):
    os.truncate(folder / "ids", os.path.getsize(folder / "ids") - 4)


@pytest.mark.parametrize(
    "harm",
    [
        cut,
        lambda folder: (folder / "ids").write_bytes(b""),
        lambda folder: (folder / "ids").unlink(),
        lambda folder: (folder / "index.npz").write_bytes(b""),
        lambda folder: (folder / "index.npz").write_bytes(b"PK"),
        lambda folder: np.savez(folder / "index.npz", lengths=np.zeros(3)),
    ],
)
def test_half_a_store_is_made_anew(harm, capsys):
    expected = list(made(words(), capsys)[0])
    (folder,) = tokens.FOLDER.iterdir()
    harm(folder)
    for done in ("written to", "read from"):
        got, _, (line,) = made(words(), capsys)
        assert list(got) == expected and done in line
    assert [path.name for path in tokens.FOLDER.iterdir()] == [folder.name]


def test_what_a_killed_run_left_is_removed_after_a_day(capsys):
    for name, age in (("old.x.part", 90_000), ("new.x.part", 60)):
        part = tokens.FOLDER / name
        part.mkdir(parents=True)
        os.utime(part, (time.time() - age,) * 2)
    made(words(), capsys)
    assert [path.name for path in tokens.FOLDER.glob("*.part")] == ["new.x.part"]


@pytest.mark.parametrize("crop", [None, (1, 3)])
@pytest.mark.parametrize(
    "room, why",  # for no file, for half of the ids, for half of the tokenizer
    [(None, "Not a directory"), (15_000, "File too large"), (900, "File too large (os error 27)")],
)
def test_a_disk_that_takes_nothing_leaves_ids_in_memory(room, why, crop, capsys, monkeypatch):
    some, limits = pairs(1500), resource.getrlimit(resource.RLIMIT_FSIZE)
    expected, printed, _ = in_memory(monkeypatch, words(), capsys, some, crop_words=crop)
    if room:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    else:
        open("runs", "w").close()
    try:
        got, lines, said = made(words(), capsys, some, crop_words=crop)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said == [f"  tokens of pairs stay in memory: runs/tokens cannot be written ({why})"]
    assert lines == printed and list(got) == list(expected)
    assert not os.path.isdir(tokens.FOLDER) or not os.listdir(tokens.FOLDER)


def one_of_several(number):
    examples = encode_pairs(pairs(400), words(), **LIMITS)
    assert not isinstance(examples.source, bytes), "none went on without the store"
    return json.dumps(list(examples)), examples.fingerprint()


def test_processes_at_once_leave_one_store():
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(one_of_several, range(8), chunksize=1)
    assert len(set(found)) == 1
    assert len(list(tokens.FOLDER.iterdir())) == 1


def test_a_store_that_is_removed_or_cut_in_mid_run(capsys):
    examples = made(words(), capsys)[0]
    expected, (folder,) = list(examples), tokens.FOLDER.iterdir()
    for path in folder.iterdir():
        path.unlink()
    assert list(examples) == expected
    again = made(words(), capsys)[0]
    os.truncate(again.source.name, 40)
    with pytest.raises(UserError, match="cut during the run"):
        list(again)


# --- what is made of them


def test_slices_and_fingerprints(capsys):
    examples, every = made(words(), capsys)[0], list(made(words(), capsys)[0])
    assert list(examples[3:9]) == every[3:9] and len(examples[3:9]) == 6
    assert examples[-1] == every[-1]
    with pytest.raises(IndexError):
        examples[len(examples)]
    own = examples.fingerprint()
    assert fingerprints({"data": examples}, {})["data"] == own
    others = [
        pairs()[::-1],
        pairs()[1:],
        [*pairs()[:-1], pairs()[-1]._replace(rejected="a a a")],
        [*pairs()[:-1], pairs()[-1]._replace(margin=0.25)],
        [*pairs()[:-1], pairs()[-1]._replace(chosen_rating=0.25)],
    ]
    found = {made(words(), capsys, some)[0].fingerprint() for some in others}
    assert len(found | {own}) == 6


def test_special_tokens_are_found_as_by_a_search_of_all_texts(capsys):
    """Of texts that have no first letter of one, nothing else is looked at."""
    marked = [text + "<|im_end|>" * (n % 7 == 0) for n, text in enumerate(texts(60))]
    for template, form in (("chatml", lambda t: [{"role": "user", "content": t}]), ("plain", str)):
        items = [(form(text), "x", text) for text in marked]
        chat.note_special_tokens(tiny.tokenizer(template), items, "things")
        special = chat.special_tokens(tiny.tokenizer(template))
        count = sum(any(token in repr(item) for token in special) for item in items)
        assert count and f"note: {count} of 60 things hold special" in capsys.readouterr().out
