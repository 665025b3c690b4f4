"""Functions, sums and averages as rewards, against the same numbers worked out by hand."""

import pytest
import torch

from minalign.data import toy
from minalign.data.chat import TokenizedPrompt, encode, encode_prompt
from minalign.models.rewards import RewardFunction, RewardSum, average_weights, load_rewards
from minalign.reward import RewardModel, Scores
from minalign.running.errors import UserError

TOKENIZER = toy.make_tokenizer()
TEXTS = [
    ("overall , the plot is", " very good ."),
    ("again , the music is", " odd and the plot is bad ."),
    ("tonight ,", " neat ."),
]
PROMPTS = [TokenizedPrompt(encode(TOKENIZER, prompt, end=False)) for prompt, _ in TEXTS]
COMPLETIONS = [TOKENIZER(completion)["input_ids"] for _, completion in TEXTS]
ROLLOUT = TOKENIZER, PROMPTS, COMPLETIONS, 2


def make_reward_model(seed, num_labels=1, tokenizer=None):
    torch.manual_seed(seed)
    tokenizer = tokenizer or toy.make_tokenizer()
    return RewardModel.from_backbone(toy.make_model(tokenizer, seed), tokenizer, num_labels)


class Fixed:
    """A reward with given scores."""

    reading, num_labels = "fixed", 10

    def __init__(self, rewards, variance=None):
        variance = None if variance is None else torch.tensor(variance)
        self.scores = Scores(torch.tensor(rewards), variance, {})

    def score_rollout(self, *_):
        return self.scores


def test_a_reward_model_scores_a_rollout_as_it_scores_its_texts():
    for num_labels in (1, 2, 10):
        reward_model = make_reward_model(0, num_labels)
        scores = reward_model.score_rollout(*ROLLOUT)
        torch.testing.assert_close(scores.rewards, reward_model.score(*map(list, zip(*TEXTS))))
        assert (scores.variance is None) == (num_labels < 3) and scores.parts == {}


def test_a_function_gets_the_texts_that_were_sampled():
    seen = []

    def function(prompts, completions):
        seen.append((prompts, completions))
        return [1, 2.5, -3]

    scores = RewardFunction("f", function).score_rollout(*ROLLOUT)
    assert scores.rewards.tolist() == [1.0, 2.5, -3.0] and scores.rewards.dtype == torch.float32
    assert seen == [([prompt for prompt, _ in TEXTS], [completion for _, completion in TEXTS])]


def test_a_function_gets_chat_prompts_as_messages():
    question = [{"role": "user", "content": "the plot"}]
    seen = []

    def function(prompts, completions):
        seen.append(prompts)
        return [0.0]

    prompt = TokenizedPrompt(encode_prompt(TOKENIZER, question), question)
    RewardFunction("f", function).score_rollout(TOKENIZER, [prompt], [[5]], 1)
    assert seen == [[question]]


@pytest.mark.parametrize("wrong", [[1.0], [1.0, 2.0, "3"], None, [1.0] * 4])
def test_a_function_must_give_one_number_each(wrong):
    reward = RewardFunction("f", lambda prompts, completions: wrong)
    message = "--rm f: got .* for 3 completions, expected one number for each"
    with pytest.raises(UserError, match=message):
        reward.score_rollout(*ROLLOUT)


def test_a_function_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text("def zero(p, c):\n    return [0] * len(c)\n")
    monkeypatch.chdir(tmp_path)
    rewards = load_rewards(["my_rules:zero"], torch.device("cpu"))
    assert rewards["my_rules:zero"].score_rollout(*ROLLOUT).rewards.tolist() == [0, 0, 0]
    for name in ("my_rules:one", "no_rules:zero"):
        with pytest.raises(UserError, match=f"--rm {name}: cannot be imported .*module:function"):
            load_rewards([name], torch.device("cpu"))


def test_a_sum_standardises_each_part_and_keeps_them():
    first = Fixed([1.0, 2.0, 6.0], [1.0, 4.0, 9.0])
    second = Fixed([10.0, 30.0, 20.0], [25.0, 0.0, 100.0])
    reward = RewardSum({"a": first, "b": second}, [2.0, -0.5])
    # Of a: mean 2, deviation 2. Of b: mean 5, deviation 5.
    reward.fit({"a": torch.tensor([0.0, 4.0]), "b": torch.tensor([0.0, 10.0])})
    scores = reward.score_rollout(*ROLLOUT)
    rewards = [2 * (a - 2) / 2 - 0.5 * (b - 5) / 5 for a, b in ((1, 10), (2, 30), (6, 20))]
    assert scores.rewards.tolist() == pytest.approx(rewards)
    variance = [(2 / 2) ** 2 * a + (0.5 / 5) ** 2 * b for a, b in ((1, 25), (4, 0), (9, 100))]
    assert scores.variance.tolist() == pytest.approx(variance)
    parts = {name: part.tolist() for name, part in scores.parts.items()}
    assert parts == {"a": [1.0, 2.0, 6.0], "b": [10.0, 30.0, 20.0]}
    reward = RewardSum({"a": first, "b": Fixed([0.0] * 3)}, [1.0, 1.0])
    assert reward.score_rollout(*ROLLOUT).variance is None


@pytest.mark.parametrize("scores", [[1.0, 1.0, 1.0], [1.0, float("nan")], [3.0]])
def test_scores_that_are_all_equal_cannot_be_standardised(scores):
    with pytest.raises(UserError, match="--rm a: .*cannot be standardised"):
        RewardSum({"a": Fixed([0.0])}, [1.0]).fit({"a": torch.tensor(scores)})


def test_an_average_is_the_mean_of_the_weights():
    models = [make_reward_model(seed) for seed in (0, 1, 2)]
    weights = [{name: p.clone() for name, p in each.model.named_parameters()} for each in models]
    average = average_weights(models)
    for name, parameter in average.model.named_parameters():
        mean = (weights[0][name] + weights[1][name] + weights[2][name]) / 3
        torch.testing.assert_close(parameter.data, mean)
    for each, kept in zip(models[1:], weights[1:]):
        assert all(torch.equal(p, kept[name]) for name, p in each.model.named_parameters())


def test_models_that_differ_are_not_averaged():
    other = toy.make_tokenizer()
    other.add_tokens(["sequel"])
    for differing in (make_reward_model(1, 10), make_reward_model(1, 1, other)):
        with pytest.raises(UserError, match="differ in architecture or vocabulary"):
            average_weights([make_reward_model(0), differing])
    swapped = make_reward_model(1)  # the same shapes, but other words for the ids
    vocabulary = {word: (i + 1) % len(toy.VOCABULARY) for i, word in enumerate(toy.VOCABULARY)}
    swapped.tokenizer.get_vocab = lambda: vocabulary
    with pytest.raises(UserError, match="vocabulary"):
        average_weights([make_reward_model(0), swapped])


# --- risk


def test_an_ordinal_reward_is_adjusted_and_its_mean_stands_beside_it():
    """With labels from the best to the worst, too: by the logits, in double precision."""
    reward_model = make_reward_model(0, 10)
    names = {k: str(10 - k) for k in range(10)}
    for other in (None, names):
        if other:
            reward_model.model.config.id2label = other
            reward_model = RewardModel(reward_model.model, reward_model.tokenizer)
        plain = reward_model.score_rollout(*ROLLOUT)
        assert plain.parts == {} and "risk" not in reward_model.reading
        reward_model.risk = 0.7
        scores = reward_model.score_rollout(*ROLLOUT)
        rows = reward_model.encode_rollout(*ROLLOUT[:3])
        p = reward_model.logits(rows)[:, reward_model.order].double().softmax(1)
        by_hand = -0.7 * (p * (-torch.arange(1, 11) / 0.7).exp()).sum(1).log()
        torch.testing.assert_close(scores.rewards, by_hand.float())
        assert torch.equal(scores.parts["mean"], plain.rewards)
        assert torch.equal(scores.variance, plain.variance)
        assert (scores.rewards < plain.rewards).all()
        assert reward_model.reading.startswith("risk-adjusted (tau 0.7) score 1..10")
        assert torch.equal(reward_model.score(*map(list, zip(*TEXTS))), scores.rewards)


def test_a_sum_has_the_means_of_its_adjusted_parts():
    models = {name: make_reward_model(seed, 10) for seed, name in enumerate("ab")}
    for model in models.values():
        model.risk = 2.0
    for parts in (models, {"a": models["a"]}):
        scores = RewardSum(parts, [1.0] * len(parts)).score_rollout(*ROLLOUT)
        assert list(scores.parts) == [f"{n}{what}" for n in parts for what in ("", " mean")]
        adjusted = sum(scores.parts[name] for name in parts)
        torch.testing.assert_close(scores.rewards, adjusted)


def test_risk_needs_a_distribution_over_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rules.py").write_text("def zero(p, c):\n    return [0] * len(c)\n")
    for labels in (1, 2, 10):
        make_reward_model(0, labels).save_pretrained(f"rm-{labels}")
    make_reward_model(1, 10).save_pretrained("other")
    for name, kind in (("rm-1", "scalar"), ("rm-2", "2 labels"), ("my_rules:zero", "function")):
        for names in ([name], ["rm-10", name]):
            with pytest.raises(UserError, match=f"--risk 0.5: --rm {name}: .*{kind}") as error:
                load_rewards(names, torch.device("cpu"), risk=0.5)
            assert "\n" not in str(error.value)
    for average in (False, True):
        rewards = load_rewards(["rm-10", "other"], torch.device("cpu"), average, 0.5)
        assert {reward.risk for reward in rewards.values()} == {0.5}
        assert len(rewards) == 2 - average
    (plain,) = load_rewards(["rm-10"], torch.device("cpu")).values()
    assert plain.risk == float("inf")
