"""The review world: a small language of film reviews whose true reward is known.

    overall , the plot is very good but the music is utterly dull .

A grammar writes reviews, a parser gives each its gold reward, and a noisy rater turns gold into
preferences. The reward model sees the rater alone, so it is a proxy; over-optimisation, length
effects and collapse show against gold.
"""

import hashlib
import math
import random
import re
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..logprobs import token_logprobs
from ..models.padding import pad
from ..models.saving import save_policy
from .chat import encode
from .columns import Pair
from .splits import held_out

OPENINGS = ["overall", "honestly", "frankly", "tonight", "again", "surprisingly"]

ASPECTS = "plot music acting pacing ending dialogue camera humour cast script".split()

INTENSITY = {"slightly": 0.5, "fairly": 0.75, "really": 1.25, "very": 1.5, "utterly": 2.0}

VALENCE = {
    "superb": 1.5,
    "lovely": 1.25,
    "good": 1.0,
    "neat": 0.75,
    "fine": 0.5,
    "plain": 0.0,
    "odd": -0.25,
    "weak": -0.5,
    "dull": -0.75,
    "bad": -1.0,
    "dreadful": -1.25,
    "awful": -1.5,
}

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]

WORDS = [",", ".", "the", "is", "and", "but", *OPENINGS, *ASPECTS, *INTENSITY, *VALENCE]

VOCABULARY = SPECIAL + WORDS

CLAUSE = re.compile(
    f"the ({'|'.join(ASPECTS)}) is (?:({'|'.join(INTENSITY)}) )?({'|'.join(VALENCE)})"
)

REVIEW = re.compile(
    f"(?:{'|'.join(OPENINGS)}) , ({CLAUSE.pattern}(?: (?:and|but) {CLAUSE.pattern})*) [.]"
)

UNPARSABLE = -4.0


def parse(text: str) -> list[tuple[str, float]] | None:
    """The (aspect, valence x intensity) of each clause of a review; None where it is no review.

        review = opening , clause { (and | but) clause } .
        clause = the ASPECT is [ADVERB] ADJECTIVE

    >>> parse("overall , the plot is very good but the music is dull .")
    [('plot', 1.5), ('music', -0.75)]
    >>> parse("overall , the plot is very good but") is None
    True
    """
    match = REVIEW.fullmatch(" ".join(text.split()))
    if match is None:
        return None
    clauses = CLAUSE.findall(match.group(1))
    return [
        (aspect, INTENSITY.get(adverb, 1.0) * VALENCE[adjective])
        for aspect, adverb, adjective in clauses
    ]


def gold_reward(text: str) -> float:
    """The true reward of a review.

        gold = sum over its aspects of valence x intensity at the first mention

    UNPARSABLE where the text is no review.

    >>> gold_reward("overall , the plot is very good and the plot is very good .")
    1.5
    """
    clauses = parse(text)
    if clauses is None:
        return UNPARSABLE
    # Reversed: the first mention of an aspect overwrites the later ones.
    return sum(dict(reversed(clauses)).values())


def is_grammatical(text: str) -> float:
    """1 for a review, 0 for anything else."""
    return float(parse(text) is not None)


MEASURES = {"gold": gold_reward, "grammatical": is_grammatical}  # of a whole text


def write_prompt(rng: random.Random) -> str:
    """The beginning of a review, up to the "is" of its first or second clause.

    >>> write_prompt(random.Random(1))
    'frankly , the acting is weak but the music is'
    """
    first, second = rng.sample(ASPECTS, 2)
    text = f"{rng.choice(OPENINGS)} ,"
    if rng.random() < 0.5:
        text += f" the {first} is {_opinion(rng)} {rng.choice(['and', 'but'])}"
    return f"{text} the {second} is"


def write_completion(rng: random.Random, prompt: str) -> str:
    """The rest of a review, by the grammar: prompt + completion is the whole text.

    >>> write_completion(random.Random(0), "overall , the plot is dull but the cast is")
    ' odd .'
    """
    aspects = [word for word in prompt.split() if word in ASPECTS]
    text = f" {_opinion(rng)}"
    while rng.random() > 0.45 and len(aspects) < 6:
        again = rng.random() < 0.1
        fresh = [aspect for aspect in ASPECTS if aspect not in aspects]
        aspects.append(rng.choice(aspects if again else fresh))
        text += f" {rng.choice(['and', 'but'])} the {aspects[-1]} is {_opinion(rng)}"
    return text + " ."


def _opinion(rng: random.Random) -> str:
    adverb = f"{rng.choice(list(INTENSITY))} " if rng.random() < 0.5 else ""
    return adverb + rng.choice(list(VALENCE))


def _slip(rng: random.Random, completion: str) -> str:
    """The completion with one word lost, doubled or replaced: people write such reviews, too."""
    words = completion.split()
    i = rng.randrange(len(words))
    other = rng.choice(WORDS)
    words[i : i + 1] = rng.choice([[], [words[i]] * 2, [other]])
    return "".join(f" {word}" for word in words)


def prompts(
    seed: int, eval_share: float, split_seed: int = 0, count: int = 10_000
) -> tuple[list[str], list[str]]:
    """Different training and held-out prompts, split as `splits.held_out` splits real ones."""
    rng = random.Random(f"prompts {seed}")
    found = {}
    while len(found) < count:
        found[write_prompt(rng)] = None
    parts = ([], [])
    for prompt in found:
        parts[held_out(prompt, split_seed, eval_share)].append(prompt)
    return parts


def preference_pairs(
    seed: int, eval_share: float, split_seed: int = 0, noise: float = 1.0
) -> tuple[list[Pair], list[Pair]]:
    """What a rater says of two reviews for each prompt: the preferred one, and both ratings.

        P(a preferred) = sigmoid((gold_a - gold_b) / noise)
        rating = 5.5 + gold + N(0, noise^2), as an integer 1..10

    One review in ten has a slip, so the rater's dislike of broken reviews can be learned.

    Returns:
        Training pairs and held-out pairs.
    """
    rng = random.Random(f"pairs {seed}")
    train, evaluation = (
        [_compare(rng, prompt, noise) for prompt in part]
        for part in prompts(seed, eval_share, split_seed)
    )
    return train, evaluation


def _compare(rng: random.Random, prompt: str, noise: float) -> Pair:
    texts = [write_completion(rng, prompt) for _ in range(2)]
    texts = [_slip(rng, text) if rng.random() < 0.1 else text for text in texts]
    gold = [gold_reward(prompt + text) for text in texts]
    ratings = [float(min(10, max(1, round(5.5 + g + rng.gauss(0, noise))))) for g in gold]
    first = rng.random() < 1 / (1 + math.exp(-(gold[0] - gold[1]) / noise))
    chosen, rejected = (0, 1) if first else (1, 0)
    return Pair(prompt, texts[chosen], texts[rejected], ratings[chosen], ratings[rejected])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word. Pad, begin and end tokens are three different ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of 2 layers and width 64 with random weights and tied embeddings.

    It has 97,280 parameters (94,528 without the tied embedding).
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def fit_start_policy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> None:
    """Maximum likelihood on fresh reviews, 32 per step, in place."""
    rng = random.Random(f"start {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in tqdm(range(steps), desc="toy world: start policy", leave=False, disable=None):
        beginnings = [write_prompt(rng) for _ in range(32)]
        reviews = [text + write_completion(rng, text) for text in beginnings]
        rows = [encode(tokenizer, review, end=True) for review in reviews]
        ids, mask = pad(rows, "right", model.device)  # (32, T)
        logprobs = token_logprobs(model(ids, attention_mask=mask).logits[:, :-1], ids[:, 1:])
        loss = -logprobs[mask[:, 1:].bool()].mean()
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def folder() -> Path:
    """Where this version of the world keeps its start policy and reward model.

    The name is a hash of this file, so that a changed world is built anew.
    """
    return Path("runs") / f"toy-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]}"


def start_policy_folder() -> str:
    """The start policy's checkpoint; fitted in a few seconds on first use.

    It imitates reviews, good and bad alike.
    """
    path = folder() / "start-policy"
    if not path.exists():
        tokenizer = make_tokenizer()
        model = make_model(tokenizer, seed=0)
        fit_start_policy(model, tokenizer, steps=250, seed=0)
        save_policy(model, tokenizer, path)
    return str(path)
