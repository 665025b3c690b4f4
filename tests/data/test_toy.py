"""The review world: grammar and parser agree, gold and the rater's noise are as documented."""

import math
import random

import pytest
import torch

from minalign.data import toy
from minalign.data.chat import encode
from minalign.data.splits import held_out
from minalign.data.toy import UNPARSABLE, gold_reward, parse

PAIRS = toy.preference_pairs(seed=0, eval_share=0.1)
NOISY_PAIRS = toy.preference_pairs(seed=1, eval_share=0.1, noise=3.0)


def reviews(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        prompt = toy.write_prompt(rng)
        yield prompt, toy.write_completion(rng, prompt)


# --- grammar, parser, gold


def test_every_written_review_parses():
    for prompt, completion in reviews(1000):
        assert parse(prompt) is None and parse(prompt + completion) is not None, prompt + completion


def test_the_parser_reads_what_was_written():
    """Against a reader that knows only that each clause is `the ASPECT is [ADVERB] ADJECTIVE`."""
    for prompt, completion in reviews(300):
        clauses = []
        for clause in (prompt + completion).split(" the ")[1:]:
            words = [word for word in clause.split() if word not in ("and", "but", ".")]
            aspect, _, *adverbs, adjective = words
            value = toy.VALENCE[adjective]
            for adverb in adverbs:
                value *= toy.INTENSITY[adverb]
            clauses.append((aspect, value))
        assert parse(prompt + completion) == clauses


@pytest.mark.parametrize(
    "text",
    [
        "",
        "overall , .",
        "overall , the plot is good",  # no end
        "the plot is good .",  # no opening
        "overall the plot is good .",
        "overall , the plot is good . .",
        "overall , the plot is good and .",
        "overall , the plot is good the music is bad .",
        "overall , the plot is very very good .",
        "overall , the plot is very .",
        "overall , the story is good .",
        "overall , the plot good .",
        "overall , overall , the plot is good .",
        "xoverall , the plot is good .",
    ],
)
def test_what_is_no_review(text):
    assert parse(text) is None and gold_reward(text) == UNPARSABLE


@pytest.mark.parametrize(
    "text, gold",
    [
        ("overall , the plot is good .", 1.0),
        ("overall , the plot is plain .", 0.0),
        ("  overall ,  the plot is\ngood . ", 1.0),  # spaces do not matter
        ("overall , the plot is utterly awful .", -3.0),
        ("overall , the plot is slightly good but the music is very dull .", 0.5 - 1.125),
        # Praise repeated counts once, by its first mention, for each aspect.
        ("overall , the plot is good and the plot is superb .", 1.0),
        ("overall , the plot is bad and the plot is superb .", -1.0),
        (
            "overall , the plot is good and the cast is bad and the plot is bad and the cast is "
            "superb .",
            0.0,
        ),
    ],
)
def test_gold_reward_by_hand(text, gold):
    assert gold_reward(text) == pytest.approx(gold)


def test_no_review_is_worse_than_a_usual_bad_one():
    gold = sorted(gold_reward(prompt + completion) for prompt, completion in reviews(1000))
    assert UNPARSABLE < gold[20]


def test_a_slip_usually_breaks_a_review():
    rng, broken = random.Random(0), 0
    for prompt, completion in reviews(1000):
        slipped = toy._slip(rng, completion)
        assert slipped.startswith(" ") or not slipped
        assert abs(len(slipped.split()) - len(completion.split())) <= 1
        broken += parse(prompt + slipped) is None
    assert 700 < broken < 1000


def test_a_completion_seldom_comes_back_to_an_aspect():
    """Now and then it does, so that counting an aspect once can be learned."""
    parsed = [parse(prompt + completion) for prompt, completion in reviews(1000)]
    repeats = [len(clauses) - len(dict(clauses)) for clauses in parsed]
    assert 0 < sum(map(bool, repeats)) < 200


# --- prompts and preferences


def test_prompts_are_different_and_split_into_disjoint_parts():
    train, held = toy.prompts(seed=3, eval_share=0.2, split_seed=1, count=1000)
    assert len(set(train) | set(held)) == len(train) + len(held) == 1000
    assert 140 < len(held) < 260
    assert all(held_out(prompt, 1, 0.2) for prompt in held), "as prompts from a file are split"
    assert toy.prompts(seed=3, eval_share=0.2, split_seed=1, count=1000) == (train, held)
    assert set(toy.prompts(seed=2, eval_share=0.2, count=1000)[1]) != set(held)


def test_no_prompt_of_the_reward_model_judges_the_policy():
    """With the defaults of both scripts."""
    train, held = toy.prompts(seed=0, eval_share=0.1)
    assert {pair.prompt for pair in PAIRS[0]} <= set(train)
    assert {pair.prompt for pair in PAIRS[1]} <= set(held)
    assert {pair.prompt for pair in PAIRS[0]}.isdisjoint(held)


def test_the_better_review_is_preferred_as_often_as_the_model_says():
    """P(better preferred) = sigmoid(gap / noise), for small and for large gaps.

    The counts lie within four standard deviations.
    """

    def gap_of(pair):
        return gold_reward(pair.prompt + pair.chosen) - gold_reward(pair.prompt + pair.rejected)

    for noise, (pairs, _) in ((1.0, PAIRS), (3.0, NOISY_PAIRS)):
        gaps = [gap_of(pair) for pair in pairs]
        for low, high in ((0.1, 1), (1, 2), (2, 20)):
            part = [gap for gap in gaps if low < abs(gap) <= high]
            probabilities = [1 / (1 + math.exp(-abs(gap) / noise)) for gap in part]
            deviation = math.sqrt(sum(p * (1 - p) for p in probabilities))
            assert len(part) > 300
            assert abs(sum(gap > 0 for gap in part) - sum(probabilities)) < 4 * deviation


def test_ratings_are_whole_numbers_from_1_to_10_that_follow_gold():
    rated = [(pair.prompt + pair.chosen, pair.chosen_rating) for pair in PAIRS[0]]
    rated += [(pair.prompt + pair.rejected, pair.rejected_rating) for pair in PAIRS[0]]
    assert {rating for _, rating in rated} == set(map(float, range(1, 11)))
    scored = [(gold_reward(text), rating) for text, rating in rated]
    # far from the clamp
    errors = [rating - 5.5 - gold for gold, rating in scored if abs(gold) < 1.5]
    assert abs(sum(errors) / len(errors)) < 0.05
    spread = math.sqrt(1 + 1 / 12)  # of the noise, and of rounding
    found = math.sqrt(sum(error**2 for error in errors) / len(errors))
    assert found == pytest.approx(spread, abs=0.05)


def test_preferences_are_those_of_their_seed():
    assert toy.preference_pairs(seed=0, eval_share=0.1) == PAIRS
    assert [pair.prompt for pair in NOISY_PAIRS[0][:20]] != [pair.prompt for pair in PAIRS[0][:20]]


def test_some_reviews_have_slips():
    texts = [pair.prompt + text for pair in PAIRS[0] for text in (pair.chosen, pair.rejected)]
    assert 0.06 < sum(parse(text) is None for text in texts) / len(texts) < 0.12


# --- tokenizer and model


def test_reviews_survive_the_tokenizer():
    tokenizer = toy.make_tokenizer()
    special = [getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "unk")]
    assert len(set(special)) == 4
    for prompt, completion in reviews(100):
        ids = encode(tokenizer, prompt + completion, end=True)
        assert len(ids) == len((prompt + completion).split()) + 2
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion
        prompt_ids = encode(tokenizer, prompt, end=False)
        assert ids[: len(prompt_ids)] == prompt_ids


def test_the_model_knows_its_special_tokens_and_repeats_by_seed():
    tokenizer = toy.make_tokenizer()
    model, again, other = (toy.make_model(tokenizer, seed) for seed in (0, 0, 1))
    config = model.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (model, again, other)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_fitting_makes_reviews_likelier_and_lets_them_end():
    tokenizer = toy.make_tokenizer()
    model = toy.make_model(tokenizer, seed=0)
    rows = [torch.tensor([encode(tokenizer, p + c, end=True)]) for p, c in reviews(20, seed=9)]

    def loss():
        return sum(model(row, labels=row).loss.item() for row in rows) / 20

    before = loss()
    toy.fit_start_policy(model, tokenizer, steps=40, seed=0)
    assert loss() < before - 0.7
    ends = [model(row).logits[0, -2].softmax(0)[tokenizer.eos_token_id].item() for row in rows]
    assert min(ends) > 0.1, "from 1/43: an end token without a loss is never learned"
